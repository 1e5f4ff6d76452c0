"""Counts: which spots stay, how they are normalized, and that held-out spots have no say in the genes."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings, strategies as st
from scipy import sparse

from peka_lite.data.expression import align_genes, expression_targets, hash_counts, normalize, qc, top_hvg
from peka_lite.data.hest import Cohort, Slide, read_cohort
from peka_lite.data.tiles import TileStore


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


def expressing(*n_genes, of=250):
    """Spots that express so many genes each."""
    return [[2] * n + [0] * (of - n) for n in n_genes]


# --- quality -------------------------------------------------------------------------------------------------------


def test_a_spot_needs_200_expressed_genes():
    kept = qc(make_cohort(make_adata(expressing(200, 199, 250, 0))))
    assert kept.obs["barcode"].tolist() == ["spot0", "spot2"]


def test_dropped_spots_are_counted_and_their_tiles_go_with_them():
    slide = qc(make_cohort(make_adata(expressing(100, 220, 100, 240)))).slides[0]
    assert slide.dropped == {"spots with fewer than 200 genes": 2}
    assert slide.tiles.row.tolist() == [1, 3]


def test_a_stored_zero_is_not_an_expressed_gene():
    adata = make_adata(expressing(200, 200))
    adata.X.data[5] = 0
    assert qc(make_cohort(adata)).obs["barcode"].tolist() == ["spot1"]


def test_the_number_of_genes_is_an_option():
    assert len(qc(make_cohort(make_adata(expressing(3, 5, 9))), min_genes=5)) == 2


def test_each_slide_is_judged_on_its_own_genes():
    one = make_adata(expressing(220), [f"A{i}" for i in range(249)] + ["both"])
    two = make_adata(expressing(230), [f"B{i}" for i in range(249)] + ["both"])
    assert len(qc(make_cohort(one, two))) == 2


def test_a_cohort_without_a_good_spot_is_refused():
    with pytest.raises(ValueError, match=r"no spot is left.*200 genes"):
        qc(make_cohort(make_adata(expressing(10, 20))))


@pytest.mark.parametrize("name", ["MT-CO1", "mt-Co1"])
def test_the_mitochondrial_fraction_is_an_option(name):
    cohort = make_cohort(make_adata([[1, 9], [2, 8], [3, 7]], [name, "ACTB"]))
    assert len(qc(cohort, min_genes=1)) == 3
    kept = qc(cohort, min_genes=1, max_mito=0.2)
    assert kept.obs["barcode"].tolist() == ["spot0", "spot1"]
    assert kept.slides[0].dropped == {"spots above 0.2 mitochondrial": 1}


def test_a_name_that_only_begins_with_mt_is_not_mitochondrial():
    cohort = make_cohort(make_adata([[9, 0, 1]], ["MTOR", "MT-ND1", "ACTB"]))
    assert len(qc(cohort, min_genes=1, max_mito=0.1)) == 1


def test_a_mitochondrial_limit_without_such_genes_is_refused():
    with pytest.raises(ValueError, match=r"no gene is named MT-\*"):
        qc(make_cohort(make_adata([[1, 1]])), min_genes=1, max_mito=0.1)


@pytest.mark.parametrize("limit", [0, -0.1, 1.5, 20])
def test_the_mitochondrial_limit_is_a_fraction(limit):
    with pytest.raises(ValueError, match="fraction between 0 and 1"):
        qc(make_cohort(make_adata([[1, 1]])), max_mito=limit)


def test_quality_control_leaves_the_cohort_as_it_was():
    cohort = make_cohort(make_adata(expressing(100, 220)))
    qc(cohort)
    assert len(cohort) == 2
    assert cohort.slides[0].dropped == {}


# --- normalization -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_cp10k_is_that_of_scanpy(seed):
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
def test_cp10k_takes_depth_out(seed, depth):
    counts = random_counts(5, 12, seed) + 1
    deep, shallow = (normalize(make_adata(c)).toarray() for c in (counts * depth, counts))
    np.testing.assert_allclose(deep, shallow, rtol=1e-5)
    np.testing.assert_allclose(np.expm1(deep.astype(float)).sum(1), 1e4, rtol=1e-4)


@pytest.mark.parametrize("method", ["log1p-cp10k", "log1p"])
def test_normalization_is_sparse_float32_and_leaves_the_counts_alone(method):
    adata = make_adata(random_counts(6, 8))
    before = adata.X.toarray()
    X = normalize(adata, method=method)
    assert (X.format, X.dtype) == ("csr", np.float32)
    np.testing.assert_array_equal(adata.X.toarray(), before)


@pytest.mark.parametrize("method", ["log1p-cp10k", "log1p"])
def test_counts_whose_columns_stand_in_disorder_are_left_alone_too(method):
    adata = make_adata(random_counts(6, 8) + 1)
    X = adata.X
    for a, b in zip(X.indptr[:-1], X.indptr[1:], strict=True):  # as joining slides of other genes leaves them
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
    """300 genes over 80 spots; genes 0 to 14 switch on in a random half of the spots."""
    rng = np.random.default_rng(1)
    rates = np.tile(rng.uniform(2, 8, 300), (80, 1))
    rates[:, :15] *= np.where(rng.random((80, 15)) < 0.5, 1.9, 0.1)
    return make_adata(rng.poisson(rates))


def test_fifty_different_genes_are_chosen(planted):
    chosen = top_hvg(planted)
    assert len(chosen) == len(set(chosen)) == 50


def test_genes_planted_as_variable_are_chosen(planted):
    assert {f"G{i}" for i in range(15)} <= set(top_hvg(planted))


def test_the_choice_and_its_order_are_those_of_scanpy(planted):
    peer = planted.copy()
    sc.pp.normalize_total(peer, target_sum=1e4)
    sc.pp.log1p(peer)
    sc.pp.highly_variable_genes(peer, n_top_genes=50)
    peer = peer.var[peer.var["highly_variable"]].sort_values("dispersions_norm", ascending=False)
    assert set(top_hvg(planted)) == set(peer.index)
    assert top_hvg(planted)[:10] == peer.index[:10].tolist()


@given(rows=st.sets(st.integers(0, 79), min_size=30, max_size=70), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_held_out_rows_have_no_say(planted, rows, seed):
    train, rng = np.array(sorted(rows)), np.random.default_rng(seed)
    held_out = np.setdiff1d(np.arange(80), train)
    changed = planted.X.toarray()
    changed[held_out] = rng.poisson(rng.gamma(0.3, 30, (len(held_out), 300)))
    assert top_hvg(make_adata(changed), rows=train) == top_hvg(planted, rows=train)


def test_training_rows_do_have_a_say(planted):
    flat = planted.X.toarray()
    flat[:40] = 5
    assert top_hvg(make_adata(flat), rows=np.arange(40, 80)) == top_hvg(planted, rows=np.arange(40, 80))
    assert top_hvg(make_adata(flat), rows=np.arange(60)) != top_hvg(planted, rows=np.arange(60))


def test_rows_can_be_indices_or_a_mask(planted):
    mask = np.arange(80) % 3 > 0
    assert top_hvg(planted, rows=mask) == top_hvg(planted, rows=np.flatnonzero(mask))


def test_the_choice_is_the_same_every_time_and_leaves_the_counts_alone(planted):
    before = planted.X.toarray()
    assert top_hvg(planted, n=20) == top_hvg(planted, n=20) == top_hvg(planted)[:20]
    np.testing.assert_array_equal(planted.X.toarray(), before)


def test_a_gene_seen_in_too_few_training_spots_is_not_chosen(planted):
    rare, rows = planted.X.toarray(), np.arange(75)
    rare[:, 299] = 0
    rare[:7, 299] = 500  # below a tenth of 75 spots
    rare[75:, 299] = 500  # held out
    assert "G299" not in top_hvg(make_adata(rare), rows=rows)
    rare[7, 299] = 500
    assert "G299" in top_hvg(make_adata(rare), rows=rows)


def test_a_gene_that_is_not_eligible_still_counts_in_the_totals(planted):
    counts = planted.X.toarray()
    counts[:7, 299], counts[7:, 299] = 5000, 0
    peer = make_adata(counts)
    sc.pp.normalize_total(peer, target_sum=1e4)
    sc.pp.log1p(peer)
    found = sc.pp.highly_variable_genes(peer[:, :299].copy(), n_top_genes=50, inplace=False)
    assert set(top_hvg(make_adata(counts))) == set(peer.var_names[:299][found["highly_variable"]])


def test_too_few_genes_is_an_error(planted):
    with pytest.raises(ValueError, match=r"40 genes are seen.*fewer than n=50.*Lower n"):
        top_hvg(planted[:, :40].copy())


def test_all_genes_that_pass_can_be_asked_for():
    counts = random_counts(30, 12)
    counts[:, 3] = 1  # the same everywhere: log1p of it has no dispersion at all
    assert sorted(top_hvg(make_adata(counts), n=12, method="log1p")) == sorted(f"G{i}" for i in range(12))


def test_real_genes_of_a_training_slide_do_not_depend_on_the_other(her2st):
    adata = read_cohort(her2st, ["HER2_C2", "HER2_C3"]).adata
    train = np.flatnonzero(adata.obs["slide"] == "HER2_C2")
    assert top_hvg(adata, rows=train) == top_hvg(adata[train].copy())


# --- targets and gene order ----------------------------------------------------------------------------------------


def test_targets_are_columns_in_the_order_asked_for_with_totals_over_all_genes():
    adata = make_adata([[1, 2, 7], [0, 5, 5]], ["A", "B", "C"])
    Y = expression_targets(adata, ["C", "A"])
    assert Y.dtype == np.float32
    np.testing.assert_allclose(Y, np.log1p([[7000, 1000], [5000, 0]]), rtol=1e-6)


def test_targets_can_keep_depth():
    Y = expression_targets(make_adata([[1, 2], [0, 5]], ["A", "B"]), ["B"], method="log1p")
    np.testing.assert_allclose(Y, np.log1p([[2], [5]]), rtol=1e-6)


def test_a_target_that_was_not_measured_is_named():
    with pytest.raises(KeyError, match=r"not in the data: X, Y"):
        expression_targets(make_adata([[1, 2]], ["A", "B"]), ["A", "X", "Y"])


names = st.lists(st.sampled_from("ABCDEFGHIJ"), min_size=1)


@given(own=names, wanted=st.lists(st.sampled_from("ABCDEFGHIJ"), unique=True, min_size=1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_aligned_counts_are_those_of_a_loop(own, wanted, seed):
    counts = random_counts(4, len(own), seed, rate=0.4)
    expected = np.zeros((4, len(wanted)))
    for i in range(4):
        for j, gene in enumerate(own):
            if gene in wanted:
                expected[i, wanted.index(gene)] += counts[i, j]
    X, coverage = align_genes(make_adata(counts, own), wanted)
    assert (X.format, X.dtype) == ("csr", np.float32)
    np.testing.assert_array_equal(X.toarray(), expected)
    judged = [gene in wanted for gene, column in zip(own, counts.T, strict=True) if column.any() or not counts.any()]
    assert coverage == pytest.approx(np.mean(judged))


def test_columns_are_aligned_by_the_names_given():
    adata = make_adata([[1, 2, 4, 8], [3, 0, 0, 5]], ["A", "B", "C", "D"])
    X, coverage = align_genes(adata, ["B", "A"], names=["A", "old", "A", "B"])
    assert X.toarray().tolist() == [[8, 5], [5, 3]]
    assert coverage == 3 / 4


def test_coverage_judges_expressed_genes_only():
    counts, genes = [[1, 0, 2, 0, 0], [0, 0, 1, 0, 0]], ["A", "B", "x", "y", "z"]
    assert align_genes(make_adata(counts, genes), ["A", "B"])[1] == 1 / 2
    stored = make_adata(np.ones((2, 5)), genes)
    stored.X.data[:] = np.ravel(counts)  # zeros that are stored are no counts either
    assert align_genes(stored, ["A", "B"])[1] == 1 / 2


def test_without_a_count_coverage_judges_all_genes():
    assert align_genes(make_adata([[0, 0, 0]], ["A", "B", "x"]), ["A", "B"])[1] == pytest.approx(2 / 3)


def test_aligning_leaves_the_counts_alone():
    adata = make_adata([[1, 2]], ["A", "B"])
    align_genes(adata, ["B"])
    assert adata.X.toarray().tolist() == [[1, 2]]


def test_a_wanted_gene_named_twice_is_refused():
    with pytest.raises(ValueError, match="'A' stands more than once"):
        align_genes(make_adata([[1, 2]], ["A", "B"]), ["A", "B", "A"])


# --- digest --------------------------------------------------------------------------------------------------------


def test_a_digest_is_the_same_for_the_same_counts_however_they_are_kept():
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
def test_a_digest_tells_other_counts_and_other_names(change):
    adata = make_adata(random_counts(5, 7))
    assert hash_counts(changed(adata, change)) != hash_counts(adata)


def test_a_digest_tells_where_counts_of_the_same_pattern_stand():
    # the same stored values and columns; only the rows differ
    one, other = make_adata([[1, 2], [0, 0]]), make_adata([[1, 0], [0, 2]])
    assert hash_counts(one) != hash_counts(other)
    assert hash_counts(make_adata([[1, 0]])) != hash_counts(make_adata([[0, 1]]))
