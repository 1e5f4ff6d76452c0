"""Check predictions from a run's folder: the fold, images and spots, and invalid input."""

import json
import re
import shutil

import anndata as ad
import numpy as np
import pytest
import tifffile

from peka_lite.cli.main import main
from peka_lite.data import expression_targets, read_cohort, read_slide
from peka_lite.experiments import RunConfig, RunFolder, load_trained, predict_from, run, train
from peka_lite.experiments._predict_from import fold_without

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("isolated_cache"),
]


def config(root, **changes):
    settings = {"cohort": str(root), "weights": "random", "method": "none", "n_splits": 3, "n_genes": 8}
    return RunConfig(**settings | changes)


@pytest.fixture(scope="module")
def finished_run(isolated_cache, mini_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    run(config(mini_root), out, maps=False)
    return out


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Write three rows of four tiles of purple tissue on white glass, at 0.5 um/px."""
    pixels = np.full((224 * 6, 224 * 8, 3), 245, dtype=np.uint8)
    noise = np.random.default_rng(0).integers(-20, 20, (224 * 3, 224 * 4, 3))
    pixels[224 * 2 : 224 * 5, 224 * 2 : 224 * 6] = np.array([150, 70, 160]) + noise
    path = tmp_path_factory.mktemp("wsi") / "slide.tif"
    tifffile.imwrite(
        path, pixels, tile=(256, 256), photometric="rgb", resolution=(20000, 20000), resolutionunit="CENTIMETER"
    )
    return path


def test_slide_of_the_run_is_predicted_by_its_test_fold(finished_run, mini_root, tmp_path):
    written = ad.read_h5ad(finished_run / "predictions.h5ad")
    for slide in ("MINI1", "MINI3"):
        got = predict_from(finished_run, slide, tmp_path / f"{slide}.h5ad", device="cpu")
        expected = written[written.obs["slide"] == slide]
        assert got.uns["peka_lite"]["held_out"] == "yes"
        assert got.uns["peka_lite"]["model"]["fold"] == f"fold{expected.obs['fold'].iloc[0]}"
        # The probe has an intercept, so both are in the genes' units.
        np.testing.assert_allclose(got.X, expected[:, got.var_names].X, atol=1e-3)


def test_range_is_that_of_the_folds_training_rows(finished_run, mini_root, tmp_path, capsys):
    cohort, written = read_cohort(mini_root), ad.read_h5ad(finished_run / "predictions.h5ad")
    fold_of = written.obs["fold"].to_numpy()
    highest = []
    for fold in range(3):
        model = load_trained(finished_run, fold=fold, device="cpu")
        Y = expression_targets(cohort.adata[written.obs_names], model.genes)[fold_of != fold]
        np.testing.assert_allclose(model.target_range, [Y.min(0), Y.max(0)], rtol=1e-6)
        highest.append(model.target_range[1].max())
    assert len(set(highest)) > 1  # ranges exclude test rows
    out = tmp_path / "p.h5ad"
    assert main(["predict", "MINI1", "--model", str(finished_run), "--out", str(out), "--device", "cpu"]) == 0
    got = ad.read_h5ad(out)
    low, high = got.var["train_min"].to_numpy(), got.var["train_max"].to_numpy()
    outside = (low - 1e-5 > got.X) | (high + 1e-5 < got.X)
    assert got.uns["peka_lite"]["outside_training_range"] == pytest.approx(outside.mean())
    assert f"Of the predicted values ({len(got)} spots x 8 genes)" in capsys.readouterr().out


def test_given_fold_is_used_and_slide_marked_as_trained_on(finished_run, tmp_path):
    test_fold = fold_without(RunFolder.open(finished_run), "MINI1")
    got = predict_from(finished_run, "MINI1", tmp_path / "p.h5ad", fold=(test_fold + 1) % 3, device="cpu")
    assert got.uns["peka_lite"]["held_out"] == "no"


def test_slide_of_another_cohort_is_marked(finished_run, mini_root, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(mini_root)
    got = predict_from(finished_run, "MINI1", tmp_path / "p.h5ad", cohort=other, device="cpu")
    assert got.uns["peka_lite"]["held_out"] == "other cohort"


def test_model_without_its_cohort_predicts_slides_of_another(finished_run, mini_root, tmp_path):
    model = shutil.copytree(finished_run, tmp_path / "model")
    text = (model / "config.yml").read_text()
    (model / "config.yml").write_text(text.replace(str(mini_root), "gone/away"))
    got = predict_from(model, "MINI1", tmp_path / "p.h5ad", cohort=mini_root, device="cpu")
    assert got.uns["peka_lite"]["held_out"] == "other cohort"


@pytest.mark.parametrize(
    ("changes", "fold", "slides"),
    [({}, None, []), ({}, 1, 1), ({"split": "spot"}, 1, []), ({"protocol": "paper"}, 1, [])],
)
def test_training_records_its_excluded_slides(mini_root, tmp_path, changes, fold, slides):
    train(config(mini_root, **changes), tmp_path / "model", fold=fold)
    excluded = json.loads((tmp_path / "model" / "summary.json").read_text())["held_out"]
    assert excluded == slides if isinstance(slides, list) else len(excluded) >= slides
    for slide in ("MINI1", "MINI2", "MINI3", "MINI4"):
        assert fold_without(RunFolder.open(tmp_path / "model"), slide) == (fold if slide in excluded else None)


def test_image_is_predicted_tile_by_tile(finished_run, image, tmp_path, capsys):
    assert main(["predict", str(image), "--model", str(finished_run), "--out", str(tmp_path / "p.h5ad")]) == 0
    printed = capsys.readouterr().out
    assert (
        "8 genes at 12 tiles of 112 um, each at least 50% tissue, from pixels of 0.5 um, by model finished, fold0"
        in printed
    )
    got = ad.read_h5ad(tmp_path / "p.h5ad")
    pixels = tifffile.imread(image)
    tiles = np.stack([pixels[r * 224 : (r + 1) * 224, c * 224 : (c + 1) * 224]
                      for r, c in got.obs[["array_row", "array_col"]].to_numpy()])  # fmt: skip
    np.testing.assert_allclose(got.X, load_trained(finished_run, fold=0, device="cpu").predict(tiles), atol=1e-4)
    assert sorted(set(got.obs["array_row"])) == [2, 3, 4]
    assert sorted(set(got.obs["array_col"])) == [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("slide", "options", "message"),
    [
        ("OTHER", [], "OTHER: no such image file, and no slide of the cohort .*mini, which has MINI1, MINI2"),
        ("MINI1", ["--mpp", "0.5"], "give mpp only with an image file"),
        ("MINI1", ["--fold", "7"], "no fold 7"),
        (__file__, ["--cohort", "mini"], "is an image file"),
        ("MINI1", ["--model", "nowhere"], "nowhere: no finished run or training"),
    ],
)
def test_invalid_input_prints_one_line_and_leaves_no_files(finished_run, tmp_path, capsys, slide, options, message):
    out = tmp_path / "p.h5ad"
    assert main(["predict", slide, "--model", str(finished_run), *options, "--out", str(out)]) == 2
    shown = capsys.readouterr().err.strip()
    assert re.search(message, shown)
    assert "\n" not in shown
    assert list(tmp_path.iterdir()) == []


def test_train_embed_and_export_from_the_command_line(mini_root, tmp_path, capsys):
    settings = ["--cohort", str(mini_root), "--weights", "random", "--method", "none", "--n-genes", "8"]
    assert main(["train", *settings, "--out", str(tmp_path / "model")]) == 0
    assert "model: mini (random, seed 0), frozen" in capsys.readouterr().out
    features = tmp_path / "f.h5ad"
    assert main(["embed", "--cohort", str(mini_root), "--slides", "MINI2", "--model", str(tmp_path / "model"),
                 "--out", str(features)]) == 0  # fmt: skip
    cohort_slide = read_slide(mini_root, "MINI2")
    assert ad.read_h5ad(features).shape[1] == 192
    assert len(ad.read_h5ad(features)) <= cohort_slide.n_spots
    frozen = tmp_path / "g.h5ad"
    assert main(["embed", "--cohort", str(mini_root), "--slides", "MINI2", "--backbone", "mini", "--weights", "random",
                 "--out", str(frozen)]) == 0  # fmt: skip
    assert np.array_equal(ad.read_h5ad(features).X, ad.read_h5ad(frozen).X)
    assert main(["export", str(tmp_path / "model"), "--out", str(tmp_path / "shared")]) == 0
    assert (tmp_path / "shared" / "README.md").is_file()
    capsys.readouterr()
    assert main(["embed", "--cohort", str(mini_root), "--out", str(tmp_path / "h.h5ad")]) == 2
    assert "--model" in capsys.readouterr().err
    arguments = [
        "embed",
        "--cohort",
        str(mini_root),
        "--backbone",
        "mini",
        "--fold",
        "1",
        "--out",
        str(tmp_path / "h.h5ad"),
    ]
    assert main(arguments) == 2
    assert "--fold names a model of --model" in capsys.readouterr().err
