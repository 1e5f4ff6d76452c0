"""`train` saves the same student and probe as `run`, fitted without the spots left out."""

import json

import numpy as np
import pytest
import torch
import yaml

from peka_lite.data import expression_targets, hash_cohort, open_cohort, top_hvg
from peka_lite.evaluation import ALPHAS, folds
from peka_lite.experiments import RunConfig, features, load_trained, run, train
from peka_lite.probe import PCARidge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("isolated_cache", "tiny_backbone"),
]


def config(root, **changes):
    settings = {"cohort": str(root), "backbone": "tiny", "weights": "random", "epochs": 1, "n_splits": 3, "n_genes": 20}
    return RunConfig(**settings | changes)


@pytest.fixture(scope="module")
def whole(isolated_cache, tiny_backbone, mini_root, tmp_path_factory):
    """A model of the whole cohort."""
    out = tmp_path_factory.mktemp("trained") / "model"
    train(config(mini_root), out)
    return out


def forbid_training(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a cached student was trained again")

    monkeypatch.setattr(features, "fit", fail)


def predictions(cohort, features, rows, genes, method="log1p-cp10k", alpha="hest"):
    """Predict every spot with a probe fitted directly on some rows."""
    Y = expression_targets(cohort.adata, genes, method=method)
    return PCARidge(256, alpha, fit_intercept=True).fit(features[rows], Y[rows]).predict(features)


def test_model_of_the_whole_cohort_is_saved_with_all_files(whole, mini_root):
    assert {p.name for p in whole.iterdir()} == {
        "config.yml", "backbone.yml", "summary.json", "probe.safetensors", "adapter.safetensors", "training.csv",
    }  # fmt: skip
    assert RunConfig(**yaml.safe_load((whole / "config.yml").read_text())) == config(mini_root)
    summary, cohort = json.loads((whole / "summary.json").read_text()), open_cohort(mini_root)
    assert (summary["n_train"], summary["n_spots"], summary["held_out"]) == (len(cohort), len(cohort), [])
    assert summary["mean_pcc"] is None
    assert summary["data_fingerprint"] == hash_cohort(cohort)


def test_probe_equals_one_fitted_directly_on_student_features(whole, mini_root):
    from peka_lite.backbones import embed_tiles

    model, cohort = load_trained(whole, device="cpu"), open_cohort(mini_root)
    genes = list(top_hvg(cohort.adata, n=20))
    assert list(model.genes) == genes
    features = embed_tiles(model.student, cohort.tiles, device="cpu")
    expected = predictions(cohort, features, np.arange(len(cohort)), genes)
    np.testing.assert_allclose(model.predict(cohort.tiles), expected, atol=1e-4)


def test_model_of_a_fold_equals_that_of_a_run(mini_root, tmp_path, monkeypatch):
    cohort = open_cohort(mini_root)
    train_rows, test = folds(cohort, "patient", 3, 0)[1]
    run(config(mini_root), tmp_path / "run", maps=False)
    forbid_training(monkeypatch)
    summary = train(config(mini_root), tmp_path / "fold1", fold=1)  # reuses the run's student
    model, of_run = load_trained(tmp_path / "fold1", device="cpu"), load_trained(tmp_path / "run", fold=1, device="cpu")
    weights, expected = model.student.state_dict(), of_run.student.state_dict()
    assert all(torch.equal(weights[k], expected[k]) for k in expected)
    assert model.genes == of_run.genes
    np.testing.assert_allclose(model.predict(cohort.tiles), of_run.predict(cohort.tiles), atol=1e-5)
    assert summary["n_train"] == len(train_rows)
    assert summary["held_out"] == sorted(set(cohort.obs["slide"].iloc[test]))


def test_run_reuses_students_trained_before(mini_root, tmp_path, monkeypatch):
    for fold in range(2):
        train(config(mini_root, seed=3, n_splits=2), tmp_path / f"fold{fold}", fold=fold)
    forbid_training(monkeypatch)
    assert run(config(mini_root, seed=3, n_splits=2), tmp_path / "run", maps=False)["n_folds"] == 2


def test_inner_alpha_is_chosen_with_students_trained_without_the_fold(mini_root, tmp_path, monkeypatch):
    n_rows, fit = [], features.fit

    def record(model, tiles, *rest, **options):
        n_rows.append(len(tiles))
        return fit(model, tiles, *rest, **options)

    monkeypatch.setattr(features, "fit", record)
    cohort = open_cohort(mini_root)
    summary = train(config(mini_root, protocol="strict", seed=5), tmp_path / "strict")
    sizes = [len(rows) for rows, _ in folds(cohort, "patient", 3, 5)]
    assert sorted(n_rows) == sorted([len(cohort), *sizes])
    assert summary["alpha"] in ALPHAS


def test_inner_alpha_has_the_best_directly_computed_cv_score(mini_root, tmp_path):
    """Use frozen features, so that one matrix serves all folds."""
    from peka_lite.backbones import embed_tiles, load_backbone
    from peka_lite.probe import pearson

    summary = train(config(mini_root, protocol="strict", method="none"), tmp_path / "frozen")
    cohort = open_cohort(mini_root)
    X = embed_tiles(load_backbone("tiny", weights="random"), cohort.tiles, device="cpu")
    genes, scores = list(top_hvg(cohort.adata, n=20)), np.zeros(len(ALPHAS))
    Y = expression_targets(cohort.adata, genes, method="log1p-cp10k")
    for rows, test in folds(cohort, "patient", 3, 0):
        for k, alpha in enumerate(ALPHAS):
            scores[k] += np.nanmean(pearson(Y[test], predictions(cohort, X, rows, genes, alpha=alpha)[test]))
    assert summary["alpha"] == ALPHAS[int(scores.argmax())]
    files = {"config.yml", "backbone.yml", "summary.json", "probe.safetensors"}
    assert {p.name for p in (tmp_path / "frozen").iterdir()} == files


def test_train_share_and_concatenated_features_are_used(mini_root, tmp_path):
    summary = train(config(mini_root, features="frozen+student", train_share=0.5, seed=1), tmp_path / "both")
    assert summary["n_train"] < 0.55 * summary["n_spots"]
    model = load_trained(tmp_path / "both", device="cpu")
    assert len(model.probe.mean_) == 2 * 48
    assert np.isfinite(model.predict(open_cohort(mini_root).tiles[:3])).all()


@pytest.mark.parametrize(
    ("changes", "fold", "message"),
    [
        ({"features": "color", "method": "none"}, None, "have no student to train"),
        ({}, 3, "fold 3 does not exist; this cohort has folds 0 to 2"),
        ({}, -1, "fold -1 does not exist"),
    ],
)
def test_invalid_training_raises_and_leaves_no_files(mini_root, tmp_path, changes, fold, message):
    with pytest.raises(ValueError, match=message):
        train(config(mini_root, **changes), tmp_path / "out", fold=fold)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(whole, mini_root):
    before = (whole / "summary.json").read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        train(config(mini_root), whole)
    assert (whole / "summary.json").read_bytes() == before
