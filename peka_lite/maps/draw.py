"""Draw the maps of a run as files."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from peka_lite._core.io import figure_bytes, write_file
from peka_lite._core.names import unique_file_name
from peka_lite._core.progress import steps
from peka_lite.data.hest import IMAGE_KEY, Cohort
from peka_lite.maps.local_pcc import pcc_map
from peka_lite.maps.tissue import describe_constant, expression_map


def draw_maps(cohort: Cohort, predictions: ad.AnnData, table: pd.DataFrame, folder: Path) -> None:
    """Draw for each slide, as PNG files, the best predicted gene and the local PCC of all genes.

    Genes with a constant prediction on the slide are skipped, unless all are constant.
    """
    folder.mkdir(exist_ok=True)
    used_names = {}
    pcc_names = {slide.id: unique_file_name(f"{slide.id}_pcc", used_names) for slide in cohort.slides}
    for slide in steps("maps: slide", cohort.slides):
        library = next(iter(slide.adata.uns.get("spatial", {}).values()), {})
        if IMAGE_KEY not in library.get("images", {}):
            warnings.warn(
                f"{slide.id} has no image uns['spatial'][...]['images'][{IMAGE_KEY!r}]: no maps are drawn", stacklevel=3
            )
            continue
        current = predictions[cohort.rows_of(slide.id)]
        complete = ~np.isnan(current.X).any(0)  # genes that every fold of this slide predicted
        scores = table[table["gene"].isin(current.var_names[complete])].groupby("gene")["pcc"].mean().dropna()
        if scores.empty:
            warnings.warn(f"{slide.id}: no gene was predicted at all of its spots, no maps are drawn", stacklevel=3)
            continue
        varying = [gene for gene in scores.index if describe_constant(current[:, gene].X, "spots") is None]
        best = (scores[varying] if varying else scores).idxmax()
        measured, j = current.layers["measured"], current.var_names.get_loc(best)
        name = unique_file_name(f"{slide.id}_{best}", used_names, of=(slide.id, best))
        figures = {name: expression_map(slide.adata, measured[:, j], current.X[:, j], gene=best)}
        if complete.sum() >= 3 and slide.n_spots > 18:
            figures[pcc_names[slide.id]] = pcc_map(slide.adata, measured[:, complete], current.X[:, complete])
        for name, figure in figures.items():
            write_file(folder / f"{name}.png", figure_bytes(figure, dpi=90))
            plt.close(figure)
