"""Probes fitted and scored from sums per cell equal scikit-learn on the rows, for all folds and alphas."""

import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from peka_lite.probe import PCARidge, alpha_path, gather, pearson
from peka_lite.probe.moments import components

ALPHAS = (1e-3, 1.0, 30.0, 1e4)


@st.composite
def problems(draw):
    """Draw features, targets and cells 0 to 3 (3 is held out); some columns are constant, duplicated or dependent."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31 - 1)))
    n, d, genes = draw(st.integers(6, 60)), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    rank = draw(st.integers(1, 40))
    X = rng.normal(size=(n, d)) * np.linspace(0.1, 3, d)
    if rank < d:
        X = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d))
    cells = rng.permutation(np.r_[0, 1, 2, 3, 3, 3, rng.integers(0, 4, n - 6)])
    X += draw(st.sampled_from([0.0, 5.0, -1e4])) * rng.uniform(0.5, 1, d)
    if draw(st.booleans()):
        X += 3 * rng.normal(size=(4, d))[cells]  # slide effects
    kinds = draw(st.lists(st.sampled_from(["constant", "constant in training", "double"]), max_size=3))
    for kind, column in zip(kinds, rng.permutation(d)[1:], strict=False):
        if kind == "constant":
            X[:, column] = rng.normal() * 100
        elif kind == "constant in training":
            X[cells != 3, column] = 0.1
        else:
            X[:, column] = X[:, column - 1]
    Y = 3 + X[:, rng.integers(0, d, genes)] - X[:, rng.integers(0, d, genes)] + rng.normal(size=(n, genes))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return X.astype(dtype), Y.astype(draw(st.sampled_from([np.float32, np.float64]))), cells


def width_without_tie(X, share, scaled=True):
    """Return a number of components without tied eigenvalues at the cut, where the choice would be arbitrary."""
    Z = StandardScaler().fit_transform(X.astype(np.float64)) if scaled else X - X.mean(0, dtype=np.float64)
    values = np.linalg.svd(Z, compute_uv=False) ** 2
    ends = [k for k in range(1, len(values) + 1) if k == len(values) or values[k] < 0.98 * values[k - 1]]
    ends = [k for k in ends if k <= len(X) - 1 and values[k - 1] > 1e-6 * values[0] > 0]
    assume(ends)
    return ends[int(share * (len(ends) - 1))]


def by_sklearn(X, Y, new, width, alpha, scaled=True):
    X, Y, new = (A.astype(np.float64) for A in (X, Y, new))
    if scaled:
        scaler = StandardScaler().fit(X)
        X, new = scaler.transform(X), scaler.transform(new)
    pca = PCA(width, svd_solver="full").fit(X)
    return Ridge(alpha=alpha, solver="svd").fit(pca.transform(X), Y).predict(pca.transform(new)).reshape(len(new), -1)


def moments_of(X, Y, cells):
    """Return moments of the training rows and of the held-out cell 3."""
    gathered = gather(X, Y, cells)
    return gathered.over(c for c in gathered.cells if c != 3), gathered.over([3])


def same(a, b, *, tolerance=1e-9):
    """Assert that two Moments are equal up to a tolerance relative to each field's largest value."""
    for f in fields(a):
        x, y = (np.asarray(getattr(m, f.name), dtype=np.float64) for m in (a, b))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()), err_msg=f.name)


def plain(X, Y, rows):
    """Return means and scatter matrices by their definition."""
    x, y = X[rows].astype(np.float64), Y[rows].astype(np.float64)
    mx, my = x.mean(0), y.mean(0)
    x, y = x - mx, y - my
    return {"n": len(x), "mean_x": mx, "mean_y": my, "Sxx": x.T @ x, "Sxy": x.T @ y, "Syy": (y**2).sum(0)}


def small(n=50, d=6, genes=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) + 2
    return X, X[:, :genes] + rng.normal(size=(n, genes)), np.arange(n) % 5


# --- against the rows ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(problem=problems(), chunk=st.integers(1, 70))
def test_moments_of_cells_equal_those_of_their_rows(problem, chunk):
    X, Y, cells = problem
    gathered = gather(X, Y, cells, chunk=chunk)
    for some in ([0], [2, 0], [3, 1, 2], [0, 1, 2, 3]):
        actual = gathered.over(some)
        assert np.array_equal(actual.rows, np.flatnonzero(np.isin(cells, some)))
        for name, value in plain(X, Y, actual.rows).items():
            atol = 1e-12 * max(1, np.abs(X).max(), np.abs(Y).max()) ** (2 if name[0] == "S" else 1) * len(X)
            np.testing.assert_allclose(getattr(actual, name), value, rtol=1e-9, atol=atol, err_msg=name)
        assert np.array_equal(actual.Sxx, actual.Sxx.T)


@settings(max_examples=120, deadline=None)
@given(problem=problems(), share=st.floats(0, 1), alpha=st.sampled_from(ALPHAS), scaled=st.booleans())
def test_predictions_and_pcc_equal_scikit_learn(problem, share, alpha, scaled):
    X, Y, cells = problem
    train, test = cells != 3, cells == 3
    width = width_without_tie(X[train], share, scaled)
    m_train, m_test = moments_of(X, Y, cells)
    expected = by_sklearn(X[train], Y[train], X[test], width, alpha, scaled)
    model = PCARidge(width, alpha, standardize=scaled, fit_intercept=True).fit_sums(m_train)
    np.testing.assert_allclose(model.predict(X[test]), expected, rtol=0, atol=1e-6 * (1 + np.abs(expected).max()))
    (pcc,) = alpha_path(components(m_train, width, standardize=scaled), m_test, [alpha])
    np.testing.assert_allclose(pcc, pearson(Y[test], expected), rtol=0, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), width=st.sampled_from([None, 1, 3, 256]))
def test_alpha_path_equals_pearson_of_predictions(problem, width):
    X, Y, cells = problem
    train, test = moments_of(X, Y, cells)
    path = alpha_path(train, test, ALPHAS, n_components=width)
    assert (path.shape, path.dtype) == ((len(ALPHAS), Y.shape[1]), np.float64)
    for alpha, pcc in zip(ALPHAS, path, strict=True):
        k = width and min(width, train.n - 1, X.shape[1])
        P = PCARidge(k, alpha).fit_sums(train).predict(X[cells == 3])
        np.testing.assert_allclose(pcc, pearson(Y[cells == 3], P), rtol=0, atol=1e-7)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("chunk", [1, 7, 49, 50, 4096])
def test_sums_do_not_depend_on_the_chunk_size(chunk, order):
    X, Y, cells = small()
    whole = gather(X, Y, cells)
    parts = gather(np.asarray(X, order=order), Y, cells, chunk=chunk)
    for some in ([1], [4, 0, 2]):
        same(parts.over(some), whole.over(some), tolerance=1e-12)


@pytest.mark.parametrize("cells", [np.arange(20_000) // 5000, np.arange(20_000) % 4], ids=["in order", "scattered"])
def test_memory_mapped_features_are_read_in_chunks_with_the_same_sums(tmp_path, cells):
    X = np.random.default_rng(0).normal(size=(20_000, 50)).astype(np.float32)
    Y = X[:, :2].astype(np.float64)
    np.save(tmp_path / "X.npy", X)
    tracemalloc.start()
    mapped = gather(np.load(tmp_path / "X.npy", mmap_mode="r"), Y, cells, chunk=200)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < X.nbytes / 4
    for f in fields(mapped.over([0, 2])):
        assert np.array_equal(
            getattr(mapped.over([0, 2]), f.name), getattr(gather(X, Y, cells, chunk=200).over([0, 2]), f.name)
        )


def test_rows_of_other_cells_do_not_influence_a_fit():
    X, Y, cells = small()
    corrupted = X.copy(), Y.copy()
    corrupted[0][cells == 3] *= -1e9
    corrupted[1][cells == 3] = 1e9
    fits = [PCARidge(4).fit_sums(moments_of(x, y, cells)[0]) for x, y in ((X, Y), corrupted)]
    for name in ("coef_", "mean_", "scale_", "intercept_"):
        assert np.array_equal(*(getattr(fit, name) for fit in fits))


def test_rows_of_cell_minus_one_are_not_read():
    X, Y, cells = small()
    cells[cells == 2] = -1
    X[cells == -1] = np.nan
    Y[cells == -1] = np.inf
    gathered = gather(X, Y, cells)
    assert gathered.cells == [0, 1, 3, 4]
    np.testing.assert_allclose(gathered.over(gathered.cells).mean_x, X[cells >= 0].mean(0))


def test_cell_numbers_may_have_gaps():
    X, Y, cells = small()
    same(gather(X, Y, 10 * cells + 7).over([7, 37]), gather(X, Y, cells).over([0, 3]), tolerance=0)
    same(gather(X, Y, cells).over([3, 0, 99]), gather(X, Y, cells).over([0, 3]), tolerance=0)


# --- columns without variance -----------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 0.1, -1e4, 1e8])
@pytest.mark.parametrize("spread", [0, 1e-3, 1])
def test_constant_columns_are_those_of_standard_scaler(offset, spread):
    X, Y, cells = small()
    X[:, 2] = offset + spread * X[:, 2]
    train, _ = moments_of(X, Y, cells)
    scaler = StandardScaler().fit(X[cells != 3])
    reduced = components(train, None)
    assert reduced.scale[2] == pytest.approx(scaler.scale_[2], rel=1e-4)
    assert (not reduced.vectors[2].any()) == (spread == 0)


def test_column_constant_over_several_cells_has_exactly_zero_variance():
    X, Y, _ = small()
    X[:, 2], Y[:, 1] = 1e4 / 3, 1e3 / 7
    moments = gather(X, Y, np.repeat([0, 1, 2], [9, 12, 29]), chunk=9).over([0, 1, 2])
    assert not moments.Sxx[2].any()
    assert not moments.Sxy[2].any()
    assert not moments.Sxy[:, 1].any()
    assert moments.Syy[1] == 0
    assert (moments.mean_x[2], moments.mean_y[1]) == (1e4 / 3, 1e3 / 7)


@pytest.mark.parametrize("scaled", [True, False])
def test_column_of_rounding_noise_does_not_rotate_the_components(scaled):
    X, Y, cells = small()
    without = components(moments_of(np.delete(X, 2, 1), Y, cells)[0], 3, standardize=scaled)
    X[:, 2] = 1e16 + 20 * X[:, 2]
    reduced = components(moments_of(X, Y, cells)[0], 3, standardize=scaled)
    np.testing.assert_allclose(reduced.values, without.values, rtol=1e-9)
    np.testing.assert_allclose(reduced.weights(1.0) ** 2, without.weights(1.0) ** 2, atol=1e-9)


def test_variation_below_rounding_error_is_constant():
    X, Y, cells = small()
    X[:, 2] = 1e8 * (1 + np.finfo(np.float64).eps * (np.arange(len(X)) % 2))
    assert StandardScaler().fit(X[cells != 3]).scale_[2] == 1
    assert components(moments_of(X, Y, cells)[0], None).scale[2] == 1


@pytest.mark.parametrize("scaled", [True, False])
def test_column_constant_in_training_has_no_weight(scaled):
    X, Y, cells = small()
    X[:, 2] = np.where(cells == 3, 1e12 * X[:, 2], 0.1)
    train, test = moments_of(X, Y, cells)
    reduced = components(train, None, standardize=scaled)
    without = components(moments_of(np.delete(X, 2, 1), Y, cells)[0], None, standardize=scaled)
    np.testing.assert_allclose(reduced.vectors[2], 0, atol=0)
    np.testing.assert_allclose(
        np.delete(reduced.vectors, 2, 0) @ reduced.weights(1.0), without.vectors @ without.weights(1.0), atol=1e-10
    )
    assert np.isfinite(alpha_path(reduced, test, ALPHAS)).all()


def test_alpha_zero_is_least_squares_for_dependent_features():
    X, Y, cells = small()
    X = np.c_[X, X[:, 0] + X[:, 1], X[:, 2]]
    train, test = moments_of(X, Y, cells)
    design = np.c_[X, np.ones(len(X))]
    P = design[cells == 3] @ np.linalg.lstsq(design[cells != 3], Y[cells != 3], rcond=None)[0]
    actual = PCARidge(None, alpha=0, fit_intercept=True).fit_sums(train).predict(X[cells == 3])
    np.testing.assert_allclose(actual, P, atol=1e-8)
    np.testing.assert_allclose(alpha_path(train, test, [0], n_components=None)[0], pearson(Y[cells == 3], P), atol=1e-8)


def test_alpha_zero_ignores_directions_that_vary_only_in_the_test_rows():
    X, Y, cells = small()
    X = np.c_[X, np.where(cells == 3, 5.0, X[:, 0] + X[:, 1]), np.where(cells == 3, -X[:, 2], X[:, 2])]
    train, test = moments_of(X, Y, cells)
    scaler = StandardScaler().fit(X[cells != 3])
    weights = np.linalg.pinv(scaler.transform(X[cells != 3]), rcond=1e-10) @ (Y - Y[cells != 3].mean(0))[cells != 3]
    P = scaler.transform(X[cells == 3]) @ weights
    np.testing.assert_allclose(PCARidge(None, alpha=0).fit_sums(train).predict(X[cells == 3]), P, atol=1e-8)
    np.testing.assert_allclose(alpha_path(train, test, [0], n_components=None)[0], pearson(Y[cells == 3], P), atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
@pytest.mark.parametrize(
    "case",
    [
        "targets in training",
        "targets in the test rows",
        "targets but for rounding",
        "features in the test rows",
        "features but for rounding",
        "features that cancel",
    ],
)
def test_pcc_is_nan_where_targets_or_predictions_are_constant(case, value):
    X, Y, cells = small()
    if case == "targets in training":
        Y[cells != 3, 1] = value
    elif case == "targets in the test rows":
        Y[cells == 3, 1] = value
    elif case == "targets but for rounding":
        Y[cells == 3, 1] = value * (1 + 1e-13 * Y[cells == 3, 1])
    elif case == "features in the test rows":
        X[cells == 3] = value
    elif case == "features but for rounding":
        X[cells == 3] = value * (1 + 1e-13 * X[cells == 3])
    else:
        X[:] = X[:, :1]
        X[cells == 3, 1::2] = 10 + value - X[cells == 3, ::2]
    lost = [True] * 3 if case.startswith("features") else [False, True, False]
    train, test = moments_of(X, Y, cells)
    width = 1 if case == "features that cancel" else 4
    P = PCARidge(width, alpha=1.0).fit_sums(train).predict(X[cells == 3])
    assert np.isnan(pearson(Y[cells == 3], P)).tolist() == lost
    assert np.isnan(alpha_path(train, test, ALPHAS, n_components=width)).tolist() == [lost] * len(ALPHAS)


def test_components_without_variance_have_zero_weights():
    X, Y, cells = small()
    reduced = components(gather(np.full_like(X, 0.1), Y, cells).over([0, 1]), 3)
    assert not reduced.weights(0.0).any()
    assert not reduced.weights(1.0).any()


# --- shapes and reuse ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "requested", "width"), [(50, 4, 4), (50, None, 6), (50, 256, 6), (4, 256, 3), (4, None, 6)]
)
def test_components_are_capped_by_rows_and_columns(n, requested, width):
    X, Y, _ = small(n)
    reduced = components(gather(X, Y, np.zeros(n, dtype=int)).over([0]), requested)
    assert (reduced.vectors.shape, reduced.values.shape, reduced.cross.shape) == ((6, width), (width,), (width, 3))
    assert (np.diff(reduced.values) <= 0).all()


def test_components_do_not_change_the_sums():
    X, Y, cells = small()
    train, test = moments_of(X, Y, cells)
    before = train.Sxx.copy(), train.Sxy.copy(), test.Sxx.copy()
    alpha_path(train, test, ALPHAS)
    assert all(np.array_equal(a, b) for a, b in zip(before, (train.Sxx, train.Sxy, test.Sxx), strict=True))


def test_union_of_cells_does_not_change_them():
    X, Y, cells = small()
    gathered = gather(X, Y, cells)
    once, again = gathered.over([0, 1, 4]), gathered.over([4, 1, 0])
    same(once, again, tolerance=0)


def test_components_can_be_reused_for_several_tests_and_alphas():
    X, Y, cells = small()
    gathered = gather(X, Y, cells)
    train = gathered.over([0, 1, 2])
    reduced = components(train, 4)
    for test in ([3], [4], [3, 4]):
        path = alpha_path(reduced, gathered.over(test), ALPHAS)
        assert np.array_equal(path, alpha_path(train, gathered.over(test), ALPHAS, n_components=4))


@pytest.mark.parametrize("index", [[2, 0], np.array([False, True, False]), slice(1, 3)])
def test_targets_selects_columns(index):
    X, Y, cells = small()
    chosen = moments_of(X, Y, cells)[0].targets(index)
    same(chosen, moments_of(X, Y[:, index], cells)[0], tolerance=1e-12)


def test_targets_does_not_copy_feature_sums():
    train = moments_of(*small())[0]
    assert train.targets([0]).Sxx is train.Sxx


# --- invalid input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, 37, 49])
@pytest.mark.parametrize("name", ["features", "targets"])
def test_non_finite_values_are_rejected_with_their_position(name, row, value):
    X, Y, cells = small()
    (X if name == "features" else Y)[row, 1] = value
    with pytest.raises(ValueError, match=rf"^{name} have NaN or infinite values; the first in row {row}, column 1$"):
        gather(X, Y, cells, chunk=8)


def test_too_large_values_are_rejected():
    X, Y, cells = small()
    X[:, 1] = np.where(np.arange(len(X)) < 25, 1.5e308, -1.5e308)
    with pytest.raises(ValueError, match="features are too large for sums in float64"):
        gather(X, Y, cells)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Y": np.ones((49, 1))}, "must share rows"),
        ({"Y": np.ones(50)}, "must share rows"),
        ({"cells": np.zeros(49, dtype=int)}, "one integer for each of 50 rows, not int64 .49"),
        ({"cells": np.zeros(50)}, "one integer for each of 50 rows, not float64"),
        ({"cells": np.full(50, -1)}, "at least one row must have a cell"),
        ({"cells": np.full(50, -2)}, "numbered from 0, with -1 for rows left out"),
        ({"chunk": 0}, "chunk must be at least 1 row, not 0"),
    ],
)
def test_invalid_input_is_rejected(change, message):
    X, Y, cells = small()
    with pytest.raises(ValueError, match=message):
        gather(**{"X": X, "Y": Y, "cells": cells} | change)


@pytest.mark.parametrize(
    ("cells", "message"), [([1, 2, 1], "given once, not .1, 2, 1"), ([8], "no rows in cells .8"), ([], "no rows")]
)
def test_invalid_cells_are_rejected(cells, message):
    with pytest.raises(ValueError, match=message):
        gather(*small()).over(cells)


@pytest.mark.parametrize("alpha", [-1, np.nan])
def test_negative_alphas_are_rejected(alpha):
    with pytest.raises(ValueError, match="alphas must be numbers of at least 0"):
        alpha_path(*moments_of(*small()), [1.0, alpha])


def test_sums_of_different_targets_are_rejected():
    train, test = moments_of(*small())
    with pytest.raises(ValueError, match="training sums have 1 targets and test sums 3"):
        alpha_path(train.targets([0]), test, ALPHAS)
