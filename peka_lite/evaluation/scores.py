"""Score predictions per gene, fold and slide, with confidence intervals of the mean PCC over patients and genes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import t

from peka_lite.probe.metrics import spearman

MOMENTS = ("n", "mean_y", "mean_p", "var_y", "var_p", "cov")


def slide_moments(
    Y: np.ndarray, P: np.ndarray, *, slides: Sequence[str], patients: Sequence[str], genes: Sequence[str]
) -> pd.DataFrame:
    """Reduce held-out predictions to population moments by slide and gene, which all scores use.

    Parameters
    ----------
    Y, P
        Measured and predicted, (n, genes).
    slides, patients
        (n,) slide and patient of each row.

    Returns
    -------
    pandas.DataFrame
        One row per slide and gene: slide, patient, gene, n, mean_y, mean_p, var_y, var_p, cov (float64), and spearman:
        the rank correlation within the slide, which cannot be computed from moments.
    """
    Y, P = np.asarray(Y, dtype=np.float64), np.asarray(P, dtype=np.float64)
    slides, patients = np.asarray(slides, dtype=str), np.asarray(patients, dtype=str)
    parts = []
    for slide in pd.unique(slides):
        rows = slides == slide
        y, p = Y[rows], P[rows]
        mean_y, mean_p = y.mean(0), p.mean(0)
        # By rounding, a constant column has a variance of about 1e-32 of its squared size, not 0.
        var_y, var_p = (np.where((v := a.var(0)) <= 1e-20 * (a**2).mean(0), 0.0, v) for a in (y, p))
        # And means that differ between slides: its first value is the same in all of them.
        mean_y, mean_p = np.where(var_y == 0, y[0], mean_y), np.where(var_p == 0, p[0], mean_p)
        cov = ((y - mean_y) * (p - mean_p)).mean(0)
        columns = dict(zip(MOMENTS, (len(y), mean_y, mean_p, var_y, var_p, cov), strict=True))
        columns["spearman"] = spearman(y, p)
        parts.append(pd.DataFrame({"slide": slide, "patient": patients[rows][0], "gene": list(genes), **columns}))
    return pd.concat(parts, ignore_index=True)


def pool_scores(moments: pd.DataFrame) -> pd.DataFrame:
    """Score all test spots of a fold together: normalization, fold, gene, pcc, r2 and rmse.

    PCC is NaN where a side is constant, R2 where the measured side is. The rank correlation of a fold needs the spots:
    `Evaluation.scores` has it.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.normal(size=(90, 2))  # two genes, 30 spots of each of three patients
    >>> P = Y + rng.normal(size=Y.shape) * [0.5, 1.5]  # the second prediction is noisier
    >>> patients = np.repeat(["A", "B", "C"], 30)
    >>> moments = pk.evaluation.scores.slide_moments(Y, P, slides=patients, patients=patients, genes=["KRT8", "CD8A"])
    >>> pk.evaluation.pool_scores(moments.assign(normalization="log1p", fold=0)).round(2)
      normalization  fold  gene   pcc    r2  rmse
    0         log1p     0  KRT8  0.90  0.73  0.51
    1         log1p     0  CD8A  0.67 -1.96  1.63
    """
    keys = [moments[k] for k in ("normalization", "fold", "gene")]
    sums = _sums(moments).groupby(keys, sort=False).sum()
    error = _squared_errors(moments).groupby(keys, sort=False).sum()
    spread = sums["yy"] - sums["y"] ** 2 / sums["n"]
    spread = spread.where(spread > 1e-12 * sums["yy"], 0.0)  # as in `_pcc`, what is left by rounding
    scores = {"pcc": _pcc(sums.to_numpy().T), **_error_scores(sums["n"], error, spread)}
    return sums.index.to_frame(index=False).assign(**scores)


def scores_by_slide(moments: pd.DataFrame) -> pd.DataFrame:
    """Score each slide's test spots of each fold: normalization, fold, slide, patient, gene, pcc, r2, rmse, spearman.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> Y = np.random.default_rng(0).normal(size=(60, 1))
    >>> P = Y + np.repeat([[0.0], [3.0]], 30, axis=0)  # the second slide's prediction is shifted
    >>> rows = {"slides": np.repeat(["A1", "B1"], 30), "patients": np.repeat(["A", "B"], 30), "genes": ["KRT8"]}
    >>> moments = pk.evaluation.scores.slide_moments(Y, P, **rows).assign(normalization="log1p", fold=0)
    >>> pk.evaluation.scores_by_slide(moments)[["slide", "pcc", "r2", "rmse", "spearman"]].round(2)
      slide  pcc    r2  rmse  spearman
    0    A1  1.0  1.00   0.0       1.0
    1    B1  1.0 -9.26   3.0       1.0
    """
    n = moments["n"]
    scores = {"pcc": _pcc(_sums(moments).to_numpy().T)}
    scores |= _error_scores(n, _squared_errors(moments), n * moments["var_y"])
    names = moments[["normalization", "fold", "slide", "patient", "gene"]]
    return names.assign(**scores, spearman=moments["spearman"]).reset_index(drop=True)


def mean_scores(scores: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Average R2, RMSE and Spearman's correlation over genes, then over folds, for each normalization.

    Parameters
    ----------
    scores
        `Evaluation.scores`, or a table with the same columns.

    Returns
    -------
    dict
        normalization -> {"r2", "rmse", "spearman"}; genes with NaN are left out.

    Examples
    --------
    >>> import pandas as pd
    >>> import peka_lite as pk
    >>> scores = pd.DataFrame({"normalization": "log1p", "fold": [0, 0, 1], "gene": ["KRT8", "CD8A", "KRT8"]})
    >>> pk.evaluation.mean_scores(scores.assign(r2=[0.75, 0.25, 0.0], rmse=1.0, spearman=[0.75, 0.25, float("nan")]))
    {'log1p': {'r2': 0.25, 'rmse': 1.0, 'spearman': 0.5}}
    """
    per_fold = scores.groupby(["normalization", "fold"], sort=False)[["r2", "rmse", "spearman"]].mean()
    return per_fold.groupby("normalization", sort=False).mean().to_dict(orient="index")


def bootstrap_interval(moments: pd.DataFrame, *, how: str = "pooled", n_boot: int = 2000, seed: int = 0) -> dict:
    """Return the mean PCC with a 95% confidence interval from a bootstrap over patients and genes.

    Units are patients, or slides if there is one patient; spots are not resampled. The standard error of a bootstrap
    over units and genes is scaled for the number of units and multiplied by Student's t with units - 1 degrees of
    freedom, because the percentiles of a bootstrap over five patients would be too narrow.

    Parameters
    ----------
    moments
        Rows of `slide_moments` with columns normalization (one value) and fold.
    how
        ``"pooled"``: PCC over all test spots of a fold, mean over genes, then over folds (as HEST-bench).
        ``"slides"``: PCC within a slide, mean over genes, then over slides.

    Returns
    -------
    dict
        pcc, ci_low, ci_high (NaN with one unit), per_fold (list), unit, n_units.

    Examples
    --------
    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> Y = rng.normal(size=(180, 2))  # two genes, 30 spots of each of six patients
    >>> P = Y + 0.5 * rng.normal(size=Y.shape)
    >>> patients = np.repeat(["A", "B", "C", "D", "E", "F"], 30)
    >>> moments = pk.evaluation.scores.slide_moments(Y, P, slides=patients, patients=patients, genes=["KRT8", "CD8A"])
    >>> result = pk.evaluation.bootstrap_interval(moments.assign(normalization="log1p", fold=0))
    >>> [round(result[name], 2) for name in ("pcc", "ci_low", "ci_high")], result["unit"], result["n_units"]
    ([0.9, 0.86, 0.94], 'patient', 6)
    """
    return bootstrap_difference(moments, None, how=how, n_boot=n_boot, seed=seed)


def bootstrap_difference(
    a: pd.DataFrame, b: pd.DataFrame | None, *, how: str = "pooled", n_boot: int = 2000, seed: int = 0
) -> dict:
    """Return the mean PCC of `a` minus that of `b`, with the interval of a paired bootstrap (`bootstrap_interval`).

    Raises
    ------
    ValueError
        If the two have different folds, slides or genes, or several normalizations.

    Examples
    --------
    The first of two predictions has half the noise, and the interval excludes 0:

    >>> import numpy as np
    >>> import peka_lite as pk
    >>> rng = np.random.default_rng(0)
    >>> Y, noise = rng.normal(size=(2, 180, 2))  # two genes, 30 spots of each of six patients
    >>> patients = np.repeat(["A", "B", "C", "D", "E", "F"], 30)
    >>> rows = {"slides": patients, "patients": patients, "genes": ["KRT8", "CD8A"]}
    >>> a = pk.evaluation.scores.slide_moments(Y, Y + 0.5 * noise, **rows).assign(normalization="log1p", fold=0)
    >>> b = pk.evaluation.scores.slide_moments(Y, Y + 1.0 * noise, **rows).assign(normalization="log1p", fold=0)
    >>> result = pk.evaluation.bootstrap_difference(a, b)
    >>> [round(result[name], 2) for name in ("pcc", "ci_low", "ci_high")]
    [0.17, 0.1, 0.24]
    """
    if how not in ("pooled", "slides"):
        raise ValueError(f"unknown how {how!r}; known: pooled, slides")
    cubes = [_Cube(m) for m in (a, b) if m is not None]
    if len(cubes) == 2 and not cubes[0].same_as(cubes[1]):
        raise ValueError("the two runs have different folds, slides or genes and cannot be paired")
    units, genes = cubes[0].units, cubes[0].genes
    scores = [c.score(np.ones((1, len(units))), np.ones((1, len(genes))), how) for c in cubes]
    per_fold = scores[0][1][0] - (scores[1][1][0] if b is not None else 0)
    value = scores[0][0][0] - (scores[1][0][0] if b is not None else 0)
    if np.isnan(value):
        raise ValueError("every PCC is NaN: genes or predictions are constant in every fold")
    n, reach = len(units), math.nan
    if n > 1:
        rng = np.random.default_rng(seed)
        draws = (
            rng.multinomial(n, np.full(n, 1 / n), n_boot),
            rng.multinomial(len(genes), np.full(len(genes), 1 / len(genes)), n_boot),
        )
        drawn = [c.score(*(w.astype(float) for w in draws), how)[0] for c in cubes]
        error = np.nanstd(drawn[0] - (drawn[1] if b is not None else 0)) * math.sqrt(n / (n - 1))
        reach = error * t.ppf(0.975, n - 1)
    return {
        "pcc": float(value),
        "ci_low": float(value - reach),
        "ci_high": float(value + reach),
        "per_fold": [float(v) for v in per_fold],
        "unit": cubes[0].unit,
        "n_units": n,
    }


class _Cube:
    """Moments as arrays (cells, genes), so that a bootstrap is a matrix product."""

    def __init__(self, moments: pd.DataFrame):
        if moments["normalization"].nunique() != 1:
            raise ValueError("give the moments of one normalization")
        known = moments["patient"].ne("unknown").all() and moments["patient"].nunique() > 1
        self.unit = "patient" if known else "slide"
        cells = pd.MultiIndex.from_frame(moments[["fold", "slide"]])
        self.cells = cells.unique()
        self.genes = pd.Index(moments["gene"].unique()).sort_values()
        at = self.cells.get_indexer(cells), self.genes.get_indexer(moments["gene"])
        self.sums = np.zeros((6, len(self.cells), len(self.genes)))
        self.sums[:, *at] = _sums(moments).to_numpy().T
        folds, self.fold = np.unique(self.cells.get_level_values("fold"), return_inverse=True)
        self.n_folds = len(folds)
        owner = moments.drop_duplicates(["fold", "slide"])[self.unit].to_numpy()
        self.units, self.owner = np.unique(owner.astype(str), return_inverse=True)

    def same_as(self, other: _Cube) -> bool:
        same = self.cells.equals(other.cells) and self.genes.equals(other.genes)
        return same and np.array_equal(self.sums[:3], other.sums[:3])  # the same measured values

    def score(self, units: np.ndarray, genes: np.ndarray, how: str) -> tuple[np.ndarray, np.ndarray]:
        """Return mean PCC (draws,) and by fold (draws, folds), for weights of units (draws, U) and genes (draws, G)."""
        cell_weight = units[:, self.owner]  # (draws, cells)
        by_fold = np.full((len(units), self.n_folds), np.nan)
        pieces, weights = [], []
        for fold in range(self.n_folds):
            at = np.flatnonzero(self.fold == fold)
            if how == "pooled":
                pcc = _pcc(np.einsum("bc,kcg->kbg", cell_weight[:, at], self.sums[:, at]))  # (draws, G)
                by_fold[:, fold] = _weighted_mean(pcc, genes)
            else:
                within = _pcc(self.sums[:, at])  # (cells, G)
                means = np.stack([_weighted_mean(np.broadcast_to(c, genes.shape), genes) for c in within], axis=1)
                by_fold[:, fold] = _weighted_mean(means, cell_weight[:, at])
                pieces.append(means)
                weights.append(cell_weight[:, at])
        if how == "pooled":
            return _weighted_mean(by_fold, np.ones_like(by_fold)), by_fold
        return _weighted_mean(np.concatenate(pieces, axis=1), np.concatenate(weights, axis=1)), by_fold


def _sums(moments: pd.DataFrame) -> pd.DataFrame:
    n = moments["n"].astype(float)
    # Relative to the mean over slides, to avoid cancellation in predictions far from zero with little variance.
    groups = moments.groupby([k for k in ("normalization", "fold", "gene") if k in moments], sort=False)
    y, p = (moments[c] - groups[c].transform("mean") for c in ("mean_y", "mean_p"))
    return pd.DataFrame(
        {
            "n": n,
            "y": n * y,
            "yy": n * (moments["var_y"] + y**2),
            "p": n * p,
            "pp": n * (moments["var_p"] + p**2),
            "yp": n * (moments["cov"] + y * p),
        }
    )


def _squared_errors(moments: pd.DataFrame) -> pd.Series:
    """Return the sum of squared errors of each row, exactly."""
    m = moments
    return m["n"] * (m["var_y"] + m["var_p"] - 2 * m["cov"] + (m["mean_y"] - m["mean_p"]) ** 2).clip(lower=0)


def _error_scores(n, error, spread) -> dict[str, np.ndarray]:
    """Return R2 and RMSE from numbers of spots, sums of squared errors and sums of squares about the mean."""
    n, error, spread = (np.asarray(values, dtype=float) for values in (n, error, spread))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"r2": np.where(spread > 0, 1 - error / spread, np.nan), "rmse": np.sqrt(error / n)}


def _pcc(sums: np.ndarray) -> np.ndarray:
    n, y, yy, p, pp, yp = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        var_y, var_p = yy - y * y / n, pp - p * p / n
        constant = (n == 0) | (var_y <= 1e-12 * yy) | (var_p <= 1e-12 * pp)  # also 0 <= 0
        return np.where(constant, np.nan, (yp - y * p / n) / np.sqrt(var_y * var_p))


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis without NaN."""
    known = np.where(np.isnan(values), 0.0, weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.isnan(values), 0.0, values * known).sum(-1) / known.sum(-1)
