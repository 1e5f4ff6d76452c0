"""Ceilings estimated by count splitting are close to those of the true rates; invalid input is rejected."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from peka_lite.data.expression import NORMALIZATIONS
from peka_lite.evaluation import estimate_ceiling, expression_ceiling, noise_ceiling
from peka_lite.evaluation.ceiling import _halves

N_GENES = 60  # with a pattern; 40 more add to the totals


def simulate(depth, *, dispersion=0.0, n_spots=1500, seed=0):
    """Return counts with known rates: genes of 0.5 to 50 counts at a depth of 5,000, log rates with sd 0.3 to 1."""
    rng = np.random.default_rng(seed)
    spread = np.tile([0.3, 0.6, 1.0], N_GENES // 3)
    share = np.geomspace(1e-4, 1e-2, N_GENES) * np.exp(spread * rng.normal(size=(n_spots, N_GENES)) - spread**2 / 2)
    flat = np.full((n_spots, 40), 0.85 / 40)
    share = np.hstack([share, flat])
    rate = depth * share / share.sum(1, keepdims=True) * np.exp(0.2 * rng.normal(size=(n_spots, 1)))
    counts = rng.poisson(rng.gamma(1 / dispersion, rate * dispersion) if dispersion else rate)
    names = [f"G{i}" for i in range(share.shape[1])]
    return ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=names), layers={"rate": rate}
    )


@pytest.fixture(scope="module")
def poisson():
    return simulate(5000)


def patterned(adata):
    return list(adata.var_names[:N_GENES])


def counts_of(columns):
    return ad.AnnData(sparse.csr_matrix(np.stack(columns, axis=1).astype(np.float32)))


# --- estimate and true ceiling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_mean_error_is_below_two_hundredths_on_poisson_counts(poisson, method):
    truth = noise_ceiling(poisson, method=method)[patterned(poisson)]
    error = estimate_ceiling(poisson, patterned(poisson), method=method) - truth
    assert abs(error.mean()) < 0.02
    assert error[truth > 0.5].abs().max() < 0.1
    assert truth.min() < 0.3 < 0.9 < truth.max()


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_overdispersed_counts_need_their_dispersion(method):
    adata = simulate(5000, dispersion=0.3)
    truth = noise_ceiling(adata, method=method)
    given = estimate_ceiling(adata, method=method, dispersion=np.full(adata.n_vars, 0.3)) - truth
    poisson_split = estimate_ceiling(adata, method=method) - truth
    assert abs(given.iloc[:N_GENES].mean()) < 0.03
    assert poisson_split.iloc[:N_GENES].mean() > 0.1  # an upper bound, as the docstring says


@pytest.mark.parametrize(("method", "bias"), [("log1p-cp10k", 0.045), ("log1p", 0.015)])
def test_ceiling_of_the_mini_cohort_with_known_dispersion(mini_cohort, method, bias):
    adata = mini_cohort.adata
    truth = noise_ceiling(adata, method=method)
    with_pattern = adata.var["kind"].isin(["visible", "invisible"]).to_numpy()
    dispersion = adata.var["dispersion"]
    error = (estimate_ceiling(adata, method=method, dispersion=dispersion) - truth)[with_pattern]
    assert abs(error.mean()) < bias
    assert error.abs().mean() < 0.1
    strong = truth[with_pattern] > 0.5
    assert error[strong].abs().mean() < 0.08
    poisson_split = (estimate_ceiling(adata, method=method) - truth)[with_pattern]
    assert poisson_split.mean() > error.mean() + 0.02


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_deeper_sequencing_raises_the_ceiling(method):
    means = [
        estimate_ceiling(a, patterned(a), method=method).mean() for a in (simulate(d) for d in (500, 2000, 8000, 32000))
    ]
    assert (np.diff(means) > 0.05).all()


def test_ceiling_is_near_0_for_noise_and_near_1_for_signal():
    rng = np.random.default_rng(0)
    noise = rng.poisson(5, (2000, 20))
    signal = rng.poisson(np.exp(rng.normal(8, 1, (2000, 1))))
    ceiling = estimate_ceiling(counts_of([*noise.T, *signal.T]), method="log1p")
    assert ceiling.iloc[:20].mean() < 0.15
    assert ceiling.iloc[20] > 0.99


def test_negatively_correlated_halves_give_0():
    # A single molecule is in one half only, so the halves are negatively correlated.
    X = np.zeros((2000, 1))
    X[::2] = 1
    ceiling = estimate_ceiling(counts_of([X[:, 0], np.full(2000, 50)]), ["0"], method="log1p")
    assert ceiling.tolist() == [0.0]


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_halves_sum_to_the_counts_and_are_independent(dispersion):
    rng = np.random.default_rng(0)
    rate = rng.gamma(1 / dispersion, 20 * dispersion, 40_000) if dispersion else np.full(40_000, 20)
    X = sparse.csr_matrix(rng.poisson(rate).astype(float).reshape(-1, 1))
    a, b = _halves(X, np.full(X.nnz, dispersion) if dispersion else None, rng)
    assert abs(a + b - X).max() == 0
    a, b = (half.toarray().ravel() for half in (a, b))
    assert min(a.min(), b.min()) >= 0
    assert a.mean() == pytest.approx(b.mean(), rel=0.03)
    assert a.var() == pytest.approx(X.toarray().var() / 2, rel=0.05)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02  # 4 standard errors


# --- returned values -----------------------------------------------------------------------------------------------


def test_totals_use_all_genes_if_few_are_selected(poisson):
    genes = ["G59", "G30", "G40"]
    some, every = (estimate_ceiling(poisson, names) for names in (genes, None))
    assert list(some.index) == genes
    assert some.dtype == np.float64
    assert list(every.index) == list(poisson.var_names)
    np.testing.assert_allclose(some, every[genes], atol=0.03)


def test_constant_gene_is_nan():
    rng = np.random.default_rng(0)
    ceiling = estimate_ceiling(counts_of([np.zeros(50), np.full(50, 7), rng.poisson(9, 50)]), method="log1p")
    assert ceiling.isna().tolist() == [True, True, False]


def test_the_same_seed_gives_the_same_estimate(poisson):
    genes = patterned(poisson)
    first, again, other = (estimate_ceiling(poisson, genes, seed=s, n_splits=2) for s in (3, 3, 4))
    pd.testing.assert_series_equal(first, again)
    assert (first != other).any()


def test_more_splits_reduce_the_variance(poisson):
    genes = patterned(poisson)
    few, many = (
        np.std([estimate_ceiling(poisson, genes, seed=s, n_splits=n) for s in range(4)], axis=0).mean() for n in (1, 12)
    )
    assert many < few / 2


def test_empty_spots_are_supported():
    X = np.random.default_rng(0).poisson(3, (100, 5))
    X[:10] = 0
    assert np.isfinite(estimate_ceiling(counts_of(X.T))).all()


def test_counts_are_not_changed(poisson):
    before = poisson.X.copy()
    estimate_ceiling(poisson, n_splits=1)
    assert abs(poisson.X - before).max() == 0


def test_dispersion_of_0_is_poisson_and_a_series_is_aligned_by_gene(poisson):
    genes = patterned(poisson)[30:]
    zero = estimate_ceiling(poisson, genes, dispersion=np.zeros(poisson.n_vars))
    np.testing.assert_allclose(zero, estimate_ceiling(poisson, genes), atol=0.03)
    named = pd.Series(np.linspace(0, 1, poisson.n_vars), index=poisson.var_names)
    pd.testing.assert_series_equal(
        estimate_ceiling(poisson, genes, dispersion=named[::-1]),
        estimate_ceiling(poisson, genes, dispersion=named.to_numpy()),
    )


# --- known or estimated --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NORMALIZATIONS)
def test_true_rates_are_used_if_available(mini_cohort, method):
    adata = mini_cohort.adata
    genes = list(adata.var_names[[30, 4, 11]])
    ceiling, basis = expression_ceiling(adata, genes, method=method)
    assert basis == "known"
    pd.testing.assert_series_equal(ceiling, noise_ceiling(adata, method=method)[genes], check_names=False)
    measured = adata.copy()
    del measured.layers["rate"]
    ceiling, basis = expression_ceiling(measured, genes, method=method)
    assert basis == "count splitting"
    pd.testing.assert_series_equal(ceiling, estimate_ceiling(measured, genes, method=method))


def test_known_ceiling_of_raw_counts_is_the_correlation_of_logs(mini_cohort):
    adata = mini_cohort.adata
    ceiling = noise_ceiling(adata, method="log1p")
    rate, counts = np.log1p(np.asarray(adata.layers["rate"], dtype=np.float64)), np.log1p(adata.X.toarray())
    expected = [np.corrcoef(rate[:, g], counts[:, g])[0, 1] for g in range(adata.n_vars)]
    np.testing.assert_allclose(ceiling, expected, rtol=1e-5)
    pd.testing.assert_series_equal(noise_ceiling(adata), noise_ceiling(adata, method="log1p-cp10k"))
    assert (noise_ceiling(adata) != ceiling).all()


# --- invalid input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.5, -1, np.nan, np.inf])
def test_values_that_are_not_counts_are_rejected_with_the_gene(value):
    X = np.ones((5, 3))
    X[2, 1] = value
    adata = counts_of(X.T)
    adata.var_names = ["A", "B", "C"]
    with pytest.raises(ValueError, match=r"raw counts, but X has .* for gene 'B'"):
        estimate_ceiling(adata, ["A"])


@pytest.mark.parametrize("with_rate", [True, False])
def test_unknown_gene_or_method_is_rejected(poisson, with_rate):
    adata = poisson.copy()
    if not with_rate:
        del adata.layers["rate"]
    with pytest.raises(KeyError, match="genes not in the data: NOPE"):
        expression_ceiling(adata, ["G1", "NOPE"])
    with pytest.raises(ValueError, match="unknown normalization 'sqrt'"):
        expression_ceiling(adata, ["G1"], method="sqrt")
    with pytest.raises(ValueError, match="'G1' is given more than once"):
        expression_ceiling(adata, ["G1", "G1"])


@pytest.mark.parametrize("dispersion", [[0.1, 0.1], [-0.1] * 100, [np.nan] * 100, 0.1, pd.Series(0.1, index=["G1"])])
def test_invalid_dispersion_is_rejected(poisson, dispersion):
    with pytest.raises(ValueError, match="each of the 100 genes"):
        estimate_ceiling(poisson, dispersion=dispersion)


def test_zero_splits_are_rejected(poisson):
    with pytest.raises(ValueError, match="n_splits must be 1 or more, got 0"):
        estimate_ceiling(poisson, n_splits=0)
