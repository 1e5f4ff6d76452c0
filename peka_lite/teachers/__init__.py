"""Teachers: a spot's expression in, an embedding out."""

from __future__ import annotations

import numpy as np

from peka_lite.teachers.pca import PCATeacher

TEACHERS = {"pca": PCATeacher}


def load_teacher(name: str, **options):
    """Make a teacher by name; ``options`` go to its constructor.

    A teacher has ``fit(adata)``, with one AnnData of raw counts or one a slide, and
    ``embed(adata, *, batch_size=None, device=None)``, which returns (N, D_t) float32.

    Examples
    --------
    >>> load_teacher("pca", n_components=32)
    PCATeacher(n_components=32, n_genes=2000, seed=0)
    """
    if name not in TEACHERS:
        raise ValueError(f"unknown teacher {name!r}; known: {', '.join(TEACHERS)}")
    return TEACHERS[name](**options)


def embed_cohort(teacher, cohort, *, batch_size: int | None = None, device: str | None = None) -> np.ndarray:
    """Embed a cohort slide by slide, each with all of its own genes; (N, D_t) float32 in the cohort's row order."""
    return np.concatenate([teacher.embed(s.adata, batch_size=batch_size, device=device) for s in cohort.slides])
