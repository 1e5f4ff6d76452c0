"""Adapter and probe files are restored exactly, and only for the weights they were trained on."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import TINY
from torch import nn

from peka_lite import __version__
from peka_lite._core._tensor_files import write_tensors
from peka_lite.adapters import (
    adapt,
    adapter_state,
    backbone_fingerprint,
    load_adapter,
    merge,
    read_adapter_info,
    save_adapter,
)
from peka_lite.adapters._choices import METHODS
from peka_lite.adapters.files import join_adapters
from peka_lite.backbones import load_backbone
from peka_lite.probe import PCARidge, gather, load_probes, save_probes
from peka_lite.transfer import TransferModel, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
TRAINABLE = [m for m in METHODS if m != "none"]


def student(name="mini", seed=0):
    return load_backbone(name, weights="random", seed=seed)


def trained_student(method, *, name="mini", seed=0, r=32, steps=10, draw=0, **options):
    """Return an adapted student with perturbed adapter weights, as after training."""
    model = adapt(student(name, seed), method, r=r, total_steps=steps if method == "adalora" else None, **options)
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def outputs(model):
    x = torch.randn(3, 3, model.spec.input_size, model.spec.input_size, generator=torch.Generator().manual_seed(9))
    return model.eval()(x)


@pytest.mark.parametrize("layers", ["qkv", "proj"])
@pytest.mark.parametrize("method", TRAINABLE)
def test_loaded_adapter_gives_bit_identical_outputs(method, layers, tmp_path):
    model = trained_student(method, targets=layers)
    save_adapter(model, tmp_path / "a.safetensors", data="0123")
    loaded = load_adapter(student(), tmp_path / "a.safetensors")
    assert not torch.equal(outputs(model), outputs(student()))
    assert torch.equal(outputs(loaded), outputs(model))
    assert loaded.adapter.options == model.adapter.options
    assert loaded.adapter.layers == model.adapter.layers
    assert torch.equal(outputs(merge(loaded)), outputs(merge(model)))


def test_file_mode_follows_the_umask(tmp_path):
    umask = os.umask(0o022)
    try:
        write_tensors(tmp_path / "t.safetensors", {"all.x": torch.zeros(2)}, {}, kind="test")
    finally:
        os.umask(umask)
    assert (tmp_path / "t.safetensors").stat().st_mode & 0o777 == 0o644


def test_pruned_adalora_ranks_are_restored(tmp_path):
    steps, rng = 12, np.random.default_rng(0)
    model = adapt(student(TINY), "adalora", r=8, total_steps=steps)
    pruned = model.adapter.tuner.peft_config["default"]
    pruned.tinit, pruned.tfinal, pruned.deltaT = 1, 2, 1
    tiles = rng.integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    whole = TransferModel(model, teacher_dim=5, n_classes=2)
    E, labels = rng.normal(size=(12, 5)).astype(np.float32), np.arange(12) % 2
    fit(whole, tiles, E, labels, epochs=steps, batch_size=12, lr=1e-2)
    zeroed = sum(int((v == 0).sum()) for k, v in adapter_state(model).items() if "lora_E" in k)
    assert zeroed == 2 * (8 - 4)  # two layers, half of each rank
    save_adapter(model, tmp_path / "a.safetensors")
    loaded = load_adapter(student(TINY), tmp_path / "a.safetensors")
    assert torch.equal(outputs(loaded), outputs(model))
    assert not torch.equal(outputs(loaded), outputs(student(TINY)))


def test_loaded_adapter_is_in_eval_mode(tmp_path):
    save_adapter(trained_student("lora"), tmp_path / "a.safetensors")
    loaded = load_adapter(student(), tmp_path / "a.safetensors")
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("method", METHODS)
def test_fingerprint_depends_on_frozen_weights_only(method):
    plain = backbone_fingerprint(student())
    assert len(plain) == 16
    model = adapt(student(), method, r=32, total_steps=10 if method == "adalora" else None)
    assert backbone_fingerprint(model) == plain
    assert backbone_fingerprint(merge(model)) == plain  # untrained: no weight has changed
    if method != "none":
        moved = trained_student(method)
        assert backbone_fingerprint(moved) == plain
        assert backbone_fingerprint(merge(moved)) != plain


def test_fingerprint_depends_on_weights_names_shapes_and_dtypes():
    bias = student(TINY)
    with torch.no_grad():
        bias.blocks[1].attn.qkv.bias[0] += 1e-3
    assert len({backbone_fingerprint(m) for m in (student(TINY), student(TINY, seed=1), bias)}) == 3
    ones = {"w": torch.ones(4, 6)}
    other = ({"v": torch.ones(4, 6)}, {"w": torch.ones(6, 4)}, {"w": torch.ones(4, 6).half()})
    assert len({backbone_fingerprint(nn.ParameterDict(w)) for w in (ones, *other)}) == 4


@pytest.mark.parametrize("size", [1, 1023, 1024, 5000, 3_000_000])
def test_fingerprint_samples_the_whole_tensor(size):
    layer = nn.ParameterDict({"w": torch.zeros(size)})
    before = backbone_fingerprint(layer)
    assert backbone_fingerprint(nn.ParameterDict({"w": -torch.zeros(size)})) == before  # -0.0 is 0.0
    with torch.no_grad():
        layer["w"][-max(1, size // 500) :] = 1.0
    assert backbone_fingerprint(layer) != before


def test_read_adapter_info_returns_the_saved_metadata(tmp_path):
    save_adapter(
        trained_student("lora", targets="proj", alpha=16), tmp_path / "a.safetensors", name="fold2", data="abcd"
    )
    info = read_adapter_info(tmp_path / "a.safetensors")
    assert (info.method, info.layers, info.backbone, info.weights) == ("lora", "proj", "mini", "random, seed 0")
    assert info.options == {"fold2": {"r": 32, "alpha": 16, "dropout": 0.1}}
    assert info.data == {"fold2": "abcd"}
    assert info.names == ("fold2",)
    assert info.version == __version__
    assert info.fingerprint == backbone_fingerprint(student())
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == {f"fold2.{k}" for k in adapter_state(trained_student("lora", targets="proj"))}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]  # no temporary file is left


@pytest.mark.parametrize("method", ["bone", "adalora"])
def test_join_adapters_writes_all_folds_to_one_file(method, tmp_path):
    models = {f"fold{i}": trained_student(method, name=TINY, r=16, steps=10 + i, draw=i) for i in range(3)}
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path / f"{name}.one"
        save_adapter(model, paths[name], data=f"data of {name}")
    join_adapters(paths, tmp_path / "adapter.safetensors")
    info = read_adapter_info(tmp_path / "adapter.safetensors")
    assert info.names == ("fold0", "fold1", "fold2")
    assert info.data == {name: f"data of {name}" for name in models}
    for name, model in models.items():
        loaded = load_adapter(student(TINY), tmp_path / "adapter.safetensors", name=name)
        assert loaded.adapter.options == model.adapter.options  # AdaLoRA's total_steps among them
        assert torch.equal(outputs(loaded), outputs(model))
    with pytest.raises(ValueError, match="several adapters: fold0, fold1, fold2; pass one"):
        load_adapter(student(TINY), tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match="no adapter 'fold7'; it has fold0, fold1, fold2"):
        load_adapter(student(TINY), tmp_path / "adapter.safetensors", name="fold7")
    with pytest.raises(ValueError, match="has 3 adapters"):
        join_adapters({"all": tmp_path / "adapter.safetensors"}, tmp_path / "x")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"method": "miss"}, "method"),
        ({"r": 8}, "options"),
        ({"targets": "proj"}, "layers"),
        ({"seed": 1}, "fingerprint"),
    ],
    ids=str,
)
def test_join_adapters_rejects_files_of_different_runs(other, field, tmp_path):
    save_adapter(trained_student("bone", name=TINY, r=16), tmp_path / "a")
    save_adapter(trained_student(**{"method": "bone", "name": TINY, "r": 16} | other), tmp_path / "b")
    with pytest.raises(ValueError, match=f"^{field} is .*; join files of one run"):
        join_adapters({"fold0": tmp_path / "a", "fold1": tmp_path / "b"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no adapter files"):
        join_adapters({}, tmp_path / "out")


def test_load_adapter_rejects_another_student(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(trained_student("bone"), path)
    with pytest.raises(ValueError, match="was trained on backbone 'mini', not 'tiny'"):
        load_adapter(student(TINY), path)
    other = student(seed=1)
    expected, actual = backbone_fingerprint(student()), backbone_fingerprint(other)
    with pytest.raises(ValueError, match=f"'random, seed 0' .*{expected}.*'random, seed 1' .*{actual}.*load those of"):
        load_adapter(other, path)
    assert getattr(other, "adapter", None) is None
    with pytest.raises(ValueError, match="already has adapter 'bone'"):
        load_adapter(trained_student("bone"), path)


def test_save_adapter_rejects_models_without_adapter(tmp_path):
    for model in (student(TINY), adapt(student(TINY), "none"), merge(trained_student("bone", name=TINY, r=16))):
        with pytest.raises(ValueError, match="nothing to save"):
            save_adapter(model, tmp_path / "a")
    with pytest.raises(ValueError, match="without dots"):
        save_adapter(trained_student("bone", name=TINY, r=16), tmp_path / "a", name="fold.1")
    assert not list(tmp_path.iterdir())


def test_read_adapter_info_rejects_invalid_files(tmp_path):
    whole = tmp_path / "a.safetensors"
    save_adapter(trained_student("bone", name=TINY, r=16), whole)
    cut = tmp_path / "cut"
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not a safetensors file")
    for size in (4, 100, whole.stat().st_size - 1):
        cut.write_bytes(whole.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut is truncated or not a safetensors file"):
            load_adapter(student(TINY), cut)
    for name in ("empty", "text"):
        with pytest.raises(ValueError, match=f"{name} is truncated or not a safetensors"):
            read_adapter_info(tmp_path / name)
    save_file({"fold0.blocks": torch.ones(2)}, tmp_path / "old", metadata={"method": "bone"})
    with pytest.raises(ValueError, match="old is no adapter file of peka_lite"):
        read_adapter_info(tmp_path / "old")
    save_file({"a": torch.ones(2)}, tmp_path / "odd", metadata={"peka_lite": json.dumps({"kind": "adapter"})})
    with pytest.raises(ValueError, match="format None, but this peka_lite reads format 1"):
        read_adapter_info(tmp_path / "odd")
    stamp = {"kind": "adapter", "format": 1, "method": "bone"}
    save_file({"a": torch.ones(2)}, tmp_path / "odd", metadata={"peka_lite": json.dumps(stamp)})
    with pytest.raises(ValueError, match="odd: its record is not an adapter's"):
        read_adapter_info(tmp_path / "odd")
    with pytest.raises(FileNotFoundError, match="gone: no such file"):
        read_adapter_info(tmp_path / "gone")


def test_load_adapter_rejects_missing_tensors(tmp_path):
    save_adapter(trained_student("bone", name=TINY, r=16), tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(dict(list(tensors.items())[1:]), tmp_path / "b", metadata=metadata)
    with pytest.raises(ValueError, match="b: adapter and model differ in 1 tensors"):
        load_adapter(student(TINY), tmp_path / "b")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save_adapter(trained_student("bone", name=TINY, r=16), path)
    before = path.read_bytes()
    model = trained_student("bone", name=TINY, r=16, draw=1)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        with pytest.raises(OSError, match="disk is full"):
            save_adapter(model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    save_adapter(model, path)
    assert path.read_bytes() != before


def probe(d=6, genes=3, **options):
    X = np.random.default_rng(d).normal(size=(40, d))
    return PCARidge(4, **options).fit(X, X[:, :genes] + 1)


def test_loaded_probes_are_bit_identical(tmp_path):
    probes = {
        "fold0": (probe(), ["A", "B", "C"]),
        "fold1": (probe(7, 2, alpha=1.5, standardize=False, fit_intercept=True), ["C", "D"]),
    }
    save_probes(tmp_path / "p", probes, normalization="log1p", fingerprint="abcd")
    loaded = load_probes(tmp_path / "p")
    assert (loaded.normalization, loaded.fingerprint) == ("log1p", "abcd")
    for name, (model, genes) in probes.items():
        restored, names = loaded.probes[name]
        X = np.random.default_rng(1).normal(size=(5, len(model.mean_)))
        assert np.array_equal(restored.predict(X), model.predict(X))
        assert names == tuple(genes)
        assert restored.predict(X).dtype == np.float64
        for option in ("n_components", "alpha", "solver", "standardize", "fit_intercept", "n_components_"):
            assert getattr(restored, option) == getattr(model, option)


def test_probe_file_stores_the_range_of_the_training_targets(tmp_path):
    X = np.random.default_rng(0).normal(size=(40, 6))
    Y = np.abs(X[:, :3])
    Y[25:] = 99.0  # rows that are not used for fitting
    sums = gather(X, Y, np.repeat([0, 1, 2], [10, 15, 15]), chunk=7)
    save_probes(tmp_path / "p", {"all": (PCARidge(4).fit_sums(sums.over([0, 1])), "ABC")}, normalization="log1p")
    loaded, _ = load_probes(tmp_path / "p").probes["all"]
    assert np.array_equal(loaded.range_, [Y[:25].min(0), Y[:25].max(0)])
    with safe_open(tmp_path / "p", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    older = {name: values for name, values in tensors.items() if name != "all.range"}
    save_file(older, tmp_path / "older", metadata=metadata)
    older, _ = load_probes(tmp_path / "older").probes["all"]
    assert np.array_equal(older.predict(X), loaded.predict(X))
    assert not hasattr(older, "range_")


def test_invalid_probes_are_rejected(tmp_path):
    X = np.random.default_rng(0).normal(size=(40, 5))
    for model, genes, message in (
        (PCARidge(3, solver="hest-bench").fit(X, X[:, :2]), ["A", "B"], "solver 'hest-bench'; only 'exact'"),
        (PCARidge(3), ["A", "B"], "not fitted"),
        (probe(), ["A", "B"], "predicts 3 genes, not these 2"),
        (probe(), ["A", "B", "A"], "each once"),
    ):
        with pytest.raises(ValueError, match=message):
            save_probes(tmp_path / "p", {"all": (model, genes)}, normalization="log1p")
    with pytest.raises(ValueError, match="without dots"):
        save_probes(tmp_path / "p", {"a.b": (probe(), "ABC")}, normalization="log1p")
    assert not list(tmp_path.iterdir())
    save_adapter(trained_student("bone", name=TINY, r=16), tmp_path / "a")
    with pytest.raises(ValueError, match="a is no probe file"):
        load_probes(tmp_path / "a")
    save_probes(tmp_path / "p", {"all": (probe(), "ABC")}, normalization="log1p")
    with safe_open(tmp_path / "p", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    for changed in ({"all.coef": torch.zeros(6, 2)}, {"all.more": torch.zeros(1)}, {"all.range": torch.zeros(2, 2)}):
        save_file(tensors | changed, tmp_path / "p", metadata=metadata)
        with pytest.raises(ValueError, match="do not fit its 3 genes"):
            load_probes(tmp_path / "p")
