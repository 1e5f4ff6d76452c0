"""Check exports: timm loads the weights, the card's code runs, and the card has all required facts."""

import importlib
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from test_model import GENES, adapted_student, write_folder

from peka_lite._core._lazy import LazyMapping
from peka_lite.adapters import merge
from peka_lite.backbones import BACKBONES, build_network, extract_features
from peka_lite.experiments import export, load_trained
from peka_lite.experiments._model_card import LICENSES, POOLING, _options, model_card, usage
from peka_lite.probe import load_probes

EXPORT = importlib.import_module("peka_lite.experiments.export")  # the package has a function of this name

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("runs") / "bone")
    rows = {"fold": [0, 0, 1, 1], "gene": ["A", "B"] * 2, "n_train": [120, 120, 63, 63], "n_test": [63, 63, 120, 120]}
    pd.read_csv(folder / "metrics.csv").iloc[[0] * 4].assign(**rows).to_csv(folder / "metrics.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def exported(folder):
    return export(folder, folder.parent / "export", fold=1)


@pytest.fixture(scope="module")
def tiles():
    return np.random.default_rng(0).integers(0, 255, (3, 130, 130, 3), dtype=np.uint8)


def front(card):
    return yaml.safe_load(card.split("---\n")[1])


def of(trained, name, *, origin="hub", **changes):
    """Return the model as if it were trained from another backbone of the registry."""
    spec = BACKBONES[name]
    with torch.device("meta"):
        student = build_network(spec)
    student.spec, student.weights_origin = spec, f"hub {spec.source}" if origin == "hub" else origin
    config = object.__new__(type(trained.config))
    for key, value in (trained.config.as_dict() | {"backbone": name, "weights": origin} | changes).items():
        object.__setattr__(config, key, value)
    return replace(trained, student=student, config=config)


def test_timm_loads_the_merged_weights(exported):
    spec = BACKBONES["mini"]
    path = str(exported / "model.safetensors")
    model = timm.create_model(spec.arch, num_classes=0, checkpoint_path=path, **spec.options).eval()
    student = merge(adapted_student("bone", 1))
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(model(x), student(x))


def test_export_has_one_probe_and_no_other_files(exported, folder):
    assert sorted(p.name for p in exported.iterdir()) == ["README.md", "model.safetensors", "probe.safetensors"]
    assert [p.name for p in folder.parent.glob(".*")] == []
    probes = load_probes(exported / "probe.safetensors")
    assert list(probes.probes) == ["fold1"]
    X = np.random.default_rng(0).normal(size=(4, 192))
    model, genes = probes.probes["fold1"]
    assert np.array_equal(model.predict(X), load_trained(folder, fold=1).probe.predict(X))
    assert genes == GENES


@pytest.mark.parametrize("features", ["student", "frozen+student"])
def test_code_of_card_predicts_the_same(features, tmp_path, tiles, monkeypatch):
    folder = write_folder(tmp_path / "run", features=features)
    out = export(folder, tmp_path / "out", fold=1)
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(out)
    scope = {}
    exec(code, scope)
    expected = load_trained(folder, fold=1, device="cpu").predict(tiles, device="cpu")
    assert np.allclose(scope["predict"](tiles), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES)
def test_code_of_card_sets_every_option_of_a_backbone(name, folder):
    trained = of(load_trained(folder), name)
    compile(usage(trained), name, "exec")
    imports, written = _options(trained.student.spec)
    scope = {"torch": torch}
    exec("\n".join(imports), scope)
    assert eval(f"dict({written.removeprefix(', ')})", scope) == dict(trained.student.spec.options)
    assert written in usage(trained)
    assert ("forward_features" in usage(trained)) == (trained.student.spec.pooling == "token+avg")


def test_code_of_card_imports_layers_of_custom_backbones(folder):
    options = LazyMapping({"act_layer": "torch.nn:GELU", "mlp_layer": "timm.layers:GluMlp", "img_size": [32, 48]})
    imports, written = _options(replace(BACKBONES["mini"], options=options))
    scope = {}
    exec("\n".join(imports), scope)
    assert eval(f"dict({written.removeprefix(', ')})", scope) == dict(options)


@pytest.mark.parametrize("pooling", ["token", "avg", "token+avg", "network"])
@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_code_of_card_pools_as_the_backbone(folder, pooling, global_pool):
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 2, "global_pool": global_pool, "reg_tokens": 2}
    dim, arch = 96 if "+" in pooling else 48, "vit_tiny_patch16_224"
    row = replace(BACKBONES["mini"], arch=arch, dim=dim, input_size=32, pooling=pooling, options=options)
    student = build_network(row).eval()
    student.spec = replace(BACKBONES["mini"], pooling=pooling, options=options)
    code, x = usage(replace(load_trained(folder), student=student)), torch.randn(2, 3, 32, 32)
    expression = re.search(r"return (.+)\.numpy\(\)", code)[1]
    got = eval(expression, {"model": student, "torch": torch, "x": x})
    torch.testing.assert_close(got, extract_features(student, x))
    assert got.shape == (2, dim)


def test_code_of_card_uses_no_tokens_for_a_network_without(folder):
    student = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())  # without a global_pool attribute
    student.spec = replace(BACKBONES["mini"], arch="resnet18", dim=3, pooling="avg", options={})
    code = usage(replace(load_trained(folder), student=student))
    x = torch.randn(2, 3, 8, 8)
    expression = re.search(r"return (.+)\.numpy\(\)", code)[1]
    got = eval(expression, {"model": student, "torch": torch, "x": x})
    torch.testing.assert_close(got, extract_features(student, x))


@pytest.mark.parametrize("name", BACKBONES)
def test_card_has_license_of_the_parent(name, folder):
    spec, card = BACKBONES[name], model_card(of(load_trained(folder), name))
    assert front(card)["license"] in {"apache-2.0", "bsd-3-clause", "agpl-3.0", "cc-by-nc-nd-4.0"}  # the Hub's ids
    assert front(card)["license"] == spec.license.lower()
    assert front(card).get("base_model") == (None if name in ("ctranspath", "mini") else spec.source)
    assert LICENSES[spec.license] in card
    assert ("> [!WARNING]" in card) == ("do not share this folder" in card) == (spec.license == "CC-BY-NC-ND-4.0")
    assert (f"granted at {spec.gate}" in card) == (spec.gate is not None)
    assert POOLING[spec.pooling] in card


@pytest.mark.parametrize(
    ("license", "words"),
    [("GPL-3.0", "shared under the same license"), ("AGPL-3.0", "over a network"), ("MIT", "Read it before you share")],
)
def test_custom_backbone_of_any_license_has_a_card(folder, license, words):
    trained = of(load_trained(folder), "mini")
    trained.student.spec = replace(trained.student.spec, name="custom", license=license)
    card = model_card(trained)
    assert f"{license}. " in card
    assert words in card
    assert "non-commercial academic" not in card


def test_card_has_terms_of_ctranspath_and_scfoundation(folder):
    card = model_card(of(load_trained(folder), "ctranspath"))
    assert "AGPL-3.0" in card
    assert "non-commercial academic purposes" in card
    assert "scFoundation License" not in card
    card = model_card(of(load_trained(folder), "uni", teacher="scfoundation"))
    assert (
        "Its teacher was scFoundation, whose weights are under the scFoundation License (non-commercial research)"
        in card
    )
    assert "scFoundation License" not in model_card(
        of(load_trained(folder), "uni", teacher="scfoundation", method="none")
    )


def test_card_of_random_weights_has_no_parent_license(exported, folder):
    card = (exported / "README.md").read_text()
    assert "no parent weights: the image model started from random, seed 0" in card
    assert "base_model" not in front(card)
    assert front(card)["license"] == "bsd-3-clause"
    uni = model_card(of(load_trained(folder), "uni", origin="random"))
    assert front(uni).keys() & {"license", "base_model"} == set()
    assert "WARNING" not in uni


def test_card_describes_training_and_data(exported, folder):
    card, trained = (exported / "README.md").read_text(), load_trained(folder, fold=1)
    assert front(card)["library_name"] == "timm"
    assert {"pathology", "spatial-transcriptomics"} <= set(front(card)["tags"])
    for text in (
        "# mini, adapted to gene expression with bone",
        "Cohort: tissue\n",
        "Slides (2): S1, S2",
        "Spots: 183",
        "Synthetic: drawn by a program",
        "d" * 16,
        "mean (0.707223, 0.578729, 0.703617) and standard deviation (0.211883, 0.230117, 0.177517)",
        "resized to 112 x 112",
        "Genes: ACTB, KRT8, CD3E.",
        "Protocol 'custom'. Held out: whole patients. Teacher, pseudo-labels and student were fitted on training spots",
        "This is the model of fold 1.",
        "For research only, not for diagnosis",
        "torch 2.6.0",
        f"Fingerprint of the model: {trained.fingerprint}",
    ):
        assert text in card
    assert "/nowhere" not in card  # no local paths


def test_card_has_table_of_all_folds_scores(exported):
    card = (exported / "README.md").read_text()
    assert "| 0 | 120 | 63 | 0.200 |\n| 1 (this model) | 63 | 120 | 0.300 |\n" in card
    assert "| all | | | 0.250 (95% interval 0.100 to 0.400) |" in card
    assert "Student's t times a bootstrap standard error, which resamples patients and genes" in card


def test_single_patient_has_no_interval(folder):
    trained = load_trained(folder)
    alone = replace(trained, summary=trained.summary | {"ci_low": float("nan"), "ci_high": float("nan")})
    assert "0.250 (no interval: there is one patient)" in model_card(alone)


def test_card_warns_about_leakage_in_the_papers_protocol(folder):
    paper = of(load_trained(folder), "mini", origin="random", protocol="paper", split="spot")
    card = model_card(paper)
    assert "single spots, whose neighbors on the same slide were trained on" in card
    assert "fitted on all spots, including those held out" in card
    assert "The genes were selected on all spots" in card


def test_card_of_training_without_scores(tmp_path):
    folder = write_folder(tmp_path / "train", adapters=("all",), probes=("all",), summary={})
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "Nothing was held out: the model was trained on the whole cohort." in card
    assert "There are none: nothing was held out" in card
    assert "| Fold" not in card
    one = write_folder(tmp_path / "one", adapters=("fold3",), probes=("fold3",), summary={})
    card = (export(one, tmp_path / "out1") / "README.md").read_text()
    assert "This is the model of fold 3." in card
    assert "There are none: the held-out spots were not scored" in card


def test_card_of_frozen_student_names_the_parent(tmp_path):
    folder = write_folder(tmp_path / "none", method="none", probes=("all",), summary={})
    card = (export(folder, tmp_path / "out") / "README.md").read_text()
    assert "# mini\n" in card
    assert "The image model is the parent, unchanged." in card
    assert "pseudo-labels" not in card


def test_card_names_license_of_a_manifest_cohort(folder):
    card = model_card(of(load_trained(folder), "mini", origin="random", cohort="breast"))
    assert "breast, Breast cancer (HEST-1k, human Visium) (CC-BY-NC-SA-4.0)" in card
    assert front(card)["datasets"] == ["MahmoodLab/hest"]


def test_export_of_unshareable_weights_warns(folder, tmp_path, monkeypatch):
    small = timm.create_model("resnet10t", num_classes=0)
    small.spec, small.weights_origin = BACKBONES["uni"], "hub MahmoodLab/UNI"
    forbidden = replace(of(load_trained(folder), "uni"), student=small)
    monkeypatch.setattr(EXPORT, "load_trained", lambda *_, **__: forbidden)
    with pytest.warns(UserWarning, match="out must not be shared: the parent weights are CC-BY-NC-ND-4.0"):
        export(folder, tmp_path / "out")


def test_failed_export_leaves_no_files(exported, folder, tmp_path, monkeypatch):
    before = (exported / "README.md").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="export is there already"):
        export(folder, exported)
    assert (exported / "README.md").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="no fold 9"):
        export(folder, tmp_path / "out", fold=9)
    monkeypatch.setattr(EXPORT, "save_probes", lambda *_, **__: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        export(folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())
