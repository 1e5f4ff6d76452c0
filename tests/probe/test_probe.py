"""The probe equals HEST-bench, scikit-learn and SciPy."""

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score, root_mean_squared_error
from sklearn.preprocessing import StandardScaler

from peka_lite.probe import PCARidge, cross_validate, gather, pca_ridge as probe, pearson, r2, rmse, spearman
from peka_lite.probe.metrics import fold_table
from peka_lite.probe.pca_ridge import SOLVERS

WITH_PCA = {"d384_pca256": 256, "d128_pca128": 128, "constgene_d96_pca64": 64}
FAILS = {"d128_pca256_fails": 128, "n200_d384_pca256_fails": 199}


@pytest.fixture
def case(request, golden):
    return dict(np.load(golden / "hest_bench" / f"hest_{request.param}.npz"))


def score(case, model, kind="X"):
    model.fit(case[f"{kind}_train"], case["y_train"])
    return pearson(case["y_test"], model.predict(case[f"{kind}_test"]))


def make_data(n=60, d=8, genes=3, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    return X, X @ rng.normal(size=(d, genes)) + 0.5 * rng.normal(size=(n, genes)) + 2


# --- against HEST-bench -------------------------------------------------------------------------


@pytest.mark.parametrize("case", WITH_PCA, indirect=True)
@pytest.mark.parametrize("solver", SOLVERS)
def test_mean_pearson_equals_hest_bench(case, solver):
    pcc = score(case, PCARidge(case["pca_train"].shape[1], solver=solver))
    assert np.nanmean(pcc) == pytest.approx(np.nanmean(case["pearson"]), abs=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ["d128_pca128"], indirect=True)
def test_mean_pearson_is_closer_if_hest_benchs_pca_is_exact(case, solver):
    assert score(case, PCARidge(128, solver=solver)).mean() == pytest.approx(case["pearson"].mean(), abs=1e-4)


@pytest.mark.parametrize("case", ["d128_pca128", "constgene_d96_pca64"], indirect=True)
def test_genes_equal_hest_bench_if_its_pca_is_exact(case):
    exact = score(case, PCARidge(case["pca_train"].shape[1]))
    np.testing.assert_allclose(exact, case["pearson"], rtol=0, atol=2.5e-3)


@pytest.mark.parametrize("case", WITH_PCA, indirect=True)
@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge_on_hest_benchs_pca_scores_gives_its_pearson_per_gene(case, solver):
    pcc = score(case, PCARidge(None, solver=solver), "pca")
    np.testing.assert_allclose(pcc, case["pearson"], rtol=0, atol=2.5e-3)


@pytest.mark.parametrize("case", WITH_PCA, indirect=True)
def test_ridge_on_hest_benchs_pca_scores_gives_its_predictions(case):
    model = PCARidge(None, solver="hest-bench").fit(case["pca_train"], case["y_train"])
    np.testing.assert_allclose(model.predict(case["pca_test"]), case["preds"], rtol=0, atol=0.04)


@pytest.mark.parametrize("case", ["d384_nopca"], indirect=True)
@pytest.mark.parametrize("solver", SOLVERS)
def test_mean_pearson_without_pca_equals_hest_bench(case, solver):
    assert score(case, PCARidge(None, solver=solver)).mean() == pytest.approx(case["pearson"].mean(), abs=1e-3)


@pytest.mark.parametrize("case", ["constgene_d96_pca64"], indirect=True)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gene_constant_in_the_test_rows_is_nan_as_in_hest_bench(case, solver):
    pcc = score(case, PCARidge(64, solver=solver))
    assert np.flatnonzero(np.isnan(pcc)).tolist() == np.flatnonzero(np.isnan(case["pearson"])).tolist() == [3]


@pytest.mark.parametrize("case", FAILS, indirect=True)
def test_too_many_components_fail_in_the_hest_bench_solver(case):
    with pytest.raises(ValueError, match="HEST-bench cannot reduce"):
        PCARidge(256, solver="hest-bench").fit(case["X_train"], case["y_train"])


@pytest.mark.parametrize(("case", "width"), FAILS.items(), indirect=["case"])
def test_exact_solver_caps_components_with_a_warning(case, width):
    with pytest.warns(UserWarning, match=rf"allow {width} of 256 components"):
        model = PCARidge(256).fit(case["X_train"], case["y_train"])
    assert model.n_components_ == width
    assert np.isfinite(model.predict(case["X_test"])).all()


@pytest.mark.parametrize("case", WITH_PCA, indirect=True)
def test_hest_bench_solver_equals_scikit_learn_with_its_settings(case):
    width, genes = case["pca_train"].shape[1], case["y_train"].shape[1]
    scaler = StandardScaler().fit(case["X_train"])
    pca = PCA(width, random_state=1).fit(scaler.transform(case["X_train"]))
    train, test = (pca.transform(scaler.transform(case[f"X_{k}"])).astype(np.float32) for k in ("train", "test"))
    ridge = Ridge(alpha=100 / (width * genes), solver="lsqr", fit_intercept=False, max_iter=1000, random_state=1)
    expected = ridge.fit(train.astype(np.float64), case["y_train"]).predict(test)
    actual = PCARidge(width, solver="hest-bench").fit(case["X_train"], case["y_train"]).predict(case["X_test"])
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_golden_summary_and_arrays_agree(golden):
    cases = json.loads((golden / "hest_bench" / "hest_summary.json").read_text())["cases"]
    assert {k for k, v in cases.items() if not v["ok"]} == set(FAILS)


# --- against scikit-learn -----------------------------------------------------------------------


def by_sklearn(X, Y, new, width, alpha, intercept):
    scaler = StandardScaler().fit(X)
    pca = PCA(width, svd_solver="full").fit(scaler.transform(X))
    ridge = Ridge(alpha=alpha, solver="svd", fit_intercept=intercept).fit(pca.transform(scaler.transform(X)), Y)
    return ridge.predict(pca.transform(scaler.transform(new))).reshape(len(new), -1)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(4, 40),
    d=st.integers(2, 50),
    genes=st.integers(1, 5),
    constant=st.integers(0, 2),
    alpha=st.floats(1e-3, 100),
    intercept=st.booleans(),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 2**31 - 1),
)
def test_exact_solver_equals_scikit_learn(n, d, genes, constant, alpha, intercept, share, seed):
    rng = np.random.default_rng(seed)
    X, new = (5 + rng.normal(size=(rows, d)) * np.linspace(0.1, 3, d) for rows in (n, 7))
    Y = 3 + rng.normal(size=(n, genes))
    flat = rng.permutation(d)[: min(constant, d - 1)]
    X[:, flat] = new[:, flat] = rng.normal(size=len(flat))
    width = max(1, int(share * min(n - 1, d - len(flat))))
    actual = PCARidge(width, alpha, fit_intercept=intercept).fit(X, Y).predict(new)
    np.testing.assert_allclose(actual, by_sklearn(X, Y, new, width, alpha, intercept), rtol=0, atol=1e-8)


def test_hest_alpha_counts_the_columns_after_pca():
    X, Y = make_data(d=8, genes=3)
    np.testing.assert_allclose(
        PCARidge(5).fit(X, Y).predict(X), PCARidge(5, alpha=100 / (5 * 3)).fit(X, Y).predict(X), rtol=1e-12
    )


def test_hest_alpha_counts_the_columns_after_capping():
    X, Y = make_data(n=5, d=8)
    with pytest.warns(UserWarning, match="allow 4 of 256"):
        capped = PCARidge().fit(X, Y)
    np.testing.assert_allclose(capped.predict(X), PCARidge(4, alpha=100 / (4 * 3)).fit(X, Y).predict(X), rtol=1e-12)


def test_intercept_adds_the_training_means_and_does_not_change_pearson():
    X, Y = make_data()
    without, with_it = (PCARidge(5, fit_intercept=f).fit(X, Y).predict(X) for f in (False, True))
    np.testing.assert_allclose(with_it - without, np.broadcast_to(Y.mean(0), Y.shape), atol=1e-10)
    np.testing.assert_allclose(pearson(Y, with_it), pearson(Y, without), atol=1e-12)


def test_alpha_zero_is_least_squares_with_a_constant_feature():
    X, Y = make_data()
    X[:, 2] = 4
    P = PCARidge(None, alpha=0, fit_intercept=True).fit(X, Y).predict(X)
    design = np.c_[X, np.ones(len(X))]
    np.testing.assert_allclose(P, design @ np.linalg.lstsq(design, Y, rcond=None)[0], atol=1e-8)


@pytest.mark.parametrize("n_components", [None, 5])
@pytest.mark.parametrize("genes", [1, 3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_predictions_are_float64_with_one_column_per_gene(solver, genes, n_components):
    X, Y = make_data(genes=genes)
    P = PCARidge(n_components, solver=solver).fit(X, Y).predict(X[:7])
    assert (P.shape, P.dtype) == ((7, genes), np.float64)


@pytest.mark.parametrize("solver", SOLVERS)
def test_fit_and_prediction_are_deterministic(solver):
    X, Y = make_data()
    first, again = (PCARidge(5, solver=solver).fit(X, Y).predict(X) for _ in range(2))
    assert np.array_equal(first, again)


@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_are_not_changed(solver):
    X, Y = make_data()
    before = X.copy(), Y.copy()
    PCARidge(5, solver=solver).fit(X, Y).predict(X)
    assert np.array_equal(X, before[0])
    assert np.array_equal(Y, before[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_features_may_be_single_precision(solver):
    X, Y = make_data()
    single = PCARidge(5, solver=solver).fit(X.astype(np.float32), Y).predict(X.astype(np.float32))
    np.testing.assert_allclose(single, PCARidge(5, solver=solver).fit(X, Y).predict(X), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "magic"}, "unknown solver 'magic'; known: exact, hest-bench"),
        ({"alpha": "big"}, "alpha is 'hest' or a number of at least 0, not 'big'"),
        ({"alpha": -1.0}, "not -1.0"),
        ({"n_components": 0}, "n_components must be at least 1 or None, not 0"),
        ({"solver": "hest-bench", "fit_intercept": True}, "HEST-bench fits no intercept"),
        ({"solver": "hest-bench", "standardize": False}, "HEST-bench standardizes"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        PCARidge(**options)


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (np.ones((4, 2)), np.ones((3, 1)), "must share rows"),
        (np.ones((4, 2)), np.ones(4), "must share rows"),
        (np.ones((1, 2)), np.ones((1, 1)), "at least two training rows"),
        (np.full((4, 2), np.nan), np.ones((4, 1)), "features have NaN"),
        (np.ones((4, 2)), np.full((4, 1), np.inf), "targets have NaN or infinite"),
    ],
)
def test_invalid_data_are_rejected(X, Y, message):
    with pytest.raises(ValueError, match=message):
        PCARidge(1).fit(X, Y)


@pytest.mark.parametrize("options", [{}, {"standardize": False}, {"fit_intercept": True}, {"alpha": 3.0}])
@pytest.mark.parametrize("n_components", [None, 5])
def test_fit_on_sums_equals_fit_on_rows(n_components, options):
    X, Y = make_data()
    sums = gather(X, Y, np.arange(60) % 4)
    rows = np.arange(60) % 4 != 2
    by_sums = PCARidge(n_components, **options).fit_sums(sums.over([0, 1, 3]))
    by_rows = PCARidge(n_components, **options).fit(X[rows], Y[rows])
    assert by_sums.n_components_ == by_rows.n_components_ == (n_components or 8)
    for name in ("mean_", "scale_", "coef_", "intercept_"):
        np.testing.assert_allclose(getattr(by_sums, name), getattr(by_rows, name), rtol=0, atol=1e-10)
    np.testing.assert_allclose(by_sums.predict(X), by_rows.predict(X), rtol=0, atol=1e-10)


def test_fit_on_sums_caps_components_and_rejects_invalid_input():
    X, Y = make_data(n=5)
    sums = gather(X, Y, np.array([0, 0, 0, 0, 1]))
    with pytest.warns(UserWarning, match="4 training rows of 8 features allow 3 of 256 components") as warned:
        PCARidge().fit_sums(sums.over([0]))
    assert warned[0].filename == __file__
    with pytest.raises(ValueError, match="at least two training rows"):
        PCARidge(1).fit_sums(sums.over([1]))
    with pytest.raises(ValueError, match="solver 'hest-bench' needs rows"):
        PCARidge(solver="hest-bench").fit_sums(sums.over([0]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32])
def test_prediction_in_chunks_equals_prediction_of_all_rows(monkeypatch, dtype):
    X, Y = make_data()
    X = (10 * X).astype(dtype)
    model = PCARidge(5, fit_intercept=True).fit(X, Y)
    monkeypatch.setattr(probe, "CHUNK", 7)
    by_hand = (X - model.mean_) / model.scale_ @ model.coef_ + model.intercept_
    np.testing.assert_allclose(model.predict(X), by_hand, rtol=0, atol=1e-12)
    np.testing.assert_allclose(model.predict(X.tolist()), by_hand, rtol=0, atol=1e-12)


# --- Pearson ------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(3, 50),
    genes=st.integers(1, 6),
    offset=st.floats(-1e4, 1e4),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**31 - 1),
)
def test_pearson_equals_scipy(n, genes, offset, scale, seed):
    rng = np.random.default_rng(seed)
    Y = rng.normal(size=(n, genes))
    P = offset + scale * (Y + rng.normal(size=(n, genes)))
    expected = [pearsonr(Y[:, g], P[:, g]).statistic for g in range(genes)]
    np.testing.assert_allclose(pearson(Y, P), expected, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, 3.0, 1e6])
@pytest.mark.parametrize("side", [0, 1])
def test_pearson_is_nan_if_either_side_is_constant(value, side):
    pair = [np.random.default_rng(0).normal(size=(30, 2)) for _ in range(2)]
    pair[side][:, 1] = value
    assert np.isnan(pearson(*pair)).tolist() == [False, True]


def test_pearson_of_a_line_is_one_or_minus_one():
    y = np.arange(10.0)[:, None]
    np.testing.assert_allclose(pearson(np.hstack([y, y]), np.hstack([2 * y + 3, -y])), [1, -1])


def test_pearson_rejects_different_shapes():
    with pytest.raises(ValueError, match="differ in shape"):
        pearson(np.ones((3, 2)), np.ones((3, 1)))


# --- folds --------------------------------------------------------------------------------------


def thirds(n=60):
    return [(np.flatnonzero(np.arange(n) % 3 != k), np.flatnonzero(np.arange(n) % 3 == k)) for k in range(3)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_cross_validation_equals_a_manual_loop_over_folds(solver):
    X, Y = make_data()
    table = cross_validate(X, Y, thirds(), genes=["A", "B", "C"], n_components=5, solver=solver)
    for fold, (train, test) in enumerate(thirds()):
        model = PCARidge(5, solver=solver).fit(X[train], Y[train])
        expected = [pearsonr(Y[test, g], model.predict(X[test])[:, g]).statistic for g in range(3)]
        np.testing.assert_allclose(table.loc[table["fold"] == fold, "pcc"], expected, atol=1e-9)


def test_cross_validation_returns_a_tidy_table():
    X, Y = make_data()
    table = cross_validate(X, Y, thirds(), genes=["A", "B", "C"], n_components=5)
    assert list(table) == ["fold", "gene", "pcc", "r2", "rmse", "spearman", "n_train", "n_test"]
    assert table["gene"].tolist() == ["A", "B", "C"] * 3
    assert table["fold"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert (table["n_train"].eq(40) & table["n_test"].eq(20)).all()
    assert table.index.tolist() == list(range(9))


def test_genes_without_names_are_numbered():
    X, Y = make_data()
    assert cross_validate(X, Y, thirds()[:1], n_components=5)["gene"].tolist() == [0, 1, 2]


def test_number_of_gene_names_must_match_the_columns():
    with pytest.raises(ValueError, match="2 gene names for 3 columns"):
        cross_validate(*make_data(), thirds(), genes=["A", "B"])


def test_test_rows_do_not_leak_into_the_fit():
    X, Y = make_data()
    ((train, test),) = thirds()[:1]
    corrupted = X.copy(), Y.copy()
    corrupted[0][test] *= -100
    corrupted[1][test] = 0
    a, b = (PCARidge(5).fit(x[train], y[train]).coef_ for x, y in ((X, Y), corrupted))
    assert np.array_equal(a, b)
    assert cross_validate(*corrupted, [(train, test)], n_components=5)["pcc"].isna().all()


def fold_by_fold(X, Y, folds, **options):
    models = [PCARidge(5, **options).fit(X[train], Y[train]) for train, _ in folds]
    return np.concatenate([pearson(Y[test], m.predict(X[test])) for m, (_, test) in zip(models, folds, strict=True)])


def random_folds(n=60, folds=4, seed=0):
    """Return overlapping random folds, some rows in neither side; nearly every row has a different pattern."""
    order = [np.random.default_rng([seed, k]).permutation(n) for k in range(folds)]
    return [(o[:30], o[30:50]) for o in order]


def grouped_folds(n=60):
    """Return five overlapping folds of ten groups of rows, some groups in neither side."""
    group = np.arange(n) % 10
    pick = [([1, 2, 3], [0]), ([0, 4, 5], [1, 2]), ([0, 1, 2, 3, 4], [9]), ([6, 7], [0]), ([1, 5, 6, 7], [2, 3])]
    return [tuple(np.flatnonzero(np.isin(group, side)) for side in fold) for fold in pick]


def passes(monkeypatch):
    """Record for each pass of `cross_validate` the number of rows with a cell, and of cells."""
    seen = []

    def counted(X, Y, cells, **options):
        seen.append((int((cells >= 0).sum()), len(np.unique(cells[cells >= 0]))))
        return gather(X, Y, cells, **options)

    monkeypatch.setattr(probe, "gather", counted)
    return seen


@pytest.mark.parametrize(
    ("folds", "expected"),
    [
        (thirds(), [(60, 3)]),
        (thirds()[:1], [(40, 1)]),
        (grouped_folds(), [(48, 5)]),
        (random_folds(), [(54, 15)]),
        (random_folds(folds=2), [(44, 3)]),
        ([(np.r_[t, t[:9]], s) for t, s in thirds()], [(49, 1)] * 3),
        ([(np.arange(60) % 3 != k, np.arange(60) % 3 == k) for k in range(3)], [(60, 3)]),
        ([(t - 60, s - 60) for t, s in thirds()], [(60, 3)]),
    ],
    ids=["thirds", "one", "groups", "random", "two random", "drawn twice", "masks", "from the end"],
)
@pytest.mark.parametrize("alpha", ["hest", 10.0])
def test_cross_validation_equals_a_fit_for_each_fold(monkeypatch, folds, expected, alpha):
    X, Y = make_data()
    by_hand = fold_by_fold(X, Y, folds, alpha=alpha)
    seen = passes(monkeypatch)
    monkeypatch.setattr(probe, "CHUNK", 11)
    table = cross_validate(X, Y, folds, n_components=5, alpha=alpha)
    np.testing.assert_allclose(table["pcc"], by_hand, rtol=0, atol=1e-9)
    assert seen == expected


@pytest.mark.parametrize("most", [3 * 8 * 8 * 8, 3 * 8 * 8 * 8 - 1])
def test_folds_have_separate_passes_if_the_sums_are_too_large(monkeypatch, most):
    X, Y = make_data()
    by_hand = fold_by_fold(X, Y, thirds())
    monkeypatch.setattr(probe, "MOST_BYTES", most)
    seen = passes(monkeypatch)
    np.testing.assert_allclose(cross_validate(X, Y, thirds(), n_components=5)["pcc"], by_hand, rtol=0, atol=1e-9)
    assert seen == ([(60, 3)] if most == 3 * 8**3 else [(40, 1)] * 3)


def test_folds_have_separate_passes_if_there_are_too_many_cells(monkeypatch):
    X, Y = make_data(n=120)
    folds = random_folds(n=120, folds=6)
    by_hand = fold_by_fold(X, Y, folds)
    seen = passes(monkeypatch)
    np.testing.assert_allclose(cross_validate(X, Y, folds, n_components=5)["pcc"], by_hand, rtol=0, atol=1e-9)
    assert seen == [(30, 1)] * 6


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_validation_reads_memory_mapped_features_in_chunks(tmp_path, monkeypatch, dtype):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(20_000, 40)).astype(dtype)
    Y = X[:, :2] + rng.normal(size=(20_000, 2))
    np.save(tmp_path / "X.npy", X)
    monkeypatch.setattr(probe, "CHUNK", 256)
    tracemalloc.start()
    mapped = cross_validate(np.load(tmp_path / "X.npy", mmap_mode="r"), Y, thirds(20_000), n_components=5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.8 * 20_000 * 40 * 4
    pd.testing.assert_frame_equal(mapped, cross_validate(X, Y, thirds(20_000), n_components=5))


def test_features_and_targets_of_different_lengths_are_rejected():
    X, Y = make_data()
    with pytest.raises(ValueError, match="must share rows"):
        cross_validate(X[:50], Y, thirds())


# --- scores -------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(n=st.integers(3, 60), genes=st.integers(1, 5), levels=st.integers(2, 50), seed=st.integers(0, 2**31 - 1))
def test_scores_equal_those_of_scipy_and_scikit_learn(n, genes, levels, seed):
    """Whole numbers of few levels have ties, as counts have."""
    rng = np.random.default_rng(seed)
    Y, P = rng.integers(0, levels, (n, genes)).astype(float), rng.normal(size=(n, genes))
    Y[:2] = [[0], [1]]  # no gene is constant
    np.testing.assert_allclose(spearman(Y, P), [spearmanr(y, p).statistic for y, p in zip(Y.T, P.T, strict=True)])
    np.testing.assert_allclose(r2(Y, P), r2_score(Y, P, multioutput="raw_values"), atol=1e-12)
    np.testing.assert_allclose(rmse(Y, P), root_mean_squared_error(Y, P, multioutput="raw_values"))


def test_scores_of_constant_genes_and_predictions():
    Y = np.array([[0.1 + 0.2, 1], [0.1 + 0.2, 2], [0.1 + 0.2, 3]])
    P = np.array([[1, 0.7], [2, 0.7], [3, 0.7]]) + 1e-18
    assert np.isnan(spearman(Y, P)).all()
    assert np.isnan(r2(Y, P)).tolist() == [True, False]
    assert np.isfinite(rmse(Y, P)).all()
    for score in (pearson, r2, rmse, spearman):
        with pytest.raises(ValueError, match="differ in shape"):
            score(Y, P[:2])


def test_fold_table_scores_the_given_rows():
    _, Y = make_data()
    table = fold_table(4, ["A", "B", "C"], Y, Y + 1, n_train=7)
    assert table.to_dict("list") == {
        "fold": [4] * 3, "gene": ["A", "B", "C"], "pcc": pytest.approx([1] * 3),
        "r2": pytest.approx(1 - 1 / Y.var(0)), "rmse": pytest.approx([1] * 3), "spearman": pytest.approx([1] * 3),
        "n_train": [7] * 3, "n_test": [60] * 3,
    }  # fmt: skip
