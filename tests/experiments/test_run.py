"""One experiment from start to end: output folder, leakage, resuming, and errors."""

import json
import re
import shutil

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open
from scipy import sparse
from scipy.stats import spearmanr

from peka_lite.backbones import BACKBONES, load_backbone
from peka_lite.data import hash_cohort, open_cohort
from peka_lite.evaluation import ALPHAS, LeakError, pool_scores
from peka_lite.experiments import RunConfig, features, load_or_run, load_run, run, run_name, train, write_features
from peka_lite.reports import protocol_table, read_runs
from peka_lite.teachers import ScFoundation

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("isolated_cache", "tiny_backbone"),
]


def config(root, **changes):
    settings = {"cohort": str(root), "epochs": 1, "n_splits": 3, "n_genes": 20, "resolution": 0.5}
    settings |= changes
    if settings.get("label_method") == "kmeans":
        del settings["resolution"]
    return RunConfig(**settings)


CHOSEN = ("HER2_C2", "HER2_C3")
TINY_STUDENT = {"backbone": "tiny", "weights": "random"}  # fast, for tests that need any trained student


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bone_run(isolated_cache, mini_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "bone"
    run(config(mini_root), out)
    return out


def adapters(out):
    with safe_open(out / "adapter.safetensors", "np") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - safe_open is not iterable


def test_run_folder_has_exactly_the_documented_files(bone_run):
    assert {p.name for p in bone_run.iterdir()} == {
        "config.yml", "metrics.csv", "slides.parquet", "summary.json", "training.csv", "adapter.safetensors",
        "predictions.h5ad", "probe.safetensors", "maps",
    }  # fmt: skip
    assert not bone_run.with_name("bone.partial").exists()
    assert len(list((bone_run / "maps").glob("*.png"))) == 2 * 4


def test_metrics_are_tidy(bone_run, mini_cohort):
    table = pd.read_csv(bone_run / "metrics.csv")
    assert list(table) == [
        "method", "backbone", "split", "protocol", "features", "normalization",
        "fold", "gene", "pcc", "r2", "rmse", "spearman", "n_train", "n_test",
    ]  # fmt: skip
    assert table.groupby("fold").size().eq(20).all()
    assert table["fold"].nunique() == 3
    assert (table["n_train"] + table["n_test"] == len(mini_cohort)).all()


def test_summary_describes_the_run(bone_run, mini_cohort):
    summary = json.loads((bone_run / "summary.json").read_text())
    table = pd.read_csv(bone_run / "metrics.csv")
    assert summary["mean_pcc"] == pytest.approx(table.groupby("fold")["pcc"].mean().mean())
    for name in ("r2", "rmse", "spearman"):
        mean = table.groupby("fold")[name].mean().mean()
        assert summary["other_scores"][summary["normalization"]][name] == pytest.approx(mean)
    assert set(summary["other_scores"]) == set(summary["scores"])
    assert summary["ci_low"] < summary["mean_pcc"] < summary["ci_high"]
    assert re.fullmatch(r"package mini_student\.safetensors, sha256 [0-9a-f]{12}", summary["weights"])
    assert summary["data_fingerprint"] == hash_cohort(mini_cohort)
    assert summary["synthetic"] is True
    assert 0.02 < summary["adapted_share"] < 0.08
    assert summary["seconds"] > 0
    assert summary["versions"]["torch"]


def test_adapters_of_each_fold_are_saved_and_trained(bone_run):
    saved = adapters(bone_run)
    assert len(saved) == 3 * 6
    assert all(v.shape == (18, 32, 32) and np.abs(v).max() > 0 for v in saved.values())


def test_predictions_agree_with_metrics(bone_run):
    _, table, _, predictions = load_run(bone_run)
    row = table.dropna(subset="pcc").iloc[0]
    test = predictions[predictions.obs["fold"] == row["fold"], row["gene"]]
    y, p = test.layers["measured"].ravel().astype(float), test.X.ravel().astype(float)
    assert np.corrcoef(p, y)[0, 1] == pytest.approx(row["pcc"], abs=1e-4)
    assert 1 - ((y - p) ** 2).mean() / y.var() == pytest.approx(row["r2"], abs=1e-4)
    assert np.sqrt(((y - p) ** 2).mean()) == pytest.approx(row["rmse"], abs=1e-4)
    assert spearmanr(y, p).statistic == pytest.approx(row["spearman"], abs=1e-4)


def test_same_seed_gives_the_same_numbers(bone_run, mini_root, tmp_path, fresh_cache):
    run(config(mini_root), tmp_path / "again", maps=False)
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (bone_run / "metrics.csv").read_bytes()
    first, second = adapters(bone_run), adapters(tmp_path / "again")
    assert all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none"},
        {"method": "lora", "r": 8},
        {"method": "adalora", "r": 8},
        {"method": "miss"},
        {"label_method": "kmeans", "n_clusters": 5, "kd_space": "logits"},
        {"split": "slide", "normalization": "log1p", "alpha": 100.0},
        {"split": "spot"},
        {"protocol": "paper"},
        {"protocol": "hest", "method": "none", "features": "color"},
        {"protocol": "hest", "method": "none", "features": "coordinates"},
        {"method": "none", "features": "depth", "alpha": 1.0},
        {"method": "none", "features": "teacher"},
        {"features": "frozen+student", "layers": "proj"},
        {"features": "projector", "protocol": "strict", "n_splits": 3},
        {"features": "frozen+projector"},
        {"shuffle_teacher": True, "train_share": 0.5},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_every_option_runs(mini_root, tmp_path, changes):
    summary = run(config(mini_root, **TINY_STUDENT | {"n_splits": 2} | changes), tmp_path / "out", maps=False)
    assert -1 <= summary["mean_pcc"] <= 1
    assert summary["ceiling"]["log1p-cp10k"]["basis"] == "known"
    assert summary["mean_pcc"] == summary["scores"][summary["normalization"]]["pooled"]["pcc"]
    assert (tmp_path / "out" / "adapter.safetensors").exists() == (changes.get("method") != "none")


def test_projector_features_are_projections_of_the_adapted_student(mini_root, tmp_path, monkeypatch, fresh_cache):
    from peka_lite.backbones import preprocess

    real, models, projected_all = features.fit, [], []
    monkeypatch.setattr(features, "fit", lambda model, *a, **k: (models.append(model), real(model, *a, **k))[1])
    project = features._project
    monkeypatch.setattr(features, "_project", lambda *a: (projected_all.append(project(*a)), projected_all[-1])[1])
    run(config(mini_root, **TINY_STUDENT, features="projector", protocol="paper"), tmp_path / "out", maps=False)
    (model,), tiles = models, open_cohort(mini_root).tiles
    with torch.inference_mode():
        projected, _ = model(preprocess(torch.from_numpy(tiles[:16]), model.backbone.spec))
    assert projected_all[0].shape == (len(tiles), model.projector[-1].out_features)
    assert np.allclose(projected_all[0][:16], projected, atol=2e-3)
    assert not (tmp_path / "out" / "probe.safetensors").exists()


def test_features_of_a_file_are_evaluated_as_those_of_a_run(mini_root, tmp_path):
    cohort, settings = open_cohort(mini_root), TINY_STUDENT | {"method": "none", "protocol": "hest"}
    file = tmp_path / "features" / "frozen.h5ad"
    file.parent.mkdir()
    write_features(cohort, file, load_backbone("tiny", weights="random"))
    computed = run(config(mini_root, **settings), tmp_path / "computed", maps=False)
    given = run(config(mini_root, **settings, features=str(file)), tmp_path / "given", maps=False)
    assert given["mean_pcc"] == pytest.approx(computed["mean_pcc"], abs=1e-6)
    assert (given["features"], given["learned_from"]) == ("file", "not declared")
    assert computed["learned_from"] == "recorded by each fit"
    assert given["weights"].startswith("features of frozen.h5ad, sha256 ")
    table = load_or_run(config(mini_root, **settings, features=str(file)), tmp_path / "given")[1]
    assert table["features"].unique() == ["file"]
    assert "file frozen.h5ad (learned from: not declared)" in str(protocol_table(read_runs([tmp_path / "given"])))
    with pytest.raises(ValueError, match="have no student to train"):
        train(config(mini_root, **settings, features=str(file)), tmp_path / "model")
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(FileExistsError, match=r"holds a run of features of frozen\.h5ad, .*, now features of"):
        load_or_run(config(mini_root, **settings, features=str(file)), tmp_path / "given")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["x"] = 1
    with pytest.raises(ValueError, match=r"other\.h5"):
        run(config(mini_root, **settings, features=str(tmp_path / "other.h5")), tmp_path / "bad")
    assert not (tmp_path / "bad.partial").exists()


def test_features_backbone_is_an_alias_of_student():
    assert RunConfig(features="backbone") == RunConfig(features="student")


def test_no_step_is_fitted_on_a_test_patient(bone_run, mini_root, tmp_path, fresh_cache):
    """Replace one patient's counts by noise: only folds that train on this patient may change."""
    cohort = open_cohort(mini_root)
    patient = cohort.slides[0].patient
    root = tmp_path / "cohort"
    shutil.copytree(mini_root, root)
    rng = np.random.default_rng(0)
    for slide in (s for s in cohort.slides if s.patient == patient):
        path = root / "st" / f"{slide.id}.h5ad"
        adata = ad.read_h5ad(path)
        adata.X = sparse.csr_matrix(rng.poisson(3, adata.shape).astype(np.float32))
        adata.write_h5ad(path)
    run(config(root), tmp_path / "out", maps=False)

    _, before, _, predictions = load_run(bone_run)
    _, after, _, _ = load_run(tmp_path / "out")
    test_folds = set(predictions.obs.loc[predictions.obs["patient"] == patient, "fold"])
    assert len(test_folds) == 1
    clean, noisy = adapters(bone_run), adapters(tmp_path / "out")
    for fold in range(3):
        names = [k for k in clean if k.startswith(f"fold{fold}.")]
        same_student = all(np.array_equal(clean[k], noisy[k]) for k in names)
        same_genes = before[before["fold"] == fold]["gene"].tolist() == after[after["fold"] == fold]["gene"].tolist()
        assert (same_student, same_genes) == ((True, True) if fold in test_folds else (False, False))


def test_interrupted_run_resumes_with_the_same_result(bone_run, mini_root, tmp_path, monkeypatch, fresh_cache):
    real, calls = features.fit, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(features, "fit", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(config(mini_root), out, maps=False)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="unfinished run with other settings"):
        run(config(mini_root, seed=5), out)
    run(config(mini_root), out, maps=False)
    assert (out / "metrics.csv").read_bytes() == (bone_run / "metrics.csv").read_bytes()


def test_finished_folder_is_not_overwritten(bone_run, mini_root):
    with pytest.raises(FileExistsError, match="there already"):
        run(config(mini_root), bone_run)


def test_load_or_run_reads_a_finished_run_and_rejects_other_settings(bone_run, mini_root):
    stamp = (bone_run / "summary.json").stat().st_mtime_ns
    loaded, *_ = load_or_run(config(mini_root), bone_run)
    assert loaded == config(mini_root)
    assert (bone_run / "summary.json").stat().st_mtime_ns == stamp
    with pytest.raises(FileExistsError, match="other settings"):
        load_or_run(config(mini_root, seed=1), bone_run)


def test_load_run_needs_a_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        load_run(tmp_path)


def test_config_file_has_every_field(bone_run, mini_root):
    assert RunConfig(**yaml.safe_load((bone_run / "config.yml").read_text())) == config(mini_root)


def test_run_names_differ_with_any_setting(mini_root):
    changes = [{}, {"seed": 1}, {"tau": 1.0}, {"epochs": 2}, {"slides": ("MINI1",)}]
    assert len({run_name(config(mini_root, **c)) for c in changes}) == len(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "dora"}, "unknown method 'dora'"),
        ({"teacher": "scgpt"}, "unknown teacher"),
        ({"backbone": "vgg"}, "unknown backbone"),
        ({"split": "organ"}, "unknown split"),
        ({"kd_space": "tokens"}, "unknown kd_space"),
        ({"normalization": "sct"}, "unknown normalization"),
        ({"r": 50}, "r=50 must divide .* these would: .* 32"),
        ({"method": "none", "r": 32}, "does not fit method 'none'"),
        ({"backbone": "resnet50", "weights": "hub"}, "only method 'none'"),
        ({"backbone": "ctranspath", "weights": "hub"}, "only method 'none'"),
        ({"resolution": 1.0, "label_method": "kmeans_"}, "unknown label_method"),
        ({"n_clusters": 5}, "belongs to label_method 'kmeans'"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"n_splits": 1}, "at least 2"),
        ({"alpha": -1.0}, "alpha"),
        ({"protocol": "loose"}, "unknown protocol 'loose'; known: paper, hest, strict"),
        ({"protocol": "strict", "alpha": 3.0}, "protocol 'strict' has alpha 'inner', not 3.0; leave alpha out"),
        ({"protocol": "strict", "split": "spot"}, "has split 'patient', not 'spot'"),
        ({"protocol": "paper", "split": "slide"}, "has split 'spot', not 'slide'"),
        ({"protocol": "hest", "normalization": "log1p-cp10k"}, "has normalization 'log1p', not"),
        ({"features": "teacher"}, "use no student: set method 'none'"),
        ({"features": "frozen+student", "method": "none"}, "trains no student"),
        ({"features": "projector", "method": "none"}, "trains no student"),
        ({"shuffle_teacher": True, "method": "none"}, "trains no student"),
        ({"train_share": 0.0}, "train_share must be above 0"),
        ({"layers": "fc1"}, "unknown layers 'fc1'; known: qkv, proj"),
    ],
)
def test_invalid_settings_raise_before_any_work(mini_root, changes, message):
    with pytest.raises(ValueError, match=message):
        config(mini_root, **changes)


def test_missing_files_raise_before_any_work(mini_root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        run(config(mini_root, weights=str(tmp_path / "uni.bin")), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no such cohort folder"):
        run(config(tmp_path / "nowhere"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_patient_cannot_be_split_by_patient(mini_root, tmp_path):
    with pytest.raises(ValueError, match="none to hold out"):
        run(config(mini_root, slides=("MINI1",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_uni_accepts_the_papers_block_size(mini_root):
    assert BACKBONES["uni"].bone_r == 256
    assert config(mini_root, backbone="uni", weights="hub").block_size == 256


def test_real_slides_run_end_to_end(her2st, tmp_path):
    settings = config(her2st, method="none", split="slide", slides=CHOSEN, n_splits=2, n_genes=50)
    summary = run(settings, tmp_path / "out")
    assert summary["n_spots"] == 187 + 180 - 3  # three spots express fewer than 200 genes
    assert summary["synthetic"] is False
    assert len(list((tmp_path / "out" / "maps").glob("*.png"))) == 4


@pytest.fixture
def checkpoint(golden):
    return str(golden / "scfoundation" / "toy_models_ckpt.pt")


@pytest.fixture
def few_real_spots(her2st, tmp_path):
    """Two real slides with every sixth spot."""
    root = tmp_path / "few"
    for part in ("patches", "metadata"):
        shutil.copytree(her2st / part, root / part, ignore=lambda _, names: {n for n in names if n[:7] not in CHOSEN})
    (root / "st").mkdir()
    for name in CHOSEN:
        ad.read_h5ad(her2st / "st" / f"{name}.h5ad")[::6].write_h5ad(root / "st" / f"{name}.h5ad")
    return root


@pytest.mark.filterwarnings("ignore:.*tiles without a spot")
def test_scfoundation_trains_a_student_on_real_slides(few_real_spots, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    chosen = {"teacher": "scfoundation", "teacher_checkpoint": checkpoint, "split": "slide"}
    settings = config(few_real_spots, **TINY_STUDENT, **chosen, n_splits=2)
    summary = run(settings, tmp_path / "out", maps=False)
    assert summary["teacher"].startswith("ScFoundation(toy_models_ckpt.pt, cell")
    assert 0.9 < summary["teacher_coverage"] < 1
    cached = list((tmp_path / "cache" / "embeddings").iterdir())
    assert sorted(p.name[:8] for p in cached) == ["HER2_C2_", "HER2_C3_"]  # both folds share them


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"teacher": "scfoundation"}, FileNotFoundError, "peka-lite fetch scfoundation"),
        ({"teacher": "scfoundation", "teacher_checkpoint": "none.ckpt"}, FileNotFoundError, "none.ckpt"),
        ({"teacher_checkpoint": __file__}, ValueError, "belongs to teacher 'scfoundation'"),
        ({"teacher_mapping": __file__}, ValueError, "belongs to teacher 'scfoundation'"),
    ],
)
def test_teacher_files_are_checked_before_any_work(mini_root, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path))
    with pytest.raises(error, match=message):
        run(config(mini_root, **changes), tmp_path / "out")


def test_teacher_without_the_cohorts_genes_raises_before_tiles_are_copied(mini_root, tmp_path, monkeypatch):
    monkeypatch.setattr(RunConfig, "load_teacher", lambda self: ScFoundation.random([f"X{i}" for i in range(20)]))
    with pytest.raises(ValueError, match="at least half must be"):
        run(config(mini_root), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_load_or_run_rejects_another_teacher_of_the_same_name(mini_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    genes, settings = open_cohort(mini_root).genes, config(mini_root, **TINY_STUDENT, n_splits=2)
    for seed in (0, 1):
        teacher = ScFoundation.random(genes, hidden_dim=8, depth=1, seed=seed)
        monkeypatch.setattr(RunConfig, "load_teacher", lambda self, teacher=teacher: teacher)
        if seed == 0:
            *_, summary, _ = load_or_run(settings, tmp_path / "out", maps=False)
            assert summary["teacher_fingerprint"]
    with pytest.raises(FileExistsError, match="another teacher under the same name"):
        load_or_run(settings, tmp_path / "out", maps=False)


def test_missing_gpu_raises_before_any_work(mini_root, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no GPU"):
        run(config(mini_root, device="cuda:0"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_strict_chooses_alpha_and_scores_both_normalizations(mini_root, tmp_path):
    summary = run(config(mini_root, protocol="strict", method="none"), tmp_path / "out", maps=False)
    assert (summary["protocol"], summary["split"], summary["unit"]) == ("strict", "patient", "patient")
    assert len(summary["alphas"]) == 3
    assert set(summary["alphas"]) <= set(ALPHAS)
    moments = pd.read_parquet(tmp_path / "out" / "slides.parquet")
    assert set(moments["normalization"]) == {"log1p-cp10k", "log1p"}
    score = summary["scores"]["log1p"]["pooled"]
    assert score["pcc"] == pytest.approx(pool_scores(moments[moments["normalization"] == "log1p"])["pcc"].mean())


def test_strict_needs_three_folds(mini_root, tmp_path):
    with pytest.raises(ValueError, match="needs at least 3 folds"):
        run(config(mini_root, protocol="strict", method="none", n_splits=2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", ["hest", "strict"])
def test_slide_split_is_rejected_with_several_patients(mini_root, tmp_path, protocol):
    with pytest.raises(LeakError, match="holds out patients; holding out sections instead needs one known"):
        run(config(mini_root, protocol=protocol, split="slide", method="none"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_strict_trains_one_student_per_fold_and_pair_of_folds(mini_root, tmp_path, monkeypatch, fresh_cache):
    run(config(mini_root, **TINY_STUDENT, protocol="strict"), tmp_path / "strict", maps=False)
    students = {p.name for p in (tmp_path / "cache" / "students").iterdir() if not p.name.startswith(".")}
    assert len(students) == 3 + 3  # three folds, three pairs of them
    run(config(mini_root, **TINY_STUDENT, protocol="hest"), tmp_path / "hest", maps=False)  # strict's outer folds
    assert {p.name for p in (tmp_path / "cache" / "students").iterdir() if not p.name.startswith(".")} == students


def test_paper_protocol_trains_one_student_on_every_spot(mini_root, mini_cohort, tmp_path):
    run(config(mini_root, **TINY_STUDENT, protocol="paper"), tmp_path / "out", maps=False)
    assert {k.split(".")[0] for k in adapters(tmp_path / "out")} == {"all"}
    table = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert table.groupby("fold")["gene"].apply(tuple).nunique() == 1  # chosen on all rows
    assert table["split"].unique() == ["spot"]


def test_cached_student_is_reused_only_for_the_same_settings(mini_root, tmp_path, monkeypatch, fresh_cache):
    trainings = []
    real = features.fit
    monkeypatch.setattr(features, "fit", lambda *a, **k: trainings.append(1) or real(*a, **k))
    fast = TINY_STUDENT | {"n_splits": 2}
    run(config(mini_root, **fast), tmp_path / "a", maps=False)
    assert len(trainings) == 2
    run(config(mini_root, **fast, n_genes=10, alpha=5.0), tmp_path / "b", maps=False)  # only the probe differs
    assert len(trainings) == 2
    for k, changes in enumerate([{"tau": 1.0}, {"shuffle_teacher": True}]):
        run(config(mini_root, **fast, **changes), tmp_path / f"c{k}", maps=False)
        assert len(trainings) == 4 + 2 * k


def test_train_share_applies_to_every_slide(mini_root, mini_cohort, tmp_path):
    run(config(mini_root, method="none", train_share=0.5), tmp_path / "out", maps=False)
    table = pd.read_csv(tmp_path / "out" / "metrics.csv")
    whole = len(mini_cohort) - table["n_test"]
    assert ((table["n_train"] / whole - 0.5).abs() < 0.02).all()
    assert table.drop_duplicates("fold")["n_test"].sum() == len(mini_cohort)
