"""A backbone of one's own: checked, known by name, taken by runs and sweeps, and found again by its run."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import peka_lite as pk
from peka_lite._core.lazy import LazyMapping
from peka_lite.backbones import custom as backbone_files, registry
from peka_lite.backbones.custom import read_backbone, register_backbone, row_fields
from peka_lite.backbones.load import load_backbone
from peka_lite.backbones.registry import BACKBONES, IMAGENET, Backbone
from peka_lite.cli.main import main
from peka_lite.experiments.config import check_field

OWN = Backbone(
    "own-vit", "vit_tiny_patch16_224", None, 48, *IMAGENET, "Apache-2.0", input_size=32, pooling="avg", bone_r=16,
    options=LazyMapping({"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_pool": "avg",
                  "act_layer": "torch.nn:SiLU"}),
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture(autouse=True)
def _forgotten():
    """Rows of one test are not known in the next."""
    before = dict(registry._BACKBONES)
    yield
    registry._BACKBONES.clear()
    registry._BACKBONES.update(before)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own_vit.yml"
    path.write_text(yaml.safe_dump(row_fields(OWN), sort_keys=False))
    return path


def changed(file, **fields):
    now = yaml.safe_load(file.read_text()) | fields
    file.write_text(yaml.safe_dump({k: v for k, v in now.items() if v != "remove"}))
    return file


def test_a_registered_row_is_a_name_like_the_others():
    assert register_backbone(OWN) is OWN
    plain = dataclasses.replace(OWN, options=OWN.options._values)
    assert register_backbone(plain) is OWN  # equal: nothing to do
    assert any(isinstance(part, nn.SiLU) for part in load_backbone(plain, weights="random").modules())
    model = load_backbone("own-vit", weights="random")
    assert model.spec is OWN
    assert any(isinstance(part, nn.SiLU) for part in model.modules())
    assert pk.RunConfig(backbone="own-vit", weights="random").block_size == 16
    with pytest.raises(ValueError, match="'own-vit' is known already, with another dim, bone_r; give this one another"):
        register_backbone(dataclasses.replace(OWN, dim=96, bone_r=32))
    with pytest.raises(ValueError, match="'uni' is known already, with another arch"):
        register_backbone(dataclasses.replace(OWN, name="uni"))


def test_a_file_gives_the_row_that_was_written(file):
    assert read_backbone(file) == OWN
    changed(file, precision={"cpu": "torch:float32", "cuda<8.0": "torch:float32", "cuda>=8.0": "torch:float32"})
    row = read_backbone(file)
    assert row.precision["cuda<8.0"] is torch.float32
    file.write_text(yaml.safe_dump(row_fields(row)))
    assert read_backbone(file) == row
    for name in ("uni2-h", "virchow2", "mini"):  # the package's own rows are files as well
        if name != "ctranspath":
            file.write_text(yaml.safe_dump(row_fields(BACKBONES[name])))
            assert read_backbone(file) == BACKBONES[name]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dimm": 48}, "unknown field 'dimm'; did you mean 'dim'"),
        ({"arch": "remove", "dim": "remove"}, "arch, dim missing; a row needs name, arch, source, dim"),
        ({"dim": "48"}, "dim is a whole number above 0, not '48'"),
        ({"dim": -48}, "dim is a whole number above 0, not -48"),
        ({"name": "a/b"}, "name 'a/b': it names folders"),
        ({"name": "a.yml"}, "name 'a.yml': it names folders"),
        ({"mean": [0.5, 0.5]}, "mean is three numbers"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean is on a scale of 0 to 1.*divide by 255"),
        ({"std": [0, 0.5, 0.5]}, "std is on a scale"),
        ({"access": "by hand"}, "access is one of automatic, manual, institution, not 'by hand'"),
        ({"pooling": "cls"}, "unknown pooling 'cls'; known: token, avg, token.avg"),
        ({"bone_r": 32}, "bone_r: r=32 must divide in_features=48 .*: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48"),
        ({"options": {"act_layer": "os:system"}}, "options: act_layer is 'os:system'; give plain values"),
        (
            {"precision": {"cpu": "torch:float32"}},
            "precision names one type for each kind of device, as {'cpu': torch:",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named(file, fields, words):
    with pytest.raises(ValueError, match=rf"own_vit\.yml: {words}"):
        read_backbone(changed(file, **fields))


def test_what_is_no_row_is_named(tmp_path):
    (tmp_path / "a.yml").write_text("- 1")
    with pytest.raises(ValueError, match=r"a\.yml: a row maps fields to values"):
        read_backbone(tmp_path / "a.yml")
    (tmp_path / "b.yml").write_text("a: [")
    with pytest.raises(ValueError, match=r"b\.yml: no YAML"):
        read_backbone(tmp_path / "b.yml")
    with pytest.raises(FileNotFoundError, match=r"c\.yml: no such file; a backbone is a known name or"):
        pk.RunConfig(backbone=str(tmp_path / "c.yml"))
    with pytest.raises(ValueError, match=r"options: act_layer is <class.*'timm.layers:SwiGLUPacked'"):
        register_backbone(dataclasses.replace(OWN, options={"act_layer": nn.SiLU}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 96}, "vit_tiny_patch16_224 gives 48 features, its row says dim 96"),
        ({"arch": "vit_tinny"}, "timm cannot build 'vit_tinny'"),
        ({"options": {"img_sise": 32}}, "timm cannot build"),
    ],
)
def test_a_row_that_timm_does_not_fit_is_named(change, words):
    with pytest.raises(ValueError, match=f"backbone 'own-vit': .*{words}|backbone 'own-vit': {words}"):
        load_backbone(dataclasses.replace(OWN, **change), weights="random")


def test_an_unknown_name_says_how_to_make_it_known():
    for call in (load_backbone, lambda name: check_field("backbone", name), lambda name: pk.RunConfig(backbone=name)):
        with pytest.raises(
            ValueError, match=r"unknown backbone 'minni'; .*register_backbone; known: .*did you mean 'mini'"
        ):
            call("minni")


def test_a_configuration_takes_the_file_and_keeps_the_name(file):
    config = pk.RunConfig(backbone=str(file), weights="random")
    assert config.backbone == "own-vit"
    assert config.as_dict()["backbone"] == "own-vit"
    assert BACKBONES["own-vit"] == OWN
    assert load_backbone(file, weights="random").spec == OWN


def test_a_training_is_used_where_the_row_was_never_registered(mini_root, file, tmp_path, own_cache, capsys):
    out, model = tmp_path / "genes.h5ad", tmp_path / "model"
    options = ["--cohort", str(mini_root), "--backbone", str(file), "--weights", "random", "--n-genes", "10"]
    assert main(["train", *options, "--epochs", "1", "--slides", "MINI1,MINI2", "--out", str(model)]) == 0
    assert (model / "backbone.yml").is_file()
    file.unlink()
    del registry._BACKBONES["own-vit"]  # as in another process
    assert main(["predict", "MINI3", "--model", str(model), "--out", str(out)]) == 0, capsys.readouterr().err
    told = pk.load_trained(model).describe()
    assert told["backbone"] == "own-vit"
    assert BACKBONES["own-vit"] == OWN

    del registry._BACKBONES["own-vit"]
    register_backbone(dataclasses.replace(OWN, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(
        ValueError, match=r"backbone\.yml: backbone 'own-vit' is known already, with another mean; .*own"
    ):
        pk.load_trained(model)
    del registry._BACKBONES["own-vit"]
    (model / "backbone.yml").unlink()
    with pytest.raises(ValueError, match=r"unknown backbone 'own-vit'.*register_backbone"):
        pk.load_trained(model)


def test_a_run_is_read_where_the_row_was_never_registered(mini_root, file, tmp_path, own_cache):
    config = pk.RunConfig(cohort=str(mini_root), backbone=str(file), weights="random", method="none", n_splits=3)
    pk.load_or_run(config, tmp_path / "run", maps=False)
    del registry._BACKBONES["own-vit"]
    again, table, summary, _ = pk.load_run(tmp_path / "run")
    assert again == config
    assert summary["backbone"] == "own-vit"
    assert set(table["backbone"]) == {"own-vit"}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert len(pk.reports.read_runs([tmp_path / "copy"])) == 1


def test_a_student_is_kept_under_its_row(mini_root, tmp_path, own_cache):
    """Another row under the same name and weights is another student, not the one in the cache."""
    from peka_lite.experiments.cache import _key

    config = {"cohort": str(mini_root), "backbone": "own-vit", "weights": "random", "method": "none"}
    keys = []
    for mean in ((0.5, 0.5, 0.5), (0.4, 0.5, 0.5)):
        registry._BACKBONES.pop("own-vit", None)
        register_backbone(dataclasses.replace(OWN, mean=mean))
        keys.append(_key(pk.RunConfig(**config), "data", np.arange(3), None, "cpu"))
    assert keys[0] != keys[1]


def test_a_sweep_hands_the_file_on(mini_root, file, tmp_path):
    sweep = tmp_path / "own.yml"
    grid = {"backbone": ["mini", file.name], "seed": [0, 1]}
    fixed = {"cohort": str(mini_root), "weights": "random", "method": "none"}
    sweep.write_text(yaml.safe_dump({"grid": grid, "fixed": fixed}))
    (tmp_path / "mini").mkdir()  # a folder beside it that is called like a backbone is not meant
    points = pk.experiments.read_sweep(sweep).points
    assert {p.settings["backbone"] for p in points} == {"mini", str(file.resolve())}
    assert pk.RunConfig(**points[-1].settings).backbone == "own-vit"
    changed(file, dim="remove")
    registry._BACKBONES.pop("own-vit", None)
    with pytest.raises(ValueError, match=r"own_vit\.yml: dim missing"):
        pk.experiments.read_sweep(sweep)


def test_every_row_of_the_package_can_be_written_and_passes_the_check():
    for row in BACKBONES.values():
        if row.name != "ctranspath":  # its stem is this package's own
            assert backbone_files._checked(row) == row
            assert LazyMapping(row_fields(row).get("options", {})) == LazyMapping(row.options)
