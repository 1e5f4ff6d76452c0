"""Maps: local correlation equals an explicit loop, and figures show the right values and captions."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from peka_lite.data import read_slide
from peka_lite.maps import expression_map, local_pcc, pcc_map, predicted_map
from peka_lite.maps.draw import draw_maps
from peka_lite.maps.tissue import choose_gene, color_limits, list_remarks, save_predicted_map


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def slide(mini_cohort):
    return mini_cohort.slides[0]


def field(n=40, genes=5, seed=0):
    rng = np.random.default_rng(seed)
    coords, Y = rng.random((n, 2)), rng.random((n, genes))
    return coords, Y, Y + 0.5 * rng.random((n, genes))


def panels(fig):
    """Return the figure's maps without color bars."""
    return [ax for ax in fig.axes if ax.get_title()]


def color_bars(fig):
    return [ax for ax in fig.axes if not ax.get_title()]


def spots(ax):
    """Return the colored spots of a panel."""
    (collection,) = [c for c in ax.collections if c.get_array() is not None]
    return collection


def spot_values(ax):
    """Return the values of a panel's spots."""
    return np.asarray(spots(ax).get_array())


@pytest.mark.parametrize("k", [3, 6, 18])
def test_neighborhood_pcc_equals_explicit_loop(k):
    coords, Y, P = field()
    expected = []
    for center in coords:
        near = np.argsort(((coords - center) ** 2).sum(1))[: k + 1]  # the spot and its k nearest neighbors
        expected.append(np.mean([pearsonr(Y[near, g], P[near, g]).statistic for g in range(Y.shape[1])]))
    np.testing.assert_allclose(local_pcc(coords, Y, P, n_neighbors=k), expected, atol=1e-10)


def test_gene_pcc_equals_explicit_loop():
    coords, Y, P = field()
    y, p = ((A - A.mean(0)) / A.std(0) for A in (Y, P))
    expected = [pearsonr(y[i], p[i]).statistic for i in range(len(Y))]
    np.testing.assert_allclose(local_pcc(coords, Y, P, over="genes"), expected, atol=1e-10)


def test_constant_genes_are_excluded_from_the_mean():
    coords, Y, P = field()
    Y[:, 0] = 1
    np.testing.assert_allclose(local_pcc(coords, Y, P), local_pcc(coords, Y[:, 1:], P[:, 1:]), atol=1e-12)


def test_only_spots_without_variation_are_nan():
    coords, Y, P = field()
    coords[:10] += 100  # an island of ten spots in which no gene varies
    Y[:10] = 1
    assert np.isnan(local_pcc(coords, Y, P, n_neighbors=5)).tolist() == [True] * 10 + [False] * 30


def test_only_a_spot_of_constant_genes_is_nan():
    rng = np.random.default_rng(0)
    half = rng.integers(1, 9, (20, 5)).astype(float)
    P = np.concatenate([half, np.zeros((1, 5)), -half])  # spot 20 has the mean of every gene
    pcc = local_pcc(rng.random((41, 2)), rng.random((41, 5)), P, over="genes")
    assert np.flatnonzero(np.isnan(pcc)).tolist() == [20]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
def test_value_of_a_constant_gene_does_not_matter(value):
    coords, Y, P = field()
    zero, constant = P.copy(), P.copy()
    zero[:, 2], constant[:, 2] = 0, value
    np.testing.assert_allclose(
        local_pcc(coords, Y, constant, over="genes"), local_pcc(coords, Y, zero, over="genes"), atol=1e-12
    )


@pytest.mark.parametrize("over", ["neighbors", "genes"])
def test_constant_prediction_has_no_local_pcc(over):
    coords, Y, P = field()
    assert np.isnan(local_pcc(coords, Y, np.full_like(P, 0.1), over=over)).all()


@pytest.mark.parametrize("over", ["neighbors", "genes"])
def test_units_of_coordinates_and_expression_do_not_matter(over):
    coords, Y, P = field()
    np.testing.assert_allclose(
        local_pcc(1000 * coords + 7, 3 * Y, 2 * P - 5, over=over), local_pcc(coords, Y, P, over=over), atol=1e-8
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "spots"}, "unknown over='spots'; known: neighbors, genes"),
        ({"n_neighbors": 2}, "n_neighbors must be at least 3 and below the 40 spots, not 2"),
        ({"n_neighbors": 40}, "below the 40 spots, not 40"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        local_pcc(*field(), **options)


def test_mismatched_shapes_raise():
    coords, Y, P = field()
    with pytest.raises(ValueError, match="shapes do not match"):
        local_pcc(coords[1:], Y, P)
    with pytest.raises(ValueError, match="shapes do not match"):
        local_pcc(coords, Y, P[:, 1:])


def test_two_genes_are_too_few_to_correlate_over():
    coords, Y, P = field(genes=2)
    with pytest.raises(ValueError, match="at least 3 genes, not 2"):
        local_pcc(coords, Y, P, over="genes")


def test_expression_map_shows_measured_predicted_and_residual(slide):
    measured = np.random.default_rng(0).random(slide.n_spots)
    fig = expression_map(slide.adata, measured, measured**2, gene="EPCAM")
    pcc = pearsonr(measured, measured**2).statistic
    titles = ["EPCAM: measured", f"EPCAM: predicted (PCC {pcc:.2f})", "measured minus predicted"]
    assert [ax.get_title() for ax in panels(fig)] == titles
    for ax, values in zip(panels(fig), [measured, measured**2, measured - measured**2], strict=True):
        np.testing.assert_allclose(spot_values(ax), values)


def test_expression_map_shares_a_scale_and_centers_the_residual(slide):
    measured = np.random.default_rng(0).random(slide.n_spots)
    fig = expression_map(slide.adata, measured, 2 * measured, gene="EPCAM")
    a, b, residual = (spots(ax).norm for ax in panels(fig))
    assert (a.vmin, a.vmax) == (b.vmin, b.vmax)
    assert residual.vmin == -residual.vmax
    labels = [ax.get_ylabel() for ax in color_bars(fig)]
    assert labels == ["log1p expression", "log1p expression", "log1p difference"]


def test_expression_map_of_a_constant_gene_draws(slide):
    fig = expression_map(slide.adata, np.zeros(slide.n_spots), np.zeros(slide.n_spots), gene="G")
    assert panels(fig)[1].get_title() == "G: predicted (PCC nan)"
    assert [(n.vmin, n.vmax) for n in (spots(ax).norm for ax in panels(fig))] == [(-0.5, 0.5)] * 3
    assert fig.get_supxlabel().count("is constant on this slide: 0 on all") == 2


def test_pcc_map_shows_tissue_and_both_local_pccs(slide):
    rng = np.random.default_rng(0)
    Y = rng.random((slide.n_spots, 6))
    P = Y + rng.random(Y.shape)
    fig = pcc_map(slide.adata, Y, P, n_neighbors=8)
    tissue, near, genes = panels(fig)
    coords = slide.adata.obsm["spatial"]
    assert tissue.get_title() == "H&E"
    for ax, over, label in ((near, "neighbors", "neighborhoods"), (genes, "genes", "genes")):
        expected = local_pcc(coords, Y, P, over=over, n_neighbors=8)
        np.testing.assert_allclose(spot_values(ax), expected, atol=1e-6)
        assert ax.get_title() == f"PCC over {label} (mean {expected.mean():.2f})"
        assert (spots(ax).norm.vmin, spots(ax).norm.vmax) == (-1, 1)


@pytest.mark.filterwarnings("error")
def test_pcc_map_of_a_constant_prediction_draws(slide):
    Y = np.random.default_rng(0).random((slide.n_spots, 4))
    fig = pcc_map(slide.adata, Y, np.full_like(Y, 0.1), n_neighbors=8)
    fig.canvas.draw()
    assert panels(fig)[1].get_title().endswith("(mean nan)")


def test_every_panel_shows_the_slides_image(slide):
    Y = np.random.default_rng(0).random((slide.n_spots, 4))
    for ax in panels(pcc_map(slide.adata, Y, Y[:, ::-1], n_neighbors=8)):
        assert len(ax.images) == 1


def test_drawing_does_not_change_the_slide(slide):
    keys = set(slide.adata.uns), set(slide.adata.obsm), set(slide.adata.obs)
    Y = np.random.default_rng(0).random((slide.n_spots, 4))
    pcc_map(slide.adata, Y, Y + 1, n_neighbors=8)
    assert (set(slide.adata.uns), set(slide.adata.obsm), set(slide.adata.obs)) == keys


@pytest.mark.parametrize("name", ["HER2_A1", "HER2_C2"])
def test_real_slides_draw(her2st, name):
    adata = read_slide(her2st, name).adata
    Y = np.log1p(adata[:, ["ERBB2", "GNAS", "FASN"]].X.toarray())
    P = Y + np.random.default_rng(0).random(Y.shape)
    fig = expression_map(adata, Y[:, 0], P[:, 0], gene="ERBB2")
    np.testing.assert_allclose(spot_values(panels(fig)[0]), Y[:, 0], rtol=1e-6)
    assert len(panels(pcc_map(adata, Y, P))) == 3
    fig.canvas.draw()


def table():
    rows = [("none", f, g, 0.1 * i + 0.01 * f) for f in range(3) for i, g in enumerate("ABCD")]
    rows += [("bone", f, g, 0.5 - 0.1 * i + 0.01 * f) for f in range(3) for i, g in enumerate("ABCD")]
    return pd.DataFrame(rows, columns=["method", "fold", "gene", "pcc"])


def predictions(pcc, *, grid=False):
    """Return predictions like `predict_slide`; values identify the spot, and the second gene varies most."""
    rows, cols = (a.ravel() for a in np.mgrid[:4, :5])
    n = len(rows)
    X = np.column_stack([np.arange(n), 5 * np.arange(n), np.ones(n)]).astype(np.float32)
    image = np.full((100, 120, 3), 200, np.uint8)
    factors = {"spot_diameter_fullres": 200.0, "tissue_downscaled_fullres_scalef": 0.1}
    adata = ad.AnnData(
        X, obs=pd.DataFrame(index=[f"t{i}" for i in range(n)]), var=pd.DataFrame({"pcc": pcc}, index=["A", "B", "C"]),
        obsm={"spatial": np.column_stack([cols, rows]) * 200.0 + 100},
        uns={"spatial": {"s": {"images": {"downscaled_fullres": image}, "scalefactors": factors}},
             "peka_lite": {"model": {"cohort": "breast", "normalization": "log1p"}}},
    )  # fmt: skip
    if grid:
        adata.obs["tissue_share"] = 1.0
    return adata


@pytest.mark.parametrize(
    ("pcc", "gene", "shown"),
    [
        ([np.nan] * 3, None, "B: predicted"),  # no held-out spots: the gene that varies most
        ([0.2, 0.1, np.nan], None, "A: predicted\nPCC 0.20 on held-out spots of breast"),
        ([0.2, 0.1, np.nan], "B", "B: predicted\nPCC 0.10 on held-out spots of breast"),
        ([0.2, 0.1, np.nan], "C", "C: predicted"),
    ],
)
def test_predicted_map_draws_the_given_or_best_gene(pcc, gene, shown):
    adata = predictions(pcc)
    fig = predicted_map(adata, gene)
    picture, gene_panel = panels(fig)
    assert (picture.get_title(), gene_panel.get_title()) == ("H&E", shown)
    np.testing.assert_allclose(spot_values(gene_panel), adata[:, shown[0]].X.ravel())
    assert color_bars(fig)[0].get_ylabel() == "log1p of counts"


def test_predicted_map_shows_negative_values_and_the_model():
    adata = predictions([0.1] * 3, grid=True)
    adata.X = adata.X - 3  # ridge predictions can be negative
    adata.uns["peka_lite"] |= {"min_tissue": 0.5, "tile_px": 224, "tile_mpp": 0.5}
    adata.uns["peka_lite"]["model"] |= {"folder": "first", "cohort": "mini", "synthetic": True}
    fig = predicted_map(adata, "A")
    bar = color_bars(fig)[0]
    assert bar.get_ylim() == pytest.approx(np.percentile(adata[:, "A"].X, [1, 99]))
    assert bar.get_ylabel() == "log1p of counts; no count is below 0"
    text = fig.get_supxlabel()
    assert "Model “first” was trained on mini, which is synthetic" in text
    assert "Squares are 112 µm wide; tiles below 50% tissue have none" in text
    assert "Not for diagnosis" in text
    assert panels(fig)[0].images[0].get_array().shape == (100, 120, 3)  # the whole image, not only its tiles


def gene_limits(fig):
    """Return the color limits of the gene's panel."""
    norm = spots(panels(fig)[1]).norm
    return norm.vmin, norm.vmax


def caption(fig):
    return fig.get_supxlabel().replace("\n", " ")


def on_tiles(columns, pcc, **options):
    """Return predictions as above; `columns` maps a gene to a value per tile, or one for all tiles."""
    adata = predictions([0.1] * 3, grid=True)[: options.get("n", 20)].copy()
    X = np.column_stack([np.broadcast_to(v, 20)[: adata.n_obs] for v in columns.values()]).astype(np.float32)
    var = pd.DataFrame({"pcc": pcc}, index=list(columns))
    low, high = options.get("trained_on", (0.0, 2.0))
    var["train_min"], var["train_max"] = low, high
    return ad.AnnData(X, obs=adata.obs, var=var, obsm=dict(adata.obsm), uns=adata.uns)


RAMP = np.linspace(0, 1, 20)


@pytest.mark.parametrize(
    ("columns", "pcc", "gene"),
    [
        ({"BELOW": RAMP - 3, "ABOVE": RAMP}, [0.9, 0.1], "ABOVE"),  # all below 0: not visible as counts
        ({"FLAT": 1.5, "ABOVE": RAMP}, [0.9, 0.1], "ABOVE"),
        ({"FLAT": 1.5, "LITTLE": RAMP / 9, "MUCH": RAMP}, [np.nan] * 3, "MUCH"),
        ({"BELOW": 9 * RAMP - 30, "ABOVE": RAMP}, [np.nan] * 2, "ABOVE"),
        ({"FLAT": 1.5, "UNKNOWN": RAMP, "KNOWN": RAMP / 2}, [0.9, np.nan, -0.1], "KNOWN"),
        ({"FLAT": 1.5, "UNKNOWN": RAMP}, [0.9, np.nan], "UNKNOWN"),
        ({"FLAT": -1.5, "BELOW": RAMP - 3}, [0.9, 0.1], "BELOW"),  # no gene above 0 varies
        ({"FLAT": 0.0, "HOT": [0.0] * 19 + [5.0]}, [0.9, 0.1], "HOT"),
        ({"HOT": [0.0] * 19 + [99.0], "EVEN": RAMP}, [np.nan] * 2, "EVEN"),
        ({"NAN": np.nan, "HOLES": [np.nan] * 5 + [*RAMP[5:]]}, [0.9, 0.1], "HOLES"),
        ({"FLAT": 0.5, "ALSO": -0.5}, [0.1, 0.9], "FLAT"),
    ],
)
def test_default_gene_varies_on_this_slide(columns, pcc, gene):
    assert choose_gene(on_tiles(columns, pcc)) == gene


@pytest.mark.parametrize(
    ("spread", "factors", "words"),
    [
        (1e300, {}, "no spot is inside the slide's image"),
        (np.nan, {}, "no spot is inside the slide's image"),
        (1, {"tissue_downscaled_fullres_scalef": 1e-300, "spot_diameter_fullres": None}, "has no scale factor"),
        (1, {"tissue_downscaled_fullres_scalef": 1e300}, "no spot is inside the slide's image"),
    ],
)
def test_predictions_outside_the_image_raise(tmp_path, spread, factors, words):
    adata = on_tiles({"G": RAMP}, [0.9])
    adata.obsm["spatial"] = (np.asarray(adata.obsm["spatial"], float) + 1) * spread
    stored = next(iter(adata.uns["spatial"].values()))["scalefactors"]
    stored.update(factors)
    for name in [name for name, value in stored.items() if value is None]:
        del stored[name]
    adata.write_h5ad(tmp_path / "genes.h5ad")
    with pytest.raises(ValueError, match=rf"genes\.h5ad: .*{words}"):
        save_predicted_map(tmp_path / "genes.h5ad", tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


def test_map_of_the_default_gene_shows_its_values(tmp_path):
    adata = on_tiles({"BELOW": RAMP - 3, "FLAT": 1.0, "ABOVE": RAMP}, [0.9, 0.8, 0.1])
    fig = predicted_map(adata)
    assert panels(fig)[1].get_title().startswith("ABOVE: predicted")
    assert gene_limits(fig) == pytest.approx((0.01, 0.99))
    adata.write_h5ad(tmp_path / "genes.h5ad")
    gene, sentences = save_predicted_map(tmp_path / "genes.h5ad", tmp_path / "map.png")
    assert (gene, sentences) == (
        "ABOVE",
        ["ABOVE lies within the range of its training targets (0.00 to 2.00) on all 20 tiles."],
    )


@pytest.mark.parametrize(
    ("values", "limits", "text"),
    [
        (1.5, (1.0, 2.0), "The prediction of G is constant on this slide: 1.5 on all 20 tiles."),
        (-1.5, (-2.0, -1.0), "is constant on this slide: -1.5 on all 20 tiles. G is predicted below 0"),
        (0.0, (-0.5, 0.5), "is constant on this slide: 0 on all 20 tiles."),
        (1e5 + 1e-3 * RAMP, (1e5 - 0.5, 1e5 + 0.5), "is constant on this slide: 1e+05 on all 20 tiles."),
        (
            RAMP - 3,
            (-2.99, -2.01),
            "G is predicted below 0 on all tiles, unlike any count: do not read it as expression.",
        ),
        (np.nan, (0.0, 1.0), "The prediction of G is not finite at any of the 20 tiles."),
        ([np.inf, np.nan, *RAMP[2:]], None, "The prediction of G is not finite on 2 tiles (uncolored)."),
        ([1.0] * 19 + [4.0], (1.0, 3.43), ""),
        (1e-4 * RAMP, (1e-6, 9.9e-5), ""),
    ],
)
def test_given_gene_has_its_scale_and_remarks(values, limits, text):
    adata = on_tiles({"G": values, "OTHER": RAMP}, [0.1, 0.2])
    caption = " ".join(list_remarks(adata, "G"))
    assert text in caption
    assert ("is constant" in caption) == ("is constant" in text)
    low, high = color_limits(np.asarray(adata[:, "G"].X))
    assert low < high
    if limits is not None:
        assert (low, high) == pytest.approx(limits, abs=1e-2 if limits[1] > 1e-3 else 1e-8)


@pytest.mark.parametrize("values", [-1.5, np.nan, [np.inf, np.nan, *RAMP[2:]]])
def test_map_of_a_constant_gene_draws_with_remarks(values):
    adata = on_tiles({"G": values}, [0.1])
    fig = predicted_map(adata, "G")
    fig.canvas.draw()
    assert gene_limits(fig) == color_limits(np.asarray(adata.X))
    for sentence in list_remarks(adata, "G"):
        assert sentence in caption(fig)


def test_single_tile_is_constant_and_its_value_reported():
    fig = predicted_map(on_tiles({"G": 0.25}, [0.1], n=1), "G")
    fig.canvas.draw()
    assert "is constant on this slide: 0.25 on its one tile." in caption(fig)
    with pytest.raises(ValueError, match="nothing to draw: 0 tiles, 1 genes"):
        predicted_map(on_tiles({"G": 0.25}, [0.1], n=1)[:0])


def test_single_high_tile_sets_the_color_limits():
    values = np.zeros(1000)
    values[7] = 4.0
    assert color_limits(values) == (0.0, 4.0)
    assert color_limits(np.concatenate([RAMP.repeat(50), [50.0]])) == pytest.approx((0, 1), abs=0.02)


def test_color_bar_shows_clipped_values():
    values = np.concatenate([[-9.0], RAMP[1:-1], [9.0]])
    fig = predicted_map(on_tiles({"G": values}, [0.1]), "G")
    assert color_bars(fig)[0]._colorbar.extend == "both"
    assert predicted_map(on_tiles({"G": 1.0}, [0.1]), "G").axes[-1]._colorbar.extend == "neither"


@pytest.mark.parametrize(
    ("values", "trained_on", "text"),
    [
        (RAMP, (0.0, 2.0), "G lies within the range of its training targets (0.00 to 2.00) on all 20 tiles."),
        ([-1.0] * 4 + [1.0] * 15 + [3.0], (0.0, 2.0),
         "G lies below the range of its training targets (0.00 to 2.00) on 20.0% of the tiles and above it on 5.0%."),
        ([-1.0] * 5 + [1.0] * 15, (0.0, 2.0),
         "G lies below the range of its training targets (0.00 to 2.00) on 25.0% of the tiles."),
        (RAMP + 3, (0.0, 2.0), "G lies above the range of its training targets (0.00 to 2.00) on all 20 tiles."),
        (RAMP, (np.nan, np.nan), "is unknown, because the model is from an older version: train it again"),
    ],
)  # fmt: skip
def test_remarks_report_the_share_of_tiles_outside_the_training_range(values, trained_on, text):
    (sentence,) = list_remarks(on_tiles({"G": values}, [0.1], trained_on=trained_on), "G")
    assert text in sentence


def test_caption_shows_any_gene_name(tmp_path):
    fig = predicted_map(on_tiles({r"$\frac{": 1.0}, [0.1], trained_on=(0.0, 2.0)), r"$\frac{")
    assert r"The prediction of $\frac{ is constant" in caption(fig)
    fig.axes[1].set_title("")  # not under test
    fig.canvas.draw()


def test_expression_map_reports_a_constant_prediction(slide):
    measured = np.random.default_rng(0).random(slide.n_spots)
    fig = expression_map(slide.adata, measured, np.full(slide.n_spots, -0.5), gene="G")
    a, b, _ = (spots(ax).norm for ax in panels(fig))
    assert (a.vmin, a.vmax) == (b.vmin, b.vmax)
    assert a.vmin == -0.5
    assert a.vmax > 0.9
    text = f"The predicted expression is constant on this slide: -0.5 on all {slide.n_spots} spots."
    assert fig.get_supxlabel() == text
    same = expression_map(slide.adata, measured, measured, gene="G")
    assert same.get_supxlabel() == ""
    assert spots(panels(same)[2]).norm.vmax == 0.5  # the scale of a zero residual is not empty


def test_maps_of_a_run_show_a_gene_that_varies_on_the_slide(mini_cohort, tmp_path):
    n = len(mini_cohort)
    rng = np.random.default_rng(0)
    measured, varies = rng.random((n, 2)).astype(np.float32), rng.random(n)
    X = np.column_stack([np.full(n, 0.3), varies]).astype(np.float32)
    X[mini_cohort.rows_of("MINI2"), 1] = 0.1  # no gene varies: the best one is drawn
    X[mini_cohort.rows_of("MINI3")[:5], 0] = 0.5
    predicted = ad.AnnData(X, var=pd.DataFrame(index=["BEST", "NEXT"]), layers={"measured": measured})
    table = pd.DataFrame({"fold": 0, "gene": ["BEST", "NEXT"], "pcc": [0.9, 0.1]})
    draw_maps(mini_cohort, predicted, table, tmp_path / "maps")
    names = {path.name for path in (tmp_path / "maps").iterdir()}
    assert names == {"MINI1_NEXT.png", "MINI2_BEST.png", "MINI3_BEST.png", "MINI4_NEXT.png"}


def test_grid_tiles_are_adjacent_squares():
    fig = predicted_map(predictions([0.1] * 3, grid=True), "A")
    drawn = spots(panels(fig)[1]).get_paths()
    sides = np.array([np.ptp(p.vertices, axis=0) for p in drawn])  # (n, 2), pixels of the image
    np.testing.assert_allclose(sides, 20)


def test_predicted_map_without_gene_or_image_raises():
    adata = predictions([0.1] * 3)
    with pytest.raises(ValueError, match="gene 'X' is not predicted; there are A, B, C"):
        predicted_map(adata, "X")
    del adata.uns["spatial"]
    with pytest.raises(ValueError, match="the slide has no image"):
        predicted_map(adata)
