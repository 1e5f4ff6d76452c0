"""Embeddings on disk equal those in memory, resume after a stop, and are complete or absent."""

import subprocess
import sys
import threading
from contextlib import contextmanager

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from peka_lite._core._stream import finish, open_partial
from peka_lite._core.locks import lock, partial_path
from peka_lite.teachers import ScFoundation

GENES = [f"G{i}" for i in range(60)]


def make_adata(seed=0, n=12):
    """Return spots that express 4, 8, 12 ... genes, in shuffled order."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(3.0, (n, len(GENES))) + 1
    counts[np.arange(len(GENES)) >= rng.permutation(4 * np.arange(1, n + 1))[:, None]] = 0
    obs = pd.DataFrame({"total_counts": counts.sum(1)}, index=[f"spot{i}" for i in range(n)])
    return ad.AnnData(sparse.csr_matrix(counts, dtype=np.float32), obs=obs, var=pd.DataFrame(index=GENES))


def make_model(seed=0, **options):
    return ScFoundation.random(GENES, hidden_dim=8, depth=1, heads=2, seed=seed, **options)


@pytest.fixture
def model():
    return make_model()


@contextmanager
def record_lengths(model):
    """List the number of tokens of every spot that the encoder computes."""
    lengths = []
    hook = model.encoder.register_forward_pre_hook(lambda _, args: lengths.extend(args[2].tolist()))
    yield lengths
    hook.remove()


def stop(model, adata, out, *, after=2, **options):
    """Interrupt a job of three spots per batch after some batches; return the lengths of the finished spots."""
    forward, finished = model.encoder.forward, []

    def interrupted(values, positions, lengths):
        if len(finished) == 3 * after:
            raise KeyboardInterrupt
        finished.extend(lengths.tolist())
        return forward(values, positions, lengths)

    model.encoder.forward = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            model.embed(adata, out=out, batch_size=3, **options)
    finally:
        del model.encoder.forward
    return finished


# --- embedding to a file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [str, lambda path: path])
@pytest.mark.parametrize("pool", ["all", "max"])
def test_file_equals_the_embedding_in_memory_and_no_other_file_is_left(tmp_path, model, kind, pool):
    adata, out = make_adata(), tmp_path / "new" / "E.npy"
    E = model.embed(adata, out=kind(out), pool=pool)
    np.testing.assert_array_equal(np.load(out), model.embed(adata, pool=pool))
    assert np.load(out).dtype == np.float32
    assert [path.name for path in out.parent.iterdir()] == ["E.npy"]
    assert isinstance(E, np.memmap)
    assert not E.flags.writeable
    np.testing.assert_array_equal(E, np.load(out))


def test_stopped_job_leaves_only_its_partial_folder(tmp_path, model):
    stop(model, make_adata(), tmp_path / "E.npy")
    assert [path.name for path in tmp_path.iterdir()] == [partial_path(tmp_path / "E.npy", locked=True).name]


def test_next_job_computes_the_remaining_rows_only(tmp_path, model):
    adata, out = make_adata(), tmp_path / "E.npy"
    finished = stop(model, adata, out)
    with record_lengths(model) as lengths:
        model.embed(adata, out=out)
    assert len(finished) == 6
    assert sorted(finished + lengths) == sorted(model.tokens(adata).lengths)
    np.testing.assert_allclose(np.load(out), model.embed(adata), atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["E.npy"]


def test_job_can_be_stopped_more_than_once(tmp_path, model):
    adata, out = make_adata(), tmp_path / "E.npy"
    finished = stop(model, adata, out, after=1) + stop(model, adata, out, after=1)
    with record_lengths(model) as lengths:
        model.embed(adata, out=out)
    assert sorted(finished + lengths) == sorted(model.tokens(adata).lengths)
    np.testing.assert_allclose(np.load(out), model.embed(adata), atol=1e-6)


def test_another_teacher_object_resumes(tmp_path):
    adata, out = make_adata(), tmp_path / "E.npy"
    stop(make_model(), adata, out)
    other = make_model()
    with record_lengths(other) as lengths:
        other.embed(adata, out=out)
    assert len(lengths) == adata.n_obs - 6


def change_count(adata):
    adata.X.data[3] += 1


def change_place(adata):
    adata.X.indices[adata.X.indptr[1] - 1] = 59  # the first spot's last gene


def swap_barcodes(adata):
    adata.obs_names = [*adata.obs_names[1::-1], *adata.obs_names[2:]]


def swap_genes(adata):
    adata.var_names = [*adata.var_names[1::-1], *adata.var_names[2:]]


@pytest.mark.parametrize("change", [change_count, change_place, swap_barcodes, swap_genes])
def test_other_data_start_from_scratch(tmp_path, model, change):
    adata, out = make_adata(), tmp_path / "E.npy"
    stop(model, adata, out)
    change(adata)
    with record_lengths(model) as lengths:
        model.embed(adata, out=out)
    assert len(lengths) == adata.n_obs
    np.testing.assert_array_equal(np.load(out), model.embed(adata))


@pytest.mark.parametrize("options", [{"pool": "max"}, {"resolution": "f2"}, {"input_type": "bulk"}])
def test_other_settings_start_from_scratch(tmp_path, model, options):
    adata, out = make_adata(), tmp_path / "E.npy"
    stop(model, adata, out)
    with record_lengths(model) as lengths:
        model.embed(adata, out=out, **options)
    assert len(lengths) == adata.n_obs
    np.testing.assert_array_equal(np.load(out), model.embed(adata, **options))


def test_log_normalized_data_with_other_raw_totals_start_from_scratch(tmp_path, model):
    adata, out = make_adata(), tmp_path / "E.npy"
    adata.X = np.log1p(adata.X)
    stop(model, adata, out, pre_normalized="A")
    adata.obs["total_counts"] *= 3
    model.embed(adata, out=out, pre_normalized="A")
    np.testing.assert_array_equal(np.load(out), model.embed(adata, pre_normalized="A"))


def other_mapping():
    return ScFoundation(make_model().encoder, GENES, mapping={"H5": "G5"}, origin="test")


def other_precision():
    return make_model(precision={"cpu": torch.bfloat16})


@pytest.mark.parametrize("other", [lambda: make_model(seed=1), other_mapping, other_precision])
def test_another_teacher_starts_from_scratch(tmp_path, model, other):
    adata, out, other = make_adata(), tmp_path / "E.npy", other()
    stop(model, adata, out)
    other.embed(adata, out=out)
    np.testing.assert_array_equal(np.load(out), other.embed(adata))


def test_another_batch_size_resumes(tmp_path, model):
    adata, out = make_adata(), tmp_path / "E.npy"
    finished = stop(model, adata, out)
    with record_lengths(model) as lengths:
        model.embed(adata, out=out, batch_size=1, max_tokens=50)
    assert len(lengths) == adata.n_obs - len(finished)


def test_existing_file_is_replaced_when_the_new_one_is_complete(tmp_path, model):
    adata, out = make_adata(), tmp_path / "E.npy"
    before = model.embed(make_adata(2), out=out).copy()
    stop(model, adata, out)
    np.testing.assert_array_equal(np.load(out), before)
    model.embed(adata, out=out)
    np.testing.assert_allclose(np.load(out), model.embed(adata), atol=1e-6)
    model.embed(make_adata(1), out=out)
    np.testing.assert_array_equal(np.load(out), model.embed(make_adata(1)))


def test_rejected_data_leave_no_file(tmp_path, model):
    adata = make_adata()
    adata.X.data[adata.X.indptr[4] : adata.X.indptr[5]] = 0
    with pytest.raises(ValueError, match="spot4"):
        model.embed(adata, out=tmp_path / "E.npy")
    assert not list(tmp_path.iterdir())


# --- the partial file itself ---------------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path):
    """Return the folder of a job with two of four rows done."""
    rows, done = open_partial(tmp_path / "E.npy.partial", shape=(4, 2), key="one")
    rows[1:3], done[1:3] = [[1, 2], [3, 4]], True
    rows.flush(), done.flush()
    return tmp_path / "E.npy.partial"


def test_a_new_job_has_no_row_done(tmp_path):
    rows, done = open_partial(tmp_path / "E.npy.partial", shape=(4, 2), key="one")
    assert (rows.shape, rows.dtype, done.shape, done.dtype) == ((4, 2), np.float32, (4,), bool)
    assert not done.any()


def test_done_rows_are_reloaded(half):
    rows, done = open_partial(half, shape=(4, 2), key="one")
    assert done.tolist() == [False, True, True, False]
    assert rows[1:3].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("other", [{"key": "two"}, {"shape": (5, 2)}, {"shape": (4, 3)}])
def test_rows_of_another_job_are_not_reused(half, other):
    options = {"shape": (4, 2), "key": "one"} | other
    rows, done = open_partial(half, **options)
    assert not done.any()
    assert rows.shape == options["shape"]


@pytest.mark.parametrize("lost", ["rows.npy", "done.npy", "key"])
def test_incomplete_partial_folder_starts_from_scratch(half, lost):
    (half / lost).unlink()
    assert not open_partial(half, shape=(4, 2), key="one")[1].any()


def test_finishing_puts_the_rows_in_place(half):
    rows, _ = open_partial(half, shape=(4, 2), key="one")
    finish(half.with_suffix(""), rows)
    assert np.load(half.with_suffix("")).tolist() == [[0, 0], [1, 2], [3, 4], [0, 0]]
    assert [path.name for path in half.parent.iterdir()] == ["E.npy"]


RACE = """
import sys, anndata as ad, numpy as np, torch
from peka_lite.teachers.scfoundation import ScFoundation
adata = ad.read_h5ad(sys.argv[1])
E = ScFoundation.random(list(adata.var_names), hidden_dim=8, depth=1).embed(adata, batch_size=1, out=sys.argv[2])
print(float(np.abs(E).sum()))
"""


def test_two_jobs_with_the_same_file_both_succeed(tmp_path):
    make_adata().write_h5ad(tmp_path / "a.h5ad")
    command = [sys.executable, "-c", RACE, str(tmp_path / "a.h5ad"), str(tmp_path / "E.npy")]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["E.npy", "a.h5ad"]


def test_second_job_waits_for_a_locked_file(tmp_path):
    order, out = [], tmp_path / "E.npy"

    def second():
        with lock(out):
            order.append("second")

    with lock(out):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.2)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())
