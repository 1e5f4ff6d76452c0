"""Custom backbones are checked, registered by name, accepted by runs and sweeps, and restored with a run."""

import dataclasses
import shutil

import pytest
import torch
import yaml
from torch import nn

import peka_lite as pk
from peka_lite._core._lazy import LazyMapping
from peka_lite.backbones import BACKBONES, Backbone, custom, load_backbone, read_backbone, register_backbone, registry
from peka_lite.backbones.custom import row_fields
from peka_lite.backbones.registry import IMAGENET
from peka_lite.cli.main import main
from peka_lite.experiments.settings import check_field
from peka_lite.experiments.sweeps.run import _used_cache

CUSTOM = Backbone(
    "custom-vit", "vit_tiny_patch16_224", None, 48, *IMAGENET, "Apache-2.0", input_size=32, pooling="avg", bone_r=16,
    options=LazyMapping({"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_pool": "avg",
                  "act_layer": "torch.nn:SiLU"}),
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture(autouse=True)
def _unregister():
    """Remove the rows that a test registers."""
    before = dict(registry._BACKBONES)
    yield
    registry._BACKBONES.clear()
    registry._BACKBONES.update(before)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "custom_vit.yml"
    path.write_text(yaml.safe_dump(row_fields(CUSTOM), sort_keys=False))
    return path


def change_fields(file, **fields):
    row = yaml.safe_load(file.read_text()) | fields
    file.write_text(yaml.safe_dump({k: v for k, v in row.items() if v != "remove"}))
    return file


def test_registered_row_can_be_loaded_by_name():
    assert register_backbone(CUSTOM) is CUSTOM
    plain = dataclasses.replace(CUSTOM, options=CUSTOM.options._values)
    assert register_backbone(plain) is CUSTOM  # an equal row
    assert any(isinstance(part, nn.SiLU) for part in load_backbone(plain, weights="random").modules())
    model = load_backbone("custom-vit", weights="random")
    assert model.spec is CUSTOM
    assert any(isinstance(part, nn.SiLU) for part in model.modules())
    assert pk.RunConfig(backbone="custom-vit", weights="random").block_size == 16
    with pytest.raises(ValueError, match="'custom-vit' is already registered with another dim, bone_r; choose another"):
        register_backbone(dataclasses.replace(CUSTOM, dim=96, bone_r=32))
    with pytest.raises(ValueError, match="'uni' is already registered with another arch"):
        register_backbone(dataclasses.replace(CUSTOM, name="uni"))


def test_row_round_trips_through_a_file(file):
    assert read_backbone(file) == CUSTOM
    change_fields(file, precision={"cpu": "torch:float32", "cuda<8.0": "torch:float32", "cuda>=8.0": "torch:float32"})
    row = read_backbone(file)
    assert row.precision["cuda<8.0"] is torch.float32
    file.write_text(yaml.safe_dump(row_fields(row)))
    assert read_backbone(file) == row
    for name in ("uni2-h", "virchow2", "mini"):  # rows of the package can be files too
        if name != "ctranspath":
            file.write_text(yaml.safe_dump(row_fields(BACKBONES[name])))
            assert read_backbone(file) == BACKBONES[name]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dimm": 48}, "unknown field 'dimm'; did you mean 'dim'"),
        ({"arch": "remove", "dim": "remove"}, "arch, dim missing; a row needs name, arch, source, dim"),
        ({"dim": "48"}, "dim must be a whole number above 0, not '48'"),
        ({"dim": -48}, "dim must be a whole number above 0, not -48"),
        ({"name": "a/b"}, "name 'a/b' is used for folders"),
        ({"name": "a.yml"}, "name 'a.yml' is used for folders"),
        ({"mean": [0.5, 0.5]}, "mean must be three numbers"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean must be on a scale of 0 to 1.*divide by 255"),
        ({"std": [0, 0.5, 0.5]}, "std must be on a scale"),
        ({"access": "by hand"}, "access must be one of automatic, manual, institution, not 'by hand'"),
        ({"pooling": "cls"}, "unknown pooling 'cls'; known: token, avg, token.avg"),
        ({"bone_r": 32}, "bone_r: r=32 must divide in_features=48 .*: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ({"options": {"act_layer": "os:system"}}, "options: act_layer is 'os:system'; give a layer as text"),
        ({"precision": {"cpu": "torch:float32"}}, "precision must have one type per kind of device: {'cpu': torch:"),
    ],
)
def test_invalid_field_in_a_file_is_named(file, fields, words):
    with pytest.raises(ValueError, match=rf"custom_vit\.yml: {words}"):
        read_backbone(change_fields(file, **fields))


def test_invalid_or_missing_file_is_named(tmp_path):
    (tmp_path / "a.yml").write_text("- 1")
    with pytest.raises(ValueError, match=r"a\.yml: the file must map fields to values"):
        read_backbone(tmp_path / "a.yml")
    (tmp_path / "b.yml").write_text("a: [")
    with pytest.raises(ValueError, match=r"b\.yml: invalid YAML"):
        read_backbone(tmp_path / "b.yml")
    with pytest.raises(FileNotFoundError, match=r"c\.yml: file not found; a backbone is a registered name or"):
        pk.RunConfig(backbone=str(tmp_path / "c.yml")).check()
    with pytest.raises(ValueError, match=r"options: act_layer is <class.*'timm.layers:SwiGLUPacked'"):
        register_backbone(dataclasses.replace(CUSTOM, options={"act_layer": nn.SiLU}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 96}, "vit_tiny_patch16_224 has 48 features, but its row has dim 96"),
        ({"arch": "vit_tinny"}, "timm cannot build 'vit_tinny'"),
        ({"options": {"img_sise": 32}}, "timm cannot build"),
    ],
)
def test_row_that_timm_cannot_build_is_named(change, words):
    with pytest.raises(ValueError, match=f"backbone 'custom-vit': .*{words}|backbone 'custom-vit': {words}"):
        load_backbone(dataclasses.replace(CUSTOM, **change), weights="random")


def test_unknown_name_error_mentions_register_backbone():
    for call in (load_backbone, lambda name: check_field("backbone", name), lambda name: pk.RunConfig(backbone=name)):
        with pytest.raises(
            ValueError, match=r"unknown backbone 'minni'; .*register_backbone; known: .*did you mean 'mini'"
        ):
            call("minni")


def test_config_keeps_a_file_and_gives_its_row(file):
    config = pk.RunConfig(backbone=str(file), weights="random")
    assert config.as_dict()["backbone"] == config.backbone == str(file)
    assert config.spec == CUSTOM
    assert config.with_backbone_name().backbone == "custom-vit"
    assert BACKBONES["custom-vit"] == CUSTOM
    assert load_backbone(file, weights="random").spec == CUSTOM


def test_trained_model_restores_an_unregistered_row(mini_root, file, tmp_path, isolated_cache, capsys):
    out, model = tmp_path / "genes.h5ad", tmp_path / "model"
    options = ["--cohort", str(mini_root), "--backbone", str(file), "--weights", "random", "--n-genes", "10"]
    assert main(["train", *options, "--epochs", "1", "--slides", "MINI1,MINI2", "--out", str(model)]) == 0
    assert (model / "backbone.yml").is_file()
    file.unlink()
    del registry._BACKBONES["custom-vit"]  # as in another process
    assert main(["predict", "MINI3", "--model", str(model), "--out", str(out)]) == 0, capsys.readouterr().err
    assert pk.load_trained(model).describe()["backbone"] == "custom-vit"
    assert BACKBONES["custom-vit"] == CUSTOM

    del registry._BACKBONES["custom-vit"]
    register_backbone(dataclasses.replace(CUSTOM, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(
        ValueError,
        match=r"backbone\.yml: backbone 'custom-vit' is already registered with another mean; .*separate process",
    ):
        pk.load_trained(model)
    del registry._BACKBONES["custom-vit"]
    (model / "backbone.yml").unlink()
    with pytest.raises(ValueError, match=r"unknown backbone 'custom-vit'.*register_backbone"):
        pk.load_trained(model)


def test_run_restores_an_unregistered_row(mini_root, file, tmp_path, isolated_cache):
    config = pk.RunConfig(cohort=str(mini_root), backbone=str(file), weights="random", method="none", n_splits=3)
    pk.load_or_run(config, tmp_path / "run", maps=False)
    del registry._BACKBONES["custom-vit"]
    again, table, summary, _ = pk.load_run(tmp_path / "run")
    assert again == config.with_backbone_name()
    assert summary["backbone"] == "custom-vit"
    assert set(table["backbone"]) == {"custom-vit"}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert len(pk.reports.read_runs([tmp_path / "copy"])) == 1


def test_cache_key_of_a_student_depends_on_its_row(mini_root, mini_cohort, isolated_cache):
    config = {"cohort": str(mini_root), "backbone": "custom-vit", "weights": "random", "method": "none"}
    keys = []
    for mean in ((0.5, 0.5, 0.5), (0.4, 0.5, 0.5)):
        registry._BACKBONES.pop("custom-vit", None)
        register_backbone(dataclasses.replace(CUSTOM, mean=mean))
        keys.append(pk.experiments.Features(pk.RunConfig(**config), mini_cohort, device="cpu").folder(None))
    assert keys[0] != keys[1]


def test_sweep_passes_the_file_to_its_points(mini_root, file, tmp_path):
    sweep = tmp_path / "sweep.yml"
    grid = {"backbone": ["mini", file.name], "seed": [0, 1]}
    fixed = {"cohort": str(mini_root), "weights": "random", "method": "none"}
    sweep.write_text(yaml.safe_dump({"grid": grid, "fixed": fixed}))
    (tmp_path / "mini").mkdir()  # a folder named like a backbone is ignored
    points = pk.experiments.read_sweep(sweep).points
    assert {p.settings["backbone"] for p in points} == {"mini", str(file.resolve())}
    assert pk.RunConfig(**points[-1].settings).spec.name == "custom-vit"
    assert _used_cache({"notebook": None, "settings": points[-1].settings}, since=1e12)  # its name, not the path
    change_fields(file, dim="remove")
    registry._BACKBONES.pop("custom-vit", None)
    with pytest.raises(ValueError, match=r"custom_vit\.yml: dim missing"):
        pk.experiments.read_sweep(sweep)


def test_every_row_of_the_package_passes_the_check():
    for row in BACKBONES.values():
        if row.name != "ctranspath":  # its stem is a class of this package
            assert custom._check_row(row) == row
            assert LazyMapping(row_fields(row).get("options", {})) == LazyMapping(row.options)
