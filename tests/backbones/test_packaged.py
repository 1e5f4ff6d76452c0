"""Weights in the package exist, are the default, and a changed file is detected."""

import importlib.util
import re
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peka_lite.backbones import BACKBONES, _packaged, build_network, load_backbone
from peka_lite.backbones._packaged import describe_file, find_packaged
from peka_lite.cli.doctor import doctor
from peka_lite.data.download import fetch
from peka_lite.experiments import Features, RunConfig
from peka_lite.experiments.run import load_or_run, run
from peka_lite.experiments.sweeps.read import read_sweep

ROOT = Path(__file__).resolve().parents[2]
MINI = BACKBONES["mini"]
FILE = ROOT / "peka_lite" / "backbones" / "weights" / "mini_student.safetensors"


def replace_package_data(monkeypatch, folder):
    """Use another folder for the package's data, and return the path of the weights in it."""
    monkeypatch.setattr(_packaged, "resources", SimpleNamespace(files=lambda name: folder))
    return folder / "weights" / "mini_student.safetensors"


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Replace the weights of the package by changed ones."""
    state = load_file(FILE)
    state["fc_norm.bias"] += 1
    (tmp_path / "package" / "weights").mkdir(parents=True)
    path = replace_package_data(monkeypatch, tmp_path / "package")
    save_file(state, path)
    return path


def test_registry_row_names_an_existing_small_file():
    assert (MINI.source, MINI.license, MINI.gate) == ("package/mini_student.safetensors", "BSD-3-Clause", None)
    assert find_packaged(MINI) == FILE
    assert FILE.stat().st_size <= 8e6
    assert [name for name, spec in BACKBONES.items() if find_packaged(spec)] == ["mini"]
    assert find_packaged(replace(MINI, source=None)) is None


def test_file_has_finite_float16_weights_of_the_architecture():
    state, expected = load_file(FILE), build_network(MINI).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert all(v.isfinite().all() for v in state.values())


def test_default_loads_float32_weights_without_warning_seed_or_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was called"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, other = load_backbone("mini"), load_backbone("mini", seed=5)
    assert RunConfig().weights == "hub"
    stored = load_file(FILE)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, stored[name].float())
        assert torch.equal(tensor, other.state_dict()[name])
    assert re.fullmatch(r"package mini_student\.safetensors, sha256 [0-9a-f]{12}", model.weights_origin)


def test_changed_file_changes_origin_and_cache_keys(changed, mini_cohort, monkeypatch):
    def folder(rows, **settings):
        return Features(RunConfig(**settings), mini_cohort, device="cpu").folder(rows)

    def cache_keys():
        return {folder(np.arange(2)), folder(None, method="none")}

    changed_keys, path = cache_keys(), find_packaged(MINI)
    assert path == changed
    assert load_backbone("mini").weights_origin == describe_file(changed)
    monkeypatch.undo()
    assert cache_keys().isdisjoint(changed_keys)
    assert describe_file(find_packaged(MINI)) != describe_file(changed)
    assert folder(None, method="none", weights="random") not in cache_keys()


@pytest.mark.filterwarnings("ignore:.*each patient is one fold", "ignore:.*allow")
def test_run_with_other_packaged_weights_is_not_reused(mini_root, isolated_cache, tmp_path, monkeypatch):
    settings = {"cohort": str(mini_root), "method": "none", "n_splits": 2, "n_genes": 5}
    (tmp_path / "package" / "weights").mkdir(parents=True)
    run(RunConfig(**settings), tmp_path / "student", maps=False)
    run(RunConfig(**settings, features="color"), tmp_path / "control", maps=False)
    save_file({"x": torch.zeros(1)}, replace_package_data(monkeypatch, tmp_path / "package"))
    load_or_run(RunConfig(**settings, features="color"), tmp_path / "control")  # this run uses no student
    with pytest.raises(FileExistsError, match=r"student holds a run with weights 'package .* remove it to run again"):
        load_or_run(RunConfig(**settings), tmp_path / "student")


def test_missing_packaged_weights_raise_one_clear_error(tmp_path, monkeypatch):
    path = replace_package_data(monkeypatch, tmp_path)
    words = re.escape(f"{path}: the weights of mini are missing from the package; reinstall it")
    for load in (lambda: load_backbone("mini"), lambda: RunConfig().check(), lambda: read_sweep("quick")):
        with pytest.raises(FileNotFoundError, match=words) as error:
            load()
        assert "\n" not in str(error.value)
    (check,) = [c for c in doctor(online=False) if c.name == "artifacts"]
    assert check.status == "fail"
    assert str(path) in check.line
    with pytest.warns(UserWarning, match="random weights"):
        load_backbone("mini", weights=RunConfig(weights="random").weights)


def test_packaged_weights_cannot_be_fetched():
    with pytest.raises(ValueError, match="nothing called 'mini'"):
        fetch("mini")


def test_sweep_presets_and_notebooks_use_published_weights():
    for path in (*ROOT.glob("peka_lite/experiments/sweeps/presets/*.yml"), *ROOT.glob("benchmarks/*.yml")):
        assert "weights:" not in path.read_text(), path.name
    assert {point.settings["weights"] for point in read_sweep("quick").points} == {"hub"}
    for name in ("04_bone_training", "05_evaluation", "06_spatial_pcc_maps"):
        assert r"weights: str = \"hub\"" in (ROOT / "notebooks" / f"{name}.ipynb").read_text()


def test_wheel_contains_all_data_and_stays_small(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is absent: no wheel can be built")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        metadata = next(archive.read(name) for name in sizes if name.endswith(".dist-info/METADATA")).decode()
    # uv ignores an upper bound, pip does not.
    assert re.findall("^Requires-Python: (.*)$", metadata, re.M) == ["<3.14,>=3.11"]
    data = [
        p for p in (ROOT / "peka_lite").rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    ]
    assert {FILE, ROOT / "peka_lite" / "py.typed", ROOT / "peka_lite" / "probe" / "__init__.pyi"} <= set(data)
    assert {str(p.relative_to(ROOT)): p.stat().st_size for p in data}.items() <= sizes.items()
    assert wheel.stat().st_size < 15e6
