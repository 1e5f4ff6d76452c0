"""Weights inside the package: they are there, they are the default, and another file is noticed."""

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
import pytest
import torch
from safetensors.torch import load_file, save_file

from peka_lite.backbones import _packaged
from peka_lite.backbones._packaged import describe_file, find_packaged
from peka_lite.backbones.load import build_network, load_backbone
from peka_lite.backbones.registry import BACKBONES
from peka_lite.cli.doctor import doctor
from peka_lite.data.download import fetch
from peka_lite.experiments.cache import _key
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.run import load_or_run, run
from peka_lite.experiments.sweeps.read import read_sweep

ROOT = Path(__file__).resolve().parents[2]
MINI = BACKBONES["mini"]
FILE = ROOT / "peka_lite" / "backbones" / "weights" / "mini_student.safetensors"


def put_in_place(monkeypatch, folder):
    """Let the package's data be those of another folder."""
    monkeypatch.setattr(_packaged, "resources", SimpleNamespace(files=lambda name: folder))
    return folder / "weights" / "mini_student.safetensors"


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Other weights in the package's place."""
    state = load_file(FILE)
    state["fc_norm.bias"] += 1
    (tmp_path / "package" / "data").mkdir(parents=True)
    path = put_in_place(monkeypatch, tmp_path / "package")
    save_file(state, path)
    return path


def test_the_registrys_row_names_a_file_that_is_there_and_small():
    assert (MINI.source, MINI.license, MINI.gate) == ("package/mini_student.safetensors", "BSD-3-Clause", None)
    assert find_packaged(MINI) == FILE
    assert FILE.stat().st_size <= 8e6
    assert [name for name, spec in BACKBONES.items() if find_packaged(spec)] == ["mini"]
    assert find_packaged(replace(MINI, source=None)) is None


def test_the_file_holds_finite_half_precision_weights_of_the_architecture():
    state, wanted = load_file(FILE), build_network(MINI).state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in wanted.items()}
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert all(v.isfinite().all() for v in state.values())


def test_the_default_takes_them_as_float32_without_a_warning_a_seed_or_the_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
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


def test_another_file_is_another_origin_and_another_student_in_the_cache(changed, monkeypatch):
    def names():
        taught, frozen = RunConfig(), RunConfig(method="none")
        return {_key(taught, "d", [0, 1], None, "cpu"), _key(frozen, "d", None, None, "cpu")}

    now, path = names(), find_packaged(MINI)
    assert path == changed
    assert load_backbone("mini").weights_origin == describe_file(changed)
    monkeypatch.undo()
    assert names().isdisjoint(now)
    assert describe_file(find_packaged(MINI)) != describe_file(changed)
    random = RunConfig(method="none", weights="random")
    assert _key(random, "d", None, None, "cpu") not in names()


@pytest.mark.filterwarnings("ignore:.*each patient is one fold", "ignore:.*allow")
def test_a_run_with_other_weights_of_the_package_is_not_taken_for_this_one(mini_root, own_cache, tmp_path, monkeypatch):
    settings = {"cohort": str(mini_root), "method": "none", "n_splits": 2, "n_genes": 5}
    (tmp_path / "package" / "data").mkdir(parents=True)
    run(RunConfig(**settings), tmp_path / "student", maps=False)
    run(RunConfig(**settings, features="color"), tmp_path / "control", maps=False)
    save_file({"x": torch.zeros(1)}, put_in_place(monkeypatch, tmp_path / "package"))
    load_or_run(RunConfig(**settings, features="color"), tmp_path / "control")  # it reads no student
    with pytest.raises(FileExistsError, match=r"student holds a run with weights 'package .* remove it to run anew"):
        load_or_run(RunConfig(**settings), tmp_path / "student")


def test_a_package_without_them_says_so_once_whoever_asks(tmp_path, monkeypatch):
    path = put_in_place(monkeypatch, tmp_path)
    words = re.escape(f"{path}: the weights of mini should come with the package and are missing; install it again")
    for ask in (lambda: load_backbone("mini"), RunConfig, lambda: read_sweep("quick")):
        with pytest.raises(FileNotFoundError, match=words) as caught:
            ask()
        assert "\n" not in str(caught.value)
    (check,) = [c for c in doctor(online=False) if c.name == "artifacts"]
    assert check.status == "fail"
    assert str(path) in check.line
    with pytest.warns(UserWarning, match="random weights"):
        load_backbone("mini", weights=RunConfig(weights="random").weights)


def test_they_are_not_fetched():
    with pytest.raises(ValueError, match="nothing called 'mini'"):
        fetch("mini")


def test_the_ready_sweeps_and_the_walk_start_from_published_weights():
    for path in (*ROOT.glob("peka_lite/experiments/sweeps/presets/*.yml"), *ROOT.glob("benchmarks/*.yml")):
        assert "weights:" not in path.read_text(), path.name
    assert {point.settings["weights"] for point in read_sweep("quick").points} == {"hub"}
    for name in ("04_bone_training", "05_evaluation", "06_spatial_pcc_maps"):
        assert r"weights: str = \"hub\"" in (ROOT / "notebooks" / f"{name}.ipynb").read_text()


def test_a_wheel_holds_all_data_and_stays_small(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is absent: no wheel can be built")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as held:
        sizes = {info.filename: info.file_size for info in held.infolist()}
        metadata = next(held.read(name) for name in sizes if name.endswith(".dist-info/METADATA")).decode()
    # uv overlooks an upper bound, pip does not.
    assert re.findall("^Requires-Python: (.*)$", metadata, re.M) == ["<3.14,>=3.11"]
    data = [
        p for p in (ROOT / "peka_lite").rglob("*") if p.is_file() and p.suffix != ".py" and "__pycache__" not in p.parts
    ]
    assert {FILE, ROOT / "peka_lite" / "py.typed", ROOT / "peka_lite" / "probe" / "__init__.pyi"} <= set(data)
    assert {str(p.relative_to(ROOT)): p.stat().st_size for p in data}.items() <= sizes.items()
    assert wheel.stat().st_size < 15e6
