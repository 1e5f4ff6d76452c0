"""Draw measured and predicted expression on the tissue."""

from __future__ import annotations

import os
import textwrap
import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from peka_lite._core.hdf5 import read_anndata
from peka_lite._core.io import figure_bytes, write_file
from peka_lite._core.names import did_you_mean, disable_mathtext, short_name
from peka_lite._core.outputs import check_file, write_output
from peka_lite.data.hest import IMAGE_KEY, tissue_window
from peka_lite.probe._target_ranges import describe_outside, spot_or_tile
from peka_lite.probe.metrics import pearson

UNITS = {"log1p-cp10k": "log1p of counts per 10,000", "log1p": "log1p of counts"}


def expression_map(adata: ad.AnnData, measured: np.ndarray, predicted: np.ndarray, *, gene: str) -> Figure:
    """Draw one gene on the slide's H&E: measured, predicted (same color scale) and residual.

    Parameters
    ----------
    adata
        A slide's AnnData, with ``obsm["spatial"]`` and the image in ``uns["spatial"]``.
    measured, predicted
        (N,) normalized expression at the slide's spots.
    gene
        Name for the titles.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).slides[0].adata
    >>> measured = pk.data.expression_targets(adata, ["KRT8"])[:, 0]
    >>> figure = pk.expression_map(adata, measured, measured / 2, gene="KRT8")
    >>> [ax.get_title() for ax in figure.axes[:3]]
    ['KRT8: measured', 'KRT8: predicted (PCC 1.00)', 'measured minus predicted']
    """
    measured, predicted = np.asarray(measured, dtype=float).ravel(), np.asarray(predicted, dtype=float).ravel()
    pcc = pearson(measured[:, None], predicted[:, None])[0]
    limit = residual_limit(residual := measured - predicted)
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    shared = {"cmap": "viridis", "norm": Normalize(*color_limits(measured, predicted)), "label": "log1p expression"}
    draw_spots(axes[0], adata, measured, title=f"{short_name(gene)}: measured", **shared)
    draw_spots(axes[1], adata, predicted, title=f"{short_name(gene)}: predicted (PCC {pcc:.2f})", **shared)
    draw_spots(axes[2], adata, residual, title="measured minus predicted", cmap="RdBu_r", norm=Normalize(-limit, limit),
           label="log1p difference")  # fmt: skip
    notes = [f"The {kind} expression {text}." for kind, values in (("measured", measured), ("predicted", predicted))
             if (text := describe_constant(values, "spots"))]  # fmt: skip
    if notes:
        fig.supxlabel(" ".join(notes), fontsize=8)
    return disable_mathtext(fig)


def predicted_map(adata: ad.AnnData, gene: str | None = None) -> Figure:
    """Draw the prediction of one gene beside the H&E, with a caption on the model and the prediction's limits.

    Colors span the 1st to the 99th percentile of the prediction on this slide (`color_limits`), including values below
    0, which a linear probe can predict although counts are never negative. The caption reports a prediction that is
    constant on this slide or below 0 everywhere. For a grid of tiles, the whole image is shown, and tissue without a
    tile is left uncolored.

    Parameters
    ----------
    adata
        Output of `predict_slide`, `predict_spots` or `predict_from`, or read from the file that they wrote.
    gene
        One of ``adata.var_names``. None: of the genes that vary on this slide (`choose_gene`), the one with the highest
        PCC on held-out spots of the model's run (``var["pcc"]``); without held-out spots, the one that varies most.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If the gene is not predicted, the slide has no image, or there is no tile.

    Examples
    --------
    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).slides[0].adata
    >>> predictions = adata[:, ["KRT8", "CD8A"]].copy()  # like the output of `predict_slide`
    >>> predictions.X = pk.data.expression_targets(adata, ["KRT8", "CD8A"])
    >>> predictions.var["pcc"] = [0.3, 0.6]
    >>> figure = pk.maps.predicted_map(predictions)
    >>> print(figure.axes[1].get_title())
    CD8A: predicted
    PCC 0.60 on held-out spots of its run
    """
    if not adata.n_obs or not adata.n_vars:
        raise ValueError(f"nothing to draw: {adata.n_obs} tiles, {adata.n_vars} genes")
    gene = choose_gene(adata) if gene is None else gene
    if gene not in adata.var_names:
        near = did_you_mean(gene, adata.var_names)
        raise ValueError(f"gene {gene!r} is not predicted; there are {', '.join(adata.var_names)}{near}")
    library = next(iter(adata.uns.get("spatial", {}).values()), {})
    if IMAGE_KEY not in library.get("images", {}):
        raise ValueError(f"the slide has no image uns['spatial'][...]['images'][{IMAGE_KEY!r}] to draw on")
    values, pcc = _get_values(adata, gene), _get_pcc(adata)
    model = adata.uns.get("peka_lite", {}).get("model", {})
    title = f"{short_name(gene)}: predicted"
    if np.isfinite(pcc[gene]):
        title += f"\nPCC {pcc[gene]:.2f} on held-out spots of {model.get('cohort', 'its run')}"
    low, high = color_limits(values)
    label = UNITS.get(model.get("normalization"), "predicted expression")
    if low < 0 and _are_log_counts(adata):
        label += "; no count is below 0"
    x0, y0, x1, y1 = tissue_window(adata)[-1]
    caption = "\n".join(textwrap.fill(line, 160) for line in (*list_remarks(adata, gene), _describe_model(adata)))
    height = np.clip(4.2 * (y1 - y0) / (x1 - x0), 2, 8) + 0.9 + 0.13 * caption.count("\n")  # inches
    fig, axes = plt.subplots(1, 2, figsize=(9.5, height), layout="constrained")
    draw_spots(axes[0], adata, None, title="H&E")
    shape = "square" if "tissue_share" in adata.obs else "circle"  # tiles of a grid touch
    draw_spots(axes[1], adata, values, title=title, norm=Normalize(low, high), label=label, shape=shape)
    fig.supxlabel(caption, fontsize=8)
    return disable_mathtext(fig)


def choose_gene(adata: ad.AnnData) -> str:
    """Choose the default gene of a map: one that varies on this slide.

    Variation is the range from the 5th to the 95th percentile of the prediction, with log counts below 0 set to 0; if
    no gene varies, without that floor, then the full range. Among the genes that vary, the one with the highest PCC is
    chosen, or without any PCC the one that varies most; if none varies, the first.
    """
    pcc, X = _get_pcc(adata), adata.to_df().to_numpy()  # (genes,), (N, genes)
    for floor, cut in ((0 if _are_log_counts(adata) else -np.inf, 5), (-np.inf, 5), (-np.inf, 0)):
        spread = pd.Series([_compute_spread(np.maximum(column, floor), cut) for column in X.T], index=adata.var_names)
        if (varies := spread[spread > 0]).size:
            best = pcc[varies.index].dropna()
            return (best if best.size else varies).idxmax()
    return adata.var_names[0]


def color_limits(*values: np.ndarray) -> tuple[float, float]:
    """Return the limits of a color scale for all values: their 1st and 99th percentile.

    If these are equal, as for a gene that is high at a single spot, return minimum and maximum; if all values are
    equal, half a unit to either side. Values that are not finite are ignored.
    """
    finite = _drop_nonfinite(np.concatenate([np.ravel(part) for part in values]))
    if not finite.size:
        return 0.0, 1.0
    for cut in (1, 0):
        low, high = np.percentile(finite, [cut, 100 - cut]).tolist()
        if not _nearly_equal(low, high):
            return low, high
    return low - 0.5, high + 0.5


def residual_limit(residual: np.ndarray) -> float:
    """Return the limit of a scale around 0: the 99th percentile of absolute values, else the maximum, else 0.5."""
    sizes = np.abs(_drop_nonfinite(residual))
    ends = [float(np.percentile(sizes, cut)) for cut in (99, 100)] if sizes.size else []
    return next((end for end in ends if end > 1e-9), 0.5)


def describe_constant(values: np.ndarray, unit: str) -> str | None:
    """Describe values that are constant on a slide, or never finite; return None if they vary."""
    finite = _drop_nonfinite(values)
    if not finite.size:
        return f"is not finite at any of the {len(values)} {unit}"
    if not _nearly_equal(finite.min(), finite.max()):
        return None
    where = f"all {finite.size} {unit}" if finite.size > 1 else f"its one {unit.removesuffix('s')}"
    return f"is constant on this slide: {finite.mean():.3g} on {where}"


def list_remarks(adata: ad.AnnData, gene: str) -> list[str]:
    """Return sentences on a gene's prediction that a reader of its map needs."""
    values, unit, sentences = _get_values(adata, gene), spot_or_tile(adata), []
    finite, name = _drop_nonfinite(values), short_name(gene)
    if constant := describe_constant(values, unit):
        sentences.append(f"The prediction of {name} {constant}.")
    elif len(finite) < len(values):
        sentences.append(f"The prediction of {name} is not finite on {len(values) - len(finite)} {unit} (uncolored).")
    if finite.size and finite.max() < 0 and _are_log_counts(adata):
        sentences.append(f"{name} is predicted below 0 on all {unit}, unlike any count: do not read it as expression.")
    if "peka_lite" in adata.uns:
        sentences.append(describe_outside(adata, gene))
    return sentences


def _get_pcc(adata: ad.AnnData) -> pd.Series:
    return adata.var["pcc"] if "pcc" in adata.var else pd.Series(np.nan, index=adata.var_names)


def _get_values(adata: ad.AnnData, gene: str) -> np.ndarray:
    return adata[:, [gene]].to_df().to_numpy(dtype=float).ravel()


def _are_log_counts(adata: ad.AnnData) -> bool:
    """Return whether predictions are log counts, which are never below 0."""
    return adata.uns.get("peka_lite", {}).get("model", {}).get("normalization") in UNITS


def _drop_nonfinite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]


def _nearly_equal(low: float, high: float) -> bool:
    """Return whether two limits are equal up to float32 rounding."""
    return high - low <= 1e-5 * max(abs(low), abs(high), 1e-4)


def _compute_spread(values: np.ndarray, cut: float) -> float:
    finite = _drop_nonfinite(values)
    if not finite.size:
        return 0.0
    # No interpolation: a single high tile among few is not variation.
    low, high = (np.percentile(finite, at, method=to) for at, to in ((cut, "higher"), (100 - cut, "lower")))
    return 0.0 if _nearly_equal(low, high) else high - low


def _describe_model(adata: ad.AnnData) -> str:
    """Return the last line of a map's caption: model, tile size and disclaimer."""
    info = adata.uns.get("peka_lite", {})
    model, sentences = info.get("model", {}), []
    if model:
        synthetic = ", which is synthetic (drawn tissue only)" if model.get("synthetic") else ""
        sentences.append(f"Model “{model.get('folder', '')}” was trained on {model['cohort']}{synthetic}.")
    if "min_tissue" in info:
        um = info["tile_px"] * info["tile_mpp"]
        sentences.append(f"Squares are {um:g} µm wide; tiles below {info['min_tissue']:.0%} tissue have none.")
    return " ".join([*sentences, "Not for diagnosis."])


def save_predicted_map(
    predictions: str | os.PathLike, out: str | os.PathLike, *, gene: str | None = None
) -> tuple[str, list[str]]:
    """Save `predicted_map` of a predictions file as an image; the suffix gives the format (png, svg, pdf, ...).

    Return the gene and its remarks (`list_remarks`). FileExistsError protects an image that another program wrote or
    changed.
    """
    predictions, out = Path(predictions), Path(out)
    if (kind := out.suffix.removeprefix(".").lower()) not in FigureCanvasBase.filetypes:
        raise ValueError(f"{out}: give a name that ends in .png, .svg or .pdf")
    if not predictions.is_file() or predictions.suffix != ".h5ad":
        raise FileNotFoundError(f"{predictions}: not a predictions file; `peka-lite predict` writes one (.h5ad)")
    check_file(out, "peka-lite map", inputs=[predictions])
    adata = read_anndata(predictions, uns=("spatial", "peka_lite"))
    gene = choose_gene(adata) if gene is None and adata.n_vars else gene
    try:
        figure = predicted_map(adata, gene)
    except ValueError as error:
        raise ValueError(f"{predictions}: {error}") from None
    try:
        with write_output(out, "peka-lite map", inputs=[predictions]) as partial:
            write_file(partial, figure_bytes(figure, kind=kind, dpi=150), of=out)
    finally:
        plt.close(figure)
    return gene, list_remarks(adata, gene)


def draw_spots(ax, adata, values, *, title, cmap="viridis", norm=None, label=None, shape="circle") -> None:
    """Draw a panel: the slide's image cropped to its tissue, and spots colored by `values` unless they are None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from squidpy's dependencies
        import squidpy as sq

    image, scale, diameter, (x0, y0, x1, y1) = tissue_window(adata)
    ax.set(title=title)
    ax.set_axis_off()
    if values is None:
        ax.imshow(image[y0:y1, x0:x1])
        return
    coords = np.asarray(adata.obsm["spatial"], dtype=float)[:, :2]  # (N, 2) full-resolution pixels
    view = ad.AnnData(obs=pd.DataFrame({"value": values}, index=adata.obs_names), obsm={"spatial": coords})
    # squidpy derives the scale factor's name from the image's name; HEST's differs.
    factors = {"spot_diameter_fullres": diameter, f"tissue_{IMAGE_KEY}_scalef": scale}
    name, crop = next(iter(adata.uns["spatial"])), np.array([x0, y0, x1, y1]) / scale
    view.uns["spatial"] = {name: {"images": {IMAGE_KEY: image}, "scalefactors": factors}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sq.pl.spatial_scatter(
            view, color="value", library_id=name, img_res_key=IMAGE_KEY, crop_coord=tuple(crop), ax=ax, title=title,
            cmap=cmap, norm=norm, img_alpha=0.55, size=1.0, shape=shape, colorbar=False, frameon=False,
        )  # fmt: skip
    for artist in (*ax.images, *ax.collections):
        artist.set_rasterized(True)  # hundreds of vector circles make a large file
    clipped = (values < norm.vmin).any(), (values > norm.vmax).any()
    extend = {(True, False): "min", (False, True): "max", (True, True): "both"}.get(clipped, "neither")
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, shrink=0.75, extend=extend)
    bar.set_label(label)
    ax.set(xlabel="", ylabel="")
