"""Embeddings and pseudo-labels are made once, hold the numbers of making them anew, and bear many writers."""

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

from peka_lite._core._processes import Processes
from peka_lite._core.hashing import row_ids
from peka_lite._core.locks import RECORD
from peka_lite.adapters.adapt import adapt, merge
from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import load_backbone
from peka_lite.data.hest import Cohort, read_cohort
from peka_lite.experiments import _teacher_labels as lessons, cache as students
from peka_lite.experiments._teacher_labels import embed_teacher, make_targets
from peka_lite.experiments.cache import train_student
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.folder import hash_cohort
from peka_lite.teachers.load import embed_cohort
from peka_lite.teachers.pca import PCATeacher
from peka_lite.teachers.scfoundation import ScFoundation
from peka_lite.transfer._training import Epochs
from peka_lite.transfer.fit import fit
from peka_lite.transfer.model import TransferModel

transfer = importlib.import_module("peka_lite.transfer.fit")  # the module: its package offers the function

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
def asked(monkeypatch):
    """How many spots the PCA teacher was asked for, slide by slide."""
    return count_asked(monkeypatch.setattr)


def count_asked(patch):
    real, asked = PCATeacher.embed, []
    patch(PCATeacher, "embed", lambda self, adata, **k: asked.append(adata.n_obs) or real(self, adata, **k))
    return asked


def config(**changes):
    settings = {"cohort": "mini", "weights": "random", "epochs": 1, "label_method": "kmeans", "n_clusters": 4, "r": 32}
    return RunConfig(**settings | changes)


def pretrained(cohort, **options):
    return ScFoundation.random(cohort.genes, hidden_dim=8, depth=1, **options)


def learn(cohort, settings=None, rows=ROWS, teacher=None, **changes):
    at = {"teacher": teacher or PCATeacher(), "data": hash_cohort(cohort), "device": "cpu"}
    return make_targets(settings or config(), cohort, rows, **at | changes)


def teach(cohort, settings=None, rows=ROWS, teacher=None):
    at = {"teacher": teacher or PCATeacher(), "data": hash_cohort(cohort), "device": "cpu"}
    settings = settings or config()
    return train_student(settings, cohort, lambda: cohort.tiles, rows, processes=Processes("cpu"), **at)


def folders(cache, room):
    return sorted(p.name for p in (cache / room).iterdir() if p.is_dir())


def everything(cache):
    """All that the cache holds, but for what is in a folder that is whole."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if not (p.parent / RECORD).is_file())


def assert_one_of_each(cache):
    rooms = ("embeddings", "labels", "students")
    assert [len(folders(cache, room)) for room in rooms] == [1, 1, 1]
    assert everything(cache) == sorted(name for r in rooms for name in (r, f"{r}/{folders(cache, r)[0]}"))


def assert_same(one, other):
    for field in ("embedding", "labels", "n_labels"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    assert one.ids.keys() == other.ids.keys()
    for step, ids in one.ids.items():
        np.testing.assert_array_equal(ids, other.ids[step])


# --- the numbers ---------------------------------------------------------------------------------------------------


def test_a_lesson_is_what_teacher_and_labeler_say(cohort):
    teacher = PCATeacher().fit(cohort.by_slide(ROWS))
    E = embed_cohort(teacher, cohort)
    labeler = config().labeler().fit(E[ROWS])
    for _ in ("made", "found"):
        got = learn(cohort)
        np.testing.assert_array_equal(got.embedding, E[ROWS])
        np.testing.assert_array_equal(got.labels, labeler.labels_)
        assert (got.embedding.dtype, got.labels.dtype, got.n_labels) == (np.float32, np.int64, labeler.n_labels_)
        assert got.ids.keys() == {"teacher", "clusters", "embedding"}
        np.testing.assert_array_equal(got.ids["teacher"], teacher.fitted_on_)
        np.testing.assert_array_equal(got.ids["clusters"], labeler.fitted_on_)
        np.testing.assert_array_equal(got.ids["embedding"], row_ids(E))


def test_an_embedding_is_a_memory_map_of_all_spots(cohort):
    E, learned_from = embed_teacher(PCATeacher(), cohort, ROWS, data="d", device="cpu")
    assert isinstance(E, np.memmap)
    assert (E.shape[0], E.dtype, E.flags.writeable) == (len(cohort), np.float32, False)
    np.testing.assert_array_equal(learned_from, PCATeacher().fit(cohort.by_slide(ROWS)).fitted_on_)


def test_a_student_is_what_teaching_by_hand_gives(cohort):
    settings = config()
    E = embed_cohort(PCATeacher().fit(cohort.by_slide(ROWS)), cohort)
    labeler = settings.labeler().fit(E[ROWS])
    backbone = load_backbone("mini", weights="random", seed=0)
    adapt(backbone, settings.method, r=settings.block_size, targets=settings.layers, total_steps=2, seed=0)
    model = TransferModel(
        backbone, teacher_dim=E.shape[1], n_classes=labeler.n_labels_, kd_space=settings.kd_space, seed=0
    )
    options = {name: getattr(settings, name) for name in students.FITTING}
    fit(model, cohort.tiles.select(ROWS), E[ROWS], labeler.labels_, **options, device="cpu")
    student = teach(cohort)
    np.testing.assert_array_equal(student.features, embed_tiles(merge(backbone), cohort.tiles, device="cpu"))
    np.testing.assert_array_equal(student.embedding_ids, row_ids(E))
    assert student.learned_from.keys() == {"teacher", "clusters", "student"}
    np.testing.assert_array_equal(student.learned_from["clusters"], labeler.fitted_on_)


# --- what is shared, and what is not ---------------------------------------------------------------------------------


def test_other_ways_of_teaching_share_embedding_and_labels(cohort, cache, asked):
    for changes in ({}, {"tau": 1.0}, {"method": "lora", "r": 8}):
        teach(cohort, config(**changes))
    assert len(folders(cache, "students")) == 3
    assert asked == [slide.n_spots for slide in cohort.slides]
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (1, 1)


def test_another_labeler_has_labels_of_its_own_of_the_same_embedding(cohort, cache, asked):
    for k, changes in enumerate(({}, {"n_clusters": 5}, {"seed": 1})):
        learn(cohort, config(**changes))
        assert len(folders(cache, "labels")) == k + 1
    assert asked == [slide.n_spots for slide in cohort.slides]


def test_a_teacher_that_learns_is_asked_for_every_fold(cohort, cache, asked):
    one, two = learn(cohort), learn(cohort, rows=ROWS + 10)
    assert not np.array_equal(one.ids["embedding"], two.ids["embedding"])
    assert len(asked) == 2 * len(cohort.slides)
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (2, 2)


def test_folds_share_what_a_pretrained_teacher_says(cohort, cache, monkeypatch):
    teacher, calls = pretrained(cohort), []
    monkeypatch.setattr(lessons, "embed_cohort", lambda *a, **k: calls.append(1) or embed_cohort(*a, **k))
    one, two = (learn(cohort, rows=rows, teacher=teacher) for rows in (ROWS, ROWS + 10))
    assert (one.ids["teacher"], two.ids["teacher"], len(calls)) == (None, None, 1)
    np.testing.assert_array_equal(one.ids["embedding"], two.ids["embedding"])
    np.testing.assert_array_equal(one.embedding, embed_cohort(teacher, cohort)[ROWS])
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (1, 2)


def test_a_teacher_that_only_says_it_came_trained_is_refused(cohort, cache):
    class Boaster(PCATeacher):
        fitted_on_ = None

    with pytest.raises(ValueError, match="says by fitted_on_ = None that it came trained, yet"):
        learn(cohort, teacher=Boaster())
    assert everything(cache) == []


@pytest.mark.parametrize("other", ["data", "teacher", "kind", "device", "fingerprint", "precision"])
def test_what_decides_an_embedding_has_a_place_of_its_own(cohort, cache, other):
    class Kin(PCATeacher):  # another teacher that calls itself the same
        pass

    first, second, changes = PCATeacher(), PCATeacher(), {}
    if other == "data":
        changes = {"data": "other"}
    elif other == "teacher":
        second = PCATeacher(n_genes=90)
    elif other == "kind":
        second = Kin()
    elif other == "fingerprint":
        second.fingerprint = "other"
    elif other == "device":
        changes = {"device": "meta"}  # a PCA needs none
    else:
        assert other == "precision"
        first = pretrained(cohort)
        second = pretrained(cohort, precision={"cpu": torch.bfloat16})
    learn(cohort, teacher=first)
    learn(cohort, teacher=second, **changes)
    assert (len(folders(cache, "embeddings")), len(folders(cache, "labels"))) == (2, 2)


def test_other_counts_have_another_fingerprint_and_place(cohort, cache):
    first, *others = cohort.slides
    adata = first.adata.copy()
    adata.X.data[5] += 1
    changed = Cohort((dataclasses.replace(first, adata=adata), *others))
    learn(cohort), learn(changed)
    assert len(folders(cache, "embeddings")) == 2


# --- stopped, and half there -----------------------------------------------------------------------------------------


def stop_after_an_epoch(cohort, settings, monkeypatch):
    real = transfer.save_checkpoint

    def once(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transfer, "save_checkpoint", once)
        with pytest.raises(KeyboardInterrupt):
            teach(cohort, settings)


@pytest.fixture
def epochs(monkeypatch):
    return count_epochs(monkeypatch.setattr)


def count_epochs(patch):
    real, run = Epochs.run, []
    patch(Epochs, "run", lambda self, epoch, bar: run.append(epoch) or real(self, epoch, bar))
    return run


@pytest.mark.parametrize("machine", ["same", "other"])
def test_a_stopped_student_goes_on(cohort, cache, epochs, monkeypatch, machine):
    settings = config(epochs=2)
    stop_after_an_epoch(cohort, settings, monkeypatch)
    assert epochs.pop() == 0
    (left,) = (cache / "students").iterdir()
    if machine == "other":
        monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    broken = teach(cohort, settings)
    assert epochs == [1]
    assert left.exists() == (machine == "other")  # which may be at work there
    monkeypatch.setenv("PEKA_LITE_CACHE", str(cache / "unbroken"))
    np.testing.assert_array_equal(broken.features, teach(cohort, settings).features)


def test_a_student_stopped_without_a_lock_leaves_nothing(cohort, cache, epochs, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_lock)
    stop_after_an_epoch(cohort, config(), monkeypatch)
    assert everything(cache / "students") == []


def test_a_stopped_teacher_goes_on(cohort, cache, monkeypatch):
    teacher, seen = pretrained(cohort), []
    forward = teacher.encoder.forward

    def until_the_second_slide(values, positions, lengths):
        if sum(seen) > cohort.slides[0].n_spots + 4:
            raise KeyboardInterrupt
        seen.append(len(values))
        return forward(values, positions, lengths)

    with monkeypatch.context() as patch:
        patch.setattr(teacher.encoder, "forward", until_the_second_slide)
        with pytest.raises(KeyboardInterrupt):
            learn(cohort, teacher=teacher)
    left = []
    teacher.encoder.register_forward_pre_hook(lambda _, args: left.append(len(args[0])))
    learn(cohort, teacher=teacher)
    assert sum(seen) + sum(left) == len(cohort)
    assert not [name for name in everything(cache) if "partial" in name]


@pytest.mark.parametrize("room", ["embeddings", "labels", "students"])
def test_half_an_entry_is_made_anew(cohort, cache, room):
    before, taught = learn(cohort), teach(cohort)
    features = np.array(taught.features)
    (folder,) = (cache / room).iterdir()
    (folder / RECORD).unlink()
    for file in folder.glob("*.npy"):
        file.write_bytes(b"half")
    assert_same(learn(cohort), before)
    np.testing.assert_array_equal(teach(cohort).features, features)
    assert_one_of_each(cache)


# --- many writers ----------------------------------------------------------------------------------------------------


def no_lock(file, how):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


KINDS = {
    "locks": lambda rank: None,
    "no locks": lambda rank: setattr(fcntl, "flock", no_lock),
    # Held on one machine alone: both writers believe that they are the only one.
    "local locks": lambda rank: (
        setattr(fcntl, "flock", lambda file, how: None),
        setattr(platform, "node", lambda: f"machine{rank}"),
    ),
}


def compete(rank, start, told, root, base):
    """Want the same lesson and student as the other process, at the same time, under each kind of lock."""
    torch.set_num_threads(1)
    try:
        cohort, asked, rows = read_cohort(root, ["MINI1"]), count_asked(setattr), np.arange(30)
        taught = count_epochs(setattr)
        for kind, prepare in KINDS.items():
            prepare(rank)
            os.environ["PEKA_LITE_CACHE"] = f"{base}/{kind}"
            asked.clear(), taught.clear()
            start.wait(timeout=120)
            got = learn(cohort, rows=rows)
            start.wait(timeout=120)
            student = teach(cohort, rows=rows)
            digest = hashlib.sha256(student.features.tobytes() + got.labels.tobytes() + got.embedding.tobytes())
            kept = (student.folder / "features.npy").stat().st_ino
            told.put((kind, sum(asked), len(taught), (digest.hexdigest(), kept)))
    except BaseException:
        start.abort()  # the other one waits for this one
        raise


@pytest.fixture(scope="module")
def raced(mini_root, tmp_path_factory):
    """Where two processes raced, and what they said of it."""
    base = tmp_path_factory.mktemp("raced")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peka_lite.experiments.cache", "peka_lite.teachers.scfoundation"])
    start, told = context.Barrier(2), context.Queue()
    jobs = [context.Process(target=compete, args=(rank, start, told, str(mini_root), str(base))) for rank in (0, 1)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(180)
    assert [job.exitcode for job in jobs] == [0, 0]
    said = [told.get(timeout=10) for _ in range(2 * len(KINDS))]
    return base, said


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_that_want_one_student_get_the_same_and_leave_nothing_else(raced, kind):
    base, said = raced
    said = [words for words in said if words[0] == kind]
    assert len({found for *_, found in said}) == 1  # the same numbers, in the very file
    assert_one_of_each(base / kind)


def test_under_a_lock_the_work_is_done_once(raced, mini_root):
    spots = read_cohort(mini_root, ["MINI1"]).slides[0].n_spots
    done = [(asked, taught) for kind, asked, taught, _ in raced[1] if kind == "locks"]
    assert np.sum(done, axis=0).tolist() == [spots, 1]
