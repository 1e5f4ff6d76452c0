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
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

RECORD = "record.json"  # the last file to be written: a folder without it is not whole
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # NFS without lockd, Lustre without flock


@contextlib.contextmanager
def alone(out: Path) -> Iterator[bool]:
    """Hold `out` for this process; another one that wants it waits until this one is through, or gone.

    Gives True where the lock is held, False where there are no locks and nobody waits. On NFS, Linux asks the server
    (flock(2): since 2.6.12), so that machines wait for each other too; some mounts (``nolock``, ``local_lock``,
    Lustre's ``localflock``) hold the lock on one machine alone, which nobody can see from here.
    """
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = None if fcntl is None else _lock(path)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            lock.close()


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """Hold `out`, as `alone`, and give the folder to work on it in; without a lock nothing of it stays behind."""
    with alone(out) as held:
        work = partial_of(out, held=held)
        try:
            yield work
        finally:
            if not held:
                shutil.rmtree(work, ignore_errors=True)


def partial_of(out: Path, *, held: bool) -> Path:
    """Return where to work on `out`: where a stopped job left it if this process holds `out`, else a new place.

    The name holds the machine's, so that two machines share no place even where a lock is held on one machine alone.
    """
    writer = platform.node()
    if not held:
        writer += f"-{os.getpid()}-{secrets.token_hex(4)}"
    return out.with_name(f"{out.name}.{writer}.partial")


def put(work: Path, out: Path) -> None:
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
        aside = partial_of(out, held=False)
        with contextlib.suppress(FileNotFoundError):
            os.rename(out, aside)
            if (aside / RECORD).is_file():
                put(aside, out)
            else:
                shutil.rmtree(aside)


def _lock(path: Path) -> TextIO | None:
    """Return the file at `path`, locked; None where there are no locks."""
    while True:
        try:
            lock, made = path.open("x"), True
        except FileExistsError:
            try:
                lock, made = path.open("r+"), False
            except FileNotFoundError:
                continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        except OSError as error:
            if error.errno in NO_LOCKS:
                lock.close()
                if made:  # another's file may be held by one who had better luck
                    path.unlink(missing_ok=True)
                return None
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                lock.close()
                raise
        lock.close()  # its holder removed it while this one waited
