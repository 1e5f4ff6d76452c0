"""The cache of embeddings, pseudo-labels and students: same numbers, reuse, resuming and concurrent writers."""

import dataclasses
import errno
import fcntl
import hashlib
import importlib
import multiprocessing
import os
import platform

import numpy as np
import pytest
import torch

from peka_lite._core.hashing import row_ids
from peka_lite._core.locks import RECORD
from peka_lite.adapters import adapt, merge
from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.data import Cohort, read_cohort
from peka_lite.experiments import Features, RunConfig, targets as targets_module
from peka_lite.experiments.targets import TeacherTargets
from peka_lite.teachers import PCATeacher, ScFoundation, embed_cohort
from peka_lite.transfer import TransferModel, fit

fit_module = importlib.import_module("peka_lite.transfer.fit")  # `from peka_lite.transfer import fit` is the function

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*allow")
ROWS = np.arange(0, 40)


@pytest.fixture(scope="module")
def cohort(mini_root):
    return read_cohort(mini_root, ["MINI1", "MINI2"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def embedded(monkeypatch):
    """List the number of spots in each call of the PCA teacher's `embed`."""
    return count_embedded(monkeypatch.setattr)


def count_embedded(patch):
    real, embedded = PCATeacher.embed, []
    patch(PCATeacher, "embed", lambda self, adata, **k: embedded.append(adata.n_obs) or real(self, adata, **k))
    return embedded


def config(**changes):
    settings = {"cohort": "mini", "weights": "random", "epochs": 1, "label_method": "kmeans", "n_clusters": 4, "r": 32}
    return RunConfig(**settings | changes)


def pretrained(cohort, **options):
    return ScFoundation.random(cohort.genes, hidden_dim=8, depth=1, **options)


def make(cohort, settings=None, teacher=None, **changes):
    features = Features(settings or config(), cohort, device="cpu")
    features.teacher = teacher or PCATeacher()
    features.targets = TeacherTargets(features.teacher, cohort, **{"data": features.data, "device": "cpu"} | changes)
    return features


def targets(cohort, settings=None, rows=ROWS, teacher=None, **changes):
    """Return embedding, labels and number of labels of the rows, and what each step learned from."""
    settings = settings or config()
    return make(cohort, settings, teacher, **changes).targets.make(rows, settings.make_labeler())


def train(cohort, settings=None, rows=ROWS, teacher=None):
    return make(cohort, settings, teacher).for_fold(rows)


def folders(cache, kind):
    return sorted(p.name for p in (cache / kind).iterdir() if p.is_dir())


def outer_paths(cache):
    """Return all paths in the cache except those inside complete folders."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if not (p.parent / RECORD).is_file())


def assert_one_of_each(cache):
    kinds = ("embeddings", "labels", "students")
    assert [len(folders(cache, kind)) for kind in kinds] == [1, 1, 1]
    assert outer_paths(cache) == sorted(name for k in kinds for name in (k, f"{k}/{folders(cache, k)[0]}"))


def assert_same(one, other):
    for value, same in zip(one[:3], other[:3], strict=True):
        np.testing.assert_array_equal(value, same)
    assert one[3].keys() == other[3].keys()
    for step, ids in one[3].items():
        np.testing.assert_array_equal(ids, other[3][step])


# --- numbers -------------------------------------------------------------------------------------------------------


def test_targets_equal_direct_calls_of_teacher_and_labeler(cohort):
    teacher = PCATeacher().fit(cohort.by_slide(ROWS))
    E = embed_cohort(teacher, cohort)
    labeler = config().make_labeler().fit(E[ROWS])
    for _ in ("computed", "cached"):
        embedding, labels, n_labels, ids = targets(cohort)
        np.testing.assert_array_equal(embedding, E[ROWS])
        np.testing.assert_array_equal(labels, labeler.labels_)
        assert (embedding.dtype, labels.dtype) == (np.float32, np.int64)
        assert n_labels == labeler.n_labels_
        assert ids.keys() == {"teacher", "clusters", "embedding"}
        np.testing.assert_array_equal(ids["teacher"], teacher.fitted_on_)
        np.testing.assert_array_equal(ids["clusters"], labeler.fitted_on_)
        np.testing.assert_array_equal(ids["embedding"], row_ids(E))


def test_embedding_is_a_read_only_memory_map_of_all_spots(cohort):
    result = make(cohort, config(method="none", features="teacher", r=None)).for_fold(ROWS)
    E = result.values
    assert isinstance(E, np.memmap)
    assert (E.shape[0], E.dtype, E.flags.writeable) == (len(cohort), np.float32, False)
    np.testing.assert_array_equal(result.learned_from["teacher"], PCATeacher().fit(cohort.by_slide(ROWS)).fitted_on_)


def test_student_equals_one_trained_by_direct_calls(cohort):
    settings = config()
    E = embed_cohort(PCATeacher().fit(cohort.by_slide(ROWS)), cohort)
    labeler = settings.make_labeler().fit(E[ROWS])
    backbone = load_backbone("mini", weights="random", seed=0)
    adapt(backbone, settings.method, r=settings.block_size, targets=settings.layers, total_steps=2, seed=0)
    model = TransferModel(
        backbone, teacher_dim=E.shape[1], n_classes=labeler.n_labels_, kd_space=settings.kd_space, seed=0
    )
    names = ("epochs", "batch_size", "lr", "tau", "kd_weight", "ce_weight", "augment", "seed")
    options = {name: getattr(settings, name) for name in names}
    fit(model, cohort.tiles.select(ROWS), E[ROWS], labeler.labels_, **options, device="cpu")
    student = train(cohort)
    np.testing.assert_array_equal(student.values, embed_tiles(merge(backbone), cohort.tiles, device="cpu"))
    np.testing.assert_array_equal(student.embedding_ids, row_ids(E))
    assert student.learned_from.keys() == {"teacher", "clusters", "student"}
    np.testing.assert_array_equal(student.learned_from["clusters"], labeler.fitted_on_)


# --- reuse -----------------------------------------------------------------------------------------------------------


def test_students_with_other_training_settings_share_embedding_and_labels(cohort, cache, embedded):
    for changes in ({}, {"tau": 1.0}, {"method": "lora", "r": 8}):
        train(cohort, config(**changes))
    assert len(folders(cache, "students")) == 3
    assert embedded == [slide.n_spots for slide in cohort.slides]
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (1, 1)


def test_each_labeler_has_separate_labels_of_the_same_embedding(cohort, cache, embedded):
    for k, changes in enumerate(({}, {"n_clusters": 5}, {"seed": 1})):
        targets(cohort, config(**changes))
        assert len(folders(cache, "labels")) == k + 1
    assert embedded == [slide.n_spots for slide in cohort.slides]


def test_fitted_teacher_is_fitted_again_for_every_fold(cohort, cache, embedded):
    one, two = targets(cohort), targets(cohort, rows=ROWS + 10)
    assert not np.array_equal(one[3]["embedding"], two[3]["embedding"])
    assert len(embedded) == 2 * len(cohort.slides)
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (2, 2)


def test_folds_share_the_embedding_of_a_pretrained_teacher(cohort, cache, monkeypatch):
    teacher, calls = pretrained(cohort), []
    monkeypatch.setattr(targets_module, "embed_cohort", lambda *a, **k: calls.append(1) or embed_cohort(*a, **k))
    features = make(cohort, teacher=teacher)
    one, two = (features.targets.make(rows, config().make_labeler()) for rows in (ROWS, ROWS + 10))
    assert (one[3]["teacher"], two[3]["teacher"], len(calls)) == (None, None, 1)
    np.testing.assert_array_equal(one[3]["embedding"], two[3]["embedding"])
    np.testing.assert_array_equal(one[0], embed_cohort(teacher, cohort)[ROWS])
    # One folder per slide: the embedding is stored once, and each fold has its labels.
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (len(cohort.slides), 2)


def test_teacher_marked_as_pretrained_that_learns_in_fit_raises(cohort, cache):
    class FalselyPretrained(PCATeacher):
        fitted_on_ = None

    with pytest.raises(ValueError, match=r"has fitted_on_ = None \(pretrained\) but learns in fit"):
        targets(cohort, teacher=FalselyPretrained())
    assert outer_paths(cache) == []


@pytest.mark.parametrize("other", ["data", "teacher", "kind", "device", "fingerprint", "precision"])
def test_any_other_input_of_an_embedding_changes_its_folder(cohort, cache, other):
    class SameRepr(PCATeacher):
        pass

    first, second, changes = PCATeacher(), PCATeacher(), {}
    if other == "data":
        changes = {"data": "other"}
    elif other == "teacher":
        second = PCATeacher(n_genes=90)
    elif other == "kind":
        second = SameRepr()
    elif other == "fingerprint":
        second.fingerprint = "other"
    elif other == "device":
        changes = {"device": "meta"}  # PCA uses no device
    else:
        assert other == "precision"
        first = pretrained(cohort)
        second = pretrained(cohort, precision={"cpu": torch.bfloat16})
    targets(cohort, teacher=first)
    stored = len(folders(cache, "embeddings"))
    targets(cohort, teacher=second, **changes)
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (2 * stored, 2)


def test_changed_counts_change_hash_and_folder(cohort, cache):
    first, *others = cohort.slides
    adata = first.adata.copy()
    adata.X.data[5] += 1
    changed = Cohort((dataclasses.replace(first, adata=adata), *others))
    targets(cohort), targets(changed)
    assert len(folders(cache, "embeddings")) == 2


# --- resuming --------------------------------------------------------------------------------------------------------


def stop_after_an_epoch(cohort, settings, monkeypatch):
    real = fit_module.save_checkpoint

    def save_and_stop(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "save_checkpoint", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(cohort, settings)


@pytest.fixture
def epochs(monkeypatch):
    return count_epochs(monkeypatch.setattr)


def count_epochs(patch):
    real, run = fit_module.save_checkpoint, []  # called after every epoch, with the history

    def save(*args):
        run.append(len(args[-1]) - 1)
        real(*args)

    patch(fit_module, "save_checkpoint", save)
    return run


@pytest.mark.parametrize("machine", ["same", "other"])
def test_stopped_training_resumes_with_the_same_result(cohort, cache, epochs, monkeypatch, machine):
    settings = config(epochs=2)
    stop_after_an_epoch(cohort, settings, monkeypatch)
    assert epochs.pop() == 0
    (partial,) = (cache / "students").iterdir()
    if machine == "other":
        monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    resumed = train(cohort, settings)
    assert epochs == [1]
    assert partial.exists() == (machine == "other")  # another machine may still use it
    monkeypatch.setenv("PEKA_LITE_CACHE", str(cache / "uninterrupted"))
    np.testing.assert_array_equal(resumed.values, train(cohort, settings).values)


def test_training_stopped_without_a_lock_leaves_no_files(cohort, cache, epochs, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_lock)
    stop_after_an_epoch(cohort, config(), monkeypatch)
    assert outer_paths(cache / "students") == []


def test_stopped_embedding_resumes(cohort, cache, monkeypatch):
    teacher, seen = pretrained(cohort), []
    forward = teacher.encoder.forward

    def stop_at_the_second_slide(values, positions, lengths):
        if sum(seen) > cohort.slides[0].n_spots + 4:
            raise KeyboardInterrupt
        seen.append(len(values))
        return forward(values, positions, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(teacher.encoder, "forward", stop_at_the_second_slide)
        with pytest.raises(KeyboardInterrupt):
            targets(cohort, teacher=teacher)
    remaining = []
    teacher.encoder.register_forward_pre_hook(lambda _, args: remaining.append(len(args[0])))
    targets(cohort, teacher=teacher)
    assert sum(seen) + sum(remaining) == len(cohort)
    assert not [name for name in outer_paths(cache) if "partial" in name]


@pytest.mark.parametrize("kind", ["embeddings", "labels", "students"])
def test_incomplete_cache_folder_is_replaced(cohort, cache, kind):
    before, features = targets(cohort), np.array(train(cohort).values)
    (folder,) = (cache / kind).iterdir()
    (folder / RECORD).unlink()
    for file in folder.glob("*.npy"):
        file.write_bytes(b"half")
    assert_same(targets(cohort), before)
    np.testing.assert_array_equal(train(cohort).values, features)
    assert_one_of_each(cache)


# --- concurrent writers ----------------------------------------------------------------------------------------------


def no_lock(file, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


KINDS = {
    "locks": lambda rank: None,
    "no locks": lambda rank: setattr(fcntl, "flock", no_lock),
    # Locks that other machines do not see: both processes get one.
    "local locks": lambda rank: (
        setattr(fcntl, "flock", lambda file, how: None),
        setattr(platform, "node", lambda: f"machine{rank}"),
    ),
}


def compete(rank, start, results, root, base):
    """Request the same targets and student as the other process, at the same time, under each kind of lock."""
    torch.set_num_threads(1)
    try:
        cohort, embedded, rows = read_cohort(root, ["MINI1"]), count_embedded(setattr), np.arange(30)
        epochs = count_epochs(setattr)
        for kind, prepare in KINDS.items():
            prepare(rank)
            os.environ["PEKA_LITE_CACHE"] = f"{base}/{kind}"
            embedded.clear(), epochs.clear()
            start.wait(timeout=120)
            result = targets(cohort, rows=rows)
            start.wait(timeout=120)
            student = train(cohort, rows=rows)
            digest = hashlib.sha256(student.values.tobytes() + result[1].tobytes() + result[0].tobytes())
            inode = os.stat(student.values.filename).st_ino
            results.put((kind, sum(embedded), len(epochs), (digest.hexdigest(), inode)))
    except BaseException:
        start.abort()  # so that the other process does not wait
        raise


@pytest.fixture(scope="module")
def raced(mini_root, tmp_path_factory):
    """Return the cache folder and the results of two competing processes."""
    base = tmp_path_factory.mktemp("raced")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peka_lite.experiments.features", "peka_lite.teachers.scfoundation"])
    start, queue = context.Barrier(2), context.Queue()
    jobs = [context.Process(target=compete, args=(rank, start, queue, str(mini_root), str(base))) for rank in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(180)
    assert [job.exitcode for job in jobs] == [0, 0]
    results = [queue.get(timeout=10) for _ in range(2 * len(KINDS))]
    return base, results


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_get_the_same_student_and_leave_no_other_files(raced, kind):
    base, results = raced
    results = [result for result in results if result[0] == kind]
    assert len({digest_and_inode for *_, digest_and_inode in results}) == 1  # the same numbers from the same file
    assert_one_of_each(base / kind)


def test_work_is_done_once_under_a_lock(raced, mini_root):
    spots = read_cohort(mini_root, ["MINI1"]).slides[0].n_spots
    work = [(embedded, epochs) for kind, embedded, epochs, _ in raced[1] if kind == "locks"]
    assert np.sum(work, axis=0).tolist() == [spots, 1]
