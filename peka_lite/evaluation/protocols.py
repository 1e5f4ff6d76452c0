"""Define the evaluation protocols: the held-out groups, and the rows used to fit each step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SPLITS = ("patient", "slide", "spot")


#: Regularization strengths that ``"inner"`` chooses from: twenty, from 0.01 to a million, log-spaced.
ALPHAS = tuple(float(a) for a in np.logspace(-2, 6, 20))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """An evaluation protocol. Results under different protocols are not comparable.

    Attributes
    ----------
    name, split
        Name, and the held-out group: ``"patient"``, ``"slide"`` or ``"spot"``.
    student
        Rows used to train the student, clusters and a fitted teacher: ``"train"`` or ``"all"`` (the whole cohort, with
        test spots). A pretrained teacher, such as scFoundation, embeds these rows and is not fitted on them.
    genes
        Rows used to choose the highly variable genes: ``"train"`` or ``"all"``.
    normalization
        Normalization of the targets of the main score; the other normalization is reported too.
    alpha
        Regularization strength of the ridge: a number, ``"hest"`` (`PCARidge`) or ``"inner"``: chosen from `ALPHAS` on
        inner folds, with a student, teacher and clusters fitted without the inner and outer test rows.
    standardize, fit_intercept
        As in `PCARidge`.

    Examples
    --------
    Held-out group, rows for training, rows for choosing genes, and alpha:

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


#: The three protocols by name. For ``paper``, the paper gives five folds, the 50 most variable genes, PCA to 256
#: components and ridge. Held-out group, rows of each step and alpha are those of the authors' released
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
