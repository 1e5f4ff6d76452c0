"""Row ids depend on the content of rows, and fits on rows that are not allowed are rejected."""

import numpy as np
import pytest
from scipy import sparse

from peka_lite.data import TileStore
from peka_lite.evaluation import LeakError, row_ids
from peka_lite.evaluation.leaks import require_allowed, require_disjoint


def test_ids_do_not_depend_on_the_sparse_storage():
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


def test_row_ids_does_not_change_the_data():
    X = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    X.data[1] = 0
    row_ids(X)
    assert X.nnz == 3


def test_tile_ids_survive_selection_joining_and_a_memory_map(tmp_path):
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


def test_fit_on_rows_outside_is_rejected_with_step_and_number():
    ids = row_ids(np.arange(12.0).reshape(6, 2))
    require_allowed("the clusters", ids[:4], allowed=ids[:4], where="fold 0")
    require_allowed("the teacher", None, allowed=ids[:0], where="fold 0")
    with pytest.raises(LeakError, match=r"fold 3: the clusters learned from 2 of 5 rows outside"):
        require_allowed("the clusters", ids[:5], allowed=ids[:3], where="fold 3")


def test_group_or_spot_in_training_and_test_is_rejected():
    groups, counts = np.array(["a", "a", "b", "b"]), np.array([1, 2, 3, 4], dtype=np.uint64)
    first, last = np.array([0, 1]), np.array([2, 3])
    require_disjoint(groups, counts, first, last, where="fold 0")
    with pytest.raises(LeakError, match="fold 0: a in both training and test"):
        require_disjoint(groups, counts, np.array([0]), np.array([1, 2]), where="fold 0")
    with pytest.raises(LeakError, match="under two ids"):
        require_disjoint(groups, np.array([1, 2, 3, 2], dtype=np.uint64), first, last, where="fold 0")
