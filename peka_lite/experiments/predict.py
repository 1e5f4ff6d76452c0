"""Predicted expression of a whole slide: tiles stream through a trained model, and a map ready to draw comes out."""

from __future__ import annotations

import hashlib
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
from peka_lite._core.progress import Stage, print_line, progress_bar
from peka_lite.data._format import PLACES
from peka_lite.data.hest import IMAGE_KEY, Slide
from peka_lite.data.tissue import tissue_tiles
from peka_lite.data.wsi import TILE, TILE_MPP, open_slide
from peka_lite.experiments.folder import to_h5ad_values
from peka_lite.probe._ranges import HIGH, LOW, shares_outside

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
    """Predict expression on the tissue of a whole-slide image, one tile of 224 px at 0.5 um/px (112 um) beside another.

    Tiles are read ahead in threads and predictions written to ``{out}.{machine}.partial`` as they come: memory holds
    a few batches, however large the slide. A job stopped on this machine goes on where it was, to the same numbers,
    unless slide, model or settings have changed.

    Parameters
    ----------
    slide
        Path of the image; see `open_slide`, also for `mpp`.
    model
        A trained model.
    out
        ``.h5ad`` file to write. One that is there is replaced when the new one is complete, where this wrote it and
        nobody changed it since.
    min_tissue
        Least share of a tile that is tissue; see `tissue_tiles`.
    batch_size
        Tiles at once.
    device
        None: the GPU where there is one.
    workers
        Threads that read tiles, each a batch at a time and one batch ahead.
    progress
        Print the plan and show a bar with tiles per second and the time left, or where stderr is no terminal a line
        every half minute.

    Returns
    -------
    anndata.AnnData
        As read from `out`. ``X`` (N, genes) float32; ``var`` pcc, how well the model's own run predicted each gene on
        spots it had held out (NaN where none were), train_min and train_max, the range of its training targets (NaN
        where the model is of an older version that did not keep it); ``obs`` array_row, array_col and tissue_share;
        ``obsm["spatial"]`` (N, 2) centers in pixels of the slide's finest level, x first; ``uns["spatial"]`` the
        thumbnail and its scale, so that `squidpy.pl.spatial_scatter` and `scanpy.pl.spatial` draw it;
        ``uns["peka_lite"]`` where it comes from, and outside_training_range, the share of the values in ``X`` that lie
        outside their gene's range (NaN where it is unknown).

    Raises
    ------
    FileNotFoundError, SlideError
        As `open_slide`, `tissue_tiles` and `WholeSlide.read_tile`. What was predicted before stays for the next try.
    FileExistsError
        For an `out` that is another file, or one that is read here.
    ValueError
        For an `out` that is not ``.h5ad``, or predictions that are not finite or not of the model's genes.

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
    out = _checked(out, batch_size, workers, inputs=[slide])
    with open_slide(slide, mpp=mpp) as opened:
        with Stage("finding the tissue"):
            found = tissue_tiles(opened, min_tissue=min_tissue)
        places = found.obs[["array_row", "array_col"]].to_numpy()  # (N, 2)

        def read(rows: slice) -> np.ndarray:
            return np.stack([opened.read_tile(row, col) for row, col in places[rows]])

        width, height = opened.tile
        scalefactors = {"spot_diameter_fullres": (width * height) ** 0.5}
        scalefactors |= {f"tissue_{key}_scalef": found.scale for key in ("hires", IMAGE_KEY)}
        picture = {"images": {"hires": found.picture, IMAGE_KEY: found.picture}, "scalefactors": scalefactors}
        adata = ad.AnnData(
            obs=found.obs,
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
    """Predict expression at the spots of a HEST slide, from its own tiles.

    As `predict_slide`, but with the slide's spots. Of ``slide.adata`` are kept: of obs array_row, array_col and
    in_tissue where they are numbers, ``obsm["spatial"]`` (N, 2), and of ``uns["spatial"]`` the images hires, lowres
    and downscaled_fullres with their scale factors and the spots' diameter. The image also goes by the name ``"hires"``
    where there is none, which plots look for. What `held_out` says of slide and model is kept in ``uns["peka_lite"]``.

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
    out = _checked(out, batch_size, 1, inputs=slide.tiles.paths)
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
        obs=measured.obs[[name for name in PLACES if name in measured.obs and is_numeric_dtype(measured.obs[name])]],
        obsm={"spatial": np.asarray(measured.obsm["spatial"], dtype=float)[:, :2]},
        uns={"spatial": pictures} if pictures else {},
    )
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in slide.tiles.paths]
    key = repr((slide.id, stats, slide.tiles.part.tobytes(), slide.tiles.row.tobytes()))
    options = {"batch_size": batch_size, "device": device, "workers": 1, "progress": progress}  # h5py reads one by one
    return _predict(
        slide.tiles.__getitem__, adata, {"slide": slide.id, "held_out": held_out}, model, out, key=key, **options
    )


def check_prediction_file(out: Path, *, inputs: Iterable[str | os.PathLike] = ()) -> None:
    """Refuse a place where predictions cannot be written, or where another file is or one that is read."""
    if out.suffix != ".h5ad" or out.is_dir():
        raise ValueError(f"{out}: predictions are one AnnData file; give a name that ends in .h5ad")
    check_file(out, BY, inputs=inputs)


def _checked(out: str | os.PathLike, batch_size: int, workers: int, *, inputs: Iterable[str | os.PathLike]) -> Path:
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
    """Fill `adata` with predictions for the tiles that `read` gives, and write it to `out`."""
    device = device or default_device()
    genes = list(model.genes)
    # The last digits of a prediction depend on device and batch: with them in the key, a resumed job repeats no others.
    parts = (__version__, key, model.fingerprint, genes, str(device), batch_size)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    with lock_work_folder(out) as work:
        check_file(out, BY)  # once more before the work: another process may have been first
        rows, done = open_partial(work, shape=(adata.n_obs, len(genes)), key=key)  # (N, genes), (N,)
        starts = range(0, adata.n_obs, batch_size)
        left = [s for s in (slice(i, min(i + batch_size, adata.n_obs)) for i in starts) if not done[s].all()]
        n, before = adata.n_obs, int(done.sum())
        shown = progress_bar(total=n, initial=before, desc="predict tiles", unit=" tiles", enabled=progress)
        with Stage("", reports=progress), shown:
            print_line(
                f"plan: {n - before:,} tiles to read, {len(genes)} genes to predict on each"
                + (f"; {before:,} tiles were done before" if before else "")
            )
            for batch, tiles in _read_ahead(read, left, workers):
                guess = np.asarray(model.predict(tiles, batch_size=batch_size, device=device), dtype=np.float32)
                if guess.shape != (len(tiles), len(genes)) or not np.isfinite(guess).all():
                    raise ValueError(
                        f"the model predicts {guess.shape} for {len(tiles)} tiles and {len(genes)} genes, or values "
                        "that are not finite; are its weights whole?"
                    )
                rows[batch], done[batch] = guess, True
                shown.update(len(tiles))
        low, high = getattr(model, "target_range", np.full((2, len(genes)), np.nan))  # unknown of a model of one's own
        outside = float(np.mean(np.add(*shares_outside(rows, low, high))))
        whole = ad.AnnData(
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
        with Stage(f"writing {out.name}"):
            write_h5ad(whole, work / "whole.h5ad", compression="gzip", of=out)
        place_file(work / "whole.h5ad", out, BY)
        del rows, done, whole
        shutil.rmtree(work)
    return read_anndata(out, uns=("spatial", "peka_lite"))


def _read_ahead(
    read: Callable[[slice], np.ndarray], batches: list[slice], workers: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Give batches in order, while threads read at most `workers` more."""
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
