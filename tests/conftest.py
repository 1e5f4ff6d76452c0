"""Provide shared fixtures: a small synthetic cohort, and external data that may be absent."""

import io
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest

matplotlib.use("Agg")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory):
    """Write a small synthetic cohort: 3 patients, 4 slides, 40 to 60 spots each."""
    from peka_lite.data import write_mini_cohort

    root = tmp_path_factory.mktemp("cohort") / "mini"
    return write_mini_cohort(root, seed=7, n_patients=3, n_slides=4, spots_per_slide=(40, 60))


@pytest.fixture(scope="session")
def mini_cohort(mini_root):
    """Read the small synthetic cohort."""
    from peka_lite.data import read_cohort

    return read_cohort(mini_root)


@pytest.fixture(scope="session")
def golden():
    """Return the folder with results of reference implementations."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("../shared/golden is absent: reference numbers cannot be compared")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def her2st():
    """Return the folder of real slides in HEST-1k's layout."""
    if not (SHARED / "real" / "her2st").is_dir():
        pytest.skip("../shared/real/her2st is absent: real slides cannot be read")
    return SHARED / "real" / "her2st"


@pytest.fixture(scope="module")
def isolated_cache(tmp_path_factory):
    """Use another cache for one test file, without the students of other files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEKA_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tiny_backbone():
    """Register a backbone ``"tiny"`` that trains in a moment, for one test file."""
    from tiny import TINY

    from peka_lite.backbones.registry import _BACKBONES

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_BACKBONES, "tiny", TINY)
        yield


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes the folder of a finished run, without running it."""
    from run_folders import write_run_folder

    return lambda name, **settings: write_run_folder(tmp_path / "runs" / name, **settings)


class Pipe(io.StringIO):
    """Replace a stderr that is not a terminal; tests can wait for lines."""

    def __init__(self):
        super().__init__()
        self.written = threading.Semaphore(0)

    def write(self, text):
        self.written.release(text.count("\n") or 1)
        return super().write(text)

    def wait_for(self, pattern, times=1):
        """Wait until `times` lines match a regular expression."""
        while sum(bool(re.fullmatch(pattern, line)) for line in self.lines) < times:
            assert self.written.acquire(timeout=60), f"no line was written: {self.lines}"

    @property
    def lines(self):
        """Return the lines, without the time at their start."""
        return [re.sub(r"^\[[\d smin]+\] ", "", line) for line in self.getvalue().splitlines()]


@pytest.fixture
def pipe(monkeypatch):
    """Show messages in a log, with a line every hundredth of a second instead of every half minute."""
    from peka_lite._core import progress

    monkeypatch.setattr(progress, "EVERY", 0.01)
    pipe = Pipe()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=pipe))  # pytest sets sys.stderr after the fixtures
    with progress.show_messages():
        yield pipe
