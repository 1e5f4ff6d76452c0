"""Baseline features of color, coordinates and depth, in the cohort's row order."""

import dataclasses

import numpy as np
import pytest
from scipy import sparse

from peka_lite.data import Cohort
from peka_lite.evaluation import color_features, coordinate_features, depth_features

STAINS = slice(15, 25)  # columns of the hematoxylin and eosin densities
BRIGHT = 25
GRADIENTS = slice(26, 32)
PATTERNS = slice(32, 52)


@pytest.fixture(scope="module")
def tiles(mini_cohort):
    return mini_cohort.tiles[::5]


def plain(*colors, size=224):
    return np.stack([np.full((size, size, 3), c, dtype=np.uint8) for c in colors])


def replace_slide(cohort, i, **obsm_or_x):
    adata = cohort.slides[i].adata.copy()
    if "spatial" in obsm_or_x:
        adata.obsm["spatial"] = obsm_or_x["spatial"]
    if "X" in obsm_or_x:
        adata.X = obsm_or_x["X"]
    slides = list(cohort.slides)
    slides[i] = dataclasses.replace(slides[i], adata=adata)
    return Cohort(tuple(slides))


# --- color and texture --------------------------------------------------------------------------------------------


def test_color_features_are_52_finite_columns_none_constant_or_repeated(tiles):
    features = color_features(tiles)
    assert features.shape == (len(tiles), 52)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert (features.std(0) > 0).all()
    assert np.unique(features, axis=1).shape == features.shape


def test_features_of_a_tile_do_not_depend_on_other_tiles(tiles):
    features = color_features(tiles)
    assert len(tiles) > 32  # more than two batches
    order = np.random.default_rng(0).permutation(len(tiles))
    np.testing.assert_allclose(color_features(tiles[order]), features[order], rtol=1e-5)
    np.testing.assert_allclose(color_features(tiles[20:21]), features[20:21], rtol=1e-5)


def test_tile_store_and_array_give_the_same_features(mini_cohort):
    rows = np.arange(len(mini_cohort))[::6]
    np.testing.assert_array_equal(
        color_features(mini_cohort.tiles.select(rows)), color_features(mini_cohort.tiles[rows])
    )


def test_colors_are_means_spreads_and_percentiles_of_red_green_and_blue():
    color = np.array([200, 100, 50])
    tile = np.zeros((1, 224, 224, 3), dtype=np.uint8)
    tile[:, :, 64:192] = color / 2
    tile[:, :, 192:] = color
    share = np.array([64, 128, 32]) / 224  # of levels 0, 1/2 and 1
    mean = share @ [0, 0.5, 1]
    spread = np.sqrt(share @ [0, 0.25, 1] - mean**2)
    expected = np.outer([mean, spread, 0, 0.5, 1], color).ravel()
    np.testing.assert_allclose(color_features(tile)[0, :15], expected, rtol=1e-5)


@pytest.mark.parametrize("color", [0, 1, 128, 255, (230, 10, 240)])
def test_tile_of_one_color_has_finite_features_and_no_texture(color):
    features = color_features(plain(color))
    assert np.isfinite(features).all()
    assert np.abs(features[:, STAINS]).max() < 12  # the darkest of 256 levels has a density of 5.5
    np.testing.assert_allclose(features[:, 3:6], 0, atol=1e-3)
    np.testing.assert_array_equal(features[:, GRADIENTS], 0)
    # Equal neighbors count as "not darker": all pixels are in one bin of the pattern, except at the border.
    assert (features[0, PATTERNS].reshape(2, 10).argmax(1) == 8).all()


def test_bright_share_counts_background_and_not_saturated_color():
    tile = plain((230, 10, 240))
    tile[:, :56] = 240
    assert color_features(tile)[0, BRIGHT] == pytest.approx(0.25)


def test_hematoxylin_and_eosin_are_separated():
    from skimage.color import rgb_from_hed

    stained = [255 * np.exp(-0.8 * rgb_from_hed[i]) for i in (0, 1)]
    hematoxylin, eosin = color_features(plain(*stained))[:, STAINS][:, :2]
    np.testing.assert_allclose(hematoxylin, [0.8, 0], atol=0.02)
    np.testing.assert_allclose(eosin, [0, 0.8], atol=0.02)


def test_colors_follow_brightness_and_texture_follows_the_pattern(tiles):
    before, after = color_features(tiles), color_features(tiles // 2)
    np.testing.assert_allclose(after[:, :3], before[:, :3] / 2, atol=1)
    assert (after[:, GRADIENTS] < before[:, GRADIENTS]).all()
    stripes = plain(0, 0)
    stripes[0, :, np.arange(224) // 8 % 2 == 1] = 200
    stripes[1, :, np.arange(224) // 56 % 2 == 1] = 200
    fine, coarse = color_features(stripes)
    np.testing.assert_allclose(fine[:15], coarse[:15], rtol=1e-4)
    assert (fine[GRADIENTS][::2] > 3 * coarse[GRADIENTS][::2]).all()


def test_tiles_of_another_size_are_supported(tiles):
    assert np.isfinite(color_features(tiles[:2, :17, :30])).all()
    doubled = tiles[:2].repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_allclose(color_features(doubled), color_features(tiles[:2]), rtol=1e-4)


@pytest.mark.parametrize(
    "invalid",
    [np.zeros((2, 224, 224, 3), np.float32), np.zeros((2, 224, 224), np.uint8), np.zeros((2, 8, 224, 3), np.uint8)],
)
def test_arrays_other_than_rgb_tiles_are_rejected(invalid):
    with pytest.raises(ValueError, match="tiles must be uint8"):
        color_features(invalid)


def test_zero_tiles_give_zero_rows():
    assert color_features(plain(0)[:0]).shape == (0, 52)


# --- coordinates ------------------------------------------------------------------------------------------------------


def test_coordinates_have_shared_columns_and_columns_for_each_slide(mini_cohort):
    features = coordinate_features(mini_cohort)
    assert features.shape == (len(mini_cohort), 21 * 5)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.abs(features).max() <= 1 + 1e-6
    shared, separate = features[:, :21], features[:, 21:].reshape(-1, 4, 21)
    for i, slide in enumerate(mini_cohort.slides):
        rows = mini_cohort.rows_of(slide.id)
        np.testing.assert_array_equal(separate[rows, i], shared[rows])
        assert (np.delete(separate[rows], i, axis=1) == 0).all()


def test_coordinates_span_polynomials_of_degree_5_only(mini_cohort):
    shared = coordinate_features(mini_cohort)[mini_cohort.rows_of("MINI1"), :21].astype(np.float64)
    xy = mini_cohort.slides[0].adata.obsm["spatial"].astype(np.float64)
    x, y = ((xy - xy.mean(0)) / xy.std(0)).T

    def misfit(target):
        residual = target - shared @ np.linalg.lstsq(shared, target, rcond=None)[0]
        return np.linalg.norm(residual) / np.linalg.norm(target)

    assert np.linalg.matrix_rank(shared) == 21
    assert max(misfit(x**i * y**j) for i in range(6) for j in range(6 - i)) < 1e-4
    assert min(misfit(x**i * y ** (6 - i)) for i in range(7)) > 1e-3


def test_coordinates_do_not_depend_on_units_and_offset(mini_cohort):
    before = coordinate_features(mini_cohort)
    xy = mini_cohort.slides[1].adata.obsm["spatial"]
    np.testing.assert_allclose(
        coordinate_features(replace_slide(mini_cohort, 1, spatial=xy * np.array([0.5, 3]) - 1e4)), before, atol=1e-5
    )


def test_coordinates_of_a_slide_do_not_change_other_slides(mini_cohort):
    before = coordinate_features(mini_cohort)
    xy = mini_cohort.slides[1].adata.obsm["spatial"].astype(np.float64) ** 2
    moved = (coordinate_features(replace_slide(mini_cohort, 1, spatial=xy)) != before).any(1)
    assert moved[mini_cohort.rows_of("MINI2")].sum() > 30
    assert not np.delete(moved, mini_cohort.rows_of("MINI2")).any()


def test_slide_with_one_column_of_spots_has_finite_coordinates(mini_cohort):
    xy = mini_cohort.slides[0].adata.obsm["spatial"].copy()
    xy[:, 0] = 7
    features = coordinate_features(replace_slide(mini_cohort, 0, spatial=xy))
    assert np.isfinite(features).all()


# --- depth ---------------------------------------------------------------------------------------------------------


def test_depth_is_the_log_of_each_total_in_row_order(mini_cohort):
    features = depth_features(mini_cohort)
    assert features.shape == (len(mini_cohort), 1)
    assert features.dtype == np.float32
    totals = np.concatenate([s.adata.X.toarray().sum(1) for s in mini_cohort.slides])
    np.testing.assert_allclose(features[:, 0], np.log1p(totals), rtol=1e-6)


def test_empty_spot_has_depth_0(mini_cohort):
    slide = mini_cohort.slides[0]
    emptied = replace_slide(mini_cohort, 0, X=sparse.csr_matrix(slide.adata.shape, dtype=np.float32))
    assert (depth_features(emptied)[: slide.n_spots] == 0).all()
    np.testing.assert_array_equal(
        depth_features(emptied)[slide.n_spots :], depth_features(mini_cohort)[slide.n_spots :]
    )
