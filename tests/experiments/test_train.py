"""A student and a probe taught and kept: what `run` would teach, and what is left out stays out."""

import json

import numpy as np
import pytest
import torch
import yaml

import peka_lite.experiments.cache
from peka_lite.data.cohorts import open_cohort
from peka_lite.data.expression import expression_targets, top_hvg
from peka_lite.evaluation.folds import folds
from peka_lite.evaluation.protocols import ALPHAS
from peka_lite.experiments._train import train
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.folder import hash_cohort
from peka_lite.experiments.model import load_trained
from peka_lite.experiments.run import run
from peka_lite.probe.pca_ridge import PCARidge

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("own_cache", "tiny_backbone"),
]


def config(root, **changes):
    settings = {"cohort": str(root), "backbone": "tiny", "weights": "random", "epochs": 1, "n_splits": 3, "n_genes": 20}
    return RunConfig(**settings | changes)


@pytest.fixture(scope="module")
def whole(own_cache, tiny_backbone, mini_root, tmp_path_factory):
    """A model of the whole cohort."""
    out = tmp_path_factory.mktemp("trained") / "model"
    train(config(mini_root), out)
    return out


def teach_no_more(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a student was taught that was there already")

    monkeypatch.setattr(peka_lite.experiments.cache, "fit", refuse)


def predictions(cohort, features, rows, genes, method="log1p-cp10k", alpha="hest"):
    """Predict every spot by a probe that learned from some rows, by the long way."""
    Y = expression_targets(cohort.adata, genes, method=method)
    return PCARidge(256, alpha, fit_intercept=True).fit(features[rows], Y[rows]).predict(features)


def test_a_model_of_the_whole_cohort_is_kept_with_all_that_predicting_needs(whole, mini_root):
    assert {p.name for p in whole.iterdir()} == {
        "config.yml", "backbone.yml", "summary.json", "probe.safetensors", "adapter.safetensors", "training.csv",
    }  # fmt: skip
    assert RunConfig(**yaml.safe_load((whole / "config.yml").read_text())) == config(mini_root)
    summary, cohort = json.loads((whole / "summary.json").read_text()), open_cohort(mini_root)
    assert (summary["n_taught"], summary["n_spots"], summary["held_out"]) == (len(cohort), len(cohort), [])
    assert summary["mean_pcc"] is None
    assert summary["data_fingerprint"] == hash_cohort(cohort)


def test_its_probe_is_the_one_fitted_by_hand_on_the_student_s_features(whole, mini_root):
    from peka_lite.backbones.embed import embed_tiles

    model, cohort = load_trained(whole, device="cpu"), open_cohort(mini_root)
    genes = list(top_hvg(cohort.adata, n=20))
    assert list(model.genes) == genes
    features = embed_tiles(model.student, cohort.tiles, device="cpu")
    wanted = predictions(cohort, features, np.arange(len(cohort)), genes)
    np.testing.assert_allclose(model.predict(cohort.tiles), wanted, atol=1e-4)


def test_a_fold_s_model_is_the_one_that_a_run_judges(mini_root, tmp_path, monkeypatch):
    cohort = open_cohort(mini_root)
    train_rows, test = folds(cohort, "patient", 3, 0)[1]
    run(config(mini_root), tmp_path / "run", maps=False)
    teach_no_more(monkeypatch)
    summary = train(config(mini_root), tmp_path / "fold1", fold=1)  # finds the run's student
    alone, judged = load_trained(tmp_path / "fold1", device="cpu"), load_trained(tmp_path / "run", fold=1, device="cpu")
    weights, wanted = alone.student.state_dict(), judged.student.state_dict()
    assert all(torch.equal(weights[k], wanted[k]) for k in wanted)
    assert alone.genes == judged.genes
    np.testing.assert_allclose(alone.predict(cohort.tiles), judged.predict(cohort.tiles), atol=1e-5)
    assert summary["n_taught"] == len(train_rows)
    assert summary["held_out"] == sorted(set(cohort.obs["slide"].iloc[test]))


def test_a_run_finds_the_students_that_were_taught_before_it(mini_root, tmp_path, monkeypatch):
    for fold in range(2):
        train(config(mini_root, seed=3, n_splits=2), tmp_path / f"fold{fold}", fold=fold)
    teach_no_more(monkeypatch)
    assert run(config(mini_root, seed=3, n_splits=2), tmp_path / "run", maps=False)["n_folds"] == 2


def test_an_inner_penalty_is_judged_by_students_that_missed_the_fold(mini_root, tmp_path, monkeypatch):
    asked, make = [], peka_lite.experiments.cache._make

    def record(config, cohort, tiles, rows, *rest):
        asked.append(len(rows))
        return make(config, cohort, tiles, rows, *rest)

    monkeypatch.setattr(peka_lite.experiments.cache, "_make", record)
    cohort = open_cohort(mini_root)
    summary = train(config(mini_root, protocol="strict", seed=5), tmp_path / "strict")
    sizes = [len(rows) for rows, _ in folds(cohort, "patient", 3, 5)]
    assert sorted(asked) == sorted([len(cohort), *sizes])
    assert summary["alpha"] in ALPHAS


def test_the_penalty_is_the_best_over_the_folds_by_the_long_way(mini_root, tmp_path):
    """Frozen features, so that one matrix serves all folds."""
    from peka_lite.backbones.embed import embed_tiles
    from peka_lite.backbones.load import load_backbone
    from peka_lite.probe.metrics import pearson

    summary = train(config(mini_root, protocol="strict", method="none"), tmp_path / "frozen")
    cohort = open_cohort(mini_root)
    X = embed_tiles(load_backbone("tiny", weights="random"), cohort.tiles, device="cpu")
    genes, scores = list(top_hvg(cohort.adata, n=20)), np.zeros(len(ALPHAS))
    Y = expression_targets(cohort.adata, genes, method="log1p-cp10k")
    for rows, test in folds(cohort, "patient", 3, 0):
        for k, alpha in enumerate(ALPHAS):
            scores[k] += np.nanmean(pearson(Y[test], predictions(cohort, X, rows, genes, alpha=alpha)[test]))
    assert summary["alpha"] == ALPHAS[int(scores.argmax())]
    kept = {"config.yml", "backbone.yml", "summary.json", "probe.safetensors"}
    assert {p.name for p in (tmp_path / "frozen").iterdir()} == kept


def test_shares_and_both_features_are_kept_to(mini_root, tmp_path):
    summary = train(config(mini_root, features="frozen+student", train_share=0.5, seed=1), tmp_path / "both")
    assert summary["n_taught"] < 0.55 * summary["n_spots"]
    model = load_trained(tmp_path / "both", device="cpu")
    assert len(model.probe.mean_) == 2 * 48
    assert np.isfinite(model.predict(open_cohort(mini_root).tiles[:3])).all()


@pytest.mark.parametrize(
    ("changes", "fold", "message"),
    [
        ({"features": "color", "method": "none"}, None, "have no student to train"),
        ({}, 3, "fold 3 is not there; this cohort has folds 0 to 2"),
        ({}, -1, "fold -1 is not there"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_leaves_nothing(mini_root, tmp_path, changes, fold, message):
    with pytest.raises(ValueError, match=message):
        train(config(mini_root, **changes), tmp_path / "out", fold=fold)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(whole, mini_root):
    before = (whole / "summary.json").read_bytes()
    with pytest.raises(FileExistsError, match="is there already"):
        train(config(mini_root), whole)
    assert (whole / "summary.json").read_bytes() == before
