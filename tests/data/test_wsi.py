"""Whole-slide images: tiles have the right position from any pyramid, and unusable files raise an error."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile

from peka_lite.data import SlideError, open_slide, wsi

WAVE = 40.0  # um; a shift by one tile pixel (0.5 um) would change a color by up to 8 of 255
INSIDE = slice(4, -4)  # at a slide's edge the filter includes white


def colors(x, y):
    """Return colors that encode the position (um): red from x, green from y, blue slowly from both."""
    red, green = 127.5 + 100 * np.sin(2 * np.pi * x / WAVE), 127.5 + 100 * np.cos(2 * np.pi * y / WAVE)
    return np.stack(np.broadcast_arrays(red, green, (0.1 * x + 0.2 * y) % 256), axis=-1)


def picture(width, height, *, mpp):
    x, y = ((np.arange(n) + 0.5) * um for n, um in zip((width, height), mpp, strict=True))
    return np.rint(colors(x[None, :], y[:, None])).astype(np.uint8)


def write_tiff(path, image, *, mpp=None, ratios=(), aperio=None, resolution=None, unit="CENTIMETER"):
    """Write a tiled TIFF; its levels average whole blocks and drop the remainder, as scanners do."""
    if mpp is not None:
        resolution = tuple(1e4 / um for um in mpp)
    with tifffile.TiffWriter(path) as file:
        for ratio in (1, *ratios):
            h, w = image.shape[0] // ratio, image.shape[1] // ratio
            level = image[: h * ratio, : w * ratio].reshape(h, ratio, w, ratio, 3).mean((1, 3))
            options = {"resolution": resolution, "resolutionunit": unit} if resolution else {}
            file.write(
                np.rint(level).astype(np.uint8), photometric="rgb", tile=(256, 256), compression="zlib", metadata=None,
                description=aperio, subfiletype=int(ratio > 1 and aperio is None), **options,
            )  # fmt: skip
    return path


def expected(row, col, *, n=wsi.TILE, um=0.5):
    offset = (np.arange(n) + 0.5) * um
    return colors((col * n * um + offset)[None, :], (row * n * um + offset)[:, None])


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Write a slide of one level at 0.5 um/px, 700 x 480 px: 3 x 2 whole tiles and partial ones."""
    path = tmp_path_factory.mktemp("wsi") / "plain.tif"
    return write_tiff(path, picture(700, 480, mpp=(0.5, 0.5)), mpp=(0.5, 0.5))


# --- tile positions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mpp", "ratios", "level"),
    [
        ((0.5, 0.5), (4,), 0),
        ((0.25, 0.25), (4,), 0),
        ((0.25, 0.25), (2, 4), 1),
        ((0.2528, 0.2528), (2, 4), 1),
        ((0.4567, 0.4567), (4,), 0),
        ((0.1234, 0.1234), (2, 4, 16), 2),
        ((0.21, 0.21), (2,), 1),
        ((0.25, 0.26), (2,), 0),
        ((0.509, 0.509), (), 0),
    ],
)
def test_tiles_have_the_right_position(tmp_path, mpp, ratios, level):
    width, height = (int(300 // um) | 1 for um in mpp)  # odd: levels drop the remainder
    path = write_tiff(tmp_path / "a.tif", picture(width, height, mpp=mpp), mpp=mpp, ratios=ratios)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(mpp, rel=1e-5)
        assert slide.size == (width, height)
        assert slide._choose_level(slide.tile[0] / 224, slide.tile[1] / 224) == level
        for row in range(2):
            for col in range(2):
                tile = slide.read_tile(row, col)
                assert tile.shape == (224, 224, 3)
                assert tile.dtype == np.uint8
                error = tile.astype(float) - expected(row, col)
                assert np.abs(error[INSIDE, INSIDE, :2]).max() < 3  # 0.2 um; OpenSlide blends pixels at tile borders
                assert np.abs(error[INSIDE, INSIDE]).mean() < 0.5


def test_slide_at_half_a_micron_is_not_resampled(plain):
    image = picture(700, 480, mpp=(0.5, 0.5))
    with open_slide(plain) as slide:
        assert np.array_equal(slide.read_tile(1, 2), image[224:448, 448:672])


def test_area_outside_the_slide_is_white(plain):
    image = picture(700, 480, mpp=(0.5, 0.5))
    with open_slide(plain) as slide:
        tile = slide.read_tile(2, 3)
        assert np.array_equal(tile[:32, :28], image[448:, 672:])
        tile[:32, :28] = 255
        assert (tile == 255).all()
        assert (slide.read_tile(9, 9) == 255).all()


def test_coarse_slide_is_upsampled_with_a_warning(tmp_path):
    path = write_tiff(tmp_path / "a.tif", picture(380, 380, mpp=(0.8, 0.8)), mpp=(0.8, 0.8))
    with pytest.warns(UserWarning, match=r"a\.tif: level 0 has 0\.8 um/px, coarser"):
        slide = open_slide(path)
    error = slide.read_tile(1, 1) - expected(1, 1)
    assert np.abs(error[..., :2]).max() < 2.5


def test_threads_read_the_same_tiles(plain):
    tiles = [(row, col) for row in range(3) for col in range(4)] * 4
    with open_slide(plain) as slide, ThreadPoolExecutor(4) as pool:
        serial = [slide.read_tile(*tile) for tile in tiles]
        parallel = list(pool.map(lambda tile: slide.read_tile(*tile), tiles))
        assert 1 <= len(slide._idle) <= 4
    assert np.array_equal(serial, parallel)


@pytest.mark.parametrize("ratios", [(), (2, 4)])
def test_thumbnail_has_the_right_size_and_scale(tmp_path, monkeypatch, ratios):
    path = write_tiff(
        tmp_path / "a.tif", picture(1203, 805, mpp=(0.25, 0.25)), mpp=(0.25, 0.25), ratios=ratios
    )  # 301 x 201 um
    with open_slide(path) as slide:
        image, scale = slide.thumbnail(250)
        assert image.shape == (168, 250, 3)
        assert scale == pytest.approx(250 / 1203)
        um = 0.25 / scale
        x, y = (np.arange(250) + 0.5) * um, (np.arange(168) + 0.5) * um
        for block in (2048, 100):
            monkeypatch.setattr(wsi, "BLOCK", block)
            error = slide.thumbnail(250)[0] - colors(x[None, :], y[:, None])
            assert np.abs(error[INSIDE, INSIDE, :2]).max() < 3
            assert np.abs(error[INSIDE, INSIDE]).mean() < 0.7
        assert slide.thumbnail(5000)[1] == 1


def test_thumbnail_reads_a_huge_level_in_blocks(tmp_path, monkeypatch):
    path = write_tiff(tmp_path / "a.tif", picture(1203, 805, mpp=(0.25, 0.25)), mpp=(0.25, 0.25))
    monkeypatch.setattr(wsi, "BLOCK", 200)
    with open_slide(path) as slide:
        read_region, sizes = wsi.WholeSlide._read_region, []

        def record(self, corner, level, size, **options):
            sizes.append(size)
            return read_region(self, corner, level, size, **options)

        monkeypatch.setattr(wsi.WholeSlide, "_read_region", record)
        slide.thumbnail(250)
    assert np.max(sizes) < 200 + 2 * 20  # the filter's reach on either side
    assert len(sizes) >= 6 * 4


# --- resolution ----------------------------------------------------------------------------------------------------

APERIO = "Aperio Image Library v12.0\r\n{} [0,0 {}] (256x256) JPEG/RGB Q=70|AppMag = 40"
SMALL = np.full((300, 400, 3), 200, np.uint8)


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"mpp": (0.25, 0.25)}, 0.25),
        ({"resolution": (25400 / 0.25, 25400 / 0.25), "unit": "INCH"}, 0.25),
        ({"aperio": APERIO + "|MPP = 0.2525"}, 0.2525),
        ({"aperio": APERIO, "mpp": (0.25, 0.25)}, 0.25),  # no MPP in the description, but tags
    ],
)
def test_resolution_is_read_from_the_file(tmp_path, options, mpp):
    with open_slide(write_tiff(tmp_path / "a.svs", SMALL, **options)) as slide:
        assert slide.mpp == pytest.approx((mpp, mpp), rel=1e-5)


def test_mpp_overrides_the_files_resolution(tmp_path):
    path = write_tiff(tmp_path / "a.tif", SMALL, mpp=(0.25, 0.25))
    assert open_slide(path, mpp=0.5).mpp == (0.5, 0.5)
    assert open_slide(path, mpp=0.5).tile == (224, 224)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no resolution metadata. .*--mpp"),
        ({"resolution": (20000, 20000), "unit": "NONE"}, r"no resolution metadata. .*--mpp"),
        ({"resolution": (72, 72), "unit": "INCH"}, r"352\.8 x 352\.8 um/px is not plausible. .*--mpp"),
        ({"mpp": (0.01, 0.01)}, r"0\.01 x 0\.01 um/px is not plausible. .*--mpp"),
        ({"mpp": (0.25, 0.5)}, r"not square \(0\.25 x 0\.5 um/px\)"),
        ({"mpp": (2.0, 2.0)}, r"level 0 has 2 um/px, coarser .*at most 1\.0 um/px"),
    ],
)
def test_unusable_resolution_raises(tmp_path, options, message):
    path = write_tiff(tmp_path / "a.tif", SMALL, **options)
    with pytest.raises(SlideError, match=r"a\.tif: .*" + message):
        open_slide(path)
    assert open_slide(path, mpp=0.5).mpp == (0.5, 0.5)


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), 400])
def test_mpp_must_be_plausible(plain, mpp):
    with pytest.raises(ValueError, match="mpp must be microns per pixel"):
        open_slide(plain, mpp=mpp)


# --- files ---------------------------------------------------------------------------------------------------------


def test_other_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.svs: no such file"):
        open_slide(tmp_path / "none.svs")
    with pytest.raises(FileNotFoundError, match="a folder"):
        open_slide(tmp_path)
    (tmp_path / "text.svs").write_text("not a slide")
    with pytest.raises(SlideError, match=r"text\.svs: OpenSlide cannot read it .*vips tiffsave"):
        open_slide(tmp_path / "text.svs")


def test_damaged_tile_raises_and_other_tiles_are_read(tmp_path, plain):
    path = tmp_path / "bad.tif"
    data = bytearray(plain.read_bytes())
    with tifffile.TiffFile(plain) as file:
        start, length = file.pages[0].dataoffsets[2], file.pages[0].databytecounts[2]
    data[start : start + length] = b"\x55" * length  # the upper right: x from 512
    path.write_bytes(data)
    with open_slide(path) as slide, open_slide(plain) as whole:
        for _ in range(2):
            with pytest.raises(SlideError, match=r"bad\.tif: cannot be read around pixel x=448, y=0 of level 0.*again"):
                slide.read_tile(0, 2)
            assert np.array_equal(slide.read_tile(0, 0), whole.read_tile(0, 0))


def test_fingerprint_changes_with_the_file(tmp_path):
    path = write_tiff(tmp_path / "a.tif", SMALL, mpp=(0.5, 0.5))
    first = open_slide(path).fingerprint
    assert open_slide(path).fingerprint == first
    other = SMALL.copy()
    other[0, 0] = 0
    write_tiff(path, other, mpp=(0.5, 0.5))
    assert open_slide(path).fingerprint != first
