"""Batches come in order and are read ahead by a fixed number; flips are the eight symmetries of the square."""

import threading
import time

import numpy as np
import pytest
import torch

from peka_lite.backbones.embed import AHEAD, Batches, flip_tiles

WAIT = 10  # timeout in seconds


class Source:
    """Tiles that count reads, take `slow` seconds per read, and raise OSError at read number `breaks`."""

    def __init__(self, n=10, *, slow=0.0, breaks=None):
        self.tiles = np.arange(n * 12, dtype=np.uint8).reshape(n, 2, 2, 3)
        self.slow, self.breaks, self.reads, self.threads = slow, breaks, 0, set()
        self.changed = threading.Condition()

    def __getitem__(self, rows):
        time.sleep(self.slow)
        with self.changed:
            self.threads.add(threading.current_thread())
            if self.reads == self.breaks:
                raise OSError("slide.h5: cannot be read")
            self.reads += 1
            self.changed.notify_all()
        return self.tiles[rows]

    def read(self, n):
        """Return whether the n-th read happens in time."""
        with self.changed:
            return self.changed.wait_for(lambda: self.reads >= n, timeout=WAIT)


def one_by_one(n):
    return [np.array([i]) for i in range(n)]


def test_batches_come_in_the_order_of_the_rows():
    source, rows = Source(), [np.array([7, 1]), np.array([0]), np.array([3, 3, 9]), np.array([], dtype=int)]
    batches = Batches(source, rows, device="cpu")
    tensors = list(batches)
    assert len(batches) == len(tensors) == 4
    for batch, part in zip(tensors, rows, strict=True):
        assert batch.dtype == torch.uint8
        assert batch.device.type == "cpu"
        assert np.array_equal(batch.numpy(), source.tiles[part])


@pytest.mark.parametrize("as_slices", [False, True])
def test_rows_may_be_arrays_or_slices(as_slices):
    tiles = Source().tiles
    rows = [slice(0, 4), slice(4, 8), slice(8, 10)] if as_slices else np.array_split(np.arange(10), 3)
    assert np.array_equal(torch.cat(list(Batches(tiles, rows, device="cpu"))).numpy(), tiles)


def test_non_contiguous_tiles_are_read():
    tiles = Source().tiles[:, ::-1]  # negative strides, which torch does not support
    assert np.array_equal(next(iter(Batches(tiles, [slice(0, 3)], device="cpu"))).numpy(), tiles[:3])


def test_no_rows_give_no_batches():
    assert list(Batches(Source(), [], device="cpu")) == []


def test_batches_can_be_iterated_twice():
    batches = Batches(Source(), one_by_one(3), device="cpu")
    assert [len(list(batches)), len(list(batches))] == [3, 3]


def test_nothing_is_read_before_iteration_starts():
    source = Source()
    iter(Batches(source, one_by_one(5), device="cpu"))
    time.sleep(0.05)
    assert source.reads == 0


def test_exactly_ahead_batches_are_read_in_advance():
    source = Source()
    batches = iter(Batches(source, one_by_one(10), device="cpu"))
    for k in range(10):
        next(batches)
        assert source.read(min(k + 1 + AHEAD, 10))
        time.sleep(0.02)  # time for an extra read
        assert source.reads == min(k + 1 + AHEAD, 10)


def test_one_background_thread_reads():
    source = Source()
    list(Batches(source, one_by_one(6), device="cpu"))
    assert len(source.threads) == 1
    assert threading.main_thread() not in source.threads


def test_waiting_for_a_slow_source_is_measured():
    batches, waited = Batches(Source(slow=0.05), one_by_one(4), device="cpu"), [0]
    assert batches.waited == 0
    for _ in batches:
        waited.append(batches.waited)
    assert waited == sorted(waited)
    assert waited[1] > 0.025  # the first batch is not read in advance


def test_time_spent_on_a_batch_does_not_count_as_waiting(monkeypatch):
    now = 0.0  # a clock that only advances while a batch is used
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    batches = Batches(Source(), one_by_one(10), device="cpu")
    for _ in batches:
        now += 1
    assert (batches.waited, now) == (0, 10)


def test_read_error_is_raised_at_its_batch():
    batches = iter(Batches(Source(breaks=3), one_by_one(8), device="cpu"))
    assert [len(next(batches)) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(OSError, match=r"slide\.h5: cannot be read"):
        next(batches)


def has_no_thread(source):
    for thread in source.threads:
        thread.join(WAIT)
    return not any(thread.is_alive() for thread in source.threads)


@pytest.mark.parametrize("breaks", [None, 0, 3])
def test_thread_ends_after_the_last_batch_or_an_error(breaks):
    source = Source(breaks=breaks)
    try:
        list(Batches(source, one_by_one(6), device="cpu"))
    except OSError:
        assert breaks is not None
    assert source.threads
    assert has_no_thread(source)


def test_thread_ends_when_the_loop_breaks():
    source = Source(slow=0.01)
    for _ in Batches(source, one_by_one(10), device="cpu"):
        break
    assert has_no_thread(source)
    assert source.reads <= 1 + AHEAD


def test_no_thread_reads_after_close():
    source = Source(slow=0.03)
    batches = iter(Batches(source, one_by_one(10), device="cpu"))
    next(batches)
    batches.close()
    assert not any(thread.is_alive() for thread in source.threads)


def test_thread_ends_when_the_loop_body_raises():
    source = Source()

    def work():
        for _ in Batches(source, one_by_one(10), device="cpu"):
            raise RuntimeError("the work")

    with pytest.raises(RuntimeError, match="the work"):
        work()
    assert has_no_thread(source)
    assert source.reads <= 1 + AHEAD


# flips -------------------------------------------------------------------------------------------------------------


def asymmetric(side=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).permutation(side * side * 3).astype(np.uint8)).view(
        1, side, side, 3
    )


def test_the_eight_flips_are_the_symmetries_of_the_square():
    tile = asymmetric()
    flipped = flip_tiles(tile.expand(8, -1, -1, -1), np.arange(8)).numpy()
    square = tile[0].numpy()
    expected = [np.rot90(side, k) for side in (square, square[:, ::-1]) for k in range(4)]
    assert {a.tobytes() for a in flipped} == {np.ascontiguousarray(a).tobytes() for a in expected}
    assert len({a.tobytes() for a in flipped}) == 8
    assert flipped.dtype == np.uint8


def test_flip_zero_leaves_a_tile_unchanged():
    assert torch.equal(flip_tiles(asymmetric(), np.array([0])), asymmetric())


@pytest.mark.parametrize("turn", range(8))
def test_flip_moves_pixels_and_keeps_their_colors(turn):
    pixels = [
        sorted(map(tuple, t.reshape(-1, 3).tolist())) for t in (asymmetric(), flip_tiles(asymmetric(), [turn])[0])
    ]
    assert pixels[0] == pixels[1]


def test_each_tile_is_flipped_independently():
    tiles = torch.cat([asymmetric(seed=s) for s in range(16)])
    turns = np.random.default_rng(1).integers(0, 8, 16)
    alone = torch.cat([flip_tiles(tiles[[i]], turns[[i]]) for i in range(16)])
    assert torch.equal(flip_tiles(tiles, turns), alone)


def test_flipping_does_not_change_its_input():
    tiles = asymmetric()
    flip_tiles(tiles, [5])
    assert torch.equal(tiles, asymmetric())


def test_flips_may_be_a_tensor():
    assert torch.equal(flip_tiles(asymmetric(), torch.tensor([6])), flip_tiles(asymmetric(), np.array([6])))


def test_non_square_tiles_are_rejected():
    with pytest.raises(ValueError, match=r"tiles must be square to be flipped, not \(4, 6\)"):
        flip_tiles(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), np.zeros(2, dtype=int))
