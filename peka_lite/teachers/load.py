"""Load teachers by name and embed cohorts with them."""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path

import numpy as np

from peka_lite._core.cache import cached
from peka_lite.data.download import find_fetched
from peka_lite.teachers._choices import TEACHERS


def load_teacher(name: str, **options):
    """Load a teacher by name.

    A teacher has ``fit(adata)``, which takes one AnnData of raw counts or one per slide, and
    ``embed(adata, *, batch_size=None, device=None)``, which returns (N, D_t) float32.

    Parameters
    ----------
    name
        ``"pca"`` takes the options of `PCATeacher`. ``"scfoundation"`` takes ``checkpoint`` (None: the downloaded one)
        and the options of `ScFoundation.from_checkpoint`. ``"scfoundation-mini"``, a small version of the same
        network pretrained on synthetic counts, takes ``precision`` and ``mapping``.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.load_teacher("pca", n_components=32)
    PCATeacher(n_components=32, n_genes=2000, seed=0)
    >>> pk.load_teacher("scfoundation-mini")
    ScFoundation(scfoundation_mini.ckpt, cell: 2 layers, width 64, 1500 genes)
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(TEACHERS)}")
    if name == "pca":
        from peka_lite.teachers.pca import PCATeacher

        return PCATeacher(**options)
    from peka_lite.teachers.scfoundation import ScFoundation  # imports PyTorch

    if name == "scfoundation":
        if path := options.pop("checkpoint", None) or find_fetched("scfoundation"):
            return ScFoundation.from_checkpoint(path, **options)
        fix = "run `peka-lite fetch scfoundation`, or pass a file"
        raise FileNotFoundError(f"scFoundation's checkpoint is not in the cache: {fix}")
    if unknown := options.keys() - {"precision", "mapping"}:
        fix = "use teacher 'scfoundation' for another checkpoint or gene list"
        raise ValueError(f"teacher {name!r} takes precision and mapping, not {', '.join(sorted(unknown))}; {fix}")
    weights = Path(str(resources.files("peka_lite.teachers"))) / "weights"  # with a model card, scfoundation_mini.md
    lines = resources.files("peka_lite.data.mini").joinpath("genes.txt").read_text("utf-8").splitlines()
    genes = sorted(gene for line in lines if not line.startswith("#") for gene in line.split())
    return ScFoundation.from_checkpoint(weights / "scfoundation_mini.ckpt", genes=genes, **options)


def embed_cohort(
    teacher, cohort, *, batch_size: int | None = None, device: str | None = None, progress: bool = False, **options
) -> np.ndarray:
    """Embed a cohort slide by slide, each with all its genes, as (N, D_t) float32 in the cohort's row order.

    Embeddings of a pretrained teacher are cached by slide (``embeddings`` in the cache folder), named by a hash of
    counts, weights and settings. A stopped job resumes. Embeddings of a fitted teacher such as PCA are not cached.
    `options` are passed to the teacher's `embed`, for example ``resolution="f1"``.

    Examples
    --------
    Fitted on the first slide, the teacher embeds the second too:

    >>> import peka_lite as pk
    >>> cohort = pk.open_cohort("mini", slides=["MINI1", "MINI2"])
    >>> train = cohort.rows_of("MINI1")
    >>> teacher = pk.load_teacher("pca", n_components=8, n_genes=100).fit(cohort.by_slide(train))
    >>> E = pk.embed_cohort(teacher, cohort)
    >>> E.shape, len(teacher.fitted_on_)
    ((395, 8), 190)
    """
    options |= {"device": device}
    if not hasattr(teacher, "cache_key"):
        return np.concatenate([teacher.embed(s.adata, batch_size=batch_size, **options) for s in cohort.slides])
    run = options | {"batch_size": batch_size, "progress": progress}
    parts = []
    for slide in cohort.slides:
        key = {"teacher": teacher.cache_key(slide.adata, **options)}
        folder = cached("embeddings", key, partial(_embed_slide, teacher, slide, run), name=slide.id)
        parts.append(np.load(folder / "E.npy"))
    return np.concatenate(parts)


def _embed_slide(teacher, slide, options: dict, work: Path) -> dict:
    teacher.embed(slide.adata, out=work / "E.npy", **options)
    return {"teacher": repr(teacher), "slide": slide.id, "spots": slide.n_spots}
