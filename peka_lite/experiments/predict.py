"""Predict the expression of a whole slide, tile by tile, with a trained model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from peka_lite import __version__
from peka_lite._core._stream import open_partial
from peka_lite._core.device import default_device
from peka_lite._core.hdf5 import FACTORS, PICTURES, read_anndata
from peka_lite._core.io import write_h5ad
from peka_lite._core.locks import lock_work_folder
from peka_lite._core.outputs import check_file, place_file
from peka_lite._core.progress import logger, progress_bar, stage
from peka_lite.data._format import POSITION_COLUMNS
from peka_lite.data.hest import IMAGE_KEY, Slide
from peka_lite.data.tissue import tissue_tiles
from peka_lite.data.wsi import TILE, TILE_MPP, open_slide
from peka_lite.probe._target_ranges import HIGH, LOW, shares_outside

if TYPE_CHECKING:
    from peka_lite.experiments.model import TrainedModel

BY = "peka-lite predict"


def predict_slide(
    slide: str | os.PathLike,
    model: TrainedModel,
    out: str | os.PathLike,
    *,
    mpp: float | None = None,
    min_tissue: float = 0.5,
    batch_size: int = 64,
    device: str | None = None,
    workers: int = 2,
    progress: bool = False,
) -> ad.AnnData:
    """Predict expression on the tissue of a whole-slide image, on a grid of 224 px tiles at 0.5 um/px (112 um).

    Threads read tiles ahead, and predictions are written to ``{out}.{machine}.partial``, so memory holds only a few
    batches. On the same machine, a stopped job resumes from this file and gives the same numbers, unless slide, model
    or settings changed.

    Parameters
    ----------
    slide
        Path of the image; see `open_slide`, also for `mpp`.
    model
        A trained model.
    out
        ``.h5ad`` file to write. An existing file is replaced, once the new one is complete, only if this function
        wrote it and it is unchanged.
    min_tissue
        Minimum tissue share of a tile; see `tissue_tiles`.
    batch_size
        Tiles per batch.
    device
        None: the GPU if there is one.
    workers
        Threads that read tiles, one batch each.
    progress
        Show a progress bar in a terminal or a notebook; the plan goes to the logger ``peka_lite``.

    Returns
    -------
    anndata.AnnData
        As read from `out`. ``X`` (N, genes) float32. ``var``: pcc, each gene's PCC on the test spots of the model's
        run (NaN without test spots), train_min and train_max, the range of its training targets (NaN for models of
        older versions). ``obs``: array_row, array_col and tissue_share. ``obsm["spatial"]`` (N, 2): centers in pixels
        of the slide's finest level, x first. ``uns["spatial"]``: the thumbnail and its scale, for
        `squidpy.pl.spatial_scatter` and `scanpy.pl.spatial`. ``uns["peka_lite"]``: slide, model, versions, and
        outside_training_range, the share of the values in ``X`` outside their gene's training range (NaN if unknown).

    Raises
    ------
    FileNotFoundError, SlideError
        As `open_slide`, `tissue_tiles` and `WholeSlide.read_tile`. Finished predictions are kept for the next call.
    FileExistsError
        If `out` is another file or an input.
    ValueError
        If `out` does not end in ``.h5ad``, or predictions are not finite or not of the model's genes.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> from PIL import Image
    >>> tiles = pk.open_cohort("mini", slides=["MINI3"]).tiles[:4]
    >>> Image.fromarray(np.hstack(tiles)).save("slide.png")  # 224 x 896 px
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> predicted = pk.experiments.predict_slide("slide.png", pk.load_trained("student"), "slide.h5ad", mpp=0.5)
    >>> predicted.shape, predicted.obsm["spatial"][:2].tolist()
    ((4, 10), [[112.0, 112.0], [336.0, 112.0]])
    >>> list(predicted.obs), list(predicted.var)
    (['array_row', 'array_col', 'tissue_share'], ['pcc', 'train_min', 'train_max'])
    """
    out = _check_options(out, batch_size, workers, inputs=[slide])
    with open_slide(slide, mpp=mpp) as opened:
        with stage("finding the tissue"):
            tissue = tissue_tiles(opened, min_tissue=min_tissue)
        places = tissue.obs[["array_row", "array_col"]].to_numpy()  # (N, 2)

        def read(rows: slice) -> np.ndarray:
            return np.stack([opened.read_tile(row, col) for row, col in places[rows]])

        width, height = opened.tile
        scalefactors = {"spot_diameter_fullres": (width * height) ** 0.5}
        scalefactors |= {f"tissue_{key}_scalef": tissue.scale for key in ("hires", IMAGE_KEY)}
        picture = {"images": {"hires": tissue.picture, IMAGE_KEY: tissue.picture}, "scalefactors": scalefactors}
        adata = ad.AnnData(
            obs=tissue.obs,
            obsm={"spatial": (places[:, ::-1] + 0.5) * (width, height)},
            uns={"spatial": {opened.path.stem: picture}},
        )
        source = {"slide": opened.path.name, "slide_fingerprint": opened.fingerprint, "mpp": np.array(opened.mpp)}
        source["min_tissue"] = min_tissue
        key = repr((opened.fingerprint, opened.mpp, opened.size, places.tobytes()))
        options = {"batch_size": batch_size, "device": device, "workers": workers, "progress": progress}
        return _predict(read, adata, source, model, out, key=key, **options)


def predict_spots(
    slide: Slide,
    model: TrainedModel,
    out: str | os.PathLike,
    *,
    held_out: str = "unknown",
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> ad.AnnData:
    """Predict expression at the spots of a HEST slide.

    As `predict_slide`, but at the slide's spots. Copied from ``slide.adata``: the numeric columns array_row, array_col
    and in_tissue of obs, ``obsm["spatial"]`` (N, 2), and from ``uns["spatial"]`` the images hires, lowres and
    downscaled_fullres, their scale factors and the spot diameter. If there is no image ``"hires"``, which plots need,
    downscaled_fullres is stored under this name too. `held_out` is stored in ``uns["peka_lite"]``.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> model = pk.load_trained("student", fold=1)
    >>> slide = pk.open_cohort("mini", slides=["MINI5"], min_genes=1000).slides[0]
    >>> predicted = pk.experiments.predict_spots(slide, model, "MINI5.h5ad", held_out="yes")
    >>> predicted.shape, predicted.uns["peka_lite"]["held_out"]
    ((57, 10), 'yes')
    >>> predicted.var.head(2).round(1)
            pcc  train_min  train_max
    PGR     0.4        0.0        4.2
    UBE2Q1  0.0        0.0        3.2
    """
    out = _check_options(out, batch_size, 1, inputs=slide.tiles.paths)
    measured = slide.adata
    pictures = {}
    for name, library in measured.uns.get("spatial", {}).items():
        images, factors = (
            {key: value for key, value in library.get(kind, {}).items() if key in known}
            for kind, known in (("images", PICTURES), ("scalefactors", FACTORS))
        )
        pictures[name] = library = {"images": images, "scalefactors": factors}
        if IMAGE_KEY in images and "hires" not in images and f"tissue_{IMAGE_KEY}_scalef" in factors:
            library["images"] = images | {"hires": images[IMAGE_KEY]}
            library["scalefactors"] = factors | {"tissue_hires_scalef": factors[f"tissue_{IMAGE_KEY}_scalef"]}
    adata = ad.AnnData(
        obs=measured.obs[
            [name for name in POSITION_COLUMNS if name in measured.obs and is_numeric_dtype(measured.obs[name])]
        ],
        obsm={"spatial": np.asarray(measured.obsm["spatial"], dtype=float)[:, :2]},
        uns={"spatial": pictures} if pictures else {},
    )
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in slide.tiles.paths]
    key = repr((slide.id, stats, slide.tiles.part.tobytes(), slide.tiles.row.tobytes()))
    options = {"batch_size": batch_size, "device": device, "workers": 1, "progress": progress}  # h5py reads serially
    return _predict(
        slide.tiles.__getitem__, adata, {"slide": slide.id, "held_out": held_out}, model, out, key=key, **options
    )


def check_prediction_file(out: Path, *, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Check that predictions can be written to `out`: an ``.h5ad`` name, no other file and no input."""
    if out.suffix != ".h5ad" or out.is_dir():
        raise ValueError(f"{out}: predictions are written as one AnnData file; give a name that ends in .h5ad")
    check_file(out, BY, inputs=inputs)


def _check_options(
    out: str | os.PathLike, batch_size: int, workers: int, *, inputs: Iterable[str | os.PathLike]
) -> Path:
    out = Path(out)
    check_prediction_file(out, inputs=inputs)
    for name, value in {"batch_size": batch_size, "workers": workers}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    return out


def _predict(
    read: Callable[[slice], np.ndarray],
    adata: ad.AnnData,
    source: dict,
    model: TrainedModel,
    out: Path,
    *,
    key: str,
    batch_size: int,
    device: str | None,
    workers: int,
    progress: bool,
) -> ad.AnnData:
    """Predict the tiles that `read` returns, and write the predictions with `adata` to `out`."""
    device = device or default_device()
    genes = list(model.genes)
    # The last digits of a prediction depend on device and batch size, so a job with others must not resume.
    parts = (__version__, key, model.fingerprint, genes, str(device), batch_size)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    with lock_work_folder(out) as work:
        check_file(out, BY)  # again: another process may have written it meanwhile
        rows, done = open_partial(work, shape=(adata.n_obs, len(genes)), key=key)  # (N, genes), (N,)
        starts = range(0, adata.n_obs, batch_size)
        left = [s for s in (slice(i, min(i + batch_size, adata.n_obs)) for i in starts) if not done[s].all()]
        n, before = adata.n_obs, int(done.sum())
        logger.info(
            f"plan: {n - before:,} tiles to read, {len(genes)} genes to predict on each"
            + (f"; {before:,} tiles were done before" if before else "")
        )
        with progress_bar(total=n, initial=before, desc="predict tiles", unit=" tiles", enabled=progress) as bar:
            for batch, tiles in _read_ahead(read, left, workers):
                Y = np.asarray(model.predict(tiles, batch_size=batch_size, device=device), dtype=np.float32)
                if Y.shape != (len(tiles), len(genes)) or not np.isfinite(Y).all():
                    raise ValueError(
                        f"the model predicts shape {Y.shape} for {len(tiles)} tiles and {len(genes)} genes, or values "
                        "that are not finite; check its weights"
                    )
                rows[batch], done[batch] = Y, True
                bar.update(len(tiles))
        low, high = getattr(model, "target_range", np.full((2, len(genes)), np.nan))  # custom models may lack it
        outside = float(np.mean(np.add(*shares_outside(rows, low, high))))
        predictions = ad.AnnData(
            np.asarray(rows),  # still on disk
            obs=adata.obs,
            var=pd.DataFrame({"pcc": model.gene_pcc, LOW: low, HIGH: high}, index=genes),
            obsm=dict(adata.obsm),
            uns={
                **adata.uns,
                "peka_lite": {
                    **source,
                    "version": __version__,
                    "tile_px": TILE,
                    "tile_mpp": TILE_MPP,
                    "model_fingerprint": model.fingerprint,
                    "outside_training_range": outside,
                    "model": to_h5ad_values(model.describe()),
                },
            },
        )
        with stage(f"writing {out.name}"):
            write_h5ad(predictions, work / "whole.h5ad", compression="gzip", of=out)
        place_file(work / "whole.h5ad", out, BY)
        del rows, done, predictions
        shutil.rmtree(work)
    return read_anndata(out, uns=("spatial", "peka_lite"))


def _read_ahead(
    read: Callable[[slice], np.ndarray], batches: list[slice], workers: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield batches in order while threads read at most `workers` batches ahead."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    waiting: deque = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(read, batch)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def to_h5ad_values(value):
    """Convert JSON values to types that .h5ad can store; None, empty, mixed and nested lists become JSON text."""
    if isinstance(value, dict) and value and all(isinstance(k, str) and "/" not in k for k in value):
        return {k: to_h5ad_values(v) for k, v in value.items()}
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple) and value:
        for kind in (str, int, float):
            if all(type(v) is kind for v in value):
                return np.array(value, dtype=object if kind is str else kind)
    return json.dumps(value)
