"""Predict a slide with the model of a run, for a slide of its cohort with the fold that held it out."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import numpy as np

from peka_lite.data.cohorts import cohort_root
from peka_lite.data.hest import read_slide
from peka_lite.experiments.folder import RunFolder
from peka_lite.experiments.model import load_trained
from peka_lite.experiments.predict import check_prediction_file, predict_slide, predict_spots


def predict_from(
    model: str | os.PathLike,
    slide: str | os.PathLike,
    out: str | os.PathLike,
    *,
    fold: int | None = None,
    weights: str | os.PathLike | None = None,
    cohort: str | os.PathLike | None = None,
    mpp: float | None = None,
    min_tissue: float = 0.5,
    batch_size: int = 64,
    device: str | None = None,
    progress: bool = False,
) -> ad.AnnData:
    """Predict genes on a slide with the model in the folder of a run or training.

    Parameters
    ----------
    model
        Folder of `run` or `train`.
    slide
        Path of a whole-slide image (`predict_slide`), or the id of a slide of a cohort, predicted at its spots
        (`predict_spots`).
    fold
        Fold whose model to use. None: for a slide of the run's cohort the fold that held it out, else as in
        `load_trained`.
    weights
        As in `load_trained`.
    cohort
        Name or folder of the cohort of an id. None: the run's.
    mpp, min_tissue
        For an image, as in `predict_slide`.

    Returns
    -------
    anndata.AnnData
        As written to `out`. For a HEST slide ``uns["peka_lite"]["held_out"]`` is ``"yes"``, ``"no"`` or, for a slide of
        another cohort, ``"other cohort"``.

    Raises
    ------
    FileNotFoundError
        If `slide` is neither a file nor an id of the cohort.
    FileExistsError
        If `out` is an input, or a file that this function did not write.
    ValueError
        As `load_trained` and `predict_slide`, for `mpp` with a HEST slide, and for `cohort` with an image.

    Examples
    --------
    >>> import peka_lite as pk
    >>> config = pk.RunConfig(method="none", slides=["MINI1", "MINI3", "MINI5"], n_splits=3, n_genes=10)
    >>> _ = pk.load_or_run(config, "frozen", maps=False)
    >>> predicted = pk.predict_from("frozen", "MINI3", "MINI3.h5ad")
    >>> predicted.uns["peka_lite"]["held_out"], predicted.uns["peka_lite"]["model"]["fold"]
    ('yes', 'fold1')
    >>> predicted.var.head(3).round(1)
           pcc  train_min  train_max
    BANK1  0.1        0.0        2.9
    KDM3A -0.1        0.0        3.0
    NAT1   0.1        0.0        3.5
    """
    folder = Path(model)
    read = [slide, *([] if weights is None else [weights]), *(folder.iterdir() if folder.is_dir() else ())]
    check_prediction_file(Path(out), inputs=read)
    options = {"batch_size": batch_size, "device": device, "progress": progress}
    if Path(slide).is_file():
        if cohort is not None:
            raise ValueError(f"{slide} is an image file; a cohort can be given only with the id of a HEST slide")
        trained = load_trained(model, fold=fold, weights=weights, device=device)
        return predict_slide(slide, trained, out, mpp=mpp, min_tissue=min_tissue, **options)
    run = RunFolder.open(model)
    config = run.config
    root = cohort_root(cohort or config.cohort)
    if not (root / "st" / f"{slide}.h5ad").is_file():
        known = sorted(path.stem for path in (root / "st").glob("*.h5ad"))
        some = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        cohort = cohort or config.cohort
        raise FileNotFoundError(f"{slide}: no such image file, and no slide of the cohort {cohort}, which has {some}")
    check_prediction_file(Path(out), inputs=[root / "st" / f"{slide}.h5ad"])
    if mpp is not None:
        raise ValueError(f"{slide} is a HEST slide, whose tiles are already cut; give mpp only with an image file")
    in_cohort = cohort is None or root == _find_root(config.cohort)
    test_fold = fold_without(run, slide) if in_cohort else None
    trained = load_trained(model, fold=test_fold if fold is None else fold, weights=weights, device=device)
    status = "other cohort" if not in_cohort else "no" if test_fold is None or trained.fold != test_fold else "yes"
    return predict_spots(read_slide(root, slide), trained, out, held_out=status, **options)


def _find_root(cohort: str) -> Path | None:
    """Return the folder of the run's cohort; None if it is not on this machine."""
    try:
        return cohort_root(cohort)
    except (FileNotFoundError, ValueError):
        return None


def fold_without(run: RunFolder, slide: str) -> int | None:
    """Return the fold whose model was trained on no spot of a slide of the run's cohort; None if there is none."""
    if run.config.resolve_protocol().student == "all":
        return None
    if run.is_training:
        return run.summary["fold"] if slide in run.summary["held_out"] else None
    spots = run.spots()
    folds = np.unique(spots.loc[spots["slide"].astype(str) == slide, "fold"])
    return int(folds[0]) if len(folds) == 1 and folds[0] >= 0 else None
