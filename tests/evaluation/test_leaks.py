"""Rows are known by what they hold; who learned from a forbidden one is refused."""

import numpy as np
import pytest
from scipy import sparse

from peka_lite._core.hashing import row_ids
from peka_lite.data.tiles import TileStore
from peka_lite.evaluation.leaks import LeakError, require_allowed, require_disjoint


def test_counts_have_the_same_ids_however_they_are_stored():
    rng = np.random.default_rng(0)
    X = sparse.random(30, 50, 0.3, format="csr", dtype=np.float32, rng=rng)
    padded = X.copy()
    padded.data[3] = 0  # an explicit zero
    plain = sparse.csr_matrix(padded.toarray())
    shuffled = padded.copy()
    for a, b in zip(shuffled.indptr[:-1], shuffled.indptr[1:], strict=True):
        shuffled.indices[a:b], shuffled.data[a:b] = shuffled.indices[a:b][::-1].copy(), shuffled.data[a:b][::-1].copy()
    shuffled.has_sorted_indices = False
    assert len(set(row_ids(X))) == 30
    assert (row_ids(padded) == row_ids(plain)).all()
    assert (row_ids(shuffled.sorted_indices()) == row_ids(plain)).all()
    assert (row_ids(padded)[1:] == row_ids(X)[1:]).all()


def test_ids_do_not_change_the_data_they_are_made_from():
    X = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    X.data[1] = 0
    row_ids(X)
    assert X.nnz == 3


def test_tiles_keep_their_ids_through_selection_joining_and_a_memory_map(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 224, 224, 3), dtype=np.uint8))
    np.save(tmp_path / "b.npy", np.zeros((3, 224, 224, 3), dtype=np.uint8))
    a = TileStore([tmp_path / "a.npy"], np.zeros(4), np.arange(4))
    b = TileStore([tmp_path / "b.npy"], np.zeros(3), np.arange(3))
    joined = TileStore.concat([a.select([2, 0]), b])
    assert joined.ids.tolist() == [*a.ids[[2, 0]], *b.ids]
    assert len(set(joined.ids)) == 5
    mapped = joined.to_memmap(tmp_path / "m.npy").select([4, 1])
    assert mapped.ids.tolist() == joined.ids[[4, 1]].tolist()
    assert TileStore.concat([mapped, a]).ids.tolist() == [*mapped.ids, *a.ids]


def test_learning_from_a_row_outside_is_refused_by_name_and_number():
    ids = row_ids(np.arange(12.0).reshape(6, 2))
    require_allowed("the clusters", ids[:4], allowed=ids[:4], where="fold 0")
    require_allowed("the teacher", None, allowed=ids[:0], where="fold 0")
    with pytest.raises(LeakError, match=r"fold 3: the clusters learned from 2 of 5 rows outside"):
        require_allowed("the clusters", ids[:5], allowed=ids[:3], where="fold 3")


def test_a_group_or_a_spot_on_both_sides_is_refused():
    groups, counts = np.array(["a", "a", "b", "b"]), np.array([1, 2, 3, 4], dtype=np.uint64)
    first, last = np.array([0, 1]), np.array([2, 3])
    require_disjoint(groups, counts, first, last, where="fold 0")
    with pytest.raises(LeakError, match="fold 0: a on both sides"):
        require_disjoint(groups, counts, np.array([0]), np.array([1, 2]), where="fold 0")
    with pytest.raises(LeakError, match="under two ids"):
        require_disjoint(groups, np.array([1, 2, 3, 2], dtype=np.uint64), first, last, where="fold 0")
