"""Many writers of one folder, on a shared disk too: who waits, where each one works, and how a result takes its place.

A lock only saves work. Where a disk has none, or one that other machines do not see, every result is still whole: no
two writers work in one place, and a result appears by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

RECORD = "record.json"  # the last file to be written: a folder without it is not whole
PARTIAL = ".partial"
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # NFS without lockd, Lustre without flock
PATIENCE = 1  # seconds of waiting without a word
_HELD: ContextVar[dict[tuple[int, Path], Path]] = ContextVar(
    "held", default=MappingProxyType({})
)  # of `lock_output_folder`


@contextlib.contextmanager
def lock(out: Path) -> Iterator[bool]:
    """Hold `out` for this process; another one that wants it waits until this one is through, or gone.

    Gives True where the lock is held, False where there are no locks and nobody waits. On NFS, Linux asks the server
    (flock(2): since 2.6.12), so that machines wait for each other too; some mounts (``nolock``, ``local_lock``,
    Lustre's ``localflock``) hold the lock on one machine alone, which nobody can see from here.

    Raises
    ------
    OSError
        If no lock's file can be made or opened beside `out`; a folder that was made for it goes again.
    """
    with _claim(out) as own:
        yield own is None


@contextlib.contextmanager
def lock_work_folder(out: Path) -> Iterator[Path]:
    """Hold `out`, as `lock`, and give the folder to work on it in; without a lock nothing of it stays behind."""
    with _claim(out) as own:
        yield own or partial_path(out, held=True)


@contextlib.contextmanager
def lock_output_folder(out: Path) -> Iterator[Path]:
    """Hold `out`, as `lock_work_folder`, and give the folder that becomes it: ``{out}.partial``, where there are locks.

    Inside itself it gives the same folder again: a sweep's point holds the folder of its run, and so does the run.
    """
    key, held = (os.getpid(), out.absolute()), _HELD.get()
    if key in held:
        yield held[key]
        return
    with _claim(out) as own:
        work = own or out.with_name(out.name + PARTIAL)
        token = _HELD.set({**held, key: work})
        try:
            yield work
        finally:
            _HELD.reset(token)


@contextlib.contextmanager
def _claim(out: Path) -> Iterator[Path | None]:
    """Hold `out`, and give None, or where there are no locks the place to work in that no other writer has."""
    path = out.with_name(f".{out.name}.lock")
    made = [folder for folder in path.parents if not os.path.lexists(folder)]
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = None if fcntl is None else _lock(path, out)
        except OSError as error:
            if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise type(error)(f"{out} cannot be written: {error.strerror} ({error.filename})") from None
        own = partial_path(out, held=False) if lock is None else None
        try:
            yield own
        finally:
            if lock is None:
                shutil.rmtree(own, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):  # in a folder of others, another user's file stays
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not by closing alone: a forked child has the file open too
                    fcntl.flock(lock, fcntl.LOCK_UN)
                os.close(lock)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        raise


def partial_path(out: Path, *, held: bool) -> Path:
    """Return where to work on `out`: where a stopped job left it if this process holds `out`, else a new place.

    The name holds the machine's, so that two machines share no place even where a lock is held on one machine alone.
    """
    writer = platform.node()
    if not held:
        writer += f"-{os.getpid()}-{secrets.token_hex(4)}"
    return out.with_name(f"{out.name}.{writer}.partial")


def move_into_place(work: Path, out: Path) -> None:
    """Move a whole folder to its place by one rename; where another writer was first, his stays and `work` goes."""
    while True:
        try:
            os.replace(work, out)
            return
        except OSError:  # a folder that holds files is never replaced
            if not out.is_dir():
                raise
        if (out / RECORD).is_file():
            shutil.rmtree(work)
            return
        # Half a folder, as a clean-up by age leaves: it is moved away, unless another writer has mended it meanwhile.
        aside = partial_path(out, held=False)
        with contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)
            if (aside / RECORD).is_file():
                move_into_place(aside, out)
            else:
                shutil.rmtree(aside)


def move_if_absent(work: Path, out: Path) -> None:
    """Move a whole folder to a place where nothing is; what has come there meanwhile stays."""
    try:
        if not os.path.lexists(out):
            os.replace(work, out)  # never in the place of a file, or of a folder that holds files
            return
    except OSError:
        if not os.path.lexists(out):
            raise
    raise FileExistsError(f"{out} is there already: give another --out, or remove it")


def _lock(path: Path, out: Path) -> int | None:
    """Return the file at `path`, open and locked; None where there are no locks."""
    while True:
        made = True
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            made = False
            try:
                lock = _open_lock(path)
            except FileNotFoundError:
                continue
        except FileNotFoundError:  # who was first has failed, and the folder that he made went with him
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        try:
            _wait(lock, out)
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(lock)
                if made:  # another's file may be held by one who had better luck
                    path.unlink(missing_ok=True)
                return None
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                os.close(lock)
                raise
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)  # its holder removed it while this one waited


def _open_lock(path: Path) -> int:
    """Open a lock's file that is there; a link, a pipe or a folder of its name is an error."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        lock = os.open(path, os.O_RDWR | flags)
    except PermissionError:  # another user's, left or held: to be waited for, reading it is enough
        lock = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(lock).st_mode):
        os.close(lock)
        raise FileExistsError(errno.EEXIST, "no plain file is there, remove it", str(path))
    return lock


def _wait(lock: int, out: Path) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr, a closed pipe, a closed file
        sys.stderr.write(f"waiting for another process that writes {out}\n")
        sys.stderr.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
