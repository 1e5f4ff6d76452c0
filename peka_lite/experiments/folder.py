"""Run folders: locking, held-out predictions, maps, and the hash of the data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from peka_lite import __version__
from peka_lite._core._processes import Processes
from peka_lite._core._yaml import read_yaml, yaml_text
from peka_lite._core.io import figure_bytes, write_file, write_file_atomically
from peka_lite._core.locks import lock_output_folder, move_if_absent
from peka_lite._core.outputs import check_free, check_work, find_link
from peka_lite._core.progress import Stage
from peka_lite.backbones.custom import save_backbone
from peka_lite.data.expression import hash_counts
from peka_lite.data.hest import Cohort
from peka_lite.experiments._unfinished import COMMAND, remake_command
from peka_lite.experiments.config import update_words


def hash_cohort(cohort: Cohort) -> str:
    """Hash a cohort's ids, barcodes, counts and a sample of its tiles; 16 hex digits.

    Examples
    --------
    >>> import peka_lite as pk
    >>> cohort, same = (pk.open_cohort("mini", slides=["MINI3"]) for _ in range(2))
    >>> stricter = pk.open_cohort("mini", slides=["MINI3"], min_genes=450)
    >>> len(cohort), len(stricter)
    (156, 151)
    >>> a, b, c = (pk.experiments.hash_cohort(data) for data in (cohort, same, stricter))
    >>> a == b, a == c
    (True, False)
    """
    digest = hashlib.sha256()
    for slide in Stage("hashing the data: slide", cohort.slides):
        digest.update(f"{slide.id} {hash_counts(slide.adata)}".encode())
        sample = np.unique(np.linspace(0, slide.n_spots - 1, 16).astype(int))
        digest.update(slide.tiles[sample].tobytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def lock_run_folder(config, out: Path, processes: Processes) -> Iterator[Path]:
    """Lock an output folder, yield a work folder, and move it to `out` at the end; check both as `check_folders`.

    Only the first process holds the lock. The others wait for it, and raise the same error if it fails.
    """
    if not processes.first:
        work = processes.same(None)
        if isinstance(work, Exception):
            raise work
        yield work
        return
    with contextlib.ExitStack() as stack:
        try:
            check_free(out)
            work = stack.enter_context(lock_output_folder(out))
            check_folders(config, out, work)
        except Exception as error:
            processes.same(error)
            raise
        processes.same(work)
        with remove_on_error(work):
            yield work
            move_if_absent(work, out)


def check_folders(config, out: Path, work: Path) -> None:
    """Check that `out` does not exist, and that `work` is absent or an unfinished run of the same config."""
    check_free(out)
    check_work(work)
    if link := find_link(work):
        raise FileExistsError(f"{work} holds a link ({link}), which no command writes: remove that folder")
    path = work / "config.yml"
    if path.is_file() and update_words(read_yaml(path)) != config.as_dict():
        raise FileExistsError(
            f"{work} holds an unfinished run with other settings: remove it, give another --out, or finish that one "
            f"with `{remake_command(work)}`"
        )


def start_run_folder(config, work: Path, name: str) -> None:
    """Create the work folder, with the settings and the command's name (for `remake_command`)."""
    (work / COMMAND).parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(work / COMMAND, name.encode())
    write_file_atomically(work / "config.yml", yaml_text(config.as_dict()).encode())
    save_backbone(config.backbone, work)


@contextlib.contextmanager
def remove_on_error(work: Path):
    """Remove a work folder that was created in the block if it raises; trained students stay in the cache."""
    existed = work.exists()
    try:
        yield
    except Exception:
        if not existed:
            shutil.rmtree(work, ignore_errors=True)
        raise


def record_environment(device: str) -> dict:
    """Return the device and the package versions for a summary."""
    import torch

    name = f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)"
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    packages = ("torch", "timm", "peft", "scanpy", "anndata", "scikit-learn", "numpy")
    versions = {"peka_lite": __version__, "python": platform.python_version()} | {p: version(p) for p in packages}
    return {"device": name, "versions": versions}


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


def join_predictions(cohort: Cohort, predicted: dict) -> ad.AnnData:
    """Join the folds' test predictions into one AnnData in the cohort's row order.

    `predicted` maps fold -> (test rows, genes, measured, predicted). ``X`` is the prediction (N, genes of any fold),
    float32, and ``layers["measured"]`` the measured values. Both are NaN where a gene was not among a fold's targets.
    """
    genes = sorted({g for _, names, _, _ in predicted.values() for g in names})
    column = {g: j for j, g in enumerate(genes)}
    P = np.full((len(cohort), len(genes)), np.nan, dtype=np.float32)
    Y, fold_of = P.copy(), np.full(len(cohort), -1)
    for fold, (test, names, measured, values) in predicted.items():
        index = np.ix_(test, [column[g] for g in names])
        P[index], Y[index], fold_of[test] = values, measured, fold
    obs = cohort.obs.astype({"slide": str, "barcode": str}).assign(fold=fold_of)
    obs["patient"] = obs["patient"].fillna("unknown").astype(str)
    obs.index = cohort.adata.obs_names
    spatial = np.concatenate([np.asarray(s.adata.obsm["spatial"], dtype=float)[:, :2] for s in cohort.slides])
    return ad.AnnData(P, obs=obs, var=pd.DataFrame(index=genes), layers={"measured": Y}, obsm={"spatial": spatial})


def draw_maps(cohort: Cohort, predictions: ad.AnnData, table: pd.DataFrame, folder: Path) -> None:
    """Draw for each slide, as PNG files, the best predicted gene and the local PCC of all genes.

    Genes with a constant prediction on the slide are skipped, unless all are constant.
    """
    import matplotlib.pyplot as plt

    from peka_lite._core.names import unique_file_name
    from peka_lite.data.hest import IMAGE_KEY
    from peka_lite.maps.local_pcc import pcc_map
    from peka_lite.maps.tissue import describe_constant, expression_map

    folder.mkdir(exist_ok=True)
    used_names = {}
    pcc_names = {slide.id: unique_file_name(f"{slide.id}_pcc", used_names) for slide in cohort.slides}
    for slide in Stage("maps: slide", cohort.slides):
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
