"""Tokens of scFoundation: which values stand in a spot's list, in which order, and which spots have no such list."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from scipy import sparse

from peka_lite.teachers._tokens import tokenize


def make_counts(rows):
    return sparse.csr_matrix(np.asarray(rows, dtype=np.float32))


def spot(tokens, i):
    """Values and positions of spot i, the two depths apart: genes' values, their positions, T, S."""
    own = slice(tokens.indptr[i], tokens.indptr[i + 1])
    values, positions = tokens.values[own], tokens.positions[own]
    return values[:-2], positions[:-2], values[-2], values[-1]


def depths(rows, **options):
    """T and S of every spot, (N, 2)."""
    tokens = tokenize(sparse.csr_matrix(np.asarray(rows, dtype=np.float64)), **options)
    return np.array([spot(tokens, i)[2:] for i in range(len(tokens.lengths))])


@pytest.fixture(scope="module")
def cells(golden):
    return sparse.load_npz(golden / "scfoundation" / "cells_csr.npz").tocsr()


# --- reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 9, 10, 11])
def test_tokens_are_those_of_the_reference(golden, cells, row):
    stages, tokens = np.load(golden / "scfoundation" / "stages.npz"), tokenize(cells)
    own = slice(tokens.indptr[row], tokens.indptr[row + 1])
    np.testing.assert_allclose(tokens.values[own], stages[f"c{row}_values"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(tokens.positions[own], stages[f"c{row}_positions"])


def test_lengths_are_those_of_the_reference(golden, cells):
    expected = json.loads((golden / "scfoundation" / "batching.json").read_text())
    assert tokenize(cells).lengths[expected["cells"]].tolist() == expected["lengths_incl_TS"]


def test_a_gene_at_103_is_a_gene_and_the_last_gene_is_not_a_depth(cells):
    tokens = tokenize(cells)
    assert tokens.positions[tokens.indptr[11] : tokens.indptr[12]].tolist() == [103, 19263, 19264, 19265]


def test_raw_counts_of_102_and_103_are_counts_as_any_other(cells):
    odd = cells[8].indices[np.isin(cells[8].data, (102, 103))]
    values, positions, _, _ = spot(tokenize(cells), 8)
    expected = np.log1p(cells[8, odd].toarray().ravel() / cells[8].sum(dtype=np.float64) * 1e4)
    assert len(odd) == 4
    np.testing.assert_allclose(values[np.isin(positions, odd)], expected, rtol=1e-6)


# --- values, order and depths --------------------------------------------------------------------------------------

counts = st.integers(0, 99).map(lambda seed: np.random.default_rng(seed).poisson(1.5, (7, 9)))


@given(counts=counts, kind=st.sampled_from("tfa"), number=st.sampled_from(["1", "2", "4", "1.5", "10"]))
@settings(max_examples=40, deadline=None)
def test_single_cells_are_those_of_a_loop(counts, kind, number):
    assume((counts.sum(1) > 1).all())
    tokens = tokenize(make_counts(counts), resolution=kind + number)
    assert (tokens.values.dtype, tokens.positions.dtype, tokens.indptr.dtype) == (np.float32, np.int64, np.int64)
    for i, row in enumerate(counts):
        total = sum(row)
        expected = [np.log1p(c / total * 10_000) for c in row if c > 0]
        goal = {"t": float(number), "f": np.log10(total * float(number)), "a": np.log10(total) + float(number)}[kind]
        values, positions, T, S = spot(tokens, i)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        assert positions.tolist() == [j for j, c in enumerate(row) if c > 0]
        np.testing.assert_allclose([T, S], [goal, np.log10(total)], rtol=1e-6)
        assert tokens.positions[tokens.indptr[i + 1] - 2 : tokens.indptr[i + 1]].tolist() == [9, 10]


def test_a_target_depth_t_is_taken_as_a_logarithm_already():
    np.testing.assert_allclose(depths([[400, 600]], resolution="t4"), [[4, 3]])
    np.testing.assert_allclose(depths([[400, 600]], resolution="t4.5"), [[4.5, 3]])


def test_flag_t_takes_values_as_they_are_and_their_sum_for_the_total():
    tokens = tokenize(sparse.csr_matrix([[1.5, 0, 2.5], [0, 0, 7.25]]), pre_normalized="T", resolution="f10")
    values, _, T, S = spot(tokens, 0)
    np.testing.assert_allclose(values, [1.5, 2.5])
    np.testing.assert_allclose([T, S], [np.log10(40), np.log10(4)], rtol=1e-6)


def test_flag_a_takes_values_as_they_are_and_the_total_that_is_given():
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


def test_both_depths_of_logged_bulk_are_the_plain_sum():
    X = [[1.5, 0, 2.5], [0, 0, 7.25]]
    np.testing.assert_allclose(depths(X, input_type="bulk", pre_normalized="T"), [[4, 4], [7.25, 7.25]])


def test_fractional_counts_are_bulk():
    assert tokenize(sparse.csr_matrix([[1.5, 7.2]]), input_type="bulk").lengths.tolist() == [4]


def test_the_order_of_stored_entries_does_not_matter_and_a_stored_zero_is_no_token():
    #  0 4 0 6, with the columns of the row stored as 3, 1, 2, 1
    X = sparse.csr_matrix((np.array([6.0, 1, 0, 3]), [3, 1, 2, 1], [0, 4]), shape=(1, 4))
    tokens, plain = tokenize(X), tokenize(make_counts([[0, 4, 0, 6]]))
    assert tokens.positions.tolist() == plain.positions.tolist() == [1, 3, 4, 5]
    np.testing.assert_array_equal(tokens.values, plain.values)
    assert X.indices.tolist() == [3, 1, 2, 1]


def test_tokenising_leaves_the_counts_alone():
    X = sparse.csr_matrix(np.array([[0, 30.0, 70]]))
    tokenize(X)
    assert X.data.tolist() == [30, 70]


def test_padded_rows_are_those_asked_for_with_zeros_behind():
    tokens = tokenize(make_counts([[1, 2, 3, 4], [0, 5, 0, 0], [0, 0, 6, 7]]))
    values, positions, lengths = tokens.padded(np.array([1, 0]))
    assert lengths.tolist() == [3, 6]
    assert positions.tolist() == [[1, 4, 5, 0, 0, 0], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(values[0], [*tokens.values[6:9], 0, 0, 0])
    np.testing.assert_array_equal(values[1], tokens.values[:6])
    assert (values.dtype, positions.dtype) == (np.float32, np.int64)


# --- refused -------------------------------------------------------------------------------------------------------

NAMES = ["good", "bad", "fine", "worse"]


def refused(rows, match, **options):
    options = {"names": NAMES[: len(rows)]} | options
    with pytest.raises(ValueError, match=match) as error:
        tokenize(sparse.csr_matrix(np.asarray(rows, dtype=np.float64)), **options)
    return str(error.value)


def test_spots_without_a_count_are_named():
    message = refused([[5, 5], [0, 0], [1, 2], [0, 0]], r"2 spots express no gene.*\(bad, worse\).*drop them")
    assert "good" not in message


def test_only_five_spots_are_named():
    message = refused(np.eye(7, 2) * 0, r"7 spots.*\(a, b, c, d, e, \.\.\.\)", names=list("abcdefg"))
    assert "f, g" not in message


def test_one_gene_with_one_count_has_no_source_depth():
    refused([[5, 5], [0, 1]], r"1 spots have a source depth S.*\(bad\)")
    assert depths([[5, 5], [0, 2]])[1, 1] == pytest.approx(np.log10(2))


def test_logged_values_that_sum_to_one_or_less_have_no_source_depth():
    refused([[0.5, 2.5], [0.25, 0.5]], r"source depth S.*\(bad\)", pre_normalized="T")


def test_bulk_rows_whose_logged_values_sum_to_one_or_less_have_no_depth():
    # the median total is 1.5: one gene makes log1p(1.5) = 0.92, two make 2 log1p(0.75) = 1.12
    refused([[1, 1], [0, 1], [0.75, 0.75]], r"1 spots have a source depth S.*\(bad\)", input_type="bulk")


@pytest.mark.parametrize(("resolution", "named"), [("t0", "good, bad, fine"), ("f0.1", "bad, fine"), ("f0", "good")])
def test_a_target_depth_that_is_not_above_zero_is_refused(resolution, named):
    rows = [[50, 50], [4, 4], [6, 4]]  # a tenth of 10 counts is one: T is zero, not below
    refused(rows, rf"target depth T.*{resolution}.*\({named}.*raise the resolution", resolution=resolution)


@pytest.mark.parametrize("total", [0, -5, np.nan, np.inf])
def test_a_raw_total_must_be_a_number_above_zero(total):
    refused([[1.5, 2], [2.5, 1]], r"total.*\(bad\)", pre_normalized="A", total=[100, total])


def test_flag_a_without_totals_is_refused():
    refused([[1.5, 2]], "needs the raw totals", pre_normalized="A")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
@pytest.mark.parametrize("flag", ["F", "T"])
def test_values_that_are_no_expression_are_refused(value, flag):
    refused([[1.5, 2], [value, 1]], "NaN, infinite or negative", pre_normalized=flag)


def test_logged_values_are_not_taken_for_counts():
    refused([[1.5, 2]], r"'F' takes raw counts.*not whole.*'T'")


@pytest.mark.parametrize("options", [{"pre_normalized": "T"}, {"pre_normalized": "A", "total": [9]}])
def test_counts_are_not_taken_for_logged_values(options):
    refused([[3, 6]], r"takes log-normalized values.*whole counts", **options)


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
def test_unknown_options_are_refused(options, match):
    refused([[3, 6]], match, **options)
