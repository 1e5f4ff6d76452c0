"""Protocols: what is held out, and which rows each step that learns may see."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPLITS = ("patient", "slide", "spot")


#: Ridge penalties that ``"inner"`` chooses from: twenty, from 0.01 to a million, evenly spaced in their logarithm.
ALPHAS = tuple(float(a) for a in np.logspace(-2, 6, 20))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way to score; results under two protocols are never put in one column.

    Attributes
    ----------
    name, split
        The protocol, and who is held out: ``"patient"``, ``"slide"`` or ``"spot"``.
    student
        Rows that train student, clusters and a teacher that is fitted: ``"train"`` or ``"all"`` (the whole cohort, test
        spots included). A pretrained teacher, such as scFoundation, embeds these rows and is not fitted on them.
    genes
        Rows that choose the highly variable genes: ``"train"`` or ``"all"``.
    normalization
        Of the targets that the score is about; the other normalization is reported beside it.
    alpha
        Ridge penalty: a number, ``"hest"`` (`PCARidge`) or ``"inner"``: chosen from `ALPHAS` on inner folds, each
        scored with a student, teacher and clusters that saw neither the inner nor the outer test rows.
    standardize, fit_intercept
        As in `PCARidge`.

    Examples
    --------
    Who is held out, which rows teach, which choose the genes, and the penalty:

    >>> import peka_lite as pk
    >>> for p in pk.evaluation.PROTOCOLS.values():
    ...     print(f"{p.name:7}{p.split:9}{p.student:7}{p.genes:7}{p.alpha}")
    paper  spot     all    all    1.0
    hest   patient  train  all    hest
    strict patient  train  train  inner
    """

    name: str
    split: str
    student: str = "train"
    genes: str = "train"
    normalization: str = "log1p-cp10k"
    alpha: str | float = "hest"
    standardize: bool = True
    fit_intercept: bool = True


#: The three protocols by name. Of ``paper`` the paper itself says five folds, the 50 most variable genes, PCA to 256
#: components and ridge. What is held out, which rows each step sees and the penalty are those of the authors' released
#: code: ``KFold`` with shuffle over spots. The published tables may have come from other code.
PROTOCOLS = {
    p.name: p
    for p in (
        # The released code: PCA of the raw features and Ridge() with its defaults; log2 of 1 + counts per 10,000, of
        # which the natural logarithm is a multiple, so every PCC is the same. It trains the student on a random 80% of
        # all spots, here on all.
        Protocol(name="paper", split="spot", student="all", genes="all", alpha=1.0, standardize=False),
        # HEST-bench's code (Jaume et al. 2024): log1p of raw counts, no intercept.
        Protocol(name="hest", split="patient", genes="all", normalization="log1p", fit_intercept=False),
        Protocol(name="strict", split="patient", alpha="inner"),
    )
}
