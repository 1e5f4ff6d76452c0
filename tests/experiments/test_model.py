"""Check that a loaded model reproduces its run, and that mixed or damaged folders are refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from run_folders import complete_summary, training_summary

from peka_lite.adapters import adapt, backbone_fingerprint, merge, read_adapter_info, save_adapter
from peka_lite.adapters.files import join_adapters
from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.experiments import RunConfig, load_run, load_trained, run
from peka_lite.probe import PCARidge, save_probes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"
)
GENES = ("ACTB", "KRT8", "CD3E")


def student(seed=0):
    return load_backbone("mini", weights="random", seed=seed)


def adapted_student(method, draw, *, seed=0):
    """Return a student with random adapter weights, as after training."""
    model = adapt(student(seed), method, r=32, total_steps=10 if method == "adalora" else None)
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def probe(d, draw):
    rng = np.random.default_rng(draw)
    return PCARidge(8, fit_intercept=True).fit(rng.normal(size=(300, d)), rng.normal(size=(300, len(GENES))))


def write_folder(folder, *, adapters=("fold0", "fold1"), probes=("fold0", "fold1"), summary=None, **settings):
    """Write the folder of a run or training with random weights and made-up scores."""
    folder.mkdir()
    config = {"cohort": "/nowhere/tissue", "weights": "random", "method": "bone", "normalization": "log1p-cp10k"}
    config |= {"split": "patient", "alpha": "hest"} | settings
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    about = training_summary() if summary == {} else complete_summary(**(summary or {}))
    (folder / "summary.json").write_text(json.dumps(about))
    if summary != {}:
        row = {name: about[name] for name in ("method", "backbone", "split", "protocol", "features", "normalization")}
        row |= {"fold": 0, "gene": GENES, "pcc": [0.1, 0.2, 0.3], "n_train": 120, "n_test": 63}
        pd.DataFrame(row).to_csv(folder / "metrics.csv", index=False)
    if config["method"] != "none":
        paths = {name: folder / name for name in adapters}
        for draw, path in enumerate(paths.values()):
            save_adapter(adapted_student(config["method"], draw, seed=config.get("seed", 0)), path, data="d" * 16)
        join_adapters(paths, folder / "adapter.safetensors")
        for path in paths.values():
            path.unlink()
    d = 192 * (2 if config.get("features") == "frozen+student" else 1)
    fitted = {name: (probe(d, draw), GENES) for draw, name in enumerate(probes)}
    base = backbone_fingerprint(student(config.get("seed", 0)))
    save_probes(folder / "probe.safetensors", fitted, normalization=config["normalization"], fingerprint=base)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("runs") / "bone")


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def tiles():
    return np.random.default_rng(0).integers(0, 255, (5, 112, 112, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def finished_run(mini_root, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    settings = {"epochs": 1, "n_splits": 2, "n_genes": 10, "label_method": "kmeans", "n_clusters": 3}
    config = RunConfig(cohort=str(mini_root), weights="random", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEKA_LITE_CACHE", str(home / "cache"))
        run(config, home / "out", maps=False)
    return home / "out"


@pytest.mark.parametrize("fold", [None, 0, 1])
def test_loaded_model_reproduces_predictions_of_its_run(finished_run, mini_cohort, tmp_path, fold):
    trained = load_trained(finished_run, fold=fold)
    assert trained.name == f"fold{fold or 0}"
    _, _, summary, predictions = load_run(finished_run)
    test_rows = np.flatnonzero(predictions.obs["fold"] == (fold or 0))
    P = trained.predict(mini_cohort.tiles.select(test_rows), batch_size=16)
    assert P.dtype == np.float32
    assert P.shape == (len(test_rows), 10)
    expected = predictions[test_rows, list(trained.genes)].X
    assert np.abs(P - expected).max() < 1e-3 * np.abs(expected).max()
    assert trained.config == load_run(finished_run)[0]
    assert trained.summary == summary


def test_student_is_timm_model_with_merged_adapters(folder, tiles):
    trained = load_trained(folder, fold=1, device="cpu")
    assert trained.frozen is None
    assert not trained.student.training
    assert trained.student.state_dict().keys() == student().state_dict().keys()
    assert not any(p.requires_grad for p in trained.student.parameters())
    X = embed_tiles(merge(adapted_student("bone", 1)), tiles, device="cpu")
    expected = probe(192, 1).predict(X).astype(np.float32)
    assert np.array_equal(trained.predict(tiles), expected)
    assert not np.array_equal(load_trained(folder, fold=0, device="cpu").predict(tiles), expected)


def test_probe_takes_frozen_features_first(tmp_path, tiles):
    folder = write_folder(tmp_path / "both", features="frozen+student")
    trained = load_trained(folder, fold=1, device="cpu")
    frozen, adapted = (embed_tiles(m, tiles, device="cpu") for m in (student(), merge(adapted_student("bone", 1))))
    expected = probe(384, 1).predict(np.hstack([frozen, adapted])).astype(np.float32)
    assert np.array_equal(trained.predict(tiles), expected)


def test_method_none_predicts_with_frozen_student(tmp_path, tiles):
    folder = write_folder(tmp_path / "none", method="none", probes=("all",))
    trained = load_trained(folder, device="cpu")
    assert (trained.name, trained.fold) == ("all", None)
    assert np.array_equal(
        trained.predict(tiles), probe(192, 0).predict(embed_tiles(student(), tiles, device="cpu")).astype(np.float32)
    )


def test_paper_protocol_shares_one_student_among_folds(tmp_path, tiles):
    folder = write_folder(tmp_path / "paper", adapters=("all",), protocol="paper", split="spot", alpha=1.0)
    X = embed_tiles(merge(adapted_student("bone", 0)), tiles, device="cpu")
    for fold in (0, 1):
        P = load_trained(folder, fold=fold, device="cpu").predict(tiles)
        assert np.array_equal(P, probe(192, fold).predict(X).astype(np.float32))
    assert load_trained(folder, device="cpu").fold == 0


def test_training_on_whole_cohort_is_loaded_by_default(tmp_path):
    folder = write_folder(tmp_path / "train", adapters=("all",), probes=("all",), summary={})
    trained = load_trained(folder, device="cpu")
    assert trained.fold is None
    assert trained.describe()["pcc"] is None
    with pytest.raises(ValueError, match="train has no fold 0; it has one model of the whole cohort, no folds"):
        load_trained(folder, fold=0)


def test_default_fold_has_lowest_number(tmp_path):
    names = ("fold10", "fold2")
    assert load_trained(write_folder(tmp_path / "a", adapters=names, probes=names)).fold == 2


def test_description_is_json(folder):
    trained = load_trained(folder, fold=0)
    about = json.loads(json.dumps(trained.describe(), allow_nan=False))
    assert about == {
        "folder": "bone", "fold": "fold0", "fingerprint": trained.fingerprint, "cohort": "tissue", "n_spots": 183,
        "synthetic": True, "data_fingerprint": "d" * 16, "backbone": "mini", "weights": "random, seed 0",
        "method": "bone", "features": "student", "protocol": "custom", "normalization": "log1p-cp10k",
        "genes": list(GENES), "pcc": {"mean": 0.25, "low": 0.1, "high": 0.4, "unit": "patient"},
        "versions": {"torch": "2.6.0"},
    }  # fmt: skip


def test_undefined_interval_is_null(tmp_path):
    scored = {"mean_pcc": 0.2, "ci_low": float("nan"), "ci_high": float("nan"), "unit": "slide"}
    about = load_trained(write_folder(tmp_path / "one", summary=scored)).describe()
    assert about["pcc"] == {"mean": 0.2, "low": None, "high": None, "unit": "slide"}


def test_fingerprint_depends_on_adapter_probe_genes_and_frozen_weights(folder, copy, tmp_path):
    one = load_trained(folder, fold=0).fingerprint
    assert one == load_trained(copy, fold=0).fingerprint
    seen = {one, load_trained(folder, fold=1).fingerprint}
    base = backbone_fingerprint(student())
    for changed in ((probe(192, 7), GENES), (probe(192, 0), ("X", *GENES[1:]))):
        save_probes(copy / "probe.safetensors", {"fold0": changed}, normalization="log1p-cp10k", fingerprint=base)
        seen.add(load_trained(copy, fold=0).fingerprint)
    save_adapter(adapted_student("bone", 5), copy / "adapter.safetensors", name="fold0")
    seen.add(load_trained(copy, fold=0).fingerprint)
    seen |= {load_trained(write_folder(tmp_path / f"{s}", method="none", seed=s)).fingerprint for s in (0, 1)}
    assert len(seen) == 7


def test_cohort_and_teacher_may_be_absent(copy):
    settings = yaml.safe_load((copy / "config.yml").read_text())
    settings |= {
        "teacher": "scfoundation",
        "teacher_checkpoint": "/nowhere/w.ckpt",
        "device": "cuda:0",
        "slides": ["S1"],
    }
    (copy / "config.yml").write_text(yaml.safe_dump(settings))
    trained = load_trained(copy, device="cpu")
    assert trained.config.slides == ("S1",)
    assert trained.config.epochs == RunConfig().epochs  # the default for a setting that the file lacks


def test_weights_can_be_given_as_a_file(tmp_path, copy):
    settings = yaml.safe_load((copy / "config.yml").read_text()) | {"weights": "/nowhere/vit.pth"}
    (copy / "config.yml").write_text(yaml.safe_dump(settings))
    with pytest.raises(FileNotFoundError, match=r"vit\.pth: no such weights file"):
        load_trained(copy)
    for seed in (0, 1):
        torch.save(student(seed).state_dict(), tmp_path / f"{seed}.pth")
    assert load_trained(copy, weights=tmp_path / "0.pth").student.weights_origin == "file 0.pth"
    with pytest.raises(ValueError, match=r"'random, seed 0' .*'file 1\.pth'"):
        load_trained(copy, weights=tmp_path / "1.pth")


def test_other_frozen_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path / "none", method="none")
    torch.save(student(1).state_dict(), tmp_path / "1.pth")
    with pytest.raises(ValueError, match=r"fitted on mini with weights 'random, seed 0' .*'file 1\.pth'"):
        load_trained(folder, weights=tmp_path / "1.pth")


def test_unknown_fold_is_refused(folder):
    for fold in (2, -1):
        with pytest.raises(ValueError, match=f"has no fold {fold}; it has models of fold0, fold1"):
            load_trained(folder, fold=fold)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "color", "method": "none"}, "features 'color', of which no model is saved"),
        ({"features": "teacher", "method": "none"}, "features 'teacher', of which no model is saved"),
        ({"backbone": "vgg"}, "unknown backbone 'vgg'"),
        ({"method": "lora"}, "has method 'bone', but the run has 'lora'; it belongs to another run"),
        ({"normalization": "log1p"}, "has normalization 'log1p-cp10k', but the run has 'log1p'"),
        ({"seed": 1}, "'random, seed 0' .* 'random, seed 1' .* load those of the adapter"),
        ({"features": "frozen+student"}, "takes 192 features, but the student has 384"),
        ({"protocol": "paper", "split": "spot", "alpha": 1.0}, "no adapter 'all'; it has fold0, fold1"),
        ({"flavour": "mint"}, "unknown setting 'flavour'"),
    ],
    ids=str,
)
def test_inconsistent_folder_is_refused(copy, changes, message):
    settings = yaml.safe_load((copy / "config.yml").read_text()) | changes
    (copy / "config.yml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        load_trained(copy)


def test_adapter_of_another_cohort_is_refused(copy):
    save_adapter(adapted_student("bone", 0), copy / "adapter.safetensors", name="fold0", data="e" * 16)
    with pytest.raises(ValueError, match=r"has data fingerprint 'e{16}', but the run has 'd{16}'"):
        load_trained(copy)


@pytest.mark.parametrize("name", ["config.yml", "summary.json", "adapter.safetensors", "probe.safetensors"])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_trained(copy)


def test_invalid_config_is_refused(copy, tmp_path):
    (copy / "config.yml").write_text("text")
    with pytest.raises(ValueError, match=r"config\.yml has no settings"):
        load_trained(copy)
    with pytest.raises(FileNotFoundError, match="no finished run or training here"):
        load_trained(tmp_path / "nowhere")


def test_adapter_records_fingerprint_of_its_weights(folder):
    assert read_adapter_info(folder / "adapter.safetensors").fingerprint == backbone_fingerprint(student())
