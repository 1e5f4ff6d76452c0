"""Stop a command on SIGTERM, SIGHUP or Ctrl-C once, and keep finished parts."""

import contextlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

import peka_lite.cli.main as cli
from peka_lite._core._signals import SIGNALS, Stopped, defer_signals, exit_on_signals

MESSAGE = "peka-lite: stopped; finished parts are stored, and the same command resumes\n"


@pytest.fixture
def report(monkeypatch):
    """Return a function that runs another function as the command `report`."""

    def run(action):
        monkeypatch.setattr(cli, "_report", lambda **_: action())
        return cli.main(["report", "x", "--out", "y"])

    return run


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_ends_a_command(report, capsys, number):
    before = [signal.getsignal(each) for each in SIGNALS]
    assert report(lambda: signal.raise_signal(number) or 0) == 128 + number
    assert capsys.readouterr().err == MESSAGE
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_clean_up_is_not_interrupted(report, tmp_path, number):
    def work():
        half = tmp_path / "half"
        half.write_text("")
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            for _ in range(3):
                signal.raise_signal(number)
            half.unlink()

    assert report(work) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_second_signal_raises_after_the_first_was_suppressed(report):
    def work():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        return 0

    assert report(work) == 130


def test_ignored_and_handled_signals_are_unchanged(report):
    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        assert report(lambda: signal.raise_signal(signal.SIGHUP) or signal.raise_signal(signal.SIGTERM) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert seen == [1]


def test_command_runs_in_a_thread(report):
    statuses = []
    thread = threading.Thread(target=lambda: statuses.append(report(lambda: 0)))
    thread.start()
    thread.join()
    assert statuses == [0]


def test_other_processes_of_a_run_end_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with exit_on_signals():
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signal_is_deferred_until_the_block_ends():
    steps = []
    with pytest.raises(Stopped), exit_on_signals(), defer_signals():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        steps.append("first")
    assert steps == ["first"]
    with pytest.raises(KeyboardInterrupt), defer_signals() as raise_deferred:  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        steps.append("second")
        raise_deferred()
        steps.append("never")
    assert steps == ["first", "second"]


def test_job_stopped_while_writing_tiles_leaves_nothing(tmp_path):
    code = """
    import os, signal, sys
    from pathlib import Path
    import numpy as np
    import peka_lite.cli.main as cli
    from peka_lite.data._format import write_tiles
    def tiles():
        for i in range(30):
            if i == 9:
                os.kill(os.getpid(), signal.SIGTERM)
            cut.append(i)
            yield np.random.default_rng(i).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    cut = []
    cli._report = lambda **_: write_tiles(Path("t.h5"), tiles(), list("a" * 30), np.zeros((30, 2)), attributes={})
    status = cli.main(["report", "x", "--out", "y"])
    print(len(cut), list(Path().iterdir()))
    sys.exit(status)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (143, MESSAGE)
    assert done.stdout == "10 []\n"


def test_run_stopped_by_a_signal_can_be_resumed(tmp_path, mini_root):
    out = tmp_path / "out"
    command = ["run", "--cohort", mini_root, "--method", "none", "--features", "depth", "--n-splits", "3"]
    command = [sys.executable, "-m", "peka_lite", *map(str, [*command, "--n-genes", "5", "--no-maps", "--out", out])]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out.partial").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err[-len(MESSAGE) :]) == (143, MESSAGE)
    assert not out.exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yml", "metrics.csv", "predictions.h5ad", "slides.parquet", "summary.json",
    ]  # fmt: skip
