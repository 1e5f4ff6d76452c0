"""Any container, layout, channels and bit depth: pixels are read correctly, or an error describes the file."""

from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage.color import rgb2gray

import peka_lite as pk
from peka_lite.data import SlideError, open_slide, tissue_tiles
from peka_lite.data.tissue import check_stain

TILED = {"tile": (128, 128), "compression": "zlib", "metadata": None}
WIDTH, HEIGHT = 340, 260
NAMES = ("DAPI", "CD3", "CK")


def stained(width=WIDTH, height=HEIGHT):
    """Return an image of tissue in H&E's colors on glass, without repeated pixels."""
    y, x = np.mgrid[:height, :width] / (height, width)[0]
    image = np.stack([230 - 60 * x, 90 + 50 * y, 180 + 20 * (x - y)], axis=-1)
    image[:30], image[:, -40:] = (243, 241, 244), (243, 241, 244)
    return np.rint(image).astype(np.uint8)


HE = stained()


def with_alpha(alpha, image=HE):
    return np.dstack([image, np.broadcast_to(np.asarray(alpha, image.dtype), image.shape[:2])])


def write(path, *pages, **options):
    """Write one page for each (image, page options); `options` apply to all."""
    with tifffile.TiffWriter(path, ome=path.name.endswith(".ome.tif")) as file:
        for image, page in pages:
            file.write(image, **{"photometric": "rgb", **TILED, **options, **page})
    return path


def read(path):
    with open_slide(path, mpp=0.5) as slide:
        assert slide.size == slide._idle[0].dimensions
        return slide.thumbnail()[0]


def planes(image=HE):
    return image.transpose(2, 0, 1)


LAYOUTS = {
    "planes.ome.tif": (planes(), {"photometric": "minisblack", "metadata": {"axes": "CYX"}}),
    "named.ome.tif": (
        planes(HE[..., ::-1]),
        {"photometric": "minisblack", "metadata": {"axes": "CYX", "Channel": {"Name": ["Blue", "Green", "Red"]}}},
    ),
    "numbered.ome.tif": (
        planes(),
        {"photometric": "minisblack", "metadata": {"axes": "CYX", "Channel": {"Name": ["Channel:0:0", "C2", "3"]}}},
    ),
    "planar.ome.tif": (planes(), {"planarconfig": "separate", "metadata": {"axes": "CYX"}}),
    "interleaved.ome.tif": (HE, {"metadata": {"axes": "YXS"}}),
    "five-axes.ome.tif": (planes()[None, :, None], {"photometric": "minisblack", "metadata": {"axes": "TCZYX"}}),
    "axes.tif": (planes(), {"photometric": "minisblack", "metadata": {"axes": "CYX"}}),
    "jpeg2000.tif": (HE, {"compression": "jpeg2000"}),
    "planar.tif": (planes(), {"planarconfig": "separate"}),
    "planar-gray.tif": (planes(), {"planarconfig": "separate", "photometric": "minisblack"}),
    "interleaved-gray.tif": (HE, {"planarconfig": "contig", "photometric": "minisblack"}),
    "alpha-0.tif": (with_alpha(0), {}),
    "alpha-0-associated.tif": (with_alpha(0), {"extrasamples": ["assocalpha"]}),
    "alpha-0-strips.tif": (with_alpha(0), {"tile": None}),
    "alpha-255.tif": (with_alpha(255), {}),
    "fourth-0.tif": (with_alpha(0), {"extrasamples": ["unspecified"]}),
    "fourth-any.tif": (with_alpha(HE[..., 0]), {"extrasamples": ["unspecified"]}),
    "five.tif": (np.dstack([HE, HE[..., :2]]), {"extrasamples": ["unspecified"] * 2}),
    "16.tif": (HE.astype(np.uint16) * 257, {}),
    "16-strips.tif": (HE.astype(np.uint16) * 257, {"tile": None}),
    "16-planar.tif": (planes(HE.astype(np.uint16) * 257), {"planarconfig": "separate"}),
    "12-of-16.tif": (np.rint(HE * (4095 / 255)).astype(np.uint16), {}),
    "8-of-16.tif": (HE.astype(np.uint16), {}),
    "16-alpha-0.tif": (with_alpha(0, HE.astype(np.uint16) * 257), {}),
    "float.tif": (HE / np.float32(255), {}),
    "float-255.tif": (HE.astype(np.float32), {}),
    "big.tif": (HE, {"bigtiff": True}),
    "strips.tif": (HE, {"tile": None}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_colors_are_read_from_any_layout(tmp_path, name):
    image, options = LAYOUTS[name]
    tifffile.imwrite(
        tmp_path / name, image, ome=name.endswith(".ome.tif"), **{"photometric": "rgb", **TILED, **options}
    )
    assert np.array_equal(read(tmp_path / name), HE)


@pytest.mark.parametrize("kind", ["unassociated", "associated", "16 bits", "png"])
def test_alpha_is_blended_with_white(tmp_path, kind):
    alpha = np.tile(np.linspace(0, 255, WIDTH).round(), (HEIGHT, 1))
    expected = HE * (alpha / 255)[..., None] + (255 - alpha)[..., None]
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    if kind == "png":
        Image.fromarray(with_alpha(alpha)).save(path)
    elif kind == "associated":
        shown = np.rint(HE * (alpha / 255)[..., None]).astype(np.uint8)
        write(path, (with_alpha(alpha, shown), {"extrasamples": ["assocalpha"]}))
    elif kind == "16 bits":
        write(path, (with_alpha(alpha * 257, HE.astype(np.uint16) * 257), {}))
    else:
        write(path, (with_alpha(alpha), {}))
    assert np.abs(read(path) - expected).max() <= 2


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_alpha_of_zeros_is_ignored_in_plain_images(tmp_path, name):
    Image.fromarray(with_alpha(0)).save(
        tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {})
    )
    assert np.array_equal(read(tmp_path / name), HE)


def test_palette_and_transparent_color_are_applied(tmp_path):
    image = Image.fromarray(HE).quantize(32)
    for name in ("a.png", "a.tif"):
        image.save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), np.array(image.convert("RGB")))
    block = HE.copy()
    block[:30] = 0
    Image.fromarray(block).save(tmp_path / "b.png", transparency=(0, 0, 0))
    block[:30] = 255
    assert np.array_equal(read(tmp_path / "b.png"), block)


SMALL = (HE[::4, ::4], {})
FULL = (HE, {})
ORDERS = {
    "thumbnail first": (SMALL, FULL),
    "a thumbnail in strips": ((SMALL[0], {"tile": None}), FULL),
    "both in strips": ((SMALL[0], {"tile": None}), (HE, {"tile": None})),
    "ascending": ((SMALL[0], {"subfiletype": 1}), (HE[::2, ::2], {"subfiletype": 1}), FULL),
    "ascending, flagged the other way": (SMALL, (HE, {"subfiletype": 1})),
    "with a mask": (FULL, (HE[..., 0], {"photometric": "minisblack"})),
    "with a bilevel mask": (
        FULL,
        (HE[..., 0] > 200, {"photometric": "mask", "subfiletype": 4, "tile": None, "compression": None}),
    ),
    "with a label": (FULL, (HE[:60, :300], {"subfiletype": 9})),
    "a thumbnail of gray": ((SMALL[0][..., 0], {"photometric": "minisblack"}), FULL),
}


@pytest.mark.parametrize("order", ORDERS)
def test_full_scale_page_is_read_in_any_order(tmp_path, order):
    path = write(tmp_path / "a.tif", *ORDERS[order])
    assert np.array_equal(read(path), HE)
    with open_slide(path, mpp=0.5) as slide:  # a label is not taken for a level
        assert np.array_equal(slide.read_tile(0, 0), HE[:224, :224])
        assert slide._choose_level(8, 8) == 0


@pytest.mark.parametrize("stored", [{}, {"metadata": None}, {"tile": None, "compression": None}], ids=str)
@pytest.mark.parametrize("orientation", [1, 3])
def test_full_scale_in_subifd_is_read(tmp_path, stored, orientation):
    options = {**stored, "extratags": [(274, 3, 1, orientation, True)]}
    shown = HE[::-1, ::-1] if orientation == 3 else HE
    path = write(tmp_path / "a.tif", (SMALL[0], {"subifds": 1, **stored}), (HE, options))
    assert np.array_equal(read(path), shown)


def test_resolution_is_that_of_the_full_scale_page(tmp_path):
    options = {"resolutionunit": "CENTIMETER"}
    path = write(
        tmp_path / "a.tif", (SMALL[0], {"resolution": (5000, 5000)}), (HE, {"resolution": (20000, 20000)}), **options
    )
    with open_slide(path) as slide:
        assert slide.mpp == (0.5, 0.5)


def test_full_scale_of_ome_pyramid_after_thumbnail_is_read(tmp_path):
    ome = {"metadata": {"axes": "YXS"}}
    path = write(
        tmp_path / "a.ome.tif", (SMALL[0], ome), (HE, {"subifds": 1, **ome}), (HE[::2, ::2], {"subfiletype": 1})
    )
    assert np.array_equal(read(path), HE)


UPRIGHT = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a),
}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["tiles", "strips", "16", "png"])
def test_orientation_tag_is_applied(tmp_path, orientation, kind):
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    if kind == "png":
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(HE).save(path, exif=exif)
    else:
        tag = {"extratags": [(274, 3, 1, orientation, True)]} | ({"tile": None} if kind == "strips" else {})
        write(path, (HE.astype(np.uint16) * 257 if kind == "16" else HE, tag))
    with open_slide(path, mpp=0.5) as slide:
        assert slide.orientation == orientation
        assert np.array_equal(slide.thumbnail()[0], UPRIGHT[orientation](HE))


def test_rotation_swaps_the_resolutions(tmp_path):
    resolution = {"resolution": (20000, 19000), "resolutionunit": "CENTIMETER"}
    for kind in ({}, {"tile": None}):
        path = write(tmp_path / "a.tif", (HE, {"extratags": [(274, 3, 1, 6, True)], **resolution, **kind}))
        with open_slide(path) as slide:
            assert slide.mpp == pytest.approx((1e4 / 19000, 0.5), rel=1e-3)


GRAY = np.rint(255 * rgb2gray(HE)).astype(np.uint8)
OME = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}
REFUSED = {
    "gray.tif": ((GRAY, {"photometric": "minisblack"}), r"not a color image \(axes YX, 260 x 340, uint8, MINISBLACK\)"),
    "gray-strips.tif": ((GRAY, {"photometric": "minisblack", "tile": None}), "of mode L, not 8-bit colors"),
    "bilevel.tif": ((GRAY > 128, {"photometric": "minisblack", "tile": None, "compression": None}), "of mode 1, not"),
    "five.ome.tif": ((np.stack([GRAY] * 5), OME), "not a color image .*axes CYX, 5 x 260 x 340"),
    "two.ome.tif": ((np.stack([GRAY] * 2), OME), "not a color image .*axes CYX, 2 x"),
    "stack.ome.tif": ((np.stack([GRAY] * 3), OME | {"metadata": {"axes": "ZYX"}}), "not a color image .*axes ZYX"),
    "named.ome.tif": (
        (np.stack([GRAY] * 3), OME | {"metadata": {"axes": "CYX", "Channel": {"Name": NAMES}}}),
        "not a color image .*channels DAPI, CD3, CK",
    ),
    "dyes.ome.tif": (
        (planes(), OME | {"metadata": {"axes": "CYX", "Channel": {"Fluor": ["DAPI", "FITC", "Cy5"]}}}),
        "not a color image .*channels DAPI, FITC, Cy5",
    ),
    "light.ome.tif": (
        (planes(), OME | {"metadata": {"axes": "CYX", "Channel": {"EmissionWavelength": [460, 520, 670]}}}),
        "not a color image .*channels at 460 nm, at 520 nm",
    ),
    "white-is-0.tif": ((planes(255 - HE), {"photometric": "miniswhite", "planarconfig": "separate"}), "MINISWHITE"),
    "signed.tif": ((HE.astype(np.int16), {}), "values are int16 from .* the value of white is unknown"),
    "nan.tif": ((np.where(HE > 240, np.nan, HE).astype(np.float32), {}), "values are float32 from nan"),
    "long.tif": ((HE.astype(np.uint32), {}), "values are uint32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_than_rgb_raises_with_a_description(tmp_path, name):
    page, words = REFUSED[name]
    path = write(tmp_path / name, page)
    with pytest.raises(SlideError, match=rf"{name}: .*{words}.*\. Give the H&E image at full scale in RGB"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("pages", [[FULL] * 3, [(np.stack([HE] * 3), {})]])
def test_stack_of_images_raises(tmp_path, pages):
    path = write(tmp_path / "a.tif", *pages)
    with pytest.raises(SlideError, match=r"a\.tif: it holds more than one picture of 340 x 260 px.*IYXS.*only the H&E"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize(("labels", "is_read"), [(["Red", "Green", "Blue"], True), (list(NAMES), False)])
def test_imagej_labels_distinguish_colors_from_dyes(tmp_path, labels, is_read):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, planes(), imagej=True, metadata={"axes": "CYX", "Labels": labels})
    if is_read:
        assert np.array_equal(read(path), HE)
    else:
        with pytest.raises(SlideError, match="channels DAPI, CD3, CK"):
            open_slide(path, mpp=0.5)


def test_damaged_16_bit_page_raises(tmp_path):
    path = write(tmp_path / "a.tif", (HE.astype(np.uint16) * 257, {}))
    with tifffile.TiffFile(path) as file:
        start, length = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[start : start + length] = b"\x55" * length
    path.write_bytes(data)
    with pytest.raises(SlideError, match=r"a\.tif: its full-scale image cannot be read \(.*Copy it again"):
        open_slide(path, mpp=0.5)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "F"])
def test_plain_image_without_colors_raises(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "F" else "a.png")
    gray = Image.fromarray(GRAY)
    image = Image.fromarray(GRAY.astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    image.save(path)
    with pytest.raises(SlideError, match=rf"its pixels are of mode {mode}, not 8-bit colors"):
        open_slide(path, mpp=0.5)


# --- colors that H&E cannot have ---------------------------------------------------------------------------------

SCENE = np.full((672, 896, 3), (243, 241, 244), np.uint8)
SCENE[100:600, 100:700] = stained(600, 500)
SCENE[100:130, 100:700] = SCENE[100:600, 660:700] = (222, 160, 195)
LIGHT = np.zeros_like(SCENE)
LIGHT[100:600, 100:700, 2] = np.random.default_rng(0).integers(60, 250, (500, 600))
UNLIKE = {
    "gray": (np.dstack([SCENE.mean(-1).astype(np.uint8)] * 3), "no color"),
    "fluorescent": (LIGHT, "black background"),
    "inverted": (255 - SCENE, "looks inverted"),
}


SLIDE = SimpleNamespace(path="S.svs")


def spots():
    import anndata as ad

    counts = ad.AnnData(np.ones((4, 3), dtype=int))
    counts.obsm["spatial"] = np.array([[250, 250], [450, 250], [250, 450], [450, 450]])
    return counts


@pytest.mark.parametrize("kind", UNLIKE)
def test_image_unlike_h_and_e_raises_before_any_write(tmp_path, kind):
    image, words = UNLIKE[kind]
    path = write(tmp_path / "a.tif", (image, {}))
    with pytest.raises(SlideError, match=rf"a\.tif: .*({words})"):
        pk.data.add_slide(tmp_path / "cohort", "S", spots(), path, mpp=0.5)
    with open_slide(path, mpp=0.5) as slide, pytest.raises(SlideError, match=words):
        tissue_tiles(slide)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


def test_orientation_tag_is_applied_to_tiles_but_raises_for_spots(tmp_path):
    path = write(tmp_path / "a.tif", (SCENE, {"extratags": [(274, 3, 1, 3, True)]}))
    with pytest.raises(SlideError, match=r"a\.tif: its Orientation tag, 3, .*without the tag"):
        pk.data.add_slide(tmp_path / "cohort", "S", spots(), path, mpp=0.5)
    assert not (tmp_path / "cohort").exists()
    with open_slide(path, mpp=0.5) as slide:
        assert np.array_equal(tissue_tiles(slide).picture, SCENE[::-1, ::-1])


def test_ome_tiff_planes_give_the_same_tiles_as_rgb(tmp_path):
    plain = write(tmp_path / "a.tif", (SCENE, {}))
    split = write(tmp_path / "a.ome.tif", (planes(SCENE), OME))
    one, two = (pk.data.add_slide(tmp_path / "c", i, spots(), p, mpp=0.5) for i, p in (("A", plain), ("B", split)))
    assert np.array_equal(one.tiles[:], two.tiles[:])
    assert np.array_equal(two.tiles[0], SCENE[138:362, 138:362])


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_real_tissue_passes_when_faint_or_mostly_glass(her2st, share):
    for path in sorted((her2st / "patches").glob("*.h5")):
        tiles = pk.data.read_slide(her2st, path.stem).tiles[:6]
        faint = 255 - (share * (255 - tiles[:, ::8, ::8].astype(float)))
        pixels = faint.reshape(-1, 3).astype(np.uint8)
        glass = np.full((20 * len(pixels), 3), 243, np.uint8)
        check_stain(SLIDE, pixels)
        check_stain(SLIDE, np.concatenate([pixels, glass]))
        with pytest.raises(SlideError, match=r"S\.svs: .*no color"):
            check_stain(SLIDE, np.repeat(pixels[:, :1], 3, axis=1))


def test_tissue_of_embedded_cohort_passes(mini_cohort):
    for slide in mini_cohort.slides:
        check_stain(SLIDE, slide.tiles[:10].reshape(-1, 3))
