"""Pictures of tissue: measured and predicted expression, and where they agree."""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Sequence
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
from peka_lite.probe._ranges import describe_outside, spot_or_tile
from peka_lite.probe.metrics import pearson

UNITS = {"log1p-cp10k": "log1p of counts per 10,000", "log1p": "log1p of counts"}


def expression_map(adata: ad.AnnData, measured: np.ndarray, predicted: np.ndarray, *, gene: str) -> Figure:
    """Draw one gene on the slide's H&E: measured, predicted (one color scale) and residual, side by side.

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
    residual = measured - predicted
    reach = residual_limit(residual)
    fig, axes = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    same = {"cmap": "viridis", "norm": Normalize(*color_limits(measured, predicted)), "label": "log1p expression"}
    draw_spots(axes[0], adata, measured, title=f"{short_name(gene)}: measured", **same)
    draw_spots(axes[1], adata, predicted, title=f"{short_name(gene)}: predicted (PCC {pcc:.2f})", **same)
    draw_spots(axes[2], adata, residual, title="measured minus predicted", cmap="RdBu_r", norm=Normalize(-reach, reach),
           label="log1p difference")  # fmt: skip
    flat = [f"What is {kind} {words}." for kind, values in (("measured", measured), ("predicted", predicted))
            if (words := describe_constant(values, "spots"))]  # fmt: skip
    if flat:
        fig.supxlabel(" ".join(flat), fontsize=8)
    return disable_mathtext(fig)


def gene_bars(table: pd.DataFrame, *, n: int = 20, order_by: str | None = None) -> Figure:
    """Draw PCC per gene, one bar a method, as the paper's Fig. 2; whiskers are the range over folds.

    Parameters
    ----------
    table
        Tidy results with columns method, fold, gene and pcc.
    n
        How many genes, the best first, among those that most folds predicted.
    order_by
        Method whose mean PCC orders the genes; the first in the table by default.

    Examples
    --------
    >>> import pandas as pd
    >>> import peka_lite as pk
    >>> pcc = {"frozen": {"KRT8": 0.5, "CD8A": 0.6}, "bone": {"KRT8": 0.7, "CD8A": 0.4}}
    >>> rows = [(method, 0, gene, value) for method, genes in pcc.items() for gene, value in genes.items()]
    >>> figure = pk.maps.gene_bars(pd.DataFrame(rows, columns=["method", "fold", "gene", "pcc"]), order_by="bone")
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]  # the best of Bone first
    ['KRT8', 'CD8A']
    """
    import seaborn as sns

    methods = list(dict.fromkeys(table["method"]))
    order_by = order_by or methods[0]
    if order_by not in methods:
        raise ValueError(f"no method {order_by!r} in the table; it has {', '.join(methods)}")
    scores = table[table["method"] == order_by].groupby("gene")["pcc"].agg(["count", "mean"])
    # Folds choose their genes; one that few folds chose would win by luck.
    ranked = scores[scores["count"] == scores["count"].max()].sort_values("mean", ascending=False)
    genes: Sequence[str] = ranked.index[:n].tolist()
    fig, ax = plt.subplots(figsize=(max(6, 0.5 * len(genes)), 3.8), layout="constrained")
    sns.barplot(
        table[table["gene"].isin(genes)], x="gene", y="pcc", hue="method", order=genes, hue_order=methods,
        errorbar=("pi", 100), err_kws={"linewidth": 1}, palette="colorblind", ax=ax,
    )  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="", ylabel="PCC on held-out spots", title=f"PCC per gene (the {len(genes)} best of {order_by})")
    ax.set_xticks(range(len(genes)), [short_name(gene) for gene in genes], rotation=90)
    ax.legend(title="", frameon=False)
    return disable_mathtext(fig)


def predicted_map(adata: ad.AnnData, gene: str | None = None) -> Figure:
    """Draw what a model predicts of one gene, beside the H&E; the line below says which model, and what it is not for.

    Colors span the 1st to the 99th percentile of the prediction on this slide (`color_limits`), values below 0
    included, which no count can have: a linear probe does not know that counts end there. A prediction that does not
    vary on this slide, or that lies below 0 everywhere, is drawn with a sentence that says so. Where tiles of a grid
    were predicted, the whole image is shown, and tissue without a tile stays uncoloured.

    Parameters
    ----------
    adata
        From `predict_slide`, `predict_spots` or `predict_from`, or read from the file that they wrote.
    gene
        One of ``adata.var_names``. None: of the genes that vary on this slide (`default_gene`) the one that the
        model's own run predicted best on spots it had held out (``var["pcc"]``); where none were held out, the one
        whose prediction varies most.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        For a gene that is not predicted, a slide without its image, or a file without a tile.

    Examples
    --------
    >>> import peka_lite as pk
    >>> adata = pk.open_cohort("mini", slides=["MINI1"]).slides[0].adata
    >>> predictions = adata[:, ["KRT8", "CD8A"]].copy()  # as if `predict_slide` had made them
    >>> predictions.X = pk.data.expression_targets(adata, ["KRT8", "CD8A"])
    >>> predictions.var["pcc"] = [0.3, 0.6]
    >>> figure = pk.maps.predicted_map(predictions)
    >>> print(figure.axes[1].get_title())
    CD8A: predicted
    PCC 0.60 on held-out spots of its run
    """
    if not adata.n_obs or not adata.n_vars:
        raise ValueError(f"there is nothing to draw: {adata.n_obs} tiles, {adata.n_vars} genes")
    gene = default_gene(adata) if gene is None else gene
    if gene not in adata.var_names:
        near = did_you_mean(gene, adata.var_names)
        raise ValueError(f"gene {gene!r} is not predicted; there are {', '.join(adata.var_names)}{near}")
    library = next(iter(adata.uns.get("spatial", {}).values()), {})
    if IMAGE_KEY not in library.get("images", {}):
        raise ValueError(f"the slide has no image uns['spatial'][...]['images'][{IMAGE_KEY!r}] to draw on")
    values, pcc = _values(adata, gene), _pcc(adata)
    model = adata.uns.get("peka_lite", {}).get("model", {})
    title = f"{short_name(gene)}: predicted"
    if np.isfinite(pcc[gene]):
        title += f"\nPCC {pcc[gene]:.2f} on held-out spots of {model.get('cohort', 'its run')}"
    low, high = color_limits(values)
    label = UNITS.get(model.get("normalization"), "predicted expression")
    if low < 0 and _of_counts(adata):
        label += "; no count is below 0"
    x0, y0, x1, y1 = tissue_window(adata)[-1]
    words = "\n".join(textwrap.fill(line, 160) for line in (*remarks(adata, gene), _what_it_is(adata)))
    height = np.clip(4.2 * (y1 - y0) / (x1 - x0), 2, 8) + 0.9 + 0.13 * words.count("\n")  # inches, as the panels ask
    fig, axes = plt.subplots(1, 2, figsize=(9.5, height), layout="constrained")
    draw_spots(axes[0], adata, None, title="H&E")
    shape = "square" if "tissue_share" in adata.obs else "circle"  # tiles of a grid touch
    draw_spots(axes[1], adata, values, title=title, norm=Normalize(low, high), label=label, shape=shape)
    fig.supxlabel(words, fontsize=8)
    return disable_mathtext(fig)


def default_gene(adata: ad.AnnData) -> str:
    """Choose the gene that a map shows where none is named: one that varies on this slide.

    Judged by the 5th to the 95th percentile of its prediction, log counts below 0 taken as 0; where no gene varies so,
    as predicted, then from the least to the greatest. Of those that vary it is the one with the highest PCC, or where
    none is known the one that varies most; where none varies, the first.
    """
    pcc, X = _pcc(adata), adata.to_df().to_numpy()  # (genes,), (N, genes)
    for floor, cut in ((0 if _of_counts(adata) else -np.inf, 5), (-np.inf, 5), (-np.inf, 0)):
        spread = pd.Series([_spread(np.maximum(column, floor), cut) for column in X.T], index=adata.var_names)
        if (varies := spread[spread > 0]).size:
            best = pcc[varies.index].dropna()
            return (best if best.size else varies).idxmax()
    return adata.var_names[0]


def color_limits(*values: np.ndarray) -> tuple[float, float]:
    """Return the ends of one color scale for all values: their 1st and 99th percentile, never one number twice.

    Where these meet, as of a gene that is high at one spot alone, they are the least and the greatest value; where all
    is one value, half a unit to either side of it. What is not finite is left out.

    Examples
    --------
    >>> from peka_lite.maps.tissue import color_limits
    >>> color_limits([0.0] * 999 + [4.0]), color_limits([-2.0, -2.0])
    ((0.0, 4.0), (-2.5, -1.5))
    """
    finite = _finite(np.concatenate([np.ravel(part) for part in values]))
    if not finite.size:
        return 0.0, 1.0
    for cut in (1, 0):
        low, high = np.percentile(finite, [cut, 100 - cut]).tolist()
        if not _one_value(low, high):
            return low, high
    return low - 0.5, high + 0.5


def residual_limit(residual: np.ndarray) -> float:
    """Return where a scale around 0 ends: the 99th percentile of the sizes, else the greatest, else half a unit."""
    sizes = np.abs(_finite(residual))
    ends = [float(np.percentile(sizes, cut)) for cut in (99, 100)] if sizes.size else []
    return next((end for end in ends if end > 1e-9), 0.5)


def describe_constant(values: np.ndarray, unit: str) -> str | None:
    """Say that values do not vary over a slide, and what they are, or that none is finite; None where they vary."""
    finite = _finite(values)
    if not finite.size:
        return f"is not finite at any of the {len(values)} {unit}"
    if not _one_value(finite.min(), finite.max()):
        return None
    where = f"all {finite.size} {unit}" if finite.size > 1 else f"its one {unit.removesuffix('s')}"
    return f"does not vary on this slide, it is {finite.mean():.3g} on {where}"


def remarks(adata: ad.AnnData, gene: str) -> list[str]:
    """Say in a sentence each what a map of a gene does not show by itself."""
    values, unit, said = _values(adata, gene), spot_or_tile(adata), []
    finite = _finite(values)
    if flat := describe_constant(values, unit):
        said.append(f"The prediction of {short_name(gene)} {flat}.")
    elif len(finite) < len(values):
        said.append(
            f"The prediction of {short_name(gene)} is not finite on {len(values) - len(finite)} {unit}: uncoloured."
        )
    if finite.size and finite.max() < 0 and _of_counts(adata):
        said.append(
            f"{short_name(gene)} is predicted below 0 on all {unit}, and no count is: do not read it as expression."
        )
    if "peka_lite" in adata.uns:
        said.append(describe_outside(adata, gene))
    return said


def _pcc(adata: ad.AnnData) -> pd.Series:
    return adata.var["pcc"] if "pcc" in adata.var else pd.Series(np.nan, index=adata.var_names)


def _values(adata: ad.AnnData, gene: str) -> np.ndarray:
    return adata[:, [gene]].to_df().to_numpy(dtype=float).ravel()


def _of_counts(adata: ad.AnnData) -> bool:
    """Tell whether predictions are log counts, which end at 0."""
    return adata.uns.get("peka_lite", {}).get("model", {}).get("normalization") in UNITS


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    return values[np.isfinite(values)]


def _one_value(low: float, high: float) -> bool:
    """Tell whether two ends are one number up to the rounding of float32."""
    return high - low <= 1e-5 * max(abs(low), abs(high), 1e-4)


def _spread(values: np.ndarray, cut: float) -> float:
    finite = _finite(values)
    if not finite.size:
        return 0.0
    # Between values that are there: of few tiles, too, one alone that is high makes no spread.
    low, high = (np.percentile(finite, at, method=to) for at, to in ((cut, "higher"), (100 - cut, "lower")))
    return 0.0 if _one_value(low, high) else high - low


def _what_it_is(adata: ad.AnnData) -> str:
    """Say below a map whose prediction it is, what has none, and what it is not for."""
    told = adata.uns.get("peka_lite", {})
    model, words = told.get("model", {}), []
    if model:
        drawn = ", which is synthetic: it has seen drawn tissue only" if model.get("synthetic") else ""
        words.append(f"Model “{model.get('folder', '')}” learned on {model['cohort']}{drawn}.")
    if "min_tissue" in told:
        um = told["tile_px"] * told["tile_mpp"]
        words.append(f"A square is {um:g} µm wide; less than {told['min_tissue']:.0%} tissue has none.")
    return " ".join([*words, "Not for diagnosis."])


def save_predicted_map(
    predictions: str | os.PathLike, out: str | os.PathLike, *, gene: str | None = None
) -> tuple[str, list[str]]:
    """Draw `predicted_map` of a file of predictions into a picture; its suffix names the kind (png, svg, pdf, ...).

    Returns the gene drawn and what is to be said of it (`remarks`). A picture that is there is replaced where this
    drew it and nobody changed it since; anything else is a FileExistsError.
    """
    predictions, out = Path(predictions), Path(out)
    if (kind := out.suffix.removeprefix(".").lower()) not in FigureCanvasBase.filetypes:
        raise ValueError(f"{out}: give a name that ends in .png, .svg or .pdf")
    if not predictions.is_file() or predictions.suffix != ".h5ad":
        raise FileNotFoundError(f"{predictions}: no file of predictions; `peka-lite predict` writes one (.h5ad)")
    check_file(out, "peka-lite map", inputs=[predictions])
    adata = read_anndata(predictions, uns=("spatial", "peka_lite"))
    gene = default_gene(adata) if gene is None and adata.n_vars else gene
    try:
        figure = predicted_map(adata, gene)
    except ValueError as error:
        raise ValueError(f"{predictions}: {error}") from None
    try:
        with write_output(out, "peka-lite map", inputs=[predictions]) as partial:
            write_file(partial, figure_bytes(figure, kind=kind, dpi=150), of=out)
    finally:
        plt.close(figure)
    return gene, remarks(adata, gene)


def draw_spots(ax, adata, values, *, title, cmap="viridis", norm=None, label=None, shape="circle") -> None:
    """One panel: the slide's image cut to its tissue, and spots colored by values where there are any."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # squidpy's import warns of its own dependencies
        import squidpy as sq

    image, scale, diameter, (x0, y0, x1, y1) = tissue_window(adata)
    ax.set(title=title)
    ax.set_axis_off()
    if values is None:
        ax.imshow(image[y0:y1, x0:x1])
        return
    coords = np.asarray(adata.obsm["spatial"], dtype=float)[:, :2]  # (N, 2) full-resolution pixels
    view = ad.AnnData(obs=pd.DataFrame({"value": values}, index=adata.obs_names), obsm={"spatial": coords})
    # HEST names the scale factor of its image in its own way; squidpy derives the name from the image's.
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
        artist.set_rasterized(True)  # hundreds of circles as paths would make a vector figure large
    beyond = (values < norm.vmin).any(), (values > norm.vmax).any()
    extend = {(True, False): "min", (False, True): "max", (True, True): "both"}.get(beyond, "neither")
    bar = ax.figure.colorbar(plt.cm.ScalarMappable(norm, cmap), ax=ax, shrink=0.75, extend=extend)
    bar.set_label(label)
    ax.set(xlabel="", ylabel="")
