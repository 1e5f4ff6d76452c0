"""Hash files once per process."""

import hashlib
import os

import pytest

from peka_lite._core import hashing


@pytest.fixture
def reads(monkeypatch):
    """Record the files whose content is hashed."""
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (read.append(file.name), digest(file, name))[1])
    return read


def test_a_file_is_read_once_by_any_of_its_names(tmp_path, reads):
    path, link = tmp_path / "w.pt", tmp_path / "link.pt"
    path.write_bytes(b"weights")
    link.symlink_to(path)
    assert {hashing.sha256(p) for p in (path, link, path)} == {hashlib.sha256(b"weights").hexdigest()}
    assert reads == [str(path)]


@pytest.mark.parametrize("how", ["longer", "later", "replaced"])
def test_a_changed_file_is_read_again(tmp_path, reads, how):
    path = tmp_path / "w.pt"
    path.write_bytes(b"weights")
    hashing.sha256(path)
    stat = path.stat()
    content = b"weights of another" if how == "longer" else b"WEIGHTS"
    other = tmp_path / "other.pt" if how == "replaced" else path
    other.write_bytes(content)
    os.utime(other, ns=(0, stat.st_mtime_ns + (how == "later")))
    os.replace(other, path)
    assert hashing.sha256(path) == hashlib.sha256(content).hexdigest()
    assert len(reads) == 2


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        hashing.sha256(tmp_path / "none.pt")
