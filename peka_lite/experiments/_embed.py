"""Write the features of every spot of a cohort to a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from peka_lite import __version__
from peka_lite._core.io import write_h5ad
from peka_lite._core.outputs import check_file, write_output
from peka_lite._core.progress import logger
from peka_lite.backbones.embed import embed_tiles
from peka_lite.data.cohorts import hash_cohort
from peka_lite.data.hest import Cohort
from peka_lite.experiments.predict import to_h5ad_values


def write_features(
    cohort: Cohort,
    out: str | os.PathLike,
    student,
    *,
    source: dict | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> ad.AnnData:
    """Embed every tile of a cohort and write the features as AnnData.

    Parameters
    ----------
    cohort
        From `open_cohort`; not only the one that the student was trained on.
    out
        ``.h5ad`` file, written atomically. An existing file is replaced only if this function wrote it and it is
        unchanged.
    student
        From `load_backbone`, or ``load_trained(folder).student``, or any module that `embed_tiles` takes.
    source
        Origin of the student as plain values, such as ``TrainedModel.describe()``; stored in ``uns["peka_lite"]``.
    mean, std, input_size
        As in `embed_tiles`.

    Returns
    -------
    anndata.AnnData
        ``X`` (N, D_s) float32; obs slide, patient and barcode; ``obsm["spatial"]`` as in the cohort.

    Raises
    ------
    ValueError
        If `out` does not end in .h5ad, and as `embed_tiles`.
    FileExistsError
        If `out` is another file or an input of the cohort.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI3"], min_genes=1000)
    >>> features = pk.experiments.write_features(cohort, "features.h5ad", pk.load_backbone("mini"))
    >>> features.shape
    (29, 192)
    >>> features.obs.head(2)
                              slide         patient             barcode
    MINI3/CAACCCTATCATATAT-1  MINI3  Mini patient 3  CAACCCTATCATATAT-1
    MINI3/AAACAACGTAACAGCA-1  MINI3  Mini patient 3  AAACAACGTAACAGCA-1
    >>> features.uns["peka_lite"]["backbone"]
    'mini'
    """
    out = Path(out)
    if out.suffix != ".h5ad":
        raise ValueError(f"{out}: features are written as AnnData; give a name that ends in .h5ad")
    access = {"by": "peka-lite embed", "inputs": cohort.tiles.paths}
    check_file(out, **access)
    name = getattr(getattr(student, "spec", None), "name", type(student).__name__)
    inputs = {"mean": mean, "std": std, "input_size": input_size}
    logger.info(f"plan: {len(cohort):,} tiles to embed by {name}")
    X = embed_tiles(student, cohort.tiles, **inputs, batch_size=batch_size, device=device, progress=progress)
    obs = cohort.obs[["slide", "patient", "barcode"]].copy()
    obs = obs.fillna("unknown").astype(str)
    obs.index = cohort.adata.obs_names
    spatial = np.concatenate([np.asarray(s.adata.obsm["spatial"], dtype=float)[:, :2] for s in cohort.slides])
    spec = getattr(student, "spec", None)
    record = {"backbone": getattr(spec, "name", type(student).__name__), "data_fingerprint": hash_cohort(cohort)}
    record |= {"weights": getattr(student, "weights_origin", "a network in memory")}
    record |= {name: list(map(float, np.atleast_1d(value))) for name, value in inputs.items() if value is not None}
    record |= {"versions": {"peka_lite": __version__}} | (source or {})
    names = pd.Index([f"feature_{i}" for i in range(X.shape[1])])
    adata = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=names), obsm={"spatial": spatial})
    adata.uns["peka_lite"] = to_h5ad_values(record)
    with write_output(out, **access) as partial:
        write_h5ad(adata, partial, of=out)
    return adata
