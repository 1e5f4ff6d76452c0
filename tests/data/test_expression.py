"""Quality control, normalization and alignment of counts; genes are selected without held-out spots."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings, strategies as st
from scipy import sparse

import peka_lite as pk
from peka_lite.data import Cohort, Slide, TileStore, align_genes, expression_targets, normalize, qc, top_hvg
from peka_lite.data.expression import hash_counts


def make_adata(counts, genes=None):
    X = sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    genes = [f"G{i}" for i in range(X.shape[1])] if genes is None else list(genes)
    obs = pd.DataFrame(index=[f"spot{i}" for i in range(X.shape[0])])
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes))


def make_cohort(*slides):
    return Cohort(
        tuple(
            Slide(f"S{i}", a, TileStore(["none.h5"], np.zeros(a.n_obs), np.arange(a.n_obs)), f"P{i}", {}, {})
            for i, a in enumerate(slides)
        )
    )


def random_counts(n_spots, n_genes, seed=0, rate=2.0):
    return np.random.default_rng(seed).poisson(rate, (n_spots, n_genes))


def make_counts(*n_genes, of=250):
    """Return counts of spots with these numbers of expressed genes."""
    return [[2] * n + [0] * (of - n) for n in n_genes]


# --- quality -------------------------------------------------------------------------------------------------------


def test_a_spot_needs_200_expressed_genes():
    filtered = qc(make_cohort(make_adata(make_counts(200, 199, 250, 0))))
    assert filtered.obs["barcode"].tolist() == ["spot0", "spot2"]


def test_qc_counts_dropped_spots_and_drops_their_tiles():
    slide = qc(make_cohort(make_adata(make_counts(100, 220, 100, 240)))).slides[0]
    assert slide.dropped == {"spots with fewer than 200 genes": 2}
    assert slide.tiles.row.tolist() == [1, 3]


def test_a_stored_zero_is_not_an_expressed_gene():
    adata = make_adata(make_counts(200, 200))
    adata.X.data[5] = 0
    assert qc(make_cohort(adata)).obs["barcode"].tolist() == ["spot1"]


def test_min_genes_sets_the_limit():
    assert len(qc(make_cohort(make_adata(make_counts(3, 5, 9))), min_genes=5)) == 2


def test_qc_counts_all_genes_of_each_slide():
    one = make_adata(make_counts(220), [f"A{i}" for i in range(249)] + ["both"])
    two = make_adata(make_counts(230), [f"B{i}" for i in range(249)] + ["both"])
    assert len(qc(make_cohort(one, two))) == 2


def test_a_cohort_without_a_spot_left_is_refused():
    with pytest.raises(ValueError, match=r"no spot is left.*200 genes"):
        qc(make_cohort(make_adata(make_counts(10, 20))))


@pytest.mark.parametrize("name", ["MT-CO1", "mt-Co1"])
def test_max_mito_drops_spots(name):
    cohort = make_cohort(make_adata([[1, 9], [2, 8], [3, 7]], [name, "ACTB"]))
    assert len(qc(cohort, min_genes=1)) == 3
    filtered = qc(cohort, min_genes=1, max_mito=0.2)
    assert filtered.obs["barcode"].tolist() == ["spot0", "spot1"]
    assert filtered.slides[0].dropped == {"spots above 0.2 mitochondrial": 1}


def test_a_gene_name_with_prefix_mt_alone_is_not_mitochondrial():
    cohort = make_cohort(make_adata([[9, 0, 1]], ["MTOR", "MT-ND1", "ACTB"]))
    assert len(qc(cohort, min_genes=1, max_mito=0.1)) == 1


def test_max_mito_without_mitochondrial_genes_is_refused():
    with pytest.raises(ValueError, match=r"no gene is named MT-\*"):
        qc(make_cohort(make_adata([[1, 1]])), min_genes=1, max_mito=0.1)


@pytest.mark.parametrize("limit", [0, -0.1, 1.5, 20])
def test_max_mito_must_be_a_fraction(limit):
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        qc(make_cohort(make_adata([[1, 1]])), max_mito=limit)


def test_qc_does_not_modify_the_cohort():
    cohort = make_cohort(make_adata(make_counts(100, 220)))
    qc(cohort)
    assert len(cohort) == 2
    assert cohort.slides[0].dropped == {}


# --- normalization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_cp10k_matches_scanpy(seed):
    counts = random_counts(20, 30, seed)
    counts[4] = 0
    peer = make_adata(counts)
    sc.pp.normalize_total(peer, target_sum=1e4)
    sc.pp.log1p(peer)
    np.testing.assert_allclose(normalize(make_adata(counts)).toarray(), peer.X.toarray(), rtol=1e-5)


def test_log1p_is_the_logarithm_of_raw_counts():
    counts = random_counts(20, 30)
    np.testing.assert_allclose(normalize(make_adata(counts), method="log1p").toarray(), np.log1p(counts), rtol=1e-6)


@given(seed=st.integers(0, 99), depth=st.integers(2, 50))
@settings(max_examples=25, deadline=None)
def test_cp10k_removes_depth(seed, depth):
    counts = random_counts(5, 12, seed) + 1
    deep, shallow = (normalize(make_adata(c)).toarray() for c in (counts * depth, counts))
    np.testing.assert_allclose(deep, shallow, rtol=1e-5)
    np.testing.assert_allclose(np.expm1(deep.astype(float)).sum(1), 1e4, rtol=1e-4)


@pytest.mark.parametrize("method", ["log1p-cp10k", "log1p"])
def test_normalization_is_sparse_float32_and_does_not_modify_counts(method):
    adata = make_adata(random_counts(6, 8))
    before = adata.X.toarray()
    X = normalize(adata, method=method)
    assert (X.format, X.dtype) == ("csr", np.float32)
    np.testing.assert_array_equal(adata.X.toarray(), before)


@pytest.mark.parametrize("method", ["log1p-cp10k", "log1p"])
def test_normalization_does_not_modify_counts_with_unsorted_indices(method):
    adata = make_adata(random_counts(6, 8) + 1)
    X = adata.X
    for a, b in zip(X.indptr[:-1], X.indptr[1:], strict=True):  # as after concatenating slides with different genes
        X.indices[a:b], X.data[a:b] = X.indices[a:b][::-1].copy(), X.data[a:b][::-1].copy()
    X.has_sorted_indices = False
    before, first = X.toarray(), normalize(adata, method=method).toarray()
    np.testing.assert_array_equal(adata.X.toarray(), before)
    np.testing.assert_array_equal(normalize(adata, method=method).toarray(), first)


def test_a_spot_without_counts_stays_zero():
    assert normalize(make_adata([[0, 0], [1, 1]])).toarray()[0].tolist() == [0, 0]


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match=r"unknown normalization 'cpm'; known: log1p-cp10k, log1p"):
        normalize(make_adata([[1]]), method="cpm")


# --- highly variable genes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Return 300 genes over 80 spots; genes 0 to 14 are high in a random half of the spots."""
    rng = np.random.default_rng(1)
    rates = np.tile(rng.uniform(2, 8, 300), (80, 1))
    rates[:, :15] *= np.where(rng.random((80, 15)) < 0.5, 1.9, 0.1)
    return make_adata(rng.poisson(rates))


def test_fifty_different_genes_are_chosen(planted):
    chosen = top_hvg(planted)
    assert len(chosen) == len(set(chosen)) == 50


def test_genes_planted_as_variable_are_chosen(planted):
    assert {f"G{i}" for i in range(15)} <= set(top_hvg(planted))


def test_selected_genes_and_their_order_match_scanpy(planted):
    peer = planted.copy()
    sc.pp.normalize_total(peer, target_sum=1e4)
    sc.pp.log1p(peer)
    sc.pp.highly_variable_genes(peer, n_top_genes=50)
    peer = peer.var[peer.var["highly_variable"]].sort_values("dispersions_norm", ascending=False)
    assert set(top_hvg(planted)) == set(peer.index)
    assert top_hvg(planted)[:10] == peer.index[:10].tolist()


@given(rows=st.sets(st.integers(0, 79), min_size=30, max_size=70), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_selection_does_not_depend_on_held_out_rows(planted, rows, seed):
    train, rng = np.array(sorted(rows)), np.random.default_rng(seed)
    test = np.setdiff1d(np.arange(80), train)
    changed = planted.X.toarray()
    changed[test] = rng.poisson(rng.gamma(0.3, 30, (len(test), 300)))
    assert top_hvg(make_adata(changed), rows=train) == top_hvg(planted, rows=train)


def test_selection_depends_on_training_rows(planted):
    flat = planted.X.toarray()
    flat[:40] = 5
    assert top_hvg(make_adata(flat), rows=np.arange(40, 80)) == top_hvg(planted, rows=np.arange(40, 80))
    assert top_hvg(make_adata(flat), rows=np.arange(60)) != top_hvg(planted, rows=np.arange(60))


def test_rows_can_be_indices_or_a_mask(planted):
    mask = np.arange(80) % 3 > 0
    assert top_hvg(planted, rows=mask) == top_hvg(planted, rows=np.flatnonzero(mask))


def test_selection_is_deterministic_and_does_not_modify_counts(planted):
    before = planted.X.toarray()
    assert top_hvg(planted, n=20) == top_hvg(planted, n=20) == top_hvg(planted)[:20]
    np.testing.assert_array_equal(planted.X.toarray(), before)


def test_a_gene_expressed_in_too_few_training_spots_is_not_selected(planted):
    rare, rows = planted.X.toarray(), np.arange(75)
    rare[:, 299] = 0
    rare[:7, 299] = 500  # below a tenth of 75 spots
    rare[75:, 299] = 500  # held out
    assert "G299" not in top_hvg(make_adata(rare), rows=rows)
    rare[7, 299] = 500
    assert "G299" in top_hvg(make_adata(rare), rows=rows)


def test_totals_include_genes_that_min_spots_excludes(planted):
    counts = planted.X.toarray()
    counts[:7, 299], counts[7:, 299] = 5000, 0
    peer = make_adata(counts)
    sc.pp.normalize_total(peer, target_sum=1e4)
    sc.pp.log1p(peer)
    table = sc.pp.highly_variable_genes(peer[:, :299].copy(), n_top_genes=50, inplace=False)
    assert set(top_hvg(make_adata(counts))) == set(peer.var_names[:299][table["highly_variable"]])


def test_too_few_genes_is_an_error(planted):
    with pytest.raises(ValueError, match=r"40 genes are expressed.*fewer than n=50.*lower n"):
        top_hvg(planted[:, :40].copy())


def test_n_may_be_the_number_of_eligible_genes():
    counts = random_counts(30, 12)
    counts[:, 3] = 1  # constant: its log1p has no dispersion
    assert sorted(top_hvg(make_adata(counts), n=12, method="log1p")) == sorted(f"G{i}" for i in range(12))


def test_genes_of_a_real_training_slide_do_not_depend_on_the_other(her2st):
    adata = pk.read_cohort(her2st, ["HER2_C2", "HER2_C3"]).adata
    train = np.flatnonzero(adata.obs["slide"] == "HER2_C2")
    assert top_hvg(adata, rows=train) == top_hvg(adata[train].copy())


# --- targets and gene order ----------------------------------------------------------------------------------------


def test_targets_have_the_given_order_and_totals_over_all_genes():
    adata = make_adata([[1, 2, 7], [0, 5, 5]], ["A", "B", "C"])
    Y = expression_targets(adata, ["C", "A"])
    assert Y.dtype == np.float32
    np.testing.assert_allclose(Y, np.log1p([[7000, 1000], [5000, 0]]), rtol=1e-6)


def test_log1p_targets_keep_depth():
    Y = expression_targets(make_adata([[1, 2], [0, 5]], ["A", "B"]), ["B"], method="log1p")
    np.testing.assert_allclose(Y, np.log1p([[2], [5]]), rtol=1e-6)


def test_the_error_for_missing_genes_names_them():
    with pytest.raises(KeyError, match=r"not in the data: X, Y"):
        expression_targets(make_adata([[1, 2]], ["A", "B"]), ["A", "X", "Y"])


names = st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=1)


@given(measured=names, genes=st.lists(st.sampled_from("ABCDEFGHIJ"), unique=True, min_size=1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_aligned_counts_match_a_loop(measured, genes, seed):
    counts = random_counts(4, len(measured), seed, rate=0.4)
    expected = np.zeros((4, len(genes)))
    for i in range(4):
        for j, gene in enumerate(measured):
            if gene in genes:
                expected[i, genes.index(gene)] += counts[i, j]
    X, coverage = align_genes(make_adata(counts, measured), genes)
    assert (X.format, X.dtype) == ("csr", np.float32)
    np.testing.assert_array_equal(X.toarray(), expected)
    covered = [gene in genes for gene, n in zip(measured, counts.T, strict=True) if n.any() or not counts.any()]
    assert coverage == pytest.approx(np.mean(covered))


def test_columns_are_aligned_by_the_given_names():
    adata = make_adata([[1, 2, 4, 8], [3, 0, 0, 5]], ["A", "B", "C", "D"])
    X, coverage = align_genes(adata, ["B", "A"], names=["A", "old", "A", "B"])
    assert X.toarray().tolist() == [[8, 5], [5, 3]]
    assert coverage == 3 / 4


def test_coverage_counts_expressed_genes_only():
    counts, genes = [[1, 0, 2, 0, 0], [0, 0, 1, 0, 0]], ["A", "B", "x", "y", "z"]
    assert align_genes(make_adata(counts, genes), ["A", "B"])[1] == 1 / 2
    stored = make_adata(np.ones((2, 5)), genes)
    stored.X.data[:] = np.ravel(counts)  # explicit zeros are not counts
    assert align_genes(stored, ["A", "B"])[1] == 1 / 2


def test_coverage_without_counts_includes_all_genes():
    assert align_genes(make_adata([[0, 0, 0]], ["A", "B", "x"]), ["A", "B"])[1] == pytest.approx(2 / 3)


def test_aligning_does_not_modify_counts():
    adata = make_adata([[1, 2]], ["A", "B"])
    align_genes(adata, ["B"])
    assert adata.X.toarray().tolist() == [[1, 2]]


def test_a_gene_given_twice_is_refused():
    with pytest.raises(ValueError, match="'A' is duplicated in genes"):
        align_genes(make_adata([[1, 2]], ["A", "B"]), ["A", "B", "A"])


# --- hash ----------------------------------------------------------------------------------------------------------


def test_the_hash_does_not_depend_on_the_storage_of_counts():
    counts = random_counts(5, 7)
    adata, dense = make_adata(counts), make_adata(counts)
    dense.X = counts.astype(np.float64)
    digest = hash_counts(adata)
    assert digest == hash_counts(adata.copy()) == hash_counts(dense) == hash_counts(adata[:, :])
    assert len(digest) == 16
    assert int(digest, 16) >= 0


def changed(adata, change):
    adata = adata.copy()
    if change == "count":
        adata.X.data[3] += 1
    elif change == "gene of a count":
        adata.X = sparse.csr_matrix(np.roll(adata.X.toarray(), 1, axis=1))
    elif change == "spot of a count":
        adata.X = sparse.csr_matrix(np.roll(adata.X.toarray().ravel(), 1).reshape(adata.shape))
    elif change == "order of spots":
        adata = adata[::-1].copy()
    elif change == "order of genes":
        adata = adata[:, ::-1].copy()
    elif change == "barcode":
        adata.obs_names = ["other", *adata.obs_names[1:]]
    elif change == "gene":
        adata.var_names = ["other", *adata.var_names[1:]]
    elif change == "fewer spots":
        adata = adata[:4].copy()
    else:
        adata = adata[:, :6].copy()
    return adata


CHANGES = [
    *("count", "gene of a count", "spot of a count", "order of spots", "order of genes", "barcode", "gene"),
    *("fewer spots", "fewer genes"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_depends_on_counts_and_names(change):
    adata = make_adata(random_counts(5, 7))
    assert hash_counts(changed(adata, change)) != hash_counts(adata)


def test_the_hash_depends_on_the_rows_of_equal_stored_values():
    # same stored values and columns, other rows
    one, other = make_adata([[1, 2], [0, 0]]), make_adata([[1, 0], [0, 2]])
    assert hash_counts(one) != hash_counts(other)
    assert hash_counts(make_adata([[1, 0]])) != hash_counts(make_adata([[0, 1]]))
