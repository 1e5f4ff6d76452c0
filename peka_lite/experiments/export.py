"""Export a trained student as plain timm weights with its probe and a model card."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from peka_lite._core._tensor_files import write_tensors
from peka_lite._core.io import write_file
from peka_lite._core.outputs import check_free, write_output_folder
from peka_lite._core.progress import logger
from peka_lite.experiments._model_card import model_card, starts_random
from peka_lite.experiments.folder import RunFolder
from peka_lite.experiments.model import load_trained
from peka_lite.probe.files import save_probes


def export(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    *,
    fold: int | None = None,
    weights: str | os.PathLike | None = None,
) -> Path:
    """Write merged weights in timm's format, their probe, and a model card in Hugging Face's format.

    Parameters
    ----------
    folder, fold, weights
        As in `load_trained`.
    out
        Folder to create: ``model.safetensors``, ``probe.safetensors``, ``README.md``. Written atomically; its path is
        returned.

    Raises
    ------
    FileExistsError
        If `out` exists, or another process creates it meanwhile.

    Warns
    -----
    UserWarning
        If the license of the parent weights forbids sharing the export.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> out = pk.experiments.export("student", "to_share", fold=0)
    >>> sorted(path.name for path in out.iterdir())
    ['README.md', 'model.safetensors', 'probe.safetensors']
    >>> (out / "README.md").read_text(encoding="utf-8").splitlines()[1:3]
    ['license: bsd-3-clause', 'library_name: timm']
    """
    out = Path(out)
    check_free(out)
    trained = load_trained(folder, fold=fold, weights=weights, device="cpu")
    n = sum(tensor.numel() for tensor in trained.student.state_dict().values())
    logger.info(f"plan: {n:,} merged weights to write, with their probe and a model card")
    run = RunFolder(trained.folder, trained.config, trained.summary, trained.folder)
    metrics = None if run.is_training else run.metrics()
    try:
        card = model_card(trained, metrics)
    except ValueError as error:
        raise ValueError(f"{trained.folder}, summary.json or config.yml: {error}") from None
    with write_output_folder(out) as work:
        write_tensors(work / "model.safetensors", trained.student.state_dict(), trained.describe(), kind="student")
        probes = {trained.name: (trained.probe, trained.genes)}
        save_probes(work / "probe.safetensors", probes, normalization=trained.normalization)
        write_file(work / "README.md", card.encode())
    license = trained.student.spec.license
    if "-ND" in license and not starts_random(trained):
        warnings.warn(f"{out} must not be shared: the parent weights are {license}; see its README.md", stacklevel=2)
    return out
