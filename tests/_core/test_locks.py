"""Lock output folders, and move results into place with and without locks."""

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


def write_folder(path, content, complete=True):
    path.mkdir()
    (path / "file").write_text(content)
    if complete:
        (path / RECORD).write_text("{}")
    return path


def names(path):
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_disk_without_locks_yields_false(tmp_path, monkeypatch, code):
    with lock(tmp_path / "new" / "a") as locked:
        assert locked
        assert names(tmp_path / "new") == [".a.lock"]
    refuse(monkeypatch, code)
    with lock(tmp_path / "new" / "a") as locked:
        assert not locked
    assert names(tmp_path / "new") == []


def test_failed_lock_keeps_file_of_other_owner(tmp_path, monkeypatch):
    with lock(tmp_path / "a"):
        refuse(monkeypatch, errno.ENOLCK)
        with lock(tmp_path / "a") as locked:
            assert not locked
        assert names(tmp_path) == [".a.lock"]
    assert names(tmp_path) == []


def test_other_lock_errors_are_raised(tmp_path, monkeypatch):
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output"), lock(tmp_path / "a"):
        pass


def test_without_fcntl_there_are_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with lock(tmp_path / "a") as locked:
        assert not locked


def test_work_folder_is_reused_only_when_locked_and_on_the_same_machine(tmp_path, monkeypatch):
    def work_folders(locked):
        return [partial_path(tmp_path / "a", locked=locked) for _ in range(2)]

    first, again = work_folders(locked=True)
    assert first == again
    assert len({first, *work_folders(locked=False)}) == 3
    monkeypatch.setattr(locks.platform, "node", lambda: "elsewhere")
    assert partial_path(tmp_path / "a", locked=True) != first


def test_without_a_lock_a_failed_job_leaves_nothing(tmp_path, monkeypatch):
    def fail():
        with contextlib.suppress(KeyboardInterrupt), lock_work_folder(tmp_path / "a") as work:
            write_folder(work, "half")
            raise KeyboardInterrupt

    fail()
    assert names(tmp_path) == [partial_path(tmp_path / "a", locked=True).name]
    refuse(monkeypatch, errno.ENOLCK)
    fail()
    assert names(tmp_path) == [partial_path(tmp_path / "a", locked=True).name]


def test_first_result_stays_and_second_is_removed(tmp_path):
    move_into_place(write_folder(tmp_path / "one", "one"), tmp_path / "a")
    inode = (tmp_path / "a").stat().st_ino
    move_into_place(write_folder(tmp_path / "two", "two"), tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert ((tmp_path / "a" / "file").read_text(), (tmp_path / "a").stat().st_ino) == ("one", inode)


def test_incomplete_folder_is_replaced(tmp_path):
    write_folder(tmp_path / "a", "half", complete=False)
    move_into_place(write_folder(tmp_path / "one", "one"), tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "one"


def test_folder_completed_by_another_writer_stays(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", "half", complete=False)
    rename = os.rename

    def late(source, to):
        monkeypatch.setattr(os, "rename", rename)
        move_into_place(write_folder(tmp_path / "two", "two"), tmp_path / "a")
        rename(source, to)

    monkeypatch.setattr(os, "rename", late)
    move_into_place(write_folder(tmp_path / "one", "one"), tmp_path / "a")
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "two"


def test_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        move_into_place(tmp_path / "nothing", tmp_path / "a")
