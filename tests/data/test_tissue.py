"""Tissue is segmented from glass, borders and ink, and its share of each grid tile is computed."""

import numpy as np
import pytest
import tifffile
from skimage.filters import threshold_otsu

from peka_lite.data import SlideError, find_tissue, open_slide, tissue_tiles
from peka_lite.data.tissue import tissue_share

GLASS, EOSIN, NUCLEI, PALE = (243, 241, 244), (222, 160, 195), (120, 80, 150), (236, 212, 226)
UM = 8.0


def scene(*, size=(300, 400), seed=0, noise=2.0, background=GLASS, parts=()):
    """Paint rectangles ((y0, y1, x0, x1), color) on glass, with a scanner's noise."""
    image = np.empty((*size, 3))
    image[:] = background
    for (y0, y1, x0, x1), color in parts:
        image[y0:y1, x0:x1] = color
    noisy = image + np.random.default_rng(seed).normal(0, noise, image.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def truth(*boxes, size=(300, 400)):
    mask = np.zeros(size, dtype=bool)
    for y0, y1, x0, x1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def otsu(image):
    high, low = image.max(-1).astype(float), image.min(-1)
    saturation = 1 - low / np.maximum(high, 1)
    return saturation > threshold_otsu(saturation)


TISSUE = (80, 220, 100, 300)


@pytest.mark.parametrize("um_per_px", [2.0, 8.0, 25.0])
@pytest.mark.parametrize("color", [EOSIN, NUCLEI, PALE])
def test_tissue_is_segmented_on_glass(color, um_per_px):
    mask = find_tissue(scene(parts=[(TISSUE, color)]), um_per_px=um_per_px)
    assert mask.dtype == bool
    assert overlap(mask, truth(TISSUE)) > 0.97


@pytest.mark.parametrize("background", [(255, 255, 255), GLASS, (246, 243, 228), (225, 225, 225), (0, 0, 0)])
def test_blank_slide_has_no_tissue(background):
    assert not find_tissue(scene(background=background), um_per_px=UM).any()
    assert not find_tissue(scene(background=background, noise=0), um_per_px=UM).any()


@pytest.mark.parametrize("color", [(3, 2, 4), (20, 60, 190), (30, 140, 60), (40, 40, 44)])
def test_borders_and_ink_are_excluded(color):
    image = scene(parts=[(TISSUE, EOSIN), ((0, 300, 0, 40), color), ((20, 60, 100, 350), color)])
    iou = overlap(find_tissue(image, um_per_px=UM), truth(TISSUE))
    assert iou > 0.97
    assert iou >= overlap(otsu(image), truth(TISSUE))


def test_slide_with_little_or_no_glass_is_segmented():
    boxes = [(0, 300, 0, 390)]
    image = scene(parts=[(boxes[0], EOSIN), ((100, 200, 100, 250), NUCLEI)])
    assert overlap(find_tissue(image, um_per_px=UM), truth(*boxes)) > 0.97
    assert overlap(otsu(image), truth(*boxes)) < 0.3  # Otsu segments only the nuclei
    assert find_tissue(scene(background=EOSIN), um_per_px=UM).all()


def test_specks_are_removed_and_holes_filled():
    speck, hole, lumen = (10, 16, 10, 16), (120, 130, 150, 160), (100, 200, 200, 290)  # 48, 80 and 720 um
    image = scene(parts=[(TISSUE, EOSIN), (speck, EOSIN), (hole, GLASS), (lumen, GLASS)])
    mask = find_tissue(image, um_per_px=UM)
    assert not mask[:30, :30].any()
    assert mask[120:130, 150:160].all()
    assert not mask[110:190, 210:280].any()


@pytest.mark.parametrize("tile", [(4, 3), (2.5, 3.75), (1.25, 0.5), (40, 50)])
def test_tissue_shares_are_exact(tile):
    mask = np.random.default_rng(0).random((15, 20)) > 0.5
    fine = np.kron(mask, np.ones((4, 4)))  # quarter pixels, which all tile sizes divide into
    w, h = (int(4 * side) for side in tile)
    rows, cols = -(-60 // h), -(-80 // w)
    whole = np.zeros((rows * h, cols * w))
    whole[:60, :80] = fine
    expected = whole.reshape(rows, h, cols, w).mean((1, 3))
    assert tissue_share(mask, tile=tile) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="session")
def slide_path(tmp_path_factory):
    """Write a slide of 8 x 6 tiles at 0.5 um/px: tissue on tiles (1, 1) to (3, 4) and a quarter of column 5."""
    image = scene(size=(6 * 224, 8 * 224), noise=0, parts=[((224, 4 * 224, 224, 5 * 224 + 56), EOSIN)])
    return save(tmp_path_factory.mktemp("tissue") / "slide.tif", image)


def save(path, image):
    tifffile.imwrite(
        path, image, tile=(256, 256), photometric="rgb", compression="zlib", resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def test_tiles_with_enough_tissue_are_selected(slide_path):
    with open_slide(slide_path) as slide:
        half, little = tissue_tiles(slide), tissue_tiles(slide, min_tissue=0.1)
    tiles = [(row, col) for row in (1, 2, 3) for col in (1, 2, 3, 4)]
    assert list(zip(half.obs["array_row"], half.obs["array_col"], strict=True)) == tiles
    assert half.obs["tissue_share"].to_numpy() == pytest.approx(1, abs=0.02)
    assert list(half.obs.index[:2]) == ["tile_1_1", "tile_1_2"]
    assert half.picture.shape == (1344, 1792, 3)
    assert half.mask.shape == (1344, 1792)
    assert half.scale == 1
    edge = little.obs[little.obs["array_col"] == 5]
    assert edge["array_row"].tolist() == [1, 2, 3]
    assert edge["tissue_share"].to_numpy() == pytest.approx(0.25, abs=0.02)
    assert len(little.obs) == 15


def test_slide_without_enough_tissue_raises(tmp_path, slide_path):
    blank = save(tmp_path / "blank.tif", scene(noise=0))
    with open_slide(blank) as slide, pytest.raises(SlideError, match=r"blank\.tif: no tissue found .*H&E"):
        tissue_tiles(slide)
    image = scene(size=(448, 448), noise=0, parts=[((112, 336, 112, 336), EOSIN)])  # a quarter of each of four
    little = save(tmp_path / "little.tif", image)
    message = r"little\.tif: no tile has 50% tissue or more \(the largest share is 2.\.\d%\)\. .*--min-tissue"
    with open_slide(little) as slide, pytest.raises(SlideError, match=message):
        tissue_tiles(slide)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_min_tissue_must_be_a_share(slide_path, share):
    with open_slide(slide_path) as slide, pytest.raises(ValueError, match="min_tissue must be a share"):
        tissue_tiles(slide, min_tissue=share)
