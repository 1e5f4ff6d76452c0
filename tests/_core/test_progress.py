"""Report long work: first its plan, then bars in a terminal and plain lines elsewhere."""

import importlib
import io
import logging
import re
import sys
import threading

import numpy as np
import pytest
from tiny import task

import peka_lite.experiments.features
import peka_lite.experiments.targets
from peka_lite._core import progress
from peka_lite._core.progress import logger, progress_bar, show_messages, stage, steps
from peka_lite.adapters import adapt
from peka_lite.backbones import embed_tiles, load_backbone
from peka_lite.cli.main import main
from peka_lite.experiments import RunConfig, run, train
from peka_lite.transfer import TransferModel, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("isolated_cache", "tiny_backbone"),
]


def lines_are_logged():
    return "progress" in {thread.name for thread in threading.enumerate()}


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    assert progress._open == []
    for thread in threading.enumerate():
        if thread.name == "progress":
            thread.join(60)
            assert not thread.is_alive()


def config(root, **changes):
    settings = {"cohort": str(root), "backbone": "tiny", "weights": "random", "epochs": 2, "n_splits": 3, "n_genes": 5}
    if changes.get("method") != "none":
        settings |= {"label_method": "kmeans", "n_clusters": 3}
    return RunConfig(**settings | changes)


@pytest.fixture
def count(monkeypatch, caplog):
    """Count the calls or items of expensive functions in a test, and log messages."""
    caplog.set_level(logging.INFO, logger="peka_lite")
    done = dict.fromkeys(("fit", "take_step", "embed_tiles", "embed_cohort", "color_features"), 0)

    def counted(module, name, size=lambda *_: 1):
        original = getattr(module, name)

        def call(*args, **options):
            done[name] += size(*args)
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    counted(peka_lite.experiments.features, "fit")
    counted(importlib.import_module("peka_lite.transfer.fit"), "take_step")
    counted(peka_lite.experiments.features, "embed_tiles", lambda _, tiles: len(tiles))
    counted(peka_lite.experiments.targets, "embed_cohort", lambda _, cohort: len(cohort))
    counted(peka_lite.experiments.features, "color_features", lambda tiles: len(tiles))
    return done


def logged(caplog):
    """Return the messages since the last call."""
    text = "\n".join(caplog.messages)
    caplog.clear()
    return text


def planned(text):
    """Return the plan's numbers in the order of `count`."""
    (line,) = [line for line in text.splitlines() if line.startswith("plan: ")]
    words = ("trainings?", "optimizer steps", "tiles to embed", "spots for the teacher", "tiles to measure")
    matches = [re.search(rf"([\d,]+) {word}", line) for word in words]
    return [int(match[1].replace(",", "")) if match else 0 for match in matches]


@pytest.mark.parametrize(
    ("settings", "trainings"),
    [
        ({"protocol": "paper"}, 1),
        ({"protocol": "hest"}, 3),
        ({"protocol": "strict"}, 6),
        ({"protocol": "strict", "train_share": 0.5, "batch_size": 7, "epochs": 1}, 6),
        ({"protocol": "hest", "features": "frozen+student"}, 3),
        ({"protocol": "strict", "method": "none"}, 0),
        ({"protocol": "strict", "method": "none", "features": "teacher"}, 0),
        ({"protocol": "strict", "method": "none", "features": "color"}, 0),
        ({"protocol": "strict", "method": "none", "features": "depth"}, 0),
    ],
)
def test_plan_of_a_run_equals_its_work(mini_root, tmp_path, monkeypatch, caplog, count, settings, trainings):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    run(config(mini_root, **settings), tmp_path / "a", maps=False, progress=True)
    assert planned(logged(caplog)) == list(count.values())
    assert count["fit"] == trainings
    if settings.get("features") not in ("teacher", "depth"):
        assert count["embed_tiles"] + count["color_features"] > 0
    # Again: finished parts are in the cache and not in the plan.
    before = dict(count)
    run(config(mini_root, **settings), tmp_path / "b", maps=False, progress=True)
    text = logged(caplog)
    assert planned(text) == [count[name] - before[name] for name in count]
    assert count["fit"] == trainings
    if cached := trainings + (settings.get("features") == "frozen+student"):
        assert f"plan: no training, {cached} from the cache" in text


@pytest.mark.parametrize(("fold", "trainings"), [(None, 4), (1, 3)])
def test_plan_of_a_training_equals_its_work(mini_root, tmp_path, monkeypatch, caplog, count, fold, trainings):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    train(config(mini_root, protocol="strict", epochs=1), tmp_path / "a", fold=fold, progress=True)
    assert planned(logged(caplog)) == list(count.values())
    assert count["fit"] == trainings


def test_plan_counts_only_parts_missing_from_the_cache(mini_root, tmp_path, monkeypatch, caplog, count):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    train(config(mini_root, protocol="hest", epochs=1), tmp_path / "a", fold=1)
    caplog.clear()
    before = dict(count)
    run(config(mini_root, protocol="hest", epochs=1), tmp_path / "b", maps=False, progress=True)
    text = logged(caplog)
    assert planned(text) == [count[name] - before[name] for name in count]
    assert text.startswith("plan: 2 trainings, ")
    assert "1 more from the cache" in text


def test_every_long_part_of_a_run_has_a_name(mini_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    named = []

    class Recorded(list):
        def append(self, text):
            named.append(re.sub(r" [\d,?]+ of .*", "", text() if callable(text) else text))
            super().append(text)

    monkeypatch.setattr(progress, "_open", Recorded())
    run(config(mini_root, protocol="strict", epochs=1), tmp_path / "a", progress=True)
    assert {
        "reading the cohort", "hashing the data: slide", "training", "loading tiny", "fitting the teacher",
        "copying tiles to a memory map: part", "transfer:", "embed tiles:", "choosing genes: fold",
        "alpha: folds left out", "probe: fold", "maps: slide",
    } <= set(named)  # fmt: skip
    assert any(name.startswith("clustering ") for name in named)


def test_long_step_is_logged_repeatedly_with_its_parts(pipe):
    with stage("run"):
        for k in steps("training", ["a", "b", "c"]):
            if k == "b":
                with progress_bar(desc="transfer", total=1200, initial=100, unit=" steps", enabled=True) as shown:
                    shown.update(20)
                    shown.set_postfix(loss="1.2")
                    left = r"[\d:]+ so far, [\d:]+ left"
                    pipe.wait_for(rf"run; training 2 of 3; transfer: 120 of 1200 steps, loss=1.2, {left}", times=3)
    assert re.match(r"\[\d+ s\] run", pipe.getvalue())


def test_text_of_a_stage_may_be_a_function(pipe):
    texts = iter(["0 of 2 done", *["1 of 2 done"] * 10**6])
    with stage(lambda: next(texts)), stage("clustering 30,414 spots"):
        pipe.wait_for("0 of 2 done; clustering 30,414 spots")
        pipe.wait_for("1 of 2 done; clustering 30,414 spots", times=2)


def test_training_shows_its_step_during_a_slow_batch(pipe):
    tiles, teacher, labels = task(20)

    class Slow:
        ids, shape = np.arange(20, dtype=np.uint64), tiles.shape

        def __len__(self):
            return len(tiles)

        def __getitem__(self, rows):
            pipe.wait_for(r"transfer: 0 of 2 steps, .* left")
            return tiles[rows]

    student = adapt(load_backbone("tiny", weights="random"), "lora", r=4)
    model = TransferModel(student, teacher_dim=6, n_classes=3)
    assert len(fit(model, Slow(), teacher, labels, epochs=1, batch_size=10, progress=True)) == 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_lines_end_with_the_work_after_any_error(pipe, error):
    def work():
        with stage("run"):
            for _ in progress_bar(range(3), desc="training", enabled=True):
                pipe.wait_for("run; training: 0 of 3.*")
                raise error

    with pytest.raises(error):
        work()


def test_failed_training_ends_its_bars(pipe):
    _, teacher, labels = task(20)

    class Broken:
        ids = np.arange(20, dtype=np.uint64)

        def __len__(self):
            return 20

        def __getitem__(self, rows):
            raise OSError("gone")

    student = adapt(load_backbone("tiny", weights="random"), "lora", r=4)
    model = TransferModel(student, teacher_dim=6, n_classes=3)
    for call in (
        lambda: fit(model, Broken(), teacher, labels, epochs=1, batch_size=10, progress=True),
        lambda: embed_tiles(student, Broken(), progress=True),
    ):
        with pytest.raises(OSError, match="gone") as caught:
            call()
        assert progress._open == [], caught


@pytest.mark.parametrize("place", ["terminal", "notebook"])
def test_terminal_and_notebook_get_bars_and_no_lines(pipe, capsys, monkeypatch, place):
    if place == "terminal":
        monkeypatch.setattr(pipe, "isatty", lambda: True, raising=False)
    else:
        monkeypatch.setattr(type(pipe), "__module__", "ipykernel.iostream")
    with stage("run"):
        assert not lines_are_logged()
        logger.info("plan: 3 trainings")
        for _ in steps("training", range(3)):
            for _ in progress_bar(range(4), desc="embed tiles", enabled=True):
                pass
    assert pipe.getvalue() == "plan: 3 trainings\n"
    assert "training 2 of 3, embed tiles: 100%" in capsys.readouterr().err


def test_terminal_bar_is_not_shown_in_a_notebook(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "__module__", "ipykernel.iostream")
    monkeypatch.setattr("tqdm.auto.tqdm", lambda items, *, disable, **_: disable)  # its stream claims to be a terminal
    assert progress_bar(range(4), desc="draw the synthetic cohort", enabled=None) is True
    assert progress_bar(range(4), desc="embed tiles", enabled=True) is False


def test_library_logs_its_plan_and_prints_nothing(mini_root, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, logger="peka_lite")
    run(config(mini_root, method="none", features="color"), tmp_path / "a", maps=False, progress=True)
    assert capsys.readouterr().err == ""
    assert logged(caplog).startswith("plan: no training, ")


def test_no_thread_is_started_without_a_handler():
    with stage("run"):
        assert not lines_are_logged()


def test_only_the_first_process_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with show_messages(), stage("run"):
        assert not lines_are_logged()
        logger.warning("plan: 3 trainings")
    assert capsys.readouterr().err == ""


def test_work_continues_with_closed_stderr(monkeypatch):
    tried = threading.Semaphore(0)

    class Closed(io.StringIO):
        def write(self, text):
            tried.release()
            raise BrokenPipeError

    monkeypatch.setattr(progress, "EVERY", 0.01)
    for stderr in (Closed(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        with show_messages(), stage("run"):
            logger.info("plan: 3 trainings")
            if stderr is not None:
                assert all(tried.acquire(timeout=60) for _ in range(3))


def test_short_command_prints_only_its_plan(mini_root, tmp_path, capsys):
    cohort = ["--cohort", str(mini_root), "--slides", "MINI1,MINI2"]
    assert main(["embed", *cohort, "--backbone", "mini", "--out", str(tmp_path / "x.h5ad")]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(r"plan: \d+ tiles to embed by mini\n", printed.err)
    assert printed.out.endswith(f"{tmp_path / 'x.h5ad'}\n")
    options = ["--method", "none", "--features", "depth", "--n-splits", "2", "--n-genes", "5", "--no-maps"]
    assert main(["run", *cohort, *options, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr()
    assert printed.err == "plan: no training\n"
    assert printed.out.startswith("none, features depth")
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report")]) == 0
    assert capsys.readouterr() == (f"{tmp_path / 'report'}/report.md\n", "plan: tables and figures of 1 run\n")
