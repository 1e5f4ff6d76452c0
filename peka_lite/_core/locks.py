"""Lock output folders between processes, also on shared disks, and move results into place.

Locks only save work. Without them, or if other machines do not see them, results are still complete: each writer has
another work folder, and a result appears by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

RECORD = "record.json"  # written last: a folder without it is incomplete
PARTIAL = ".partial"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # NFS without lockd, Lustre without flock
PATIENCE = 1  # seconds of waiting before a message
#: Work folders of `lock_output_folder` by process and output folder.
_LOCKED: ContextVar[dict[tuple[int, Path], Path]] = ContextVar("locked", default=MappingProxyType({}))


@contextlib.contextmanager
def lock(out: Path) -> Iterator[bool]:
    """Lock `out` for this process; other processes wait until it has finished or ended.

    Yields True if `out` is locked, False if the disk has no locks and no process waits. On NFS, Linux locks on the
    server (flock(2): since 2.6.12), so that machines wait for each other too. Some mounts (``nolock``, ``local_lock``,
    Lustre's ``localflock``) lock on one machine only, which cannot be detected.

    Raises
    ------
    OSError
        If no lock file can be created or opened beside `out`. Folders created for it are removed.
    """
    with _acquire(out) as private:
        yield private is None


@contextlib.contextmanager
def lock_work_folder(out: Path) -> Iterator[Path]:
    """Lock `out`, as `lock`, and yield its work folder, which is removed afterwards if there are no locks."""
    with _acquire(out) as private:
        yield private or partial_path(out, locked=True)


@contextlib.contextmanager
def lock_output_folder(out: Path) -> Iterator[Path]:
    """Lock `out`, as `lock_work_folder`, and yield the folder that becomes it: ``{out}.partial`` if there are locks.

    A nested call yields the same folder: a sweep's point locks the folder of its run, and the run does so again.
    """
    key, locked = (os.getpid(), out.absolute()), _LOCKED.get()
    if key in locked:
        yield locked[key]
        return
    with _acquire(out) as private:
        work = private or out.with_name(out.name + PARTIAL)
        token = _LOCKED.set({**locked, key: work})
        try:
            yield work
        finally:
            _LOCKED.reset(token)


@contextlib.contextmanager
def _acquire(out: Path) -> Iterator[Path | None]:
    """Lock `out` and yield None, or without locks a work folder that no other writer has."""
    path = out.with_name(f".{out.name}.lock")
    new_folders = [folder for folder in path.parents if not os.path.lexists(folder)]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = None if fcntl is None else _lock(path, out)
        except OSError as error:
            if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise type(error)(f"{out} cannot be written: {error.strerror} ({error.filename})") from None
        private = partial_path(out, locked=False) if lock is None else None
        try:
            yield private
        finally:
            if lock is None:
                shutil.rmtree(private, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # another user's file may not be removed
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # closing is not enough: a forked child has the file open too
                    fcntl.flock(lock, fcntl.LOCK_UN)
                os.close(lock)
    except BaseException:
        for folder in new_folders:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise


def partial_path(out: Path, *, locked: bool) -> Path:
    """Return the work folder of `out`: that of a stopped job if this process has locked `out`, else a new one.

    Its name includes the machine's, so that two machines never share a folder, even if locks are per machine.
    """
    writer = platform.node()
    if not locked:
        writer += f"-{os.getpid()}-{secrets.token_hex(4)}"
    return out.with_name(f"{out.name}.{writer}.partial")


def move_into_place(work: Path, out: Path) -> None:
    """Move a complete folder to `out` by one rename; remove `work` if another writer was first."""
    while True:
        try:
            os.replace(work, out)
            return
        except OSError:  # a folder that is not empty is never replaced
            if not out.is_dir():
                raise
        if (out / RECORD).is_file():
            shutil.rmtree(work)
            return
        # An incomplete folder, as a clean-up by age leaves: move it away, unless another writer has completed it.
        aside = partial_path(out, locked=False)
        with contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)
            if (aside / RECORD).is_file():
                move_into_place(aside, out)
            else:
                shutil.rmtree(aside)


def move_if_absent(work: Path, out: Path) -> None:
    """Move a complete folder to `out`, or raise FileExistsError if something is there."""
    try:
        if not os.path.lexists(out):
            os.replace(work, out)  # never replaces a file, or a folder that is not empty
            return
    except OSError:
        if not os.path.lexists(out):
            raise
    raise FileExistsError(f"{out} is there already: give another --out, or remove it")


def _lock(path: Path, out: Path) -> int | None:
    """Open and lock the file at `path`; return None if there are no locks."""
    while True:
        created = True
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            created = False
            try:
                lock = _open_lock(path)
            except FileNotFoundError:
                continue
        except FileNotFoundError:  # another process failed and removed the folder that it had created
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            _wait(lock, out)
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(lock)
                if created:  # another process's file may be locked
                    path.unlink(missing_ok=True)
                return None
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                os.close(lock)
                raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # the other process removed it meanwhile


def _open_lock(path: Path) -> int:
    """Open an existing lock file; a link, a pipe or a folder is an error."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        lock = os.open(path, os.O_RDWR | flags)
    except PermissionError:  # another user's file: reading is enough to wait for it
        lock = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise FileExistsError(errno.EEXIST, "not a regular file, remove it", str(path))
    return lock


def _wait(lock: int, out: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
    logging.getLogger("peka_lite").warning(f"waiting for another process that writes {out}")
    fcntl.flock(lock, fcntl.LOCK_EX)
