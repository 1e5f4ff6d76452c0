"""Batches: in order, read ahead by so many and no more, nothing left behind; turns: the eight of the square."""

import threading
import time

import numpy as np
import pytest
import torch

from peka_lite.backbones.embed import AHEAD, Batches, flip_tiles

WAIT = 10  # seconds until a test gives up; none of them takes so long unless it fails


class Source:
    """Tiles that count how often they were read, at `slow` seconds a read, and cannot be read past `breaks`."""

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
        """Whether the n-th read comes."""
        with self.changed:
            return self.changed.wait_for(lambda: self.reads >= n, timeout=WAIT)


def one_by_one(n):
    return [np.array([i]) for i in range(n)]


def test_batches_come_in_the_order_asked_for():
    source, rows = Source(), [np.array([7, 1]), np.array([0]), np.array([3, 3, 9]), np.array([], dtype=int)]
    batches = Batches(source, rows, device="cpu")
    got = list(batches)
    assert len(batches) == len(got) == 4
    for batch, at in zip(got, rows, strict=True):
        assert batch.dtype == torch.uint8
        assert batch.device.type == "cpu"
        assert np.array_equal(batch.numpy(), source.tiles[at])


@pytest.mark.parametrize("as_slices", [False, True])
def test_rows_may_be_arrays_or_slices(as_slices):
    tiles = Source().tiles
    rows = [slice(0, 4), slice(4, 8), slice(8, 10)] if as_slices else np.array_split(np.arange(10), 3)
    assert np.array_equal(torch.cat(list(Batches(tiles, rows, device="cpu"))).numpy(), tiles)


def test_tiles_with_gaps_in_memory_are_read_all_the_same():
    tiles = Source().tiles[:, ::-1]  # negative strides, which torch refuses
    assert np.array_equal(next(iter(Batches(tiles, [slice(0, 3)], device="cpu"))).numpy(), tiles[:3])


def test_no_rows_give_no_batches():
    assert list(Batches(Source(), [], device="cpu")) == []


def test_batches_can_be_gone_through_again():
    batches = Batches(Source(), one_by_one(3), device="cpu")
    assert [len(list(batches)), len(list(batches))] == [3, 3]


def test_nothing_is_read_before_the_first_batch_is_asked_for():
    source = Source()
    iter(Batches(source, one_by_one(5), device="cpu"))
    time.sleep(0.05)
    assert source.reads == 0


def test_the_batches_ahead_are_read_while_this_one_is_used_and_no_more_of_them():
    source = Source()
    arriving = iter(Batches(source, one_by_one(10), device="cpu"))
    for k in range(10):
        next(arriving)
        assert source.read(min(k + 1 + AHEAD, 10))
        time.sleep(0.02)  # for a read too many to show itself
        assert source.reads == min(k + 1 + AHEAD, 10)


def test_one_thread_reads_and_it_is_not_the_callers():
    source = Source()
    list(Batches(source, one_by_one(6), device="cpu"))
    assert len(source.threads) == 1
    assert threading.main_thread() not in source.threads


def test_waiting_for_a_slow_source_is_counted():
    batches, waited = Batches(Source(slow=0.05), one_by_one(4), device="cpu"), [0]
    assert batches.waited == 0
    for _ in batches:
        waited.append(batches.waited)
    assert waited == sorted(waited)
    assert waited[1] > 0.025  # the first batch at least cannot be there before it is asked for


def test_time_spent_on_a_batch_is_not_waiting(monkeypatch):
    now = 0.0  # a clock that only the work on batches moves
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    batches = Batches(Source(), one_by_one(10), device="cpu")
    for _ in batches:
        now += 1
    assert (batches.waited, now) == (0, 10)


def test_a_reader_that_fails_fails_at_its_batch():
    arriving = iter(Batches(Source(breaks=3), one_by_one(8), device="cpu"))
    assert [len(next(arriving)) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(OSError, match=r"slide\.h5: cannot be read"):
        next(arriving)


def gone(source):
    for thread in source.threads:
        thread.join(WAIT)
    return not any(thread.is_alive() for thread in source.threads)


@pytest.mark.parametrize("breaks", [None, 0, 3])
def test_the_thread_ends_with_the_batches_whether_read_or_failed(breaks):
    source = Source(breaks=breaks)
    try:
        list(Batches(source, one_by_one(6), device="cpu"))
    except OSError:
        assert breaks is not None
    assert source.threads
    assert gone(source)


def test_the_thread_ends_where_the_loop_is_left():
    source = Source(slow=0.01)
    for _ in Batches(source, one_by_one(10), device="cpu"):
        break
    assert gone(source)
    assert source.reads <= 1 + AHEAD


def test_nothing_reads_on_once_the_loop_is_left():
    source = Source(slow=0.03)
    arriving = iter(Batches(source, one_by_one(10), device="cpu"))
    next(arriving)
    arriving.close()
    assert not any(thread.is_alive() for thread in source.threads)


def test_the_thread_ends_where_the_work_on_a_batch_fails():
    source = Source()

    def work():
        for _ in Batches(source, one_by_one(10), device="cpu"):
            raise RuntimeError("the work")

    with pytest.raises(RuntimeError, match="the work"):
        work()
    assert gone(source)
    assert source.reads <= 1 + AHEAD


# turns -------------------------------------------------------------------------------------------------------------


def asymmetric(side=5, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).permutation(side * side * 3).astype(np.uint8)).view(
        1, side, side, 3
    )


def test_the_eight_turns_are_the_eight_of_the_square():
    tile = asymmetric()
    got = flip_tiles(tile.expand(8, -1, -1, -1), np.arange(8)).numpy()
    square = tile[0].numpy()
    expected = [np.rot90(side, k) for side in (square, square[:, ::-1]) for k in range(4)]
    assert {a.tobytes() for a in got} == {np.ascontiguousarray(a).tobytes() for a in expected}
    assert len({a.tobytes() for a in got}) == 8
    assert got.dtype == np.uint8


def test_turn_zero_leaves_a_tile_as_it_is():
    assert torch.equal(flip_tiles(asymmetric(), np.array([0])), asymmetric())


@pytest.mark.parametrize("turn", range(8))
def test_a_turn_moves_pixels_and_keeps_their_colors_together(turn):
    pixels = [
        sorted(map(tuple, t.reshape(-1, 3).tolist())) for t in (asymmetric(), flip_tiles(asymmetric(), [turn])[0])
    ]
    assert pixels[0] == pixels[1]


def test_each_tile_is_turned_by_itself():
    tiles = torch.cat([asymmetric(seed=s) for s in range(16)])
    turns = np.random.default_rng(1).integers(0, 8, 16)
    alone = torch.cat([flip_tiles(tiles[[i]], turns[[i]]) for i in range(16)])
    assert torch.equal(flip_tiles(tiles, turns), alone)


def test_turning_leaves_the_tiles_given_alone():
    tiles = asymmetric()
    flip_tiles(tiles, [5])
    assert torch.equal(tiles, asymmetric())


def test_turns_may_be_a_tensor():
    assert torch.equal(flip_tiles(asymmetric(), torch.tensor([6])), flip_tiles(asymmetric(), np.array([6])))


def test_tiles_that_are_not_square_are_refused():
    with pytest.raises(ValueError, match=r"only square tiles can be turned, not \(4, 6\)"):
        flip_tiles(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), np.zeros(2, dtype=int))
