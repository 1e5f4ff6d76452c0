"""What commands write: never in the place of another file, and two that write one place wait for each other."""

import contextlib
import errno
import fcntl
import importlib
import json
import os
import shutil
import threading
from types import SimpleNamespace

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
from peka_lite.backbones.load import load_backbone
from peka_lite.cli.main import main
from peka_lite.experiments import _train as teaching
from peka_lite.experiments._embed import write_features
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.folder import lock_run_folder
from peka_lite.maps import tissue as maps

run = importlib.import_module("peka_lite.experiments.run")  # the module: its package offers the function

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*random weights", "ignore:.*each patient is one fold", "ignore:.*allow"),
    pytest.mark.usefixtures("own_cache", "tiny_backbone"),
]


@pytest.fixture(scope="module")
def other(own_cache, tmp_path_factory):
    process = OtherProcess(tmp_path_factory.mktemp("other"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def made(own_cache, tiny_backbone, mini_root, tmp_path_factory):
    """What commands are given: a model, a finished run, predictions, and counts with their image."""
    folder = tmp_path_factory.mktemp("made")
    settings = {"cohort": str(mini_root), "backbone": "tiny", "weights": "random", "method": "none", "n_genes": 5}
    teaching.train(RunConfig(**settings, slides=["MINI1"]), folder / "model")
    write_run_folder(folder / "scored")
    words = ["predict", "MINI2", "--model", folder / "model", "--cohort", mini_root, "--device", "cpu"]
    assert main([str(part) for part in [*words, "--out", folder / "genes.h5ad"]]) == 0
    Image.fromarray(np.full((600, 800, 3), (220, 180, 210), np.uint8)).save(folder / "scan.png")
    counts = ad.AnnData(np.ones((2, 4), dtype=np.float32), obsm={"spatial": np.array([[300.0, 300], [500, 300]])})
    counts.write_h5ad(folder / "counts.h5ad")
    return folder


@pytest.fixture(autouse=True)
def plain_map(monkeypatch):
    """A picture that is drawn in no time: what it shows is tested elsewhere."""
    monkeypatch.setattr(maps, "predicted_map", lambda adata, gene: Figure(figsize=(1, 1)))


@pytest.fixture
def words(made, mini_root, tmp_path):
    """Return a command's words, where ``out`` is the place of its result."""
    out = tmp_path / "place" / "out"
    start = {
        "run": ["run", "--cohort", mini_root, "--features", "depth", "--method", "none", "--n-splits", "3",
                "--n-genes", "5", "--no-maps", "--out", out],
        "train": ["train", "--cohort", mini_root, "--slides", "MINI1", "--backbone", "tiny", "--weights", "random",
                  "--method", "none", "--n-genes", "5", "--out", out],
        "export": ["export", made / "model", "--out", out],
        "report": ["report", made / "scored", "--out", out],
        "add": ["add", made / "counts.h5ad", "--image", made / "scan.png", "--mpp", "0.5", "--id", "S1",
                "--cohort", out],
        "predict": ["predict", "MINI2", "--model", made / "model", "--cohort", mini_root, "--device", "cpu",
                    "--out", out.with_suffix(".h5ad")],
        "embed": ["embed", "--cohort", mini_root, "--slides", "MINI2", "--backbone", "tiny", "--weights", "random",
                  "--device", "cpu", "--out", out.with_suffix(".h5ad")],
        "map": ["map", made / "genes.h5ad", "--out", out.with_suffix(".png")],
    }  # fmt: skip
    return lambda name: [str(part) for part in start[name]]


STEPS = {
    "run": "peka_lite.experiments.run.evaluate",
    "train": "peka_lite.experiments._train.save_probes",
    "export": "peka_lite.experiments.export.save_probes",
    "report": "peka_lite.reports.page._add_points",
    "add": "peka_lite.data.visium.write_tiles",
    "predict": "peka_lite.experiments.predict.place_file",
    "embed": "peka_lite.experiments._embed.write_h5ad",
}


def everything(folder):
    """Names and content of what lies below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- two processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_the_second_of_two_waits_and_finds_what_the_first_made(words, other, tmp_path, monkeypatch, capsys, name):
    said, first = [], {}

    def go_on(text):
        said.append(text)
        first["status"] = other.end()
        first["files"] = everything(tmp_path / "place")

    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(locks, "sys", SimpleNamespace(stderr=SimpleNamespace(write=go_on, flush=lambda: None)))
    other.start(words(name), STEPS[name])
    status = main(words(name))
    assert said, "the second did not wait"
    assert said[0].startswith(f"waiting for another process that writes {tmp_path}")
    assert first["status"] == 0
    after = everything(tmp_path / "place")
    if name in ("predict", "embed"):  # a file of its own is replaced by the same again
        assert status == 0
        assert after.keys() == first["files"].keys()
    else:
        assert (status, after) == (2, first["files"])
        assert "is there already" in capsys.readouterr().err
    assert not [path for path in after if "lock" in path or "partial" in path]


@pytest.mark.parametrize("name", ["run", "export", "add", "predict"])
def test_a_command_that_was_killed_can_be_given_again(words, other, tmp_path, name):
    other.start(words(name), STEPS[name])
    other.kill()
    assert main(words(name)) == 0
    assert main(words(name)) == (0 if name == "predict" else 2)
    if name == "add":
        assert sorted(everything(tmp_path / "place")) == [
            "out/metadata/S1.json", "out/patches/S1.h5", "out/st/S1.h5ad",
        ]  # fmt: skip


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_an_add_that_was_killed_between_its_files_can_be_given_again(words, tmp_path, monkeypatch, capsys, moved):
    """The killed process is played by one that cannot clear up."""
    from peka_lite.data import visium as own_slides

    true, done = os.replace, []

    def killed(source, place):
        if len(done) == moved:
            raise SystemExit
        done.append(place)
        true(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(own_slides.os, "replace", killed)
        patch.setattr(own_slides.Path, "unlink", lambda *_, **__: None)
        patch.setattr(own_slides.shutil, "rmtree", lambda *_, **__: None)
        with contextlib.suppress(SystemExit):
            main(words("add"))
    cohort = tmp_path / "place" / "out"
    assert main(words("add")) == (2 if moved == 3 else 0)  # with the last in place the slide is there
    left = sorted(p for p in everything(cohort) if "lock" not in p)
    assert left == ["metadata/S1.json", "patches/S1.h5", "st/S1.h5ad"]
    (cohort / "st" / "S1.h5ad").unlink()
    capsys.readouterr()
    assert main(words("add")) == 2  # files of a user's that is not one of a killed add's stay
    assert "S1.h5 is there already; choose another id" in capsys.readouterr().err
    assert sorted(everything(cohort)) == ["metadata/S1.json", "patches/S1.h5"]


def without_locks(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("command", [run.run, teaching.train])
def test_without_locks_the_first_result_stays_whole_and_the_second_is_refused(
    mini_root, tmp_path, monkeypatch, command
):
    settings = {"cohort": str(mini_root), "method": "none", "n_splits": 3, "n_genes": 5, "weights": "random"}
    config = RunConfig(**settings, backbone="tiny", slides=["MINI1", "MINI2", "MINI3"])
    out, others = tmp_path / "out", []
    place = (
        "peka_lite.experiments.run.write_metrics" if command is run.run else "peka_lite.experiments._train.save_probes"
    )
    module = run if command is run.run else teaching
    true = getattr(module, place.rpartition(".")[2])

    def late(*args, **options):
        monkeypatch.setattr(place, true)
        thread = threading.Thread(target=lambda: others.append(command(config, out, **first)))
        thread.start()
        thread.join()
        others.append(everything(out))
        return true(*args, **options)

    first = {"maps": False} if command is run.run else {}
    without_locks(monkeypatch)
    monkeypatch.setattr(place, late)
    with pytest.raises(FileExistsError, match="out is there already: give another --out"):
        command(config, out, **first)
    assert everything(out) == others[1]
    assert json.loads((out / "summary.json").read_text())["seconds"] == others[0]["seconds"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if command is run.run:
        assert run.load_run(out)[3].X.any()


def test_without_locks_the_first_of_two_slides_stays(words, tmp_path, monkeypatch, capsys):
    from peka_lite.data import visium as own_slides

    true = own_slides.write_tiles

    def late(*args, **options):
        monkeypatch.setattr(own_slides, "write_tiles", true)
        thread = threading.Thread(target=lambda: main(words("add")))
        thread.start()
        thread.join()
        return true(*args, **options)

    without_locks(monkeypatch)
    monkeypatch.setattr(own_slides, "write_tiles", late)
    assert main(words("add")) == 2
    assert "S1.h5 is there already; choose another id" in capsys.readouterr().err
    place = tmp_path / "place" / "out"
    assert sorted(p.name for p in place.rglob("*")) == [
        "S1.h5", "S1.h5ad", "S1.json", "metadata", "patches", "st",
    ]  # fmt: skip


def test_load_or_run_reads_what_another_process_has_just_made(words, other, tmp_path, mini_root, monkeypatch):
    ended = []
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    stderr = SimpleNamespace(write=lambda _: ended.append(other.end()), flush=lambda: None)
    monkeypatch.setattr(locks, "sys", SimpleNamespace(stderr=stderr))
    other.start(words("run"), STEPS["run"])
    config = RunConfig(cohort=str(mini_root), features="depth", method="none", n_splits=3, n_genes=5)
    _, _, summary, predictions = run.load_or_run(config, tmp_path / "place" / "out")
    assert ended == [0]
    assert summary["n_folds"] == 3
    assert np.isfinite(predictions.X).any()


class Rank:
    """What `lock_run_folder` asks of `Processes`: the first's values reach the others."""

    def __init__(self, first, values):
        self.first, self.values = first, values

    def same(self, value):
        if self.first:
            self.values.append(value)
        return self.values[-1]


def test_of_many_processes_the_first_alone_holds_the_folder_and_all_hear_of_a_refusal(tmp_path, mini_root):
    config, values = RunConfig(cohort=str(mini_root), method="none"), []
    with lock_run_folder(config, tmp_path / "out", Rank(True, values)) as work:
        assert work == tmp_path / "out.partial"
        with lock_run_folder(
            config, tmp_path / "out", Rank(False, values)
        ) as same:  # it would wait for ever for a lock
            assert same == work
        work.mkdir()
    for first in (True, False):
        with pytest.raises(FileExistsError, match="out is there already"), lock_run_folder(
            config, tmp_path / "out", Rank(first, values)
        ):  # fmt: skip
            pass


def test_a_folder_that_cannot_be_written_is_one_sentence(words, tmp_path, monkeypatch, capsys):
    true = os.open
    monkeypatch.setattr(locks.os, "open", lambda path, *a: _denied(path) if ".lock" in str(path) else true(path, *a))
    for name in ("run", "predict", "add"):
        assert main(words(name)) == 2
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert shown.endswith(".lock)")
        assert " cannot be written: Permission denied (" in shown
        assert list(tmp_path.iterdir()) == []


def _denied(path):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused_and_left(tmp_path, kind):
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


# --- files that are there ------------------------------------------------------------------------------------------


OUTS = {"predict": "out.h5ad", "embed": "out.h5ad", "map": "out.png"}


@pytest.fixture
def refuse(words, tmp_path, capsys):
    """Give a command that must end in one sentence and leave what is there as it is."""

    def given(name, says, out=None):
        argv = words(name)
        argv[-1] = str(out or argv[-1])
        before = {p: p.lstat() if not p.is_file() else p.read_bytes() for p in sorted(tmp_path.rglob("*"))}
        assert main(argv) == 2
        shown = capsys.readouterr().err.strip().splitlines()[-1]
        assert says in shown
        assert argv[-1] in shown
        after = {p: p.lstat() if not p.is_file() else p.read_bytes() for p in sorted(tmp_path.rglob("*"))}
        assert after.keys() == before.keys()
        assert all(after[p] == before[p] for p in before if p.is_file())

    return given


@pytest.mark.parametrize("name", OUTS)
def test_a_file_that_the_command_did_not_write_stays(words, refuse, made, tmp_path, name):
    out = tmp_path / "place" / OUTS[name]
    out.parent.mkdir()
    says = f"is there already and was not written by `peka-lite {name}`, or was changed since: give another --out"
    for content in (b"", b"my notes", (made / "counts.h5ad").read_bytes(), (made / "scan.png").read_bytes()):
        out.write_bytes(content)
        refuse(name, says)
    out.unlink()
    out.symlink_to(made / "scan.png")
    refuse(name, says)


@pytest.mark.parametrize("name", OUTS)
def test_a_file_of_the_command_is_replaced_unless_it_was_changed(words, refuse, made, tmp_path, name):
    out = tmp_path / "place" / OUTS[name]
    assert main(words(name)) == 0
    first, number = out.read_bytes(), out.stat().st_ino
    assert main(words(name)) == 0
    assert out.stat().st_ino != number
    if name == "map":
        assert out.read_bytes() == first
        Image.open(out).save(out)  # as any program that crops or labels it
    else:
        changed = ad.read_h5ad(out)
        changed.obs["mine"] = "by hand"
        changed.write_h5ad(out)
    refuse(name, "or was changed since")
    out.write_bytes(first + b" ")
    refuse(name, "or was changed since")


def test_values_changed_in_place_are_a_change(words, refuse, tmp_path):
    assert main(words("predict")) == 0
    with h5py.File(tmp_path / "place" / "out.h5ad", "r+") as file:
        file["X"][0, 0] = 42
    refuse("predict", "or was changed since")


def test_a_file_of_one_command_is_none_of_another(words, refuse, tmp_path):
    assert main(words("embed")) == 0
    refuse("predict", "was not written by `peka-lite predict`")
    assert main([*words("predict")[:-1], str(tmp_path / "place" / "genes.h5ad")]) == 0
    refuse("embed", "was not written by `peka-lite embed`", out=tmp_path / "place" / "genes.h5ad")


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".jpg"])
def test_every_kind_of_map_is_known_again(words, tmp_path, suffix):
    argv = [*words("map")[:-1], str(tmp_path / f"m{suffix}")]
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
def test_an_input_is_never_written_over(words, refuse, made, mini_root, tmp_path, how):
    """Even one that the command wrote: a slide's own file, and the predictions that a picture is drawn of."""
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

    argv = ["predict", "MINI2", "--model", str(made / "model"), "--cohort", str(root), "--out", str(place(slide))]
    content = slide.read_bytes()
    assert main(argv) == 2
    assert slide.read_bytes() == content
    own = made / "model" / "genes.h5ad"  # of `predict`, and now read as a slide
    shutil.copyfile(made / "genes.h5ad", slide)
    with pytest.raises(FileExistsError, match=r"is what `peka-lite predict` reads \("):
        check_file(place(slide), "peka-lite predict", inputs=[slide])
    assert main(argv) == 2
    assert slide.read_bytes() == (made / "genes.h5ad").read_bytes()
    assert not own.exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "dangling link", "below a file"])
@pytest.mark.parametrize("name", [*OUTS, "run", "train", "export", "report"])
def test_what_is_no_place_for_a_result_is_refused_at_once(words, refuse, tmp_path, monkeypatch, name, kind):
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
        refuse(name, "a pipe, a device or a link that leads nowhere" if name in OUTS else "is there already")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
        refuse(name, "a pipe, a device or a link that leads nowhere" if name in OUTS else "is there already")
    else:
        (tmp_path / "place" / "file").write_text("")
        refuse(name, "is no folder", out=tmp_path / "place" / "file" / "deep" / OUTS.get(name, "out"))


def test_what_came_while_a_command_worked_stays(tmp_path):
    def write():
        with write_output(tmp_path / "a.html", "SlideViewer.save") as partial:
            partial.write_text("new")
            (tmp_path / "a.html").write_text("mine")

    with pytest.raises(FileExistsError, match="is there already"):
        write()
    assert everything(tmp_path) == {"a.html": b"mine"}
    (tmp_path / "work").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        locks.move_if_absent(tmp_path / "work", tmp_path / "b")
    assert (tmp_path / "b" / "mine").read_text() == "mine"


def test_tiles_features_adapters_and_embeddings_keep_to_it_too(mini_cohort, tmp_path):
    from peka_lite.adapters.adapt import adapt
    from peka_lite.adapters.files import save_adapter

    store = mini_cohort.slides[0].tiles.select([0, 1]).to_memmap(tmp_path / "tiles.npy")
    with pytest.raises(FileExistsError, match=r"tiles\.npy is what `TileStore.to_memmap` reads"):
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


# --- links in received folders of work ------------------------------------------------------------------------------


def test_a_link_in_a_folder_of_work_is_never_written_through(words, tmp_path, capsys):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    work = tmp_path / "place" / "out.partial"
    work.mkdir(parents=True)
    (work / "summary.json").symlink_to(precious)
    assert main(words("run")) == 2
    assert "holds a link" in capsys.readouterr().err
    rows, _ = open_partial(tmp_path / "w", shape=(2, 3), key="k")
    (tmp_path / "w" / "whole.h5ad").symlink_to(precious)
    del rows
    open_partial(tmp_path / "w", shape=(2, 3), key="k")
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["done.npy", "key", "rows.npy"]
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("text", ["{title: mine, grid: {seed: [0, 1]}}", "just: notes", "[", ""])
def test_a_users_sweep_is_not_replaced_by_the_record_of_its_folder(mini_root, tmp_path, capsys, text):
    (tmp_path / "sweep.yml").write_text(text)
    (tmp_path / "asked.yml").write_text(
        f"{{fixed: {{cohort: {mini_root}, method: none}}, grid: {{features: [depth]}}}}"
    )
    assert main(["sweep", str(tmp_path / "asked.yml"), "--out", str(tmp_path), "--workers", "1"]) == 2
    assert "sweep.yml is there already and was not written by `peka-lite sweep`" in capsys.readouterr().err
    assert (tmp_path / "sweep.yml").read_text() == text


@pytest.mark.parametrize("kind", ["pipe", "link", "file", "folder"])
def test_what_lies_where_files_are_prepared_is_not_removed_nor_waited_for(tmp_path, kind):
    work, mine = tmp_path / "w", tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if kind == "pipe":
        os.mkfifo(work)
    elif kind == "link":
        work.symlink_to(mine)
    elif kind == "file":
        work.write_text("mine")
    else:
        shutil.copytree(mine, work)
    with pytest.raises(FileExistsError, match="where files are to be prepared"):
        open_partial(work, shape=(2, 3), key="k")
    assert os.path.lexists(work)
    assert (mine / "thesis.txt").read_text() == "mine"
    assert kind != "folder" or (work / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["run", "train"])
def test_a_pipe_where_a_folder_is_prepared_is_named(words, tmp_path, capsys, name):
    work = tmp_path / "place" / "out.partial"
    work.parent.mkdir()
    os.mkfifo(work)
    assert main(words(name)) == 2
    assert f"{work} is a link or no folder, where files are to be prepared: remove it" in capsys.readouterr().err


def test_a_name_that_leaves_no_room_for_one_in_preparation_is_refused(refuse, tmp_path):
    refuse("map", "a name of more than 200 bytes; give a shorter one", out=tmp_path / f"{'x' * 230}.png")
