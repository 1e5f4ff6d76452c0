"""Who waits, who works where, and what is in place afterwards: with locks, without, and with some that lie."""

import contextlib
import errno
import fcntl
import os

import pytest

from peka_lite._core import locks
from peka_lite._core.locks import RECORD, lock, lock_work_folder, move_into_place, partial_path


def refuse(monkeypatch, code):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)


def folder(path, says, whole=True):
    path.mkdir()
    (path / "file").write_text(says)
    if whole:
        (path / RECORD).write_text("{}")
    return path


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_disk_without_locks_is_worked_on_without(tmp_path, monkeypatch, code):
    with lock(tmp_path / "new" / "a") as held:
        assert held
        assert names(tmp_path / "new") == [".a.lock"]
    refuse(monkeypatch, code)
    with lock(tmp_path / "new" / "a") as held:
        assert not held
    assert names(tmp_path / "new") == []


def test_who_gets_no_lock_leaves_the_file_of_who_has_it(tmp_path, monkeypatch):
    with lock(tmp_path / "a"):
        refuse(monkeypatch, errno.ENOLCK)
        with lock(tmp_path / "a") as held:
            assert not held
        assert names(tmp_path) == [".a.lock"]
    assert names(tmp_path) == []


def test_any_other_error_is_told(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), lock(tmp_path / "a"):
        pass


def test_without_fcntl_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with lock(tmp_path / "a") as held:
        assert not held


def test_a_place_is_found_again_only_under_a_lock_and_on_the_same_machine(tmp_path, monkeypatch):
    def places(held):
        return [partial_path(tmp_path / "a", held=held) for _ in range(2)]

    first, again = places(held=True)
    assert first == again
    assert len({first, *places(held=False)}) == 3
    monkeypatch.setattr(locks.platform, "node", lambda: "elsewhere")
    assert partial_path(tmp_path / "a", held=True) != first


def test_without_a_lock_a_failed_job_leaves_nothing(tmp_path, monkeypatch):
    def fail():
        with contextlib.suppress(KeyboardInterrupt), lock_work_folder(tmp_path / "a") as work:
            folder(work, "half")
            raise KeyboardInterrupt

    fail()
    assert names(tmp_path) == [partial_path(tmp_path / "a", held=True).name]
    refuse(monkeypatch, errno.ENOLCK)
    fail()
    assert names(tmp_path) == [partial_path(tmp_path / "a", held=True).name]


def test_the_first_writer_stays_and_the_second_goes(tmp_path):
    move_into_place(folder(tmp_path / "one", "one"), tmp_path / "a")
    there = (tmp_path / "a").stat().st_ino
    move_into_place(folder(tmp_path / "two", "two"), tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert ((tmp_path / "a" / "file").read_text(), (tmp_path / "a").stat().st_ino) == ("one", there)


def test_half_a_folder_gives_way(tmp_path):
    folder(tmp_path / "a", "half", whole=False)
    move_into_place(folder(tmp_path / "one", "one"), tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "one"


def test_half_a_folder_that_another_writer_has_just_mended_stays(tmp_path, monkeypatch):
    folder(tmp_path / "a", "half", whole=False)
    rename = os.rename

    def late(source, to):
        monkeypatch.setattr(os, "rename", rename)
        move_into_place(folder(tmp_path / "two", "two"), tmp_path / "a")
        rename(source, to)

    monkeypatch.setattr(os, "rename", late)
    move_into_place(folder(tmp_path / "one", "one"), tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "two"


def test_what_cannot_be_put_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "nothing", tmp_path / "a")
