"""Tokens of scFoundation: values, their order, depths, and rejected spots."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy import sparse

from peka_lite.teachers import tokenize


def make_counts(rows):
    return sparse.csr_matrix(np.asarray(rows, dtype=np.float32))


def spot(tokens, i):
    """Return genes' values, their positions, T and S of spot i."""
    part = slice(tokens.indptr[i], tokens.indptr[i + 1])
    values, positions = tokens.values[part], tokens.positions[part]
    return values[:-2], positions[:-2], values[-2], values[-1]


def depths(rows, **options):
    """Return T and S of every spot, (N, 2)."""
    tokens = tokenize(sparse.csr_matrix(np.asarray(rows, dtype=np.float64)), **options)
    return np.array([spot(tokens, i)[2:] for i in range(len(tokens.lengths))])


@pytest.fixture(scope="module")
def cells(golden):
    return sparse.load_npz(golden / "scfoundation" / "cells_csr.npz").tocsr()


# --- reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 9, 10, 11])
def test_tokens_equal_the_reference(golden, cells, row):
    stages, tokens = np.load(golden / "scfoundation" / "stages.npz"), tokenize(cells)
    part = slice(tokens.indptr[row], tokens.indptr[row + 1])
    np.testing.assert_allclose(tokens.values[part], stages[f"c{row}_values"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(tokens.positions[part], stages[f"c{row}_positions"])


def test_lengths_equal_the_reference(golden, cells):
    expected = json.loads((golden / "scfoundation" / "batching.json").read_text())
    assert tokenize(cells).lengths[expected["cells"]].tolist() == expected["lengths_incl_TS"]


def test_gene_103_and_the_last_gene_are_tokenized_as_genes(cells):
    tokens = tokenize(cells)
    assert tokens.positions[tokens.indptr[11] : tokens.indptr[12]].tolist() == [103, 19263, 19264, 19265]


def test_raw_counts_of_102_and_103_are_ordinary_counts(cells):
    odd = cells[8].indices[np.isin(cells[8].data, (102, 103))]
    values, positions, _, _ = spot(tokenize(cells), 8)
    expected = np.log1p(cells[8, odd].toarray().ravel() / cells[8].sum(dtype=np.float64) * 1e4)
    assert len(odd) == 4
    np.testing.assert_allclose(values[np.isin(positions, odd)], expected, rtol=1e-6)


# --- values, order and depths --------------------------------------------------------------------------------------

counts = st.integers(0, 99).map(lambda seed: np.random.default_rng(seed).poisson(1.5, (7, 9)))


@given(counts=counts, kind=st.sampled_from("tfa"), number=st.sampled_from(["1", "2", "4", "1.5", "10"]))
@settings(max_examples=40, deadline=None)
def test_single_cell_tokens_equal_a_loop(counts, kind, number):
    assume((counts.sum(1) > 1).all())
    tokens = tokenize(make_counts(counts), resolution=kind + number)
    assert (tokens.values.dtype, tokens.positions.dtype, tokens.indptr.dtype) == (np.float32, np.int64, np.int64)
    for i, row in enumerate(counts):
        total = sum(row)
        expected = [np.log1p(c / total * 10_000) for c in row if c > 0]
        target = {"t": float(number), "f": np.log10(total * float(number)), "a": np.log10(total) + float(number)}[kind]
        values, positions, T, S = spot(tokens, i)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        assert positions.tolist() == [j for j, c in enumerate(row) if c > 0]
        np.testing.assert_allclose([T, S], [target, np.log10(total)], rtol=1e-6)
        assert tokens.positions[tokens.indptr[i + 1] - 2 : tokens.indptr[i + 1]].tolist() == [9, 10]


def test_target_depth_t_is_already_a_logarithm():
    np.testing.assert_allclose(depths([[400, 600]], resolution="t4"), [[4, 3]])
    np.testing.assert_allclose(depths([[400, 600]], resolution="t4.5"), [[4.5, 3]])


def test_flag_t_keeps_values_and_uses_their_sum_as_total():
    tokens = tokenize(sparse.csr_matrix([[1.5, 0, 2.5], [0, 0, 7.25]]), pre_normalized="T", resolution="f10")
    values, _, T, S = spot(tokens, 0)
    np.testing.assert_allclose(values, [1.5, 2.5])
    np.testing.assert_allclose([T, S], [np.log10(40), np.log10(4)], rtol=1e-6)


def test_flag_a_keeps_values_and_uses_the_given_total():
    X = sparse.csr_matrix([[1.5, 0, 2.5], [0, 0, 7.25]])
    tokens = tokenize(X, pre_normalized="A", total=[1000, 200], resolution="a1")
    assert [spot(tokens, i)[0].tolist() for i in range(2)] == [[1.5, 2.5], [7.25]]
    np.testing.assert_allclose([spot(tokens, i)[2:] for i in range(2)], [[4, 3], [np.log10(2000), np.log10(200)]])


@given(counts=counts)
@settings(max_examples=20, deadline=None)
def test_bulk_is_scaled_to_the_median_total_of_all_rows(counts):
    assume((counts.sum(1) > 1).all())
    tokens, median = tokenize(make_counts(counts), input_type="bulk"), np.median(counts.sum(1))
    for i, row in enumerate(counts):
        expected = np.log1p(row[row > 0] / row.sum() * median)
        values, _, T, S = spot(tokens, i)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        np.testing.assert_allclose([T, S], 2 * [np.log10(expected.sum())], rtol=1e-5, atol=1e-6)


def test_both_depths_of_log_normalized_bulk_are_the_sum():
    X = [[1.5, 0, 2.5], [0, 0, 7.25]]
    np.testing.assert_allclose(depths(X, input_type="bulk", pre_normalized="T"), [[4, 4], [7.25, 7.25]])


def test_bulk_accepts_fractional_counts():
    assert tokenize(sparse.csr_matrix([[1.5, 7.2]]), input_type="bulk").lengths.tolist() == [4]


def test_order_of_stored_entries_and_stored_zeros_do_not_matter():
    #  0 4 0 6, with the columns of the row stored as 3, 1, 2, 1
    X = sparse.csr_matrix((np.array([6.0, 1, 0, 3]), [3, 1, 2, 1], [0, 4]), shape=(1, 4))
    tokens, plain = tokenize(X), tokenize(make_counts([[0, 4, 0, 6]]))
    assert tokens.positions.tolist() == plain.positions.tolist() == [1, 3, 4, 5]
    np.testing.assert_array_equal(tokens.values, plain.values)
    assert X.indices.tolist() == [3, 1, 2, 1]


def test_tokenizing_does_not_change_the_counts():
    X = sparse.csr_matrix(np.array([[0, 30.0, 70]]))
    tokenize(X)
    assert X.data.tolist() == [30, 70]


def test_padded_returns_the_given_rows_padded_with_zeros():
    tokens = tokenize(make_counts([[1, 2, 3, 4], [0, 5, 0, 0], [0, 0, 6, 7]]))
    values, positions, lengths = tokens.padded(np.array([1, 0]))
    assert lengths.tolist() == [3, 6]
    assert positions.tolist() == [[1, 4, 5, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(values[0], [*tokens.values[6:9], 0, 0, 0])
    np.testing.assert_array_equal(values[1], tokens.values[:6])
    assert (values.dtype, positions.dtype) == (np.float32, np.int64)


# --- rejected ------------------------------------------------------------------------------------------------------

NAMES = ["good", "bad", "fine", "worse"]


def check_rejected(rows, match, **options):
    options = {"names": NAMES[: len(rows)]} | options
    with pytest.raises(ValueError, match=match) as error:
        tokenize(sparse.csr_matrix(np.asarray(rows, dtype=np.float64)), **options)
    return str(error.value)


def test_spots_without_a_count_are_named():
    message = check_rejected([[5, 5], [0, 0], [1, 2], [0, 0]], r"2 spots express no gene.*\(bad, worse\).*drop them")
    assert "good" not in message


def test_at_most_five_spots_are_named():
    message = check_rejected(np.eye(7, 2) * 0, r"7 spots.*\(a, b, c, d, e, \.\.\.\)", names=list("abcdefg"))
    assert "f, g" not in message


def test_one_gene_with_one_count_has_no_source_depth():
    check_rejected([[5, 5], [0, 1]], r"1 spots have a source depth S.*\(bad\)")
    assert depths([[5, 5], [0, 2]])[1, 1] == pytest.approx(np.log10(2))


def test_log_normalized_values_with_sum_up_to_one_have_no_source_depth():
    check_rejected([[0.5, 2.5], [0.25, 0.5]], r"source depth S.*\(bad\)", pre_normalized="T")


def test_bulk_rows_with_log_sum_up_to_one_have_no_depth():
    # the median total is 1.5: one gene makes log1p(1.5) = 0.92, two make 2 log1p(0.75) = 1.12
    check_rejected([[1, 1], [0, 1], [0.75, 0.75]], r"1 spots have a source depth S.*\(bad\)", input_type="bulk")


@pytest.mark.parametrize(("resolution", "named"), [("t0", "good, bad, fine"), ("f0.1", "bad, fine"), ("f0", "good")])
def test_target_depth_of_zero_or_less_is_rejected(resolution, named):
    rows = [[50, 50], [4, 4], [6, 4]]  # a tenth of 10 counts is one: T is zero
    check_rejected(rows, rf"target depth T.*{resolution}.*\({named}.*raise the resolution", resolution=resolution)


@pytest.mark.parametrize("total", [0, -5, np.nan, np.inf])
def test_raw_total_must_be_a_number_above_zero(total):
    check_rejected([[1.5, 2], [2.5, 1]], r"total.*\(bad\)", pre_normalized="A", total=[100, total])


def test_flag_a_without_totals_is_rejected():
    check_rejected([[1.5, 2]], "needs the raw totals", pre_normalized="A")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
@pytest.mark.parametrize("flag", ["F", "T"])
def test_nan_infinite_or_negative_values_are_rejected(value, flag):
    check_rejected([[1.5, 2], [value, 1]], "NaN, infinite or negative", pre_normalized=flag)


def test_log_normalized_values_are_rejected_as_counts():
    check_rejected([[1.5, 2]], r"'F' takes raw counts, not fractions.*'T'")


@pytest.mark.parametrize("options", [{"pre_normalized": "T"}, {"pre_normalized": "A", "total": [9]}])
def test_counts_are_rejected_as_log_normalized_values(options):
    check_rejected([[3, 6]], r"takes log-normalized values.*whole counts", **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pre_normalized": "X"}, r"unknown pre_normalized 'X'; known: F, T, A"),
        ({"input_type": "spatial"}, r"unknown input_type 'spatial'; known: singlecell, bulk"),
        *(({"resolution": r}, f"unknown resolution {r!r}") for r in ("4", "t", "x4", "t-1", "t4.", "t4x", "", 4)),
        ({"input_type": "bulk", "pre_normalized": "A"}, "bulk input takes"),
        ({"input_type": "bulk", "resolution": "f1"}, "bulk input takes.*no resolution"),
    ],
)
def test_unknown_options_are_rejected(options, match):
    check_rejected([[3, 6]], match, **options)
