"""Write outputs without overwriting other files, while concurrent commands wait for each other."""

import contextlib
import errno
import fcntl
import importlib
import json
import logging
import os
import shutil
import threading

import anndata as ad
import h5py
import numpy as np
import pytest
from matplotlib.figure import Figure
from other_process import OtherProcess
from PIL import Image
from run_folders import write_run_folder

from peka_lite._core import locks
from peka_lite._core._stream import open_partial
from peka_lite._core.outputs import check_file, write_output
from peka_lite.backbones import load_backbone
from peka_lite.cli.main import main
from peka_lite.experiments import RunConfig, RunFolder, write_features
from peka_lite.maps import tissue as maps

run = importlib.import_module("peka_lite.experiments.run")  # the module: its package offers the function

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("isolated_cache", "tiny_backbone"),
]


@pytest.fixture(scope="module")
def other(isolated_cache, tmp_path_factory):
    process = OtherProcess(tmp_path_factory.mktemp("other"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def inputs(isolated_cache, tiny_backbone, mini_root, tmp_path_factory):
    """Write the inputs of commands: a model, a finished run, predictions, and counts with their image."""
    folder = tmp_path_factory.mktemp("inputs")
    settings = {"cohort": str(mini_root), "backbone": "tiny", "weights": "random", "method": "none", "n_genes": 5}
    run.train(RunConfig(**settings, slides=["MINI1"]), folder / "model")
    write_run_folder(folder / "scored")
    arguments = ["predict", "MINI2", "--model", folder / "model", "--cohort", mini_root, "--device", "cpu"]
    assert main([str(part) for part in [*arguments, "--out", folder / "genes.h5ad"]]) == 0
    Image.fromarray(np.full((600, 800, 3), (220, 180, 210), np.uint8)).save(folder / "scan.png")
    counts = ad.AnnData(np.ones((2, 4), dtype=np.float32), obsm={"spatial": np.array([[300.0, 300], [500, 300]])})
    counts.write_h5ad(folder / "counts.h5ad")
    return folder


@pytest.fixture(autouse=True)
def plain_map(monkeypatch):
    """Draw empty maps, which are fast; maps are tested elsewhere."""
    monkeypatch.setattr(maps, "predicted_map", lambda adata, gene: Figure(figsize=(1, 1)))


@pytest.fixture
def arguments(inputs, mini_root, tmp_path):
    """Return a function that gives the arguments of a command."""
    out = tmp_path / "place" / "out"
    start = {
        "run": ["run", "--cohort", mini_root, "--features", "depth", "--method", "none", "--n-splits", "3",
                "--n-genes", "5", "--no-maps", "--out", out],
        "train": ["train", "--cohort", mini_root, "--slides", "MINI1", "--backbone", "tiny", "--weights", "random",
                  "--method", "none", "--n-genes", "5", "--out", out],
        "export": ["export", inputs / "model", "--out", out],
        "report": ["report", inputs / "scored", "--out", out],
        "add": ["add", inputs / "counts.h5ad", "--image", inputs / "scan.png", "--mpp", "0.5", "--id", "S1",
                "--cohort", out],
        "predict": ["predict", "MINI2", "--model", inputs / "model", "--cohort", mini_root, "--device", "cpu",
                    "--out", out.with_suffix(".h5ad")],
        "embed": ["embed", "--cohort", mini_root, "--slides", "MINI2", "--backbone", "tiny", "--weights", "random",
                  "--device", "cpu", "--out", out.with_suffix(".h5ad")],
        "map": ["map", inputs / "genes.h5ad", "--out", out.with_suffix(".png")],
    }  # fmt: skip
    return lambda name: [str(part) for part in start[name]]


STEPS = {
    "run": "peka_lite.experiments.run.evaluate",
    "train": "peka_lite.experiments.run.save_probes",
    "export": "peka_lite.experiments.export.save_probes",
    "report": "peka_lite.reports.page._add_points",
    "add": "peka_lite.data.visium.write_tiles",
    "predict": "peka_lite.experiments.predict.place_file",
    "embed": "peka_lite.experiments._embed.write_h5ad",
}


def read_files(folder):
    """Return the content of each file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- two processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_second_process_waits_for_the_result_of_the_first(arguments, other, tmp_path, monkeypatch, capsys, name):
    messages, first = [], {}

    def finish_first(text):
        messages.append(text)
        first["status"] = other.end()
        first["files"] = read_files(tmp_path / "place")

    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(logging.getLogger("peka_lite"), "warning", finish_first)
    other.start(arguments(name), STEPS[name])
    status = main(arguments(name))
    assert messages, "the second did not wait"
    assert messages[0].startswith(f"waiting for another process that writes {tmp_path}")
    assert first["status"] == 0
    after = read_files(tmp_path / "place")
    if name in ("predict", "embed"):  # a file of the same command is replaced
        assert status == 0
        assert after.keys() == first["files"].keys()
    else:
        assert (status, after) == (2, first["files"])
        assert "is there already" in capsys.readouterr().err
    assert not [path for path in after if "lock" in path or "partial" in path]


@pytest.mark.parametrize("name", ["run", "export", "add", "predict"])
def test_killed_command_can_be_repeated(arguments, other, tmp_path, name):
    other.start(arguments(name), STEPS[name])
    other.kill()
    assert main(arguments(name)) == 0
    assert main(arguments(name)) == (0 if name == "predict" else 2)
    if name == "add":
        assert sorted(read_files(tmp_path / "place")) == [
            "out/metadata/S1.json", "out/patches/S1.h5", "out/st/S1.h5ad",
        ]  # fmt: skip


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_add_killed_between_its_files_can_be_repeated(arguments, tmp_path, monkeypatch, capsys, moved):
    """Simulate a killed process by one that cannot clean up."""
    from peka_lite.data import visium as visium

    original, done = os.replace, []

    def killed(source, place):
        if len(done) == moved:
            raise SystemExit
        done.append(place)
        original(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(visium.os, "replace", killed)
        patch.setattr(visium.Path, "unlink", lambda *_, **__: None)
        patch.setattr(visium.shutil, "rmtree", lambda *_, **__: None)
        with contextlib.suppress(SystemExit):
            main(arguments("add"))
    cohort = tmp_path / "place" / "out"
    assert main(arguments("add")) == (2 if moved == 3 else 0)  # with the last file the slide is complete
    left = sorted(p for p in read_files(cohort) if "lock" not in p)
    assert left == ["metadata/S1.json", "patches/S1.h5", "st/S1.h5ad"]
    (cohort / "st" / "S1.h5ad").unlink()
    capsys.readouterr()
    assert main(arguments("add")) == 2  # files that no killed `add` has left stay
    assert "S1.h5 is there already; choose another id" in capsys.readouterr().err
    assert sorted(read_files(cohort)) == ["metadata/S1.json", "patches/S1.h5"]


def disable_locks(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("command", [run.run, run.train])
def test_without_locks_the_first_result_stays_and_the_second_is_refused(mini_root, tmp_path, monkeypatch, command):
    settings = {"cohort": str(mini_root), "method": "none", "n_splits": 3, "n_genes": 5, "weights": "random"}
    config = RunConfig(**settings, backbone="tiny", slides=["MINI1", "MINI2", "MINI3"])
    out, others = tmp_path / "out", []
    step = "write_metrics" if command is run.run else "save_probes"
    original = getattr(run, step)

    def late(*args, **options):
        monkeypatch.setattr(run, step, original)
        thread = threading.Thread(target=lambda: others.append(command(config, out, **first)))
        thread.start()
        thread.join()
        others.append(read_files(out))
        return original(*args, **options)

    first = {"maps": False} if command is run.run else {}
    disable_locks(monkeypatch)
    monkeypatch.setattr(run, step, late)
    with pytest.raises(FileExistsError, match="out is there already: give another --out"):
        command(config, out, **first)
    assert read_files(out) == others[1]
    assert json.loads((out / "summary.json").read_text())["seconds"] == others[0]["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if command is run.run:
        assert run.load_run(out)[3].X.any()


def test_without_locks_the_first_of_two_slides_stays(arguments, tmp_path, monkeypatch, capsys):
    from peka_lite.data import visium as visium

    original = visium.write_tiles

    def late(*args, **options):
        monkeypatch.setattr(visium, "write_tiles", original)
        thread = threading.Thread(target=lambda: main(arguments("add")))
        thread.start()
        thread.join()
        return original(*args, **options)

    disable_locks(monkeypatch)
    monkeypatch.setattr(visium, "write_tiles", late)
    assert main(arguments("add")) == 2
    assert "S1.h5 is there already; choose another id" in capsys.readouterr().err
    place = tmp_path / "place" / "out"
    assert sorted(p.name for p in place.rglob("*")) == [
        "S1.h5", "S1.h5ad", "S1.json", "metadata", "patches", "st",
    ]  # fmt: skip


def test_load_or_run_reads_the_result_of_another_process(arguments, other, tmp_path, mini_root, monkeypatch):
    ended = []
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(logging.getLogger("peka_lite"), "warning", lambda _: ended.append(other.end()))
    other.start(arguments("run"), STEPS["run"])
    config = RunConfig(cohort=str(mini_root), features="depth", method="none", n_splits=3, n_genes=5)
    _, _, summary, predictions = run.load_or_run(config, tmp_path / "place" / "out")
    assert ended == [0]
    assert summary["n_folds"] == 3
    assert np.isfinite(predictions.X).any()


class Rank:
    """Replace `Processes` for `RunFolder.create`: share the first process's values."""

    def __init__(self, first, values):
        self.first, self.values = first, values

    def same(self, value):
        if self.first:
            self.values.append(value)
        return self.values[-1]


def test_first_process_locks_the_folder_and_all_raise_its_errors(tmp_path, mini_root):
    config, values = RunConfig(cohort=str(mini_root), method="none"), []

    def create(first):
        return RunFolder.create(tmp_path / "out", config, command="run", processes=Rank(first, values))

    with create(True) as work:
        assert work == tmp_path / "out.partial"
        with create(False) as same:  # would wait forever for a lock
            assert same == work
    for first in (True, False):
        with pytest.raises(FileExistsError, match="out is there already"), create(first):
            pass


def test_folder_without_write_permission_is_one_message(arguments, tmp_path, monkeypatch, capsys):
    original = os.open
    monkeypatch.setattr(locks.os, "open", lambda path, *a: _deny(path) if ".lock" in str(path) else original(path, *a))
    for name in ("run", "predict", "add"):
        assert main(arguments(name)) == 2
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert shown.endswith(".lock)")
        assert " cannot be written: Permission denied (" in shown
        assert list(tmp_path.iterdir()) == []


def _deny(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_lock_that_is_not_a_file_is_refused_and_unchanged(tmp_path, kind):
    lock, target = tmp_path / ".out.lock", tmp_path / "precious"
    target.write_text("precious")
    {
        "link": lambda: lock.symlink_to(target),
        "dangling": lambda: lock.symlink_to(tmp_path / "nowhere"),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    with pytest.raises(OSError, match=r"out cannot be written: .*\.out\.lock"), locks.lock(tmp_path / "out"):
        pass
    assert os.path.lexists(lock)
    assert target.read_text() == "precious"


# --- existing files ------------------------------------------------------------------------------------------------


OUTS = {"predict": "out.h5ad", "embed": "out.h5ad", "map": "out.png"}


@pytest.fixture
def refuse(arguments, tmp_path, capsys):
    """Return a function that runs a command, which must end with one message and change no file."""

    def check(name, message, out=None):
        argv = arguments(name)
        argv[-1] = str(out or argv[-1])
        before = {p: p.lstat() if not p.is_file() else p.read_bytes() for p in sorted(tmp_path.rglob("*"))}
        assert main(argv) == 2
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in shown
        assert argv[-1] in shown
        after = {p: p.lstat() if not p.is_file() else p.read_bytes() for p in sorted(tmp_path.rglob("*"))}
        assert after.keys() == before.keys()
        assert all(after[p] == before[p] for p in before if p.is_file())

    return check


@pytest.mark.parametrize("name", OUTS)
def test_file_not_written_by_the_command_stays(arguments, refuse, inputs, tmp_path, name):
    out = tmp_path / "place" / OUTS[name]
    out.parent.mkdir()
    message = f"is there already and was not written by `peka-lite {name}`, or was changed since: give another --out"
    for content in (b"", b"my notes", (inputs / "counts.h5ad").read_bytes(), (inputs / "scan.png").read_bytes()):
        out.write_bytes(content)
        refuse(name, message)
    out.unlink()
    out.symlink_to(inputs / "scan.png")
    refuse(name, message)


@pytest.mark.parametrize("name", OUTS)
def test_file_of_the_command_is_replaced_unless_changed(arguments, refuse, inputs, tmp_path, name):
    out = tmp_path / "place" / OUTS[name]
    assert main(arguments(name)) == 0
    first, number = out.read_bytes(), out.stat().st_ino
    assert main(arguments(name)) == 0
    assert out.stat().st_ino != number
    if name == "map":
        assert out.read_bytes() == first
        Image.open(out).save(out)  # as a program that edits it would
    else:
        changed = ad.read_h5ad(out)
        changed.obs["mine"] = "by hand"
        changed.write_h5ad(out)
    refuse(name, "or was changed since")
    out.write_bytes(first + b" ")
    refuse(name, "or was changed since")


def test_file_with_values_changed_in_place_stays(arguments, refuse, tmp_path):
    assert main(arguments("predict")) == 0
    with h5py.File(tmp_path / "place" / "out.h5ad", "r+") as file:
        file["X"][0, 0] = 42
    refuse("predict", "or was changed since")


def test_file_of_another_command_stays(arguments, refuse, tmp_path):
    assert main(arguments("embed")) == 0
    refuse("predict", "was not written by `peka-lite predict`")
    assert main([*arguments("predict")[:-1], str(tmp_path / "place" / "genes.h5ad")]) == 0
    refuse("embed", "was not written by `peka-lite embed`", out=tmp_path / "place" / "genes.h5ad")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".jpg"])
def test_map_of_every_format_is_recognized(arguments, tmp_path, suffix):
    argv = [*arguments("map")[:-1], str(tmp_path / f"m{suffix}")]
    assert main(argv) == 0
    assert main(argv) == 0
    content = (tmp_path / f"m{suffix}").read_bytes()
    if suffix == ".svg":
        import xml.etree.ElementTree as ET

        assert ET.fromstring(content).tag.endswith("svg")  # the mark is a comment
        (tmp_path / "m.svg").write_bytes(content.replace(b"</svg>", b"<text>mine</text></svg>"))
        assert main(argv) == 2
    elif suffix != ".pdf":
        Image.open(tmp_path / f"m{suffix}").load()


@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
def test_input_is_never_overwritten(arguments, refuse, inputs, mini_root, tmp_path, how):
    """Check this also for an input that the command wrote: predictions that are read as a slide."""
    root = tmp_path / "cohort"
    shutil.copytree(mini_root, root)
    slide = root / "st" / "MINI2.h5ad"

    def place(path):
        if how == "itself":
            return path
        (tmp_path / "place").mkdir(exist_ok=True)
        (other := tmp_path / "place" / f"other{path.suffix}").unlink(missing_ok=True)
        other.symlink_to(path) if how == "link" else os.link(path, other)
        return other

    argv = ["predict", "MINI2", "--model", str(inputs / "model"), "--cohort", str(root), "--out", str(place(slide))]
    content = slide.read_bytes()
    assert main(argv) == 2
    assert slide.read_bytes() == content
    unexpected = inputs / "model" / "genes.h5ad"
    shutil.copyfile(inputs / "genes.h5ad", slide)
    with pytest.raises(FileExistsError, match=r"is an input of `peka-lite predict` \("):
        check_file(place(slide), "peka-lite predict", inputs=[slide])
    assert main(argv) == 2
    assert slide.read_bytes() == (inputs / "genes.h5ad").read_bytes()
    assert not unexpected.exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "below a file"])
@pytest.mark.parametrize("name", [*OUTS, "run", "train", "export", "report"])
def test_invalid_output_path_is_refused_before_the_work(arguments, refuse, tmp_path, monkeypatch, name, kind):
    work = "peka_lite.experiments._embed.embed_tiles" if name == "embed" else "peka_lite.data.hest.read_slide"
    monkeypatch.setattr(work, None)
    out = tmp_path / "place" / OUTS.get(name, "out")
    out.parent.mkdir()
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("")
        refuse(name, "is a folder: give the name of a file" if name in ("embed", "map") else "")
    elif kind == "pipe":
        os.mkfifo(out)
        refuse(name, "a pipe, a device or a broken link" if name in OUTS else "is there already")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
        refuse(name, "a pipe, a device or a broken link" if name in OUTS else "is there already")
    else:
        (tmp_path / "place" / "file").write_text("")
        refuse(name, "is not a folder", out=tmp_path / "place" / "file" / "deep" / OUTS.get(name, "out"))


def test_file_created_during_the_work_stays(tmp_path):
    def write():
        with write_output(tmp_path / "a.html", "SlideViewer.save") as partial:
            partial.write_text("new")
            (tmp_path / "a.html").write_text("mine")

    with pytest.raises(FileExistsError, match="is there already"):
        write()
    assert read_files(tmp_path) == {"a.html": b"mine"}
    (tmp_path / "work").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        locks.move_if_absent(tmp_path / "work", tmp_path / "b")
    assert (tmp_path / "b" / "mine").read_text() == "mine"


def test_library_functions_do_not_overwrite_other_files(mini_cohort, tmp_path):
    from peka_lite.adapters import adapt, save_adapter

    store = mini_cohort.slides[0].tiles.select([0, 1]).to_memmap(tmp_path / "tiles.npy")
    with pytest.raises(FileExistsError, match=r"tiles\.npy is an input of `TileStore.to_memmap`"):
        store.select([1]).to_memmap(tmp_path / "tiles.npy")
    np.save(tmp_path / "mine.npy", np.zeros((2, 224, 224, 3), np.uint8))
    with pytest.raises(FileExistsError, match=r"mine\.npy is there already and was not written by `TileStore"):
        store.to_memmap(tmp_path / "mine.npy")
    (tmp_path / "f.h5ad").write_text("mine")
    with pytest.raises(FileExistsError, match=r"f\.h5ad is there already"):
        write_features(mini_cohort, tmp_path / "f.h5ad", load_backbone("tiny", weights="random"))
    student = adapt(load_backbone("tiny", weights="random"), "bone", r=16)
    for _ in range(2):
        save_adapter(student, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(FileExistsError, match=r"b\.safetensors is there already"):
        save_adapter(student, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_text() == "mine"


# --- links in received work folders ---------------------------------------------------------------------------------


def test_link_in_a_work_folder_is_never_followed(arguments, tmp_path, capsys):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    work = tmp_path / "place" / "out.partial"
    work.mkdir(parents=True)
    (work / "summary.json").symlink_to(precious)
    assert main(arguments("run")) == 2
    assert "holds a link" in capsys.readouterr().err
    rows, _ = open_partial(tmp_path / "w", shape=(2, 3), key="k")
    (tmp_path / "w" / "whole.h5ad").symlink_to(precious)
    del rows
    open_partial(tmp_path / "w", shape=(2, 3), key="k")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["done.npy", "key", "rows.npy"]
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("text", ["{title: mine, grid: {seed: [0, 1]}}", "just: notes", "[", ""])
def test_sweep_file_of_a_user_is_not_overwritten(mini_root, tmp_path, capsys, text):
    (tmp_path / "sweep.yml").write_text(text)
    sweep = tmp_path / "new.yml"
    sweep.write_text(f"{{fixed: {{cohort: {mini_root}, method: none}}, grid: {{features: [depth]}}}}")
    assert main(["sweep", str(sweep), "--out", str(tmp_path), "--workers", "1"]) == 2
    assert "sweep.yml is there already and was not written by `peka-lite sweep`" in capsys.readouterr().err
    assert (tmp_path / "sweep.yml").read_text() == text


@pytest.mark.parametrize("kind", ["pipe", "link", "file", "folder"])
def test_other_file_at_the_work_folder_is_not_removed(tmp_path, kind):
    work, other = tmp_path / "w", tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    if kind == "pipe":
        os.mkfifo(work)
    elif kind == "link":
        work.symlink_to(other)
    elif kind == "file":
        work.write_text("mine")
    else:
        shutil.copytree(other, work)
    with pytest.raises(FileExistsError, match="temporary files must be written there"):
        open_partial(work, shape=(2, 3), key="k")
    assert os.path.lexists(work)
    assert (other / "thesis.txt").read_text() == "mine"
    assert kind != "folder" or (work / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["run", "train"])
def test_pipe_at_the_work_folder_is_named(arguments, tmp_path, capsys, name):
    work = tmp_path / "place" / "out.partial"
    work.parent.mkdir()
    os.mkfifo(work)
    assert main(arguments(name)) == 2
    assert (
        f"{work} is a link or not a folder, but temporary files must be written there: remove it"
        in capsys.readouterr().err
    )


def test_too_long_output_name_is_refused(refuse, tmp_path):
    refuse("map", "its name has more than 200 bytes; give a shorter one", out=tmp_path / f"{'x' * 230}.png")
