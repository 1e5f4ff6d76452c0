"""Check predictions of whole slides: tiles, coordinates, memory, resuming and atomic writes."""

import logging
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pytest
import tifffile

from peka_lite._core.locks import partial_path
from peka_lite.data import SlideError, open_slide, read_slide, tissue_tiles
from peka_lite.data.hest import IMAGE_KEY
from peka_lite.experiments import predict, predict_slide, predict_spots
from peka_lite.experiments.predict import to_h5ad_values
from peka_lite.probe._target_ranges import describe_outside, shares_outside

GLASS = 245


class MeanColor:
    """Fake a trained model whose genes are a tile's mean colors, summed in float64 and so exact for any batch size."""

    genes = ("RED", "GREEN", "BLUE")

    def __init__(self, *, scale=1.0, fail_after=None, fail=None):
        self.fingerprint, self.scale, self.fail_after, self.fail = f"mean color {scale}", scale, fail_after, fail
        self.seen = []  # tiles per batch

    def predict(self, tiles, *, batch_size, device):
        assert tiles.dtype == np.uint8
        assert tiles.shape[1:] == (224, 224, 3)
        if self.fail_after is not None and len(self.seen) == self.fail_after:
            self.fail()
        self.seen.append(len(tiles))
        return (tiles.mean((1, 2), dtype=np.float64) * self.scale).astype(np.float32)

    @property
    def gene_pcc(self):
        return np.linspace(0.5, 0.9, len(self.genes))

    @property
    def target_range(self):
        return np.array([[0.0] * 3, [250.0, 140.0, 100.0]])  # made-up range of red, green and blue

    def describe(self):
        return {
            "backbone": "mean color", "n": 3, "pcc": {"mean": 0.5, "low": None}, "genes": list(self.genes),
            "shape": [1.5, 2], "none": [], "flag": True,
        }  # fmt: skip


def fail():
    raise RuntimeError("power failure")


def paint(rows, cols, *, px=224, edge=1):
    """Return tissue whose color encodes the position: green rises downwards and blue to the right."""
    y, x = np.mgrid[0 : rows * px, 0 : cols * px] / px
    image = np.stack([200 - 0 * x, 110 + 60 * y / rows, 130 + 100 * x / cols], axis=-1)
    image[: edge * px] = image[:, : edge * px] = GLASS
    return np.rint(image).astype(np.uint8)


def save(path, image, *, um=0.5, ratios=()):
    with tifffile.TiffWriter(path) as file:
        for ratio in (1, *ratios):
            h, w = image.shape[0] // ratio, image.shape[1] // ratio
            level = image[: h * ratio, : w * ratio].reshape(h, ratio, w, ratio, 3).mean((1, 3)).round().astype(np.uint8)
            file.write(
                level, photometric="rgb", tile=(256, 256), compression="zlib", metadata=None,
                subfiletype=int(ratio > 1), resolution=(1e4 / um, 1e4 / um), resolutionunit="CENTIMETER",
            )  # fmt: skip
    return path


@pytest.fixture(scope="session")
def slide_path(tmp_path_factory):
    """Write a slide of 5 x 6 tiles at 0.5 um/px; the first row and column are glass."""
    return save(tmp_path_factory.mktemp("predict") / "slide.tif", paint(5, 6))


@pytest.fixture(scope="session")
def whole(slide_path, tmp_path_factory):
    """Return predictions of an uninterrupted job, in batches of four."""
    return predict_slide(slide_path, MeanColor(), tmp_path_factory.mktemp("whole") / "a.h5ad", batch_size=4)


PLACES = [(row, col) for row in range(1, 5) for col in range(1, 6)]


# --- whole slides --------------------------------------------------------------------------------------------------


def test_every_tile_is_predicted_at_its_coordinates(slide_path, whole):
    assert whole.X.dtype == np.float32
    assert list(whole.var_names) == ["RED", "GREEN", "BLUE"]
    assert list(zip(whole.obs["array_row"], whole.obs["array_col"], strict=True)) == PLACES
    assert whole.obs["tissue_share"].between(0.95, 1).all()
    assert list(whole.obs.columns) == ["array_row", "array_col", "tissue_share"]
    image = paint(5, 6)
    for i, (row, col) in enumerate(PLACES):
        tile = image[row * 224 : (row + 1) * 224, col * 224 : (col + 1) * 224]
        assert np.array_equal(whole.X[i], tile.mean((0, 1), dtype=np.float64).astype(np.float32))
        assert whole.obsm["spatial"][i].tolist() == [(col + 0.5) * 224, (row + 0.5) * 224]


@pytest.mark.parametrize(("um", "ratios"), [(0.25, (2, 4)), (0.4567, (4,))])
def test_coordinates_are_right_at_any_resolution(tmp_path, um, ratios):
    px = round(112 / um)  # 448 and 245; a tile of 0.4567 um/px is 245.24 px
    image = paint(4, 4, px=px)
    adata = predict_slide(save(tmp_path / "a.tif", image, um=um, ratios=ratios), MeanColor(), tmp_path / "a.h5ad")
    assert len(adata) == 9
    side = 112 / um
    assert adata.uns["spatial"]["a"]["scalefactors"]["spot_diameter_fullres"] == pytest.approx(side, rel=1e-5)
    for i, (row, col) in enumerate((r, c) for r in range(1, 4) for c in range(1, 4)):
        x, y = adata.obsm["spatial"][i]
        assert (x, y) == pytest.approx(((col + 0.5) * side, (row + 0.5) * side))
        # The colors change linearly, so a tile's mean is the color of its center, in pixels of level 0.
        if row < 3 and col < 3:  # the last tiles of 245.24 px extend over the slide's edge
            assert adata.X[i] == pytest.approx([200, 110 + 15 * y / px, 130 + 25 * x / px], abs=0.3)


def test_provenance_is_stored(whole, slide_path):
    record = whole.uns["peka_lite"]
    assert record["slide"] == "slide.tif"
    assert record["mpp"].tolist() == [0.5, 0.5]
    assert (record["tile_px"], record["tile_mpp"]) == (224, 0.5)
    assert record["version"] == predict.__version__
    assert record["model_fingerprint"] == "mean color 1.0"
    model = record["model"]
    assert (model["backbone"], model["n"], model["flag"]) == ("mean color", 3, True)
    assert (model["pcc"]["mean"], model["pcc"]["low"]) == (0.5, "null")
    assert list(model["genes"]) == ["RED", "GREEN", "BLUE"]
    assert (model["shape"], model["none"]) == ("[1.5, 2]", "[]")


def test_share_outside_training_range_is_stored_and_described(whole):
    low, high = [0.0] * 3, [250.0, 140.0, 100.0]
    outside = (low > whole.X) | (high < whole.X)
    assert 0.3 < outside.mean() < 0.9
    assert whole.uns["peka_lite"]["outside_training_range"] == pytest.approx(outside.mean())
    assert (whole.var["train_min"].tolist(), whole.var["train_max"].tolist()) == (low, high)
    least, most = whole.X[:, 2].min(), whole.X[:, 2].max()
    assert describe_outside(whole) == (
        f"Of the predicted values (20 tiles x 3 genes) 0.0% lie below and {outside.mean():.1%} above the range of "
        f"their gene's training targets; furthest out is BLUE, {least:.2f} to {most:.2f} where training had 0.00 to "
        "100.00."
    )


@pytest.mark.parametrize("custom", [False, True])
def test_unknown_training_range_is_described(slide_path, tmp_path, custom):
    class Older(MeanColor):
        @property
        def target_range(self):
            if custom:
                raise AttributeError("custom models have no target range")
            return np.full((2, 3), np.nan)

    adata = predict_slide(slide_path, Older(), tmp_path / "a.h5ad")
    assert np.isnan(adata.uns["peka_lite"]["outside_training_range"])
    assert "is unknown, because the model is from an older version: train it again, then predict." in describe_outside(
        adata
    )


def test_shares_outside_a_range_match_hand_count():
    X = np.array([[-1, 0, 5], [0, 0, 7], [2 + 1e-7, 0, 6], [9, 0, np.float32(0.3)]], dtype=np.float32)
    below, above = shares_outside(X, np.array([0.0, 0.0, np.nan]), np.array([2.0, 0.0, 3.0]))
    np.testing.assert_array_equal(below, [0.25, 0, np.nan])
    np.testing.assert_array_equal(above, [0.25, 0, np.nan])


def test_mapping_with_a_slash_in_a_key_is_stored_as_text():
    assert to_h5ad_values({"a/b": {"c": 1}}) == '{"a/b": {"c": 1}}'


def test_squidpy_and_scanpy_draw_tiles_at_their_coordinates(whole):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scanpy as sc
        import squidpy as sq

        for key in ("hires", IMAGE_KEY):
            fig, ax = plt.subplots()
            sq.pl.spatial_scatter(whole, color="BLUE", shape="square", img_res_key=key, ax=ax, colorbar=False)
            image, squares = ax.images[0], ax.collections[0]
            scale = whole.uns["spatial"]["slide"]["scalefactors"][f"tissue_{key}_scalef"]
            assert image.get_array().shape[:2] == (5 * 224, 6 * 224)
            bounds = np.array([p.get_extents().extents for p in squares.get_paths()])  # (N, 4)
            centers = (bounds[:, :2] + bounds[:, 2:]) / 2
            assert centers == pytest.approx(whole.obsm["spatial"] * scale)
            assert bounds[:, 2:] - bounds[:, :2] == pytest.approx(224 * scale)
            plt.close(fig)
        axes = sc.pl.spatial(whole, color="BLUE", show=False)
        assert axes[0].images
        plt.close("all")


def test_thumbnail_of_a_large_slide_is_to_scale(tmp_path):
    adata = predict_slide(save(tmp_path / "a.tif", paint(4, 10)), MeanColor(), tmp_path / "a.h5ad")
    library = adata.uns["spatial"]["a"]
    picture, scale = library["images"]["hires"], library["scalefactors"]["tissue_hires_scalef"]
    assert picture.shape == (800, 2000, 3)
    for (x, y), predicted in zip(adata.obsm["spatial"], adata.X, strict=True):
        assert picture[int(y * scale), int(x * scale)] == pytest.approx(predicted, abs=1.5)


# --- interrupted jobs ----------------------------------------------------------------------------------------------


def test_failed_job_resumes(slide_path, whole, tmp_path):
    out = tmp_path / "a.h5ad"
    model = MeanColor(fail_after=3, fail=fail)
    with pytest.raises(RuntimeError, match="power failure"):
        predict_slide(slide_path, model, out, batch_size=4)
    assert model.seen == [4, 4, 4]
    assert not out.exists()
    assert partial_path(out, locked=True).is_dir()
    again = MeanColor()
    adata = predict_slide(slide_path, again, out, batch_size=4)
    assert again.seen == [4, 4]
    assert np.array_equal(adata.X, whole.X)
    assert adata.obs.equals(whole.obs)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]
    assert np.array_equal(ad.read_h5ad(out).X, whole.X)


@pytest.mark.parametrize("change", ["model", "slide", "mpp", "min_tissue", "batch_size", "device"])
def test_job_with_other_data_or_settings_does_not_resume(slide_path, tmp_path, change):
    path = tmp_path / "slide.tif"
    path.write_bytes(slide_path.read_bytes())
    options = {"mpp": None, "min_tissue": 0.5, "batch_size": 4, "device": "cpu"}
    with pytest.raises(RuntimeError, match="power failure"):
        predict_slide(path, MeanColor(fail_after=3, fail=fail), tmp_path / "a.h5ad", **options)
    model = MeanColor(scale=2.0) if change == "model" else MeanColor()
    if change == "slide":
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    other = {"mpp": 0.499, "min_tissue": 0.01, "batch_size": 5, "device": "meta"}
    options |= {change: other[change]} if change in other else {}
    adata = predict_slide(path, model, tmp_path / "a.h5ad", **options)
    assert sum(model.seen) == len(adata)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_predict import MeanColor, predict_slide
model = MeanColor(fail_after=3, fail=lambda: os.kill(os.getpid(), signal.SIGKILL))
predict_slide(sys.argv[2], model, sys.argv[3], batch_size=4)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_killed_job_resumes(slide_path, whole, tmp_path):
    out = tmp_path / "a.h5ad"
    folder = str(Path(__file__).parent)
    job = subprocess.run([sys.executable, "-W", "ignore", "-c", KILLED, folder, str(slide_path), str(out)], check=False)
    assert job.returncode == -signal.SIGKILL
    assert not out.exists()
    model = MeanColor()
    adata = predict_slide(slide_path, model, out, batch_size=4)
    assert model.seen == [4, 4]
    assert np.array_equal(adata.X, whole.X)


def test_output_is_replaced_only_by_complete_predictions(slide_path, whole, tmp_path, monkeypatch):
    out = tmp_path / "a.h5ad"
    predict_slide(slide_path, MeanColor(), out)
    before = out.read_bytes()
    with pytest.raises(RuntimeError, match="power failure"):
        predict_slide(slide_path, MeanColor(scale=2.0, fail_after=0, fail=fail), out)
    assert out.read_bytes() == before

    def full(adata, path, **_):
        Path(path).write_text("partial")
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr("peka_lite.experiments.predict.write_h5ad", full)
        with pytest.raises(OSError, match="no space left"):
            predict_slide(slide_path, MeanColor(scale=2.0), out)
    assert out.read_bytes() == before
    assert np.array_equal(predict_slide(slide_path, MeanColor(scale=2.0), out).X, 2 * whole.X)


# --- memory --------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_slide(tmp_path):
    class Watched(MeanColor):
        def predict(self, tiles, **options):
            if not self.seen:
                tracemalloc.reset_peak()
            time.sleep(0.1)  # let the readers run ahead
            self.at_most = tracemalloc.get_traced_memory()[1]
            return super().predict(tiles, **options)

    peaks, batch = [], 4 * 224 * 224 * 3
    for rows, cols in ((4, 6), (8, 12)):  # 15 tiles with tissue, and 77
        path = save(tmp_path / f"{rows}.tif", paint(rows, cols))
        tracemalloc.start()
        start = tracemalloc.get_traced_memory()[0]
        model = Watched()
        adata = predict_slide(path, model, tmp_path / f"{rows}.h5ad", batch_size=4, workers=2)
        tracemalloc.stop()
        assert sum(model.seen) == (rows - 1) * (cols - 1)
        picture = adata.uns["spatial"][str(rows)]["images"]["hires"].size // 3
        peaks.append(model.at_most - start - 4 * picture)  # three colors and the mask
        assert peaks[-1] > batch
    # One current batch and three read ahead, each briefly copied. All tiles would be 19 batches.
    assert max(peaks) < 9 * batch


def test_readers_are_at_most_workers_batches_ahead():
    requested = []
    batches = [slice(i, i + 1) for i in range(20)]
    for k, (batch, value) in enumerate(predict._read_ahead(lambda b: requested.append(b) or b.start, batches, 3)):
        assert batch.start == value == k
        assert len(requested) <= k + 1 + 3
    assert len(requested) == 20


# --- errors --------------------------------------------------------------------------------------------------------


def test_invalid_input_is_named_and_leaves_no_files(slide_path, tmp_path):
    bare = tmp_path / "bare.tif"
    tifffile.imwrite(bare, paint(3, 3), tile=(256, 256), photometric="rgb")
    (tmp_path / "text.svs").write_text("no slide")
    blank = save(tmp_path / "blank.tif", np.full((500, 500, 3), GLASS, np.uint8))
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "a.h5ad"
    for slide, kind, message in (
        (tmp_path / "none.svs", FileNotFoundError, r"none\.svs: no such file"),
        (tmp_path / "text.svs", SlideError, r"text\.svs: OpenSlide cannot read it"),
        (bare, SlideError, r"bare\.tif: the file has no resolution metadata.*--mpp"),
        (blank, SlideError, r"blank\.tif: no tissue found"),
    ):
        with pytest.raises(kind, match=message):
            predict_slide(slide, MeanColor(), out)
    with pytest.raises(ValueError, match=r"a\.csv: .*\.h5ad"):
        predict_slide(slide_path, MeanColor(), tmp_path / "a.csv")
    for option in ("batch_size", "workers"):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, not 0"):
            predict_slide(slide_path, MeanColor(), out, **{option: 0})
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_unreadable_tile_is_named(slide_path, tmp_path, monkeypatch):
    data = bytearray(slide_path.read_bytes())
    with tifffile.TiffFile(slide_path) as file:
        page = file.pages[0]
        start, length = page.dataoffsets[-1], page.databytecounts[-1]  # the lower right: x from 1280, y from 1024
    data[start : start + length] = b"\x55" * length
    bad, out, model = tmp_path / "bad.tif", tmp_path / "a.h5ad", MeanColor()
    bad.write_bytes(data)
    with pytest.raises(SlideError, match=r"bad\.tif: cannot be read around pixel x=0, y=0 of level 0"):
        predict_slide(bad, model, out)  # while reading the thumbnail, which is of the same level here
    with open_slide(slide_path) as slide:
        tissue = tissue_tiles(slide)
    monkeypatch.setattr(predict, "tissue_tiles", lambda *_, **__: tissue)
    with pytest.raises(
        SlideError, match=r"bad\.tif: cannot be read around pixel x=1120, y=896 of level 0.*copy it again"
    ):
        predict_slide(bad, model, out, batch_size=1, workers=3)
    assert len(model.seen) == 19  # all before the last
    assert not out.exists()


def test_predictions_of_invalid_shape_or_value_are_refused(slide_path, tmp_path):
    class Odd(MeanColor):
        def predict(self, tiles, **options):
            return np.zeros((len(tiles), 2))

    class Broken(MeanColor):
        def predict(self, tiles, **options):
            return np.full((len(tiles), 3), np.nan)

    for model in (Odd(), Broken()):
        with pytest.raises(ValueError, match="the model predicts"):
            predict_slide(slide_path, model, tmp_path / "a.h5ad")
    assert not (tmp_path / "a.h5ad").exists()


def test_progress_bar_counts_tiles(slide_path, tmp_path, capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="peka_lite")
    with pytest.raises(RuntimeError, match="power failure"):
        predict_slide(slide_path, MeanColor(fail_after=2, fail=fail), tmp_path / "a.h5ad", batch_size=4)
    assert "predict" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # plain lines are checked in tests/_core/test_progress.py
    predict_slide(slide_path, MeanColor(), tmp_path / "a.h5ad", batch_size=4, progress=True)
    err = capsys.readouterr().err
    assert caplog.messages[-1] == "plan: 12 tiles to read, 3 genes to predict on each; 8 tiles were done before"
    assert "predict tiles" in err
    assert "8/20" in err
    assert "20/20" in err


# --- HEST slides ---------------------------------------------------------------------------------------------------


def test_spots_of_a_hest_slide_are_predicted(mini_root, tmp_path):
    slide = read_slide(mini_root, "MINI1")
    out = tmp_path / "a.h5ad"
    with pytest.raises(RuntimeError, match="power failure"):
        predict_spots(slide, MeanColor(fail_after=2, fail=fail), out, batch_size=7)
    model = MeanColor()
    adata = predict_spots(slide, model, out, batch_size=7)
    assert sum(model.seen) == slide.n_spots - 14
    assert np.array_equal(adata.X, slide.tiles[:].mean((1, 2), dtype=np.float64).astype(np.float32))
    assert list(adata.obs_names) == list(slide.adata.obs_names)
    assert list(adata.obs.columns) == ["in_tissue", "array_row", "array_col"]
    assert np.array_equal(adata.obsm["spatial"], slide.adata.obsm["spatial"])
    stored, expected = adata.uns["spatial"]["ST"], slide.adata.uns["spatial"]["ST"]
    assert np.array_equal(stored["images"][IMAGE_KEY], expected["images"][IMAGE_KEY])
    assert np.array_equal(stored["images"]["hires"], expected["images"][IMAGE_KEY])
    assert expected["scalefactors"].items() <= stored["scalefactors"].items()
    assert stored["scalefactors"]["tissue_hires_scalef"] == expected["scalefactors"][f"tissue_{IMAGE_KEY}_scalef"]
    assert "hires" not in expected["images"]
    assert adata.uns["peka_lite"]["slide"] == "MINI1"
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


def test_other_spots_do_not_resume(mini_root, tmp_path):
    slide, out = read_slide(mini_root, "MINI1"), tmp_path / "a.h5ad"
    some = slide.select(np.arange(20), reason="test"), slide.select(np.arange(20)[::-1], reason="test")
    with pytest.raises(RuntimeError, match="power failure"):
        predict_spots(some[0], MeanColor(fail_after=2, fail=fail), out, batch_size=7)
    model = MeanColor()
    adata = predict_spots(some[1], model, out, batch_size=7)
    assert sum(model.seen) == 20
    assert np.array_equal(adata.X, some[1].tiles[:].mean((1, 2), dtype=np.float64).astype(np.float32))
    with pytest.raises(ValueError, match=r"a\.txt: .*\.h5ad"):
        predict_spots(slide, MeanColor(), tmp_path / "a.txt")
