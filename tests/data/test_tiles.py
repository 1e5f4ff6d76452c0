"""A store of tiles is indexed like an array, in every process."""

import multiprocessing
import os
import pickle

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from peka_lite.data import TileStore
from peka_lite.data.tiles import TILE_SHAPE

N = 6


def write_tiles(path, tiles):
    with h5py.File(path, "w") as file:
        file.create_dataset("img", data=tiles, chunks=(1, *TILE_SHAPE), compression="gzip", compression_opts=1)
    return path


def make_store(*paths, rows):
    """Return a store of rows (part, row) of several files."""
    part, row = np.transpose(rows)
    return TileStore(paths, part, row)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return a store over two files in mixed order, and the same tiles as an array."""
    folder = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    a, b = (np.repeat(rng.integers(0, 255, (n, 224, 1, 3), np.uint8), 224, axis=2) for n in (4, 3))
    rows = [(0, 3), (1, 0), (0, 0), (1, 2), (1, 1), (0, 2)]
    store = make_store(write_tiles(folder / "a.h5", a), write_tiles(folder / "b.h5", b), rows=rows)
    return store, np.stack([(a, b)[p][r] for p, r in rows])


indices = st.one_of(
    st.integers(-N, N - 1),
    st.slices(N),
    st.lists(st.integers(-N, N - 1), max_size=8).map(lambda i: np.array(i, np.int64)),
    st.lists(st.booleans(), min_size=N, max_size=N).map(np.array),
)
several = indices.filter(lambda i: not isinstance(i, int))


@given(index=indices)
@settings(max_examples=25, deadline=None)
def test_indexing_matches_an_array(both, index):
    store, array = both
    tiles = store[index]
    assert tiles.dtype == np.uint8
    np.testing.assert_array_equal(tiles, array[index])


@given(index=several)
@settings(max_examples=25, deadline=None)
def test_selecting_matches_an_array(both, index):
    store, array = both
    chosen = store.select(index)
    assert chosen.shape == array[index].shape
    np.testing.assert_array_equal(chosen[:], array[index])


@given(first=several, last=several)
@settings(max_examples=15, deadline=None)
def test_stores_of_different_files_are_concatenated(both, first, last):
    store, array = both
    of_b = make_store(store.paths[1], rows=[(0, 0), (0, 1), (0, 2)])
    joined = TileStore.concat([store.select(first), of_b, store.select(last)])
    np.testing.assert_array_equal(joined[:], np.concatenate([array[first], array[[1, 4, 3]], array[last]]))


@pytest.mark.parametrize("index", [N, -N - 1, np.array([0, N])])
def test_an_index_out_of_range_is_an_index_error(both, index):
    with pytest.raises(IndexError):
        both[0][index]


def test_iterating_stops_at_the_end(both):
    assert sum(1 for _ in both[0]) == len(both[0]) == N


def test_no_file_is_opened_before_the_first_read(tmp_path):
    store = make_store(tmp_path / "later.h5", rows=[(0, 1), (0, 0)])
    store = TileStore.concat([store, store.select([0])])
    assert store.shape == (3, 224, 224, 3)
    write_tiles(tmp_path / "later.h5", np.stack([np.zeros(TILE_SHAPE, np.uint8), np.ones(TILE_SHAPE, np.uint8)]))
    assert store[:][:, 0, 0, 0].tolist() == [1, 0, 1]


def test_reading_one_row_of_a_huge_file_needs_little_memory(tmp_path):
    with h5py.File(tmp_path / "huge.h5", "w") as file:
        img = file.create_dataset("img", (10_000_000, *TILE_SHAPE), np.uint8, chunks=(1, *TILE_SHAPE))  # 1.5 TB
        img[9_999_999] = 5
    store = TileStore([tmp_path / "huge.h5"], np.zeros(10_000_000), np.arange(10_000_000))
    assert store[-1].mean() == 5


# --- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers_read_the_same_tiles_as_the_main_process(both, context, workers):
    store, array = both
    assert store[0].any()  # opens a file handle before the workers start
    loader = DataLoader(store, batch_size=2, num_workers=workers, multiprocessing_context=context)
    np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in loader]), array)


def test_a_forked_process_opens_the_file_again(both, monkeypatch):
    opened_by, real_file = [], h5py.File
    monkeypatch.setattr(h5py, "File", lambda *args: (opened_by.append(os.getpid()), real_file(*args))[1])
    store = both[0].select([0])
    assert store[0].any()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: (store[0], queue.put(opened_by[-1])))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == child.pid


def test_the_main_process_reads_while_forked_workers_do(both):
    store, array = both
    loader = DataLoader(store.select(np.tile(np.arange(N), 10)), num_workers=2, multiprocessing_context="fork")
    for i, batch in enumerate(loader):
        np.testing.assert_array_equal(batch[0].numpy(), array[i % N])
        np.testing.assert_array_equal(store[(5 * i) % N], array[(5 * i) % N])


def test_forked_workers_read_a_memory_map(both, tmp_path):
    store = both[0].to_memmap(tmp_path / "tiles.npy")
    assert store[0].any()
    loader = DataLoader(store, batch_size=4, num_workers=2, multiprocessing_context="fork")
    np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in loader]), both[1])


def test_a_pickled_store_contains_no_tiles_and_no_open_files(both):
    store, array = both
    assert store[0].any()
    data = pickle.dumps(store)
    assert len(data) < 2000
    np.testing.assert_array_equal(pickle.loads(data)[:], array)


# --- the memory map ------------------------------------------------------------------------------------------------


def test_a_memory_map_has_the_same_tiles_in_the_same_order(both, tmp_path):
    store = both[0].to_memmap(tmp_path / "new" / "tiles.npy")
    np.testing.assert_array_equal(store[:], both[1])
    np.testing.assert_array_equal(store.select([4, 1])[:], both[1][[4, 1]])


def test_a_memory_map_is_a_plain_uint8_npy_file(both, tmp_path):
    both[0].to_memmap(tmp_path / "tiles.npy")
    written = np.load(tmp_path / "tiles.npy", mmap_mode="r")
    assert (written.dtype, written.shape) == (np.uint8, (N, 224, 224, 3))
    np.testing.assert_array_equal(written, both[1])


def test_a_memory_map_no_longer_needs_the_slides(tmp_path):
    path = write_tiles(tmp_path / "a.h5", np.full((2, *TILE_SHAPE), 9, np.uint8))
    store = make_store(path, rows=[(0, 0), (0, 1)]).to_memmap(tmp_path / "tiles.npy")
    path.unlink()
    assert store[:].mean() == 9


def test_writing_a_memory_map_again_overwrites_it(both, tmp_path):
    both[0].to_memmap(tmp_path / "tiles.npy")
    again = both[0].select([5]).to_memmap(tmp_path / "tiles.npy")
    np.testing.assert_array_equal(again[:], both[1][[5]])


def test_writing_a_memory_map_leaves_no_other_file(both, tmp_path):
    both[0].to_memmap(tmp_path / "tiles.npy")
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.npy"]


def test_a_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        make_store(tmp_path / "absent.h5", rows=[(0, 0)]).to_memmap(tmp_path / "tiles.npy")
    assert not list(tmp_path.iterdir())


def test_a_memory_map_of_another_suffix_is_refused(both, tmp_path):
    with pytest.raises(ValueError, match=r"tiles\.dat.*ends in \.npy"):
        both[0].to_memmap(tmp_path / "tiles.dat")
