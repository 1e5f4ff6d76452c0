"""Create an interactive HTML viewer of a slide: H&E image, spots, measured and predicted expression."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import anndata as ad
import numpy as np
from matplotlib import colormaps
from PIL import Image

from peka_lite._core.io import write_file
from peka_lite._core.names import escape_html
from peka_lite._core.outputs import write_output
from peka_lite.data.hest import IMAGE_KEY, tissue_window
from peka_lite.maps.local_pcc import find_neighbors, local_pcc
from peka_lite.maps.tissue import color_limits, describe_constant, residual_limit
from peka_lite.probe.metrics import pearson

IMAGE_PX, JPEG_QUALITY = 1000, 80
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>:root {{ color-scheme: light dark }} body {{ margin: 12px; font-family: system-ui, sans-serif }}</style>
<main>
{viewer}
</main>
</html>
"""


@dataclass(frozen=True)
class SlideViewer:
    """Self-contained HTML of an interactive slide; displays itself in Jupyter, on Colab and in the book.

    Attributes
    ----------
    title
        Heading.
    html
        Style, image, data and script; needs no network and no library.
    """

    title: str
    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike) -> Path:
        """Write the viewer as an HTML page that opens without a server.

        An existing file is overwritten only if this method wrote it and it has not changed since, else FileExistsError.
        """
        path = Path(path)
        with write_output(path, "SlideViewer.save") as partial:
            write_file(partial, PAGE.format(title=escape_html(self.title), viewer=self.html).encode(), of=path)
        return path


def slide_viewer(
    adata: ad.AnnData,
    measured: np.ndarray,
    predicted: np.ndarray,
    *,
    genes: Sequence[str],
    n_neighbors: int = 18,
    title: str | None = None,
) -> SlideViewer:
    """Create a viewer that shows measured and predicted expression of a selected gene on the slide.

    Parameters
    ----------
    adata
        A slide's AnnData, with ``obsm["spatial"]`` and the image in ``uns["spatial"]``.
    measured, predicted
        (N, G) normalized expression at the slide's spots.
    genes
        The G names, listed in the order of their PCC on this slide.
    n_neighbors
        For `local_pcc`, which is drawn for each gene.
    title
        Heading. Default: the numbers of genes and spots.

    Returns
    -------
    SlideViewer

    Raises
    ------
    ValueError
        If shapes, genes and spots do not match, or a value is not finite.

    Notes
    -----
    Expression is stored in 256 steps from a gene's minimum to its maximum, the same for measured and predicted, and
    correlations in steps of 1/127. Colors span the 1st to the 99th percentile, as in `expression_map`. A constant
    prediction is reported.

    Examples
    --------
    >>> import anndata as ad
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> factors = {"tissue_downscaled_fullres_scalef": 0.1, "spot_diameter_fullres": 55.0}
    >>> image = {"images": {"downscaled_fullres": np.full((100, 120, 3), 200, np.uint8)}, "scalefactors": factors}
    >>> xy = rng.uniform(100, 900, (30, 2))
    >>> slide = ad.AnnData(np.ones((30, 1)), obsm={"spatial": xy}, uns={"spatial": {"S1": image}})
    >>> Y = rng.random((30, 2))
    >>> pk.slide_viewer(slide, Y, Y**2, genes=["EPCAM", "CD3E"], n_neighbors=6)
    SlideViewer(title='2 genes at 30 spots')
    """
    Y, P, names = np.asarray(measured, dtype=float), np.asarray(predicted, dtype=float), [str(g) for g in genes]
    _check_input(adata, Y, P, names)
    pcc = pearson(Y, P)  # (G,)
    order = np.argsort(-np.nan_to_num(pcc, nan=-2), kind="stable")
    image, scale, diameter, (x0, y0, x1, y1) = tissue_window(adata)
    picture = Image.fromarray(image[y0:y1, x0:x1]).convert("RGB")
    xy = np.asarray(adata.obsm["spatial"], dtype=float)[:, :2]  # (N, 2)
    data = {
        "genes": [names[g] for g in order],
        "pcc": [None if np.isnan(v) else float(v) for v in pcc[order]],
        "spots": adata.obs_names.astype(str).tolist(),
        "xy": _encode_base64(((xy * scale - (x0, y0)) / picture.size).astype("<f4")),
        "radius": diameter * scale / picture.width / 2,  # relative to the picture's width
        "near": n_neighbors,
        **_encode_layers(xy, Y[:, order], P[:, order], n_neighbors),
        **{name: _encode_base64(255 * colormaps[name](np.arange(256))[:, :3] + 0.5) for name in ("viridis", "RdBu_r")},
    }
    picture.thumbnail((IMAGE_PX, IMAGE_PX))
    picture.save(jpeg := io.BytesIO(), format="JPEG", quality=JPEG_QUALITY, optimize=True)
    title = title or f"{len(names)} genes at {len(xy)} spots"
    parts = {
        "title": f'<p class="peka-title">{escape_html(title)}</p>',
        "image": f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}",
        "width": str(picture.width),
        "height": str(picture.height),
        "data": json.dumps(data).replace("<", "\\u003c"),  # a gene name must not end the script
    }
    parts["id"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    template = resources.files("peka_lite.maps").joinpath("viewer.html").read_text(encoding="utf-8")
    return SlideViewer(title, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def _encode_layers(xy: np.ndarray, Y: np.ndarray, P: np.ndarray, n_neighbors: int) -> dict:
    """Return the encoded values that color the spots, and the parameters that decode them."""
    both = np.concatenate([Y, P])  # (2N, G)
    low, step = both.min(0), np.maximum(np.ptp(both, axis=0), 1e-9) / 255
    # `local_pcc` of each gene, in one call with (k + 1, N * G) values.
    near = find_neighbors(xy, n_neighbors).T  # (k + 1, N)
    local = pearson(Y[near].reshape(len(near), -1), P[near].reshape(len(near), -1)).reshape(Y.shape)
    over = local_pcc(xy, Y, P, over="genes") if Y.shape[1] >= 3 else np.empty(0)
    return {
        "measured": _encode_base64(np.rint((Y - low) / step).T),  # (G, N)
        "predicted": _encode_base64(np.rint((P - low) / step).T),
        "local": _encode_base64(_encode_pcc(local.T)),
        "over": _encode_base64(_encode_pcc(over)),
        "low": low.tolist(),
        "step": step.tolist(),
        "scale": [color_limits(values) for values in both.T],
        "reach": [residual_limit(residual) for residual in (Y - P).T],
        "flat": [describe_constant(values, "spots") for values in P.T],
    }


def _encode_pcc(pcc: np.ndarray) -> np.ndarray:
    """Encode correlations from -1 to 1 as 0 to 254, NaN as 255."""
    return np.where(np.isnan(pcc), 255, np.rint(127 * (pcc + 1)))


def _encode_base64(array: np.ndarray) -> str:
    array = array if array.dtype == "<f4" else array.astype(np.uint8)
    return base64.b64encode(array.tobytes()).decode()


def _check_input(adata: ad.AnnData, Y: np.ndarray, P: np.ndarray, names: list[str]) -> None:
    shape = (adata.n_obs, len(names))
    if not names or Y.shape != shape or P.shape != shape:
        raise ValueError(f"shapes do not match: measured {Y.shape}, predicted {P.shape}, adata and genes {shape}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"genes: {', '.join(repeated)} given more than once")
    for kind, A in (("measured", Y), ("predicted", P)):
        if bad := [name for name, finite in zip(names, np.isfinite(A).all(0), strict=True) if not finite]:
            raise ValueError(f"{kind}: {', '.join(bad[:5])} not finite at every spot; leave out such genes or spots")
    images = next(iter(adata.uns.get("spatial", {}).values()), {}).get("images", {})
    if IMAGE_KEY not in images or "spatial" not in adata.obsm:
        raise ValueError(f"adata: obsm['spatial'] and an image {IMAGE_KEY!r} in uns['spatial'] are needed")
