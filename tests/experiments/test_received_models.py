"""Check received backbones, runs, adapters, probes and weights: no code is imported, and small files stay cheap."""

import collections
import dataclasses
import json
import subprocess
import sys
import warnings
import zipfile

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import write_folder
from tiny import TINY

import peka_lite as pk
from peka_lite._core._lazy import LazyMapping
from peka_lite._core._torch_files import read_torch_file
from peka_lite.adapters import adapt, load_adapter, read_adapter_info, save_adapter
from peka_lite.backbones import (
    BACKBONES,
    build_network,
    load as backbones,
    load_backbone,
    read_backbone,
    register_backbone,
    registry,
)
from peka_lite.backbones.custom import row_fields
from peka_lite.probe import PCARidge, load_probes, save_probes
from peka_lite.teachers import ScFoundation

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
OPTIONS = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_pool": "avg"}
ROW = row_fields(TINY) | {"name": "received", "source": None}


@pytest.fixture(autouse=True)
def _reset_registry(monkeypatch):
    """Reset the registry after each test, and fail on any access to the Hub."""
    before = dict(registry._BACKBONES)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the Hub was accessed"))
    yield
    registry._BACKBONES.clear()
    registry._BACKBONES.update(before)


def row_file(folder, **fields):
    """Write a backbone's YAML file with changed fields, without those that are None."""
    path = folder / "received.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in (ROW | fields).items() if v is not None or k == "source"}))
    return path


# --- backbones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": dict.fromkeys(("cpu", "cuda<8.0", "cuda>=8.0"), "malicious:float32")},
        {"options": OPTIONS | {"act_layer": "malicious:float32"}},
        {"options": OPTIONS | {"global_pool": "malicious:float32"}},
        {"arch": "malicious:float32"},
    ],
)
def test_no_text_of_a_backbone_file_is_imported(tmp_path, fields):
    row_file(tmp_path, **fields)
    (tmp_path / "malicious.py").write_text("open('ran', 'w').close()\nfloat32 = None\n")
    code = """
import peka_lite as pk
try:
    row = pk.backbones.read_backbone("received.yml")
    pk.backbones.register_backbone(row)
    pk.backbones.register_backbone(pk.backbones.read_backbone("received.yml"))
    dict(row.precision), dict(row.options)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("received.yml: "), done.stderr
    assert not (tmp_path / "ran").exists()
    subprocess.run([sys.executable, "-c", "import malicious"], cwd=tmp_path, check=True)
    assert (tmp_path / "ran").exists()  # an import would have been detected


def test_lazy_mapping_imports_only_listed_objects():
    late = LazyMapping({"act_layer": "torch.nn:SiLU", "teacher": "os:system", "kind": "torch:float16", "path": "a:b:c"})
    assert late["act_layer"] is torch.nn.SiLU
    assert (late["teacher"], late["path"]) == ("os:system", "a:b:c")
    assert late["kind"] is torch.float16


@pytest.mark.parametrize("kind", ["torch:float64", "torch:load", "os:system", "float16", 16, None, ["torch:float16"]])
def test_compute_type_is_one_of_three(tmp_path, kind):
    given = {"cpu": "torch:float32", "cuda<8.0": "torch:float16", "cuda>=8.0": kind}
    with pytest.raises(
        ValueError, match=r"received\.yml: precision: cuda>=8.0 is .*; give one of torch:float32, torch"
    ):
        read_backbone(row_file(tmp_path, precision=given))


def test_registered_backbone_survives_a_round_trip(tmp_path):
    kinds = {"cpu": torch.float32, "cuda<8.0": torch.float16, "cuda>=8.0": "torch:bfloat16"}
    layers = {"act_layer": "gelu", "norm_layer": "timm.layers:RmsNorm", "mlp_layer": "timm.layers:GluMlp"}
    row = dataclasses.replace(TINY, name="received", source=None, precision=kinds, options=OPTIONS | layers)
    row = register_backbone(row)
    assert row.precision["cuda>=8.0"] is torch.bfloat16
    (tmp_path / "row.yml").write_text(yaml.safe_dump(row_fields(row)))
    again = read_backbone(tmp_path / "row.yml")
    assert again == row
    assert any(type(part) is timm.layers.RmsNorm for part in load_backbone(again, weights="random").modules())


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("checkpoint_path", "/home/user/w.pth", "'checkpoint_path' is not allowed"),
        ("pretrained", True, "'pretrained' is not allowed"),
        ("pretrained_cfg", {"file": "x"}, "'pretrained_cfg' is not allowed"),
        ("pretrained_cfg_overlay", {"url": "http://x"}, "'pretrained_cfg_overlay' is not allowed"),
        ("cache_dir", "/tmp", "'cache_dir' is not allowed"),
        ("scriptable", True, "'scriptable' is not allowed"),
        ("num_classes", 10**9, "'num_classes' is not allowed"),
        ("in_chans", 10**9, "'in_chans' is not allowed"),
        ("img_sise", 32, "'img_sise' is not allowed; did you mean 'img_size'"),
        ("depth", 200_000, "depth is 200000; give a whole number from 1 to 200"),
        ("depth", True, "depth is True; give a whole number"),
        ("depth", [2, 2.5], r"depth is \[2, 2.5\]; give a whole number"),
        ("depths", [[2, 2]], r"depths is \[\[2, 2\]\]; give a whole number"),
        ("depths", [2] * 10_000, r"depths is \[2, 2, .*…; give a whole number"),
        ("embed_dim", 10**8, "embed_dim is 100000000; give a whole number from 1 to 16,384"),
        ("img_size", 10**6, "img_size is 1000000; give a whole number from 1 to 1,024"),
        ("num_heads", 0, "num_heads is 0; give a whole number from 1"),
        ("reg_tokens", 10**9, "reg_tokens is 1000000000"),
        ("mlp_ratio", 1e9, "mlp_ratio is 1000000000.0; give a number from 0.0156"),
        ("init_values", float("nan"), "init_values is nan; give a number"),
        ("class_token", "yes", "class_token is 'yes'; give true or false"),
        ("global_pool", {"a": 1}, "global_pool is {'a': 1}; give a plain name"),
        ("global_pool", "../x", "global_pool is '../x'; give a plain name"),
        ("act_layer", "torch.nn:Sylu", "act_layer is 'torch.nn:Sylu'; give .*known: .*torch.nn:SiLU, torch.nn:GELU"),
        ("act_layer", "torch.nn:init", "act_layer is 'torch.nn:init'"),
        ("act_layer", "timm.layers:torch", "act_layer is 'timm.layers:torch'"),
        ("act_layer", "torch:float32", "act_layer is 'torch:float32'"),
        ("norm_layer", 5, "norm_layer is 5"),
    ],
)
def test_options_outside_list_or_bounds_are_refused(tmp_path, option, value, words):
    with pytest.raises(ValueError, match=rf"received\.yml: options: {words}"):
        read_backbone(row_file(tmp_path, options=OPTIONS | {option: value}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *(({"arch": arch}, "arch must be a timm name") for arch in ("hf-hub:a/b", "hf_hub:a/b", "local-dir:/x", "a/b")),
        *(({"arch": arch}, "arch must be a timm") for arch in ("../x", "resnet18.a/b", "resnet18.a:b", "resnet 18")),
        *(
            ({"source": source}, "source must be a hub repository")
            for source in (
                "package/../../../etc/passwd", "package//etc/passwd", "package/a/b", "package\\x", "/etc/passwd",
                "https://example.org/x", "../x", "a/b/c", "datasets/a/b", "datasets/a/b/../../x", "a/..", "a b/c",
                "a/b\n", "", 5, ["a/b"], "x" * 10_000,
            )
        ),
        *(({"revision": r}, "revision must be a commit") for r in ("../../x", "/x", "a b", "x\\y", 5, "a//b")),
        *(({"gate": gate}, "gate must be the address") for gate in ("javascript:alert(1)", "https://a b", 5, "https://a\n")),
        ({"name": ".."}, "name '..'"),
        ({"name": "a\\b"}, "name 'a"),
        ({"name": "a\nb"}, "name must be text of one line"),
        ({"license": "a\u2028b"}, "license must be text of one line"),
        ({"dim": 10**9, "bone_r": None}, "dim must be at most 65,536, not 1,000,000,000"),
        ({"input_size": 10**6}, "input_size must be at most 1,024, not 1,000,000"),
        ({"bone_r": "16"}, "bone_r must be a whole number or None, not '16'"),
        ({"bone_r": 16.0}, "bone_r must be a whole number"),
        ({"options": [1]}, "options must map names to values"),
        ({"precision": "torch:float32"}, "precision must map names to values"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean must be on a scale"),
    ],
)  # fmt: skip
def test_invalid_fields_of_a_backbone_are_refused(tmp_path, fields, words):
    with pytest.raises(ValueError, match=rf"received\.yml: {words}"):
        read_backbone(row_file(tmp_path, **fields))


def test_valid_names_are_accepted(tmp_path):
    for source in ("owner/name", "MahmoodLab/UNI2-h", "datasets/a/b/folder/file.pth", "package/x.safetensors", "gpt2"):
        assert read_backbone(row_file(tmp_path, source=source, revision="refs/pr/1")).source == source
    swin = {"img_size": [64, 64], "depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2], "window_size": 4}
    assert read_backbone(row_file(tmp_path, arch="swin_tiny_patch4_window7_224.ms_in1k", options=swin)).dim == 48


@pytest.mark.parametrize("arch", ["hf-hub:a/b", "local-dir:/tmp", "hf_hub:a/b", "resnet18.x:y", "vit_tinny", "os"])
def test_unknown_architecture_is_refused_before_calling_timm(monkeypatch, arch):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was called"))
    row = dataclasses.replace(TINY, arch=arch, source="other/weights")
    for weights in ("random", "hub"):
        with pytest.raises(ValueError, match="backbone 'tiny': timm cannot build"):
            load_backbone(row, weights=weights)


def test_too_large_network_takes_no_memory(tmp_path):
    many = OPTIONS | {"embed_dim": 16_384, "depth": 200, "num_heads": 16}
    row = read_backbone(row_file(tmp_path, dim=16_384, options=many))
    with pytest.raises(ValueError, match=r"'received': 644,\d{3},\d{3},\d{3} weights are more than the limit"):
        load_backbone(row, weights="random")
    fine = {"input_size": 1024, "options": OPTIONS | {"img_size": 1024, "patch_size": 1}}
    with pytest.raises(ValueError, match="'received': 1,048,576 patches per tile are more than"):
        load_backbone(read_backbone(row_file(tmp_path, **fine)), weights="random")


def test_weights_missing_in_a_file_take_no_memory(tmp_path, monkeypatch):
    torch.save(build_network(TINY).state_dict(), tmp_path / "small.pth")
    many = OPTIONS | {"embed_dim": 8192, "depth": 20, "num_heads": 16}
    row = read_backbone(row_file(tmp_path, dim=8192, options=many))  # 64 GB
    devices = []

    def recording(spec):
        model = build_network(spec)
        devices.extend({p.device.type for p in model.parameters()})
        return model

    monkeypatch.setattr(backbones, "build_network", recording)
    with pytest.raises(ValueError, match=r"small\.pth: these weights do not fit received"):
        load_backbone(row, weights=tmp_path / "small.pth")
    assert devices == ["meta"]
    monkeypatch.setattr(backbones.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 2**34}))
    with pytest.raises(ValueError, match="random weights take 60 GiB of memory, this machine has 16"):
        load_backbone(row, weights="random")
    assert devices == ["meta", "meta"]


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def _folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("runs") / "bone")


@pytest.fixture
def folder(_folder, tmp_path):
    out = tmp_path / "bone"
    out.mkdir()
    for path in _folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


def settings(folder, **changed):
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))


def test_weights_of_received_backbone_are_downloaded_only_on_request(folder, tmp_path, monkeypatch):
    source = load_backbone("mini", weights="random")
    weights = tmp_path / "w.safetensors"
    save_file(source.state_dict(), weights)
    row = dataclasses.replace(BACKBONES["mini"], name="received", source="other/weights")
    (folder / "backbone.yml").write_text(yaml.safe_dump(row_fields(row)))
    settings(folder, backbone="received", weights="hub", method="none")
    with pytest.raises(ValueError, match=r"backbone\.yml needs weights of the Hub repository other/weights"):
        pk.load_trained(folder, device="cpu")
    requested = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, *_, **__: requested.append(repo) or weights)
    pk.load_trained(folder, device="cpu", weights="hub")
    assert requested == ["other/weights"]
    requested.clear()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(weights))
    assert pk.load_trained(folder, device="cpu").student.weights_origin == "hub other/weights"
    assert requested == []


def test_custom_backbone_named_as_in_the_manifest_ignores_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(backbones, "find_fetched", lambda name: pytest.fail(f"{name} was taken from the cache"))
    weights = tmp_path / "w.safetensors"
    save_file(build_network(TINY).state_dict(), weights)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: weights)
    row = register_backbone(dataclasses.replace(TINY, name="scfoundation", source="us/tiny"))
    assert load_backbone(row).weights_origin == "hub us/tiny"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("seed", "__import__('os')", "seed is a whole number"),
        ("seed", 2**40, "seed must be at most 4294967295"),
        ("seed", -1, "seed must be at least 0"),
        ("seed", [1], "seed is a whole number"),
        ("seed", True, "seed is a whole number"),
        ("cohort", "a\n# heading", "cohort is text of one line"),
        ("cohort", {"a": 1}, r"cohort is text \(str\)"),
        ("weights", "hub\x1b[2J", "weights is text of one line"),
        ("weights", 5, r"weights is text \(str\)"),
        ("method", "bonne", "unknown method 'bonne'"),
        ("protocol", ["paper"], r"protocol is text \(str\) or None"),
        ("normalization", "</script>", "unknown normalization"),
        ("backbone", "other.yml", "backbone is the name of a backbone defined in backbone.yml"),
        ("lr", float("nan"), "lr must be a finite number"),
        ("r", 0, "r must be at least 1"),
        ("slides", [["S1"]], "slides is a list of names"),
    ],
)
def test_invalid_settings_of_a_run_are_refused(folder, field, value, words):
    settings(folder, **{field: value})
    with pytest.raises(ValueError, match=rf"config\.yml: {words}"):
        pk.load_trained(folder)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("n_spots", "<b>", "n_spots must be a whole number, not '<b>'"),
        ("mean_pcc", "0.5", "mean_pcc must be a number"),
        ("mean_pcc_per_fold", [0.1, "x"], "mean_pcc_per_fold.1 must be a number"),
        ("ci_low", [1], "ci_low must be a number"),
        ("slides", "S1", "slides.* must be"),
        ("slides", [["S1"]], "slides.* must be"),
        ("versions", {"torch": {"a": 1}}, "versions.torch must be text"),
        ("versions", ["torch"], "versions must be a mapping"),
        ("weights", "a\n# b", "weights must be text of one line"),
        ("unit", 5, "unit must be 'patient' or 'slide'"),
        ("synthetic", "no", "synthetic must be true or false"),
    ],
)
def test_invalid_summary_is_refused(folder, field, value, words):
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"summary\.json: {words}"):
        pk.load_trained(folder)


def test_deeply_nested_summary_is_refused(folder):
    (folder / "summary.json").write_text('{"slides":' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ValueError, match=r"summary\.json is truncated or damaged"):
        pk.load_trained(folder)


# --- adapters and probes -------------------------------------------------------------------------------------------


def change_record(path, change):
    """Change the record of a safetensors file; `change` maps it to a record or to text."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no dict
        record = change(json.loads(file.metadata()["peka_lite"]))
    save_file(tensors, path, metadata={"peka_lite": record if isinstance(record, str) else json.dumps(record)})
    return path


def adapter(path, method):
    save_adapter(adapt(load_backbone(TINY, weights="random"), method, r=8, total_steps=5), path)
    return path


@pytest.mark.parametrize("method", ["lora", "adalora", "miss", "bone"])
def test_rank_beyond_the_tensors_takes_no_memory(tmp_path, monkeypatch, method):
    path = adapter(tmp_path / "a.safetensors", method)
    load_adapter(load_backbone(TINY, weights="random"), path)

    def enlarge(record):
        record["options"]["all"]["r"] = 10**7
        return record

    monkeypatch.setattr("peka_lite.adapters.files.adapt", lambda *_, **__: pytest.fail("an adapter was created"))
    with pytest.raises(
        ValueError, match=r"a\.safetensors: r=10000000 in its record needs at least 2,880,000,000 values"
    ):
        load_adapter(load_backbone(TINY, weights="random"), change_record(path, enlarge))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("r", "8", "r '8'; it is a whole number above 0"),
        ("r", True, "r True; it is"),
        ("r", 10**30, "r 1000000000000000000000000000000; it is"),
        ("alpha", "x", "alpha 'x'; it is a number"),
        ("alpha", float("inf"), "alpha inf; it is a number"),
        ("dropout", float("nan"), "dropout nan; it is a number from 0 to below 1"),
        ("dropout", 1.0, "dropout 1.0; it is a number from 0 to below 1"),
        ("total_steps", 5, r"record is not an adapter's by lora \(it has r, alpha, dropout, total_steps;"),
        ("init_lora_weights", "corda", "record is not an adapter's by lora"),
        ("method", "none", "method 'none'; it is bone, lora, adalora or miss"),
        ("method", ["lora"], "method .'lora'.; it is bone"),
        ("layers", "(a+)+$", "layers .*; it is the name of a layer"),
        ("layers", ["qkv"], "layers .*; it is the name of a layer"),
        ("backbone", {"a": 1}, "backbone .*; it is text of one line"),
        ("weights", "a\nb", "weights .*; it is text of one line"),
        ("options", [], "options .*; it is a mapping"),
        ("options", {}, "options .*; it is a mapping"),
        ("data", {"other": None}, "its record has different sets of tensors in options and in data"),
        ("data", {"all": [1]}, "its record has data .1.; it is a fingerprint"),
    ],
)
def test_invalid_record_of_an_adapter_is_refused(tmp_path, field, value, words):
    def change(record):
        of_set = field not in record
        (record["options"]["all"] if of_set else record)[field] = value
        return record

    path = change_record(adapter(tmp_path / "a.safetensors", "lora"), change)
    with pytest.raises(ValueError, match=rf"a\.safetensors: .*{words}"):
        read_adapter_info(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", '"x"', "null", "{", '{"kind": ' + '{"a":' * 100_000])
@pytest.mark.parametrize("read", [read_adapter_info, load_probes])
def test_record_that_is_not_a_mapping_is_refused(tmp_path, read, text):
    save_file({"all.x": torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"peka_lite": text})
    with pytest.raises(ValueError, match=r"a\.safetensors(: its record is not valid JSON| is no (adapter|probe) file)"):
        read(tmp_path / "a.safetensors")


def test_too_large_record_is_not_read(tmp_path):
    save_file({"all.x": torch.zeros(2)}, tmp_path / "a", metadata={"peka_lite": " " * 2**25 + "{}"})
    with pytest.raises(ValueError, match=r"a: its header of 33,\d{3},\d{3} bytes is longer than the limit"):
        read_adapter_info(tmp_path / "a")


def set_field(*keys):
    def change(value):
        def at(record):
            part = record
            for key in keys[:-1]:
                part = part[key]
            part[keys[-1]] = value
            return record

        return at

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_field("probes")([]), "probes .*; it is a mapping"),
        (set_field("probes", "all")([]), "its record is not a probe's .it is no mapping"),
        (set_field("probes", "all", "genes")("AB"), "genes 'AB'; it is a list of names, each once"),
        (set_field("probes", "all", "genes")([["A"], ["B"]]), "genes .*; it is a list of names, each once"),
        (set_field("probes", "all", "genes")(["A"] * 3), "genes .*; it is a list of names, each once"),
        (
            set_field("probes", "all", "options", "solver")("hest-bench"),
            "its record is not a probe's .it has n_components",
        ),
        (set_field("probes", "all", "options", "alpha")("x"), "alpha 'x'; it is 'hest' or a number"),
        (set_field("probes", "all", "options", "alpha")(float("nan")), "alpha nan; it is 'hest' or a number"),
        (set_field("probes", "all", "options", "n_components")("5"), "n_components '5'; it is a whole number"),
        (set_field("probes", "all", "options", "standardize")("no"), "standardize 'no'; it is true or false"),
        (set_field("normalization")(["log1p"]), "normalization .*; it is text"),
        (set_field("fingerprint")(5), "fingerprint 5; it is text"),
    ],
)
def test_invalid_record_of_a_probe_is_refused(tmp_path, change, words):
    rng = np.random.default_rng(0)
    probe = PCARidge(4).fit(rng.normal(size=(20, 6)), rng.normal(size=(20, 3)))
    save_probes(tmp_path / "p.safetensors", {"all": (probe, ["A", "B", "C"])}, normalization="log1p")
    with pytest.raises(ValueError, match=rf"p\.safetensors: .*{words}"):
        load_probes(change_record(tmp_path / "p.safetensors", change))


def test_probe_of_invalid_type_or_shape_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    probe = PCARidge(4).fit(rng.normal(size=(20, 6)), rng.normal(size=(20, 3)))
    save_probes(tmp_path / "p", {"all": (probe, ["A", "B", "C"])}, normalization="log1p")
    with safe_open(tmp_path / "p", "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    odd = [{"all.coef": tensors["all.coef"].bfloat16()}, {"all.scale": torch.ones(1, dtype=torch.float64)}]
    for change in (*odd, {"all.mean": torch.tensor(0.0, dtype=torch.float64)}):
        save_file(tensors | change, tmp_path / "q", metadata=metadata)
        with pytest.raises(ValueError, match="q: the tensors of 'all' do not fit its 3 genes"):
            load_probes(tmp_path / "q")


# --- files of torch.save -------------------------------------------------------------------------------------------


class Call:
    """Pickle as a call of a function with some values."""

    def __init__(self, function, *values):
        self.call = function, values

    def __reduce__(self):
        return self.call


def nest_doubled(times):
    values = []
    for _ in range(times):
        values = [values, values]
    return values


def rebuild_tensor(size, stride):
    """Pickle a tensor that is larger than its storage of 4 values."""
    storage = torch.zeros(4).storage()
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, size, stride, False, collections.OrderedDict())


SAVED = {
    "stride 0": lambda: torch.zeros(1).expand(10**11),
    "stride 0 in one dimension": lambda: torch.zeros(1000).expand(10**7, 1000),
    "overlapping strides": lambda: torch.zeros(20_000).as_strided((10_000, 10_000), (1, 1)),
    "a view in half precision": lambda: torch.zeros(1, dtype=torch.float16).expand(10**11),
    "complex": lambda: torch.zeros(1, dtype=torch.complex64).expand(10**10),
    "as a parameter": lambda: torch.nn.Parameter(torch.zeros(1).expand(10**11)),
    "many views of one storage": lambda: list(torch.zeros(50_000).expand(3000, 50_000)),
    "more than its storage": lambda: rebuild_tensor((10**10,), (1,)),
    "more than its storage, by stride": lambda: rebuild_tensor((2, 10**5), (10**9, 1)),
    "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6)),
    "sparse rows": lambda: torch.zeros(4, 4).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.quint8),
    "without values": lambda: torch.zeros(10**6, 10**6, device="meta"),
    "bytes by their number": lambda: Call(bytearray, 10**10),
    "lists of one list": lambda: nest_doubled(60),
    "text of lists of one list": lambda: Call(str, nest_doubled(60)),
    "copies of one list": lambda: [Call(collections.OrderedDict, value) for value in [[(1, 2)] * 20_000] * 500],
    "a number of no type": lambda: Call(np.float64(0).__reduce__()[0], np.dtype("S2000000000")),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*quantiz", "ignore:TypedStorage", "ignore:.*stride")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", SAVED)
def test_small_file_of_large_values_is_refused(tmp_path, kind, zipped):
    path = tmp_path / "w.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({"norm.bias": SAVED[kind]()}, path, _use_new_zipfile_serialization=zipped)
    assert path.stat().st_size < 3_000_000
    for read in (lambda: load_backbone(TINY, weights=path), lambda: ScFoundation.from_checkpoint(path, genes=["A"])):
        with pytest.raises(ValueError, match=r"w\.pth: cannot be read as (weights|a checkpoint) \("):
            read()


def zipped(path, pickled, *, compression=zipfile.ZIP_STORED, size=16):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/byteorder", "little")
        archive.writestr("w/data/0", bytes(size))
        archive.writestr("w/version", "3\n")
    return path


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "its values are nested more than 100 levels deep"),
        (b"\x80\x02" + b"}K\x01" * 100_000 + b"N" + b"s" * 100_000 + b".", "its values are nested more than 100"),
        (b"\x80\x02]q\x00h\x00a.", "one of its values contains itself"),
        (b"\x80\x02" + b"K\x01" * 2**23 + b".", "its pickle has 16,777,219 bytes"),
    ],
)
def test_deeply_nested_pickle_is_refused(tmp_path, pickled, words):
    with pytest.raises(ValueError, match=rf"w\.pth: cannot be read as weights \({words}"):
        load_backbone(TINY, weights=zipped(tmp_path / "w.pth", pickled))


def test_zip_bomb_is_refused(tmp_path):
    path = zipped(tmp_path / "w.pth", b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED, size=10**7)
    with pytest.raises(ValueError, match=r"\(its 4 entries unpack to 10,000,\d{3} bytes of a file of \d"):
        load_backbone(TINY, weights=path)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_training_scripts_are_read(tmp_path, zipped):
    table, value = torch.arange(50_000.0), {"a": [1, (2, {3})], "b": collections.OrderedDict(c=None)}
    file = {"table": table, "tied": table.view(100, 500), "part": table[10:20], "turned": table.view(100, 500).T}
    file |= {"mask": torch.zeros(1).expand(4, 4), "one": torch.tensor(1), "none": torch.zeros(0, 3), "value": value}
    file |= {"steps": collections.Counter({3: 1}), "bits": b"abc", "many": [value] * 50, "kind": torch.bfloat16}
    torch.save(file, tmp_path / "a", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(tmp_path / "a", kind="weights", instead="")
    for name, expected in file.items():
        same = torch.equal(read[name], expected) if isinstance(expected, torch.Tensor) else read[name] == expected
        assert same, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 10**6}, "depth must be from 1 to 1,000, not 1000000"),
        ({"heads": 0}, "heads must be from 1 to 65,536, not 0"),
        ({"hidden_dim": -16}, "hidden_dim must be from 1"),
        ({"hidden_dim": 10**9}, "hidden_dim must be from 1 to 65,536, not 1000000000"),
        ({"depth": float("inf")}, "cannot convert float infinity to integer"),
        ({"depth": 900}, "Missing key"),
    ],
)
def test_teachers_sizes_are_checked_before_building_it(tmp_path, change, words):
    encoder = {"hidden_dim": 16, "depth": 1, "heads": 2, "module_type": "transformer"} | change
    sizes = {"seq_len": 32, "bin_num": 7, "bin_alpha": 1.0, "mask_token_id": 102, "pad_token_id": 103}
    config = {"model": "m", "model_config": {"m": {"encoder": encoder} | sizes}, "dataset_config": {"rnaseq": {}}}
    torch.save({"cell": {"config": config, "state_dict": {"pos_emb.weight": torch.zeros(33, 16)}}}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=rf"m\.ckpt: entry 'cell' holds no scFoundation model: [\s\S]*{words}"):
        ScFoundation.from_checkpoint(tmp_path / "m.ckpt", genes=[f"G{k}" for k in range(30)])
