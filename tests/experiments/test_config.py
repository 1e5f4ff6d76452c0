"""Checks of settings, alone and combined: errors, messages, and no heavy imports."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

import peka_lite.experiments.config as config_module
from peka_lite.data import read_manifest
from peka_lite.experiments import RunConfig, check_field, describe_settings
from peka_lite.experiments.settings import DECIDES, SETTINGS, settings_deciding, split_features

HEAVY = ["torch", "torchvision", "timm", "peft", "scanpy", "anndata", "sklearn", "skimage", "squidpy", "h5py", "pandas"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_fetched_breast(cache):
    """Write empty files and the record of a fetched cohort."""
    artifact, root = read_manifest()["breast"], cache / "cohorts" / "breast"
    for file in artifact.files:
        (root / file.path).parent.mkdir(parents=True, exist_ok=True)
        (root / file.path).touch()
    files = [{"path": file.path, "size": 0, "sha256": ""} for file in artifact.files]
    (root / "fetched.json").write_text(json.dumps({"name": "breast", "commit": artifact.revision, "files": files}))


def test_checking_settings_imports_no_heavy_packages(cache):
    write_fetched_breast(cache)
    code = f"""
import sys
from peka_lite.experiments import RunConfig, check_field, describe_settings
from peka_lite.experiments.settings import DECIDES, SETTINGS, settings_deciding
for settings in (
    {{"weights": "random"}},
    {{"backbone": "uni2-h", "cohort": "breast", "protocol": "strict"}},
    {{"backbone": "virchow2", "method": "lora", "r": 8, "label_method": "kmeans", "alpha": 3.0}},
    {{"backbone": "ctranspath", "method": "none", "features": "student"}},
):
    RunConfig(**settings).check()
for bad in ({{"r": 7, "weights": "random"}}, {{"teacher": "scgpt"}}, {{"method": "bonne"}}, {{"cohort": "nowhere"}}):
    try:
        RunConfig(**bad).check()
    except (ValueError, FileNotFoundError):
        continue
    raise AssertionError(bad)
from peka_lite.cli.main import main
try:
    main(["run", "--help"])
except SystemExit:
    pass
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


INVALID = [
    ("method", "bonne", "unknown method 'bonne'; known: none, bone, lora, adalora, miss; did you mean 'bone'?"),
    ("method", "xyz", "unknown method 'xyz'; known: none, bone, lora, adalora, miss"),
    ("protocol", "strickt", "unknown protocol 'strickt'; known: paper, hest, strict; did you mean 'strict'?"),
    ("features", "colr", "teacher, color, coordinates, depth, or a path such as ./FOLDER; did you mean 'color'?"),
    ("teacher", "scFoundation", "known: pca, scfoundation, scfoundation-mini; did you mean 'scfoundation'?"),
    ("backbone", "UNI", "h-optimus-1, virchow2, gigapath, mini; did you mean 'uni'?"),
    ("split", "patients", "unknown split 'patients'; known: patient, slide, spot; did you mean 'patient'?"),
    ("layers", "kqv", "unknown layers 'kqv'; known: qkv, proj; did you mean 'qkv'?"),
    ("label_method", "k-means", "known: knn-leiden, kmeans; did you mean 'kmeans'?"),
    ("kd_space", "logit", "unknown kd_space 'logit'; known: embedding, logits; did you mean 'logits'?"),
    ("normalization", "log1", "known: log1p-cp10k, log1p; did you mean 'log1p'?"),
    ("alpha", "hset", "alpha is 'hest', 'inner' or a number of at least 0, not 'hset'; did you mean 'hest'?"),
    ("alpha", "1.0", "alpha is 'hest', 'inner' or a number of at least 0, not '1.0'"),
    ("alpha", -0.5, "alpha is 'hest', 'inner' or a number of at least 0, not -0.5"),
    ("alpha", True, "alpha is text (str) or a number (float or int) or None, not True"),
    ("resolution", 0.0, "resolution must be above 0, not 0.0"),
    ("n_clusters", 0, "n_clusters must be above 0, not 0"),
    ("tau", 0, "tau must be above 0, not 0"),
    ("epochs", 0, "epochs must be above 0, not 0"),
    ("batch_size", -1, "batch_size must be above 0, not -1"),
    ("lr", 0.0, "lr must be above 0, not 0.0"),
    ("lr", float("nan"), "lr must be a finite number, not nan"),
    ("tau", float("inf"), "tau must be a finite number, not inf"),
    ("n_genes", 0, "n_genes must be above 0, not 0"),
    ("min_genes", 0, "min_genes must be above 0, not 0"),
    ("r", 0, "r must be at least 1, not 0"),
    ("kd_weight", -0.1, "kd_weight must be at least 0, not -0.1"),
    ("ce_weight", -1, "ce_weight must be at least 0, not -1"),
    ("micro_batch", 0, "micro_batch must be at least 1, not 0"),
    ("n_splits", 1, "n_splits must be at least 2, not 1"),
    ("seed", -1, "seed must be at least 0, not -1"),
    ("train_share", 0.0, "train_share must be above 0, not 0.0"),
    ("train_share", 1.5, "train_share must be at most 1, not 1.5"),
    ("max_mito", 20, "max_mito must be at most 1, not 20"),
    ("epochs", "50", "epochs is a whole number (int), not '50'"),
    ("epochs", 2.0, "epochs is a whole number (int), not 2.0"),
    ("epochs", True, "epochs is a whole number (int), not True"),
    ("r", 16.0, "r is a whole number (int) or None, not 16.0"),
    ("seed", np.float64(3), "seed is a whole number (int), not 3.0"),
    ("seed", 2**32, "seed must be at most 4294967295, not 4294967296"),
    ("lr", "1e-4", "lr is a number (float or int), not '1e-4'"),
    ("lr", False, "lr is a number (float or int), not False"),
    ("augment", 1, "augment is True or False, not 1"),
    ("compile", "yes", "compile is True or False, not 'yes'"),
    ("method", 3, "method is text (str), not 3"),
    ("backbone", ["uni"], "backbone is text (str), not ['uni']"),
    ("device", 0, "device is text (str) or None, not 0"),
    ("slides", "MINI1", "slides is a list of names (str) or None, not 'MINI1'"),
    ("slides", ["MINI1", 2], "slides is a list of names (str) or None, not ['MINI1', 2]"),
]


@pytest.mark.parametrize(("field", "value", "message"), INVALID, ids=lambda v: str(v)[:20])
def test_invalid_value_gives_same_error_in_check_field_and_run_config(field, value, message):
    with pytest.raises(ValueError, match=f"{re.escape(message)}$") as from_field:
        check_field(field, value)
    with pytest.raises(ValueError, match=f"{re.escape(message)}$") as from_config:
        RunConfig(**{"weights": "random", field: value})
    assert str(from_config.value) == str(from_field.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 1), ("tau", 0.5), ("alpha", 0), ("alpha", 2.5), ("alpha", "hest"), ("alpha", "inner"), ("r", 1),
        ("kd_weight", 0), ("train_share", 1), ("max_mito", 0.2), ("n_splits", 2), ("seed", 0), ("slides", ["MINI1"]),
        ("slides", ("MINI1", "MINI2")), ("cohort", "not looked for"), ("weights", "nor/this.bin"),
    ],
)  # fmt: skip
def test_valid_value_passes_check_field(field, value):
    stored = check_field(field, value)
    assert stored == (tuple(value) if isinstance(value, list) else value)
    assert type(stored) in SETTINGS[field].kinds


@pytest.mark.parametrize(("value", "stored"), [(np.int64(3), 3), (np.float32(0.5), 0.5), (np.bool_(True), True)])
def test_scalars_of_numpy_are_stored_as_those_of_python(value, stored):
    field = {int: "seed", float: "lr", bool: "augment"}[type(stored)]
    assert type(check_field(field, value)) is type(stored)
    assert getattr(RunConfig(**{field: value}), field) == stored


@pytest.mark.parametrize("row", SETTINGS.values(), ids=lambda row: row.name)
def test_default_is_valid_and_none_only_if_declared(row):
    assert check_field(row.name, row.default) == row.default
    assert row.decides in DECIDES
    if type(None) in row.kinds:
        assert check_field(row.name, None) is None
    else:
        with pytest.raises(ValueError, match=f"^{row.name} is .*, not None$"):
            check_field(row.name, None)


def test_table_describes_every_setting():
    table = describe_settings()
    assert list(table.index) == list(RunConfig.model_fields)
    assert table["meaning"].str.len().min() > 5
    assert all(f"{name}\n" in RunConfig.__doc__ for name in table.index)
    assert {"lr", "tau", "seed", "teacher_genes"} <= set(settings_deciding("student"))
    assert set(settings_deciding("student", "probe")) & set(settings_deciding("memory", "data")) == set()


def test_error_of_unknown_setting_names_closest_or_all():
    with pytest.raises(ValueError, match=r"^unknown setting 'metod'; did you mean 'method'\?$"):
        check_field("metod", "bone")
    with pytest.raises(ValueError, match=r"^unknown setting 'qqq'; known: cohort, slides, .*, compile, device$"):
        check_field("qqq", 1)


def test_features_of_a_file_have_a_path_and_maybe_a_key():
    assert split_features("a/b.h5ad:X_uni") == ("a/b.h5ad", "X_uni")
    assert split_features("a/b.h5ad") == ("a/b.h5ad", None)
    for value in ("uni.h5", "./folder", "x.h5ad:k"):
        assert RunConfig(features=value, method="none").feature_kind == "file"
    with pytest.raises(ValueError, match="use no student: set method 'none'"):
        RunConfig(features="uni.h5")


def test_slides_become_a_tuple_and_protocol_fills_in_none():
    config = RunConfig(weights="random", slides=["MINI1"], protocol="paper")
    assert (config.slides, config.split, config.alpha) == (("MINI1",), "spot", 1.0)


def test_constructor_looks_at_no_file_and_no_device(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the constructor asked for a file")

    for name in ("is_file", "is_dir", "exists", "stat", "open"):
        monkeypatch.setattr(f"pathlib.Path.{name}", refuse)
    elsewhere = {"cohort": "/not/here", "patients": "/not/here.csv", "device": "cuda:7", "backbone": "/not/here.yml"}
    config = RunConfig(**elsewhere, weights="/not/here.bin", teacher="scfoundation", teacher_checkpoint="/no.ckpt")
    monkeypatch.undo()
    assert RunConfig(**config.as_dict()) == config
    assert hash(RunConfig(**config.as_dict())) == hash(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cohort": "no/cohort"}, "no/cohort: no such cohort folder"),
        ({"weights": "no.bin"}, "no.bin: no such weights file; give a file, 'hub' or 'random'"),
        ({"backbone": "no.yml"}, "no.yml: file not found"),
        ({"teacher": "scfoundation"}, "peka-lite fetch scfoundation"),
        ({"teacher": "scfoundation", "teacher_checkpoint": "no.ckpt"}, "no.ckpt: no such file for teacher_checkpoint"),
        ({"teacher": "scfoundation", "teacher_genes": "no.tsv"}, "no.tsv: no such file for teacher_genes"),
        ({"features": "no.h5", "method": "none"}, "no.h5: no such file or folder of features"),
    ],
)
def test_check_names_the_missing_file(settings, message):
    config = RunConfig(**settings)
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        config.check()


def test_check_looks_for_the_gpu(monkeypatch):
    monkeypatch.setattr("peka_lite._core.device.default_device", lambda: "cpu")
    with pytest.raises(ValueError, match=r"device 'cuda:1': PyTorch finds no GPU; run `peka-lite doctor`"):
        RunConfig(device="cuda:1").check()
    RunConfig(device="cpu").check()


def test_only_successful_cohort_lookups_are_cached(cache, monkeypatch):
    lookups = []
    real = config_module.find_cohort
    monkeypatch.setattr(config_module, "find_cohort", lambda name: lookups.append(name) or real(name))
    with pytest.raises(FileNotFoundError, match="peka-lite fetch breast"):
        RunConfig(cohort="breast", weights="random").check()
    write_fetched_breast(cache)
    for seed in range(5):
        RunConfig(cohort="breast", weights="random", seed=seed).check()
    assert lookups == ["breast", "breast"]
    monkeypatch.setenv("PEKA_LITE_CACHE", str(cache / "other"))
    with pytest.raises(FileNotFoundError, match="peka-lite fetch breast"):
        RunConfig(cohort="breast", weights="random").check()


def test_lookup_of_cohort_folder_is_not_cached(tmp_path):
    folder = tmp_path / "cohort"
    folder.mkdir()
    config = RunConfig(cohort=str(folder), weights="random")
    config.check()
    folder.rmdir()
    with pytest.raises(FileNotFoundError, match="no such cohort folder"):
        config.check()
