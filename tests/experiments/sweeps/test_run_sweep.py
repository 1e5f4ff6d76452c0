"""Check running sweeps: failed points, killed workers, reruns, concurrent sweeps and clusters."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from rich.console import Console
from test_sweeps import write_notebook

from peka_lite.experiments import plan_sweep, read_sweep, run_sweep, sweep_states
from peka_lite.experiments.sweeps import run as sweep_run
from peka_lite.experiments.sweeps._board import Board
from peka_lite.experiments.sweeps.points import build_job, get_measured_seconds, make_point
from peka_lite.reports import write_report

WRITES_SUMMARY = """
import json
json.dump({"a": a, "b": b, "product": a * len(b)}, open("summary.json", "w"))
"""
FAILS_ONCE_AND_HANGS_ONCE = """
import os, time
from pathlib import Path
notes = Path(notes)
if (a, b) == (2, "yy") and not (notes / "fixed").exists():
    raise ValueError("planted: a=2, b=yy")
if (a, b) == (1, "y") and not (notes / "hung").exists():
    (notes / "hung.new").write_text(str(os.getpid()))
    os.replace(notes / "hung.new", notes / "hung")
    time.sleep(600)
"""


def write_sweep(folder, *code, grid, **keys):
    """Write a notebook and a sweep over it."""
    (folder / "notes").mkdir(exist_ok=True)
    write_notebook(folder / "walk.ipynb", 'a: int = 0\nb: str = ""\nnotes: str = "."', *code)
    fixed = {"notes": str(folder / "notes")}
    path = folder / "many.yml"
    path.write_text(yaml.safe_dump({"notebook": "walk.ipynb", "fixed": fixed, "grid": grid} | keys))
    return path


def command(path, *options, **environment):
    """Start ``peka-lite sweep`` in a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "peka_lite", "sweep", str(path), *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment, cwd=path.parent,
    )  # fmt: skip


def wait_for(condition, process):
    """Wait until a condition is true, or fail if the process ends."""
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def finish_times(out):
    """Return the time of each finished point's summary."""
    return {p.parent.name: p.stat().st_mtime_ns for p in out.glob("*/summary.json")}


def test_rerun_completes_failed_and_killed_points(tmp_path):
    path = write_sweep(
        tmp_path, FAILS_ONCE_AND_HANGS_ONCE, WRITES_SUMMARY, grid={"a": [1, 2, 3, 4], "b": ["y", "yy", "yyy"]}
    )
    out, hung = tmp_path / "out", tmp_path / "notes" / "hung"
    running = command(path, "--out", str(out), "--workers", "2", "--retry", "1")
    wait_for(hung.exists, running)
    kernel = psutil.Process(int(hung.read_text()))
    kernel.parent().kill()  # while it makes a point
    printed, _ = running.communicate()
    assert running.returncode == 1, printed
    psutil.wait_procs([kernel], timeout=60)
    assert not kernel.is_running()  # the kernel ends with its point

    sweep = read_sweep(path)
    states = sweep_states(sweep, out)
    assert states["state"].value_counts().to_dict() == {"done": 11, "failed": 1}
    assert states.loc["a=2,b=yy", ["state", "last_line"]].tolist() == ["failed", "ValueError: planted: a=2, b=yy"]
    assert "failed  a=2,b=yy: ValueError: planted: a=2, b=yy" in printed
    assert "11 done, 1 failed" in printed
    stored = nbformat.read(out / "a=2,b=yy.partial" / "notebook.ipynb", as_version=4)
    assert any(o.get("ename") == "ValueError" for c in stored.cells for o in c.get("outputs", []))
    assert "1 to run" in plan_sweep(sweep, out)

    before = finish_times(out)
    (tmp_path / "notes" / "fixed").touch()
    again = command(path, "--out", str(out), "--workers", "2")
    printed, _ = again.communicate()
    assert again.returncode == 0, printed
    after = finish_times(out)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == sorted(p.name for p in sweep.points)
    for point in sweep.points:
        got = json.loads((out / point.name / "summary.json").read_text())
        assert got == point.varied | {"product": point.varied["a"] * len(point.varied["b"])}
    assert not list(out.glob("*.partial"))
    table = pd.read_csv(out / "report" / "points.csv")
    assert len(table) == 12
    assert (table["product"] == table["a"] * table["b"].str.len()).all()
    assert "12 of 12" in (out / "report" / "report.md").read_text()


def test_cluster_makes_points_and_retries_failed_ones(tmp_path, capfd, monkeypatch):
    from distributed import LocalCluster

    fails_at_first = """
from pathlib import Path
tried = Path(notes) / f"tried {a}"
if a == 2 and not tried.exists():
    tried.touch()
    raise OSError("the disk is away")
"""
    sweep = read_sweep(write_sweep(tmp_path, fails_at_first, WRITES_SUMMARY, grid={"a": [1, 2, 3, 4]}))
    out = tmp_path / "out"
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0") as cluster:
        workers = {w["id"] for w in cluster.scheduler_info["workers"].values()}
        assert len(workers) == 2
        with pytest.raises(ValueError, match="give one of the two"):
            run_sweep(sweep, out, scheduler=cluster.scheduler_address, workers=2)
        states = run_sweep(sweep, out, scheduler=cluster.scheduler_address, retry=1)
        hosts = {json.loads((out / "log" / f"{p.name}.json").read_text())["host"] for p in sweep.points}
        assert hosts <= set(cluster.scheduler_info["workers"])
        assert len(cluster.scheduler_info["workers"]) == 2  # the cluster outlives the sweep
    assert list(states["state"]) == ["done"] * 4
    assert states["seconds"].gt(0).all()
    printed = capfd.readouterr().out
    assert "4 to run, 0 done before" in printed
    assert "2 at once; Dask's dashboard: http://127.0.0.1" in printed
    monkeypatch.setattr(sweep_run, "CONNECT_TIMEOUT", 1)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9: no Dask scheduler answers"):
        run_sweep(read_sweep(tmp_path / "many.yml", fixed={"a": 9}), tmp_path / "x", scheduler="tcp://127.0.0.1:9")


HANGS = """
import os, time
from pathlib import Path
Path(notes, "hung.new").write_text(str(os.getpid()))
os.replace(Path(notes, "hung.new"), Path(notes, "hung"))
time.sleep(600)
"""


@pytest.mark.parametrize(("sign", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_points_and_kernels_end_with_the_sweep_and_no_port_is_open(tmp_path, sign, status):
    path = write_sweep(tmp_path, HANGS, grid={"a": [1]})
    running = command(path, "--out", str(tmp_path / "out"))
    hung = tmp_path / "notes" / "hung"
    wait_for(hung.exists, running)
    kernel = psutil.Process(int(hung.read_text()))
    point = kernel.parent()
    assert point.ppid() == running.pid
    # Only the kernel and the point have sockets, which accept signed messages only.
    assert [c for c in psutil.Process(running.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN] == []
    assert set(psutil.Process(running.pid).children(recursive=True)) == {kernel, point}
    os.kill(running.pid, sign)
    running.communicate()
    assert running.returncode == status
    _, alive = psutil.wait_procs([kernel, point], timeout=60)
    assert alive == []
    assert sweep_states(read_sweep(path), tmp_path / "out")["state"].tolist() == ["unfinished"]


PLANTED = "import os\nopen(os.environ['PLANTED'], 'a').write(__file__ + '\\n')\nraise SystemExit('planted code ran')\n"


def test_modules_of_the_current_folder_are_not_imported(tmp_path):
    path = tmp_path / "runs.yml"
    path.write_text(yaml.safe_dump({"fixed": {"method": "none", "features": "depth"}, "grid": {"seed": [0]}}))
    (tmp_path / "out" / "seed=0").mkdir(parents=True)  # an incomplete folder, so the point fails after its imports
    for name in ("yaml", "pandas", "numpy", "torch", "psutil", "rich", "sitecustomize", "fcntl", "secrets"):
        (tmp_path / f"{name}.py").write_text(PLANTED)
    running = command(path, "--out", "out", PLANTED=str(tmp_path / "planted"))
    printed, _ = running.communicate()
    assert running.returncode == 1, printed
    assert not (tmp_path / "planted").exists()
    assert "failed  seed=0: FileExistsError: " in printed
    assert "no summary.json was written" in printed


def test_point_imports_the_sweeps_package_and_nothing_from_the_current_folder(tmp_path):
    """Simulate a clone that is not installed but is in the current folder."""
    package = tmp_path / "clone" / "peka_lite"
    points = package / "experiments" / "sweeps" / "points.py"
    points.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    points.write_text("import json, sys\ndef main():\n    print(json.dumps([__file__, *sys.path]))")
    job = {"name": "a=1", "notebook": None, "settings": {}}
    (tmp_path / "log").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peka_lite.__file__", str(package / "__init__.py"))
        patch.chdir(tmp_path)
        environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join(["folder", "", "/other", ""])}
        attempt = sweep_run._Attempt(job, tmp_path, environment, "host")
        attempt.process.wait(60)
    file, *path = json.loads((tmp_path / "log" / "a=1.txt").read_text())
    assert file == str(points)
    assert path[:2] == [str(tmp_path / "folder"), "/other"]
    assert not {"", str(tmp_path), str(tmp_path / "clone")} & set(path)


def test_replaced_notebook_copy_is_not_run(tmp_path):
    sweep, out = read_sweep(write_sweep(tmp_path, WRITES_SUMMARY, grid={"a": [1]})), tmp_path / "out"
    content, job = sweep.notebook.read_bytes(), build_job(sweep, sweep.points[0])
    planted = nbformat.reads(content.decode(), as_version=4)
    planted.cells[1].source += f"\nopen({str(tmp_path / 'planted')!r}, 'w')"
    same_code = nbformat.reads(content.decode(), as_version=4)
    same_code.metadata.kernelspec.name = "another"
    (out / "log").mkdir(parents=True)
    copy = out / "log" / f"{hashlib.sha256(content).hexdigest()[:16]}.ipynb"
    for path in (copy, copy.with_stem(sweep.code)):
        nbformat.write(planted, path)
    assert list(run_sweep(sweep, out, workers=1)["state"]) == ["done"]
    assert not (tmp_path / "planted").exists()
    assert copy.read_bytes() == content
    shutil.rmtree(out / "a=1")
    for replaced in (planted, same_code):  # after the sweep started
        nbformat.write(replaced, copy)
        with pytest.raises(RuntimeError, match="was replaced since the sweep started"):
            make_point(job, out)
        assert not (tmp_path / "planted").exists()


def test_links_and_modules_in_a_stopped_points_folder_are_removed(tmp_path):
    code = """
from pathlib import Path
assert not Path("pipe").is_fifo()
for name in ("results.csv", "deep/results.csv", "inside", "data.csv", "notebook.ipynb"):
    Path(name).parent.mkdir(exist_ok=True)
    with open(name, "a") as file:
        file.write("written")
Path('helper.py').write_text('x = 1')
import yaml, pkgutil, helper
"""
    sweep, out = read_sweep(write_sweep(tmp_path, code, WRITES_SUMMARY, grid={"a": [1]})), tmp_path / "out"
    job, work, outside = build_job(sweep, sweep.points[0]), out / "a=1.partial", tmp_path / "outside"
    sweep_run._write_sweep_record(sweep, out)
    (work / "package").mkdir(parents=True)
    (work / "point.json").write_text(json.dumps({"settings": job["settings"], "code": sweep.code}))
    for name in ("helper.py", "yaml.py", "nbformat.pyc", "package/__init__.py", "pkgutil.py"):
        (work / name).write_text("raise SystemExit('planted code ran')")
    outside.mkdir()
    (outside / "user.csv").write_text("user")
    (work / "results.csv").symlink_to(outside / "user.csv")
    (work / "notebook.ipynb").symlink_to(outside / "new.ipynb")
    (work / "deep").symlink_to(outside)
    (work / "data.csv").write_text("data ")
    (work / "inside").symlink_to("data.csv")
    os.mkfifo(work / "pipe")
    make_point(job, out)
    assert [path.name for path in outside.iterdir()] == ["user.csv"]
    assert (outside / "user.csv").read_text() == "user"
    assert (out / "a=1" / "data.csv").read_text() == "data writtenwritten"  # data inside the folder is reused
    assert not (out / "a=1" / "yaml.py").exists()


@pytest.mark.parametrize("name", ["log", "report", "a=1", "a=1.partial"])
@pytest.mark.parametrize("exists", [True, False])
def test_link_in_a_sweeps_folder_is_refused_before_writing(tmp_path, name, exists):
    sweep, out = read_sweep(write_sweep(tmp_path, WRITES_SUMMARY, grid={"a": [1]})), tmp_path / "out"
    target = tmp_path / "target"
    out.mkdir()
    if exists:
        target.mkdir()
        (target / "point.json").write_text("{}")
    (out / name).symlink_to(target)
    for function in (sweep_states, run_sweep):
        with pytest.raises(ValueError, match=f"out/{name} is a symbolic link; remove it"):
            function(sweep, out)
    assert [path.name for path in out.iterdir()] == [name]
    assert not target.exists() or [path.name for path in target.iterdir()] == ["point.json"]


def test_links_and_pipes_in_the_log_are_replaced(tmp_path):
    path = write_sweep(tmp_path, WRITES_SUMMARY, grid={"a": [1, 2]})
    sweep, out = read_sweep(path), tmp_path / "out"
    log, target = out / "log", tmp_path / "target.txt"
    log.mkdir(parents=True)
    target.write_text(json.dumps({"state": "failed", "last_line": "not to be shown"}))
    for name in ("log/a=1.txt", "log/a=1.json", f"log/{sweep.digest[:16]}.ipynb"):
        (out / name).symlink_to(target)
    os.mkfifo(log / "a=2.txt")
    os.mkfifo(log / "a=2.json")
    before = target.read_text()
    for options, text in (["--dry-run"], "2 points in out: 0 done, 2 to run"), ([], "many: 2 done"):
        running = command(path, "--out", "out", *options)
        try:
            printed, _ = running.communicate(timeout=300)
        finally:
            running.kill()
        assert running.returncode == 0, printed
        assert text in printed
        assert "not to be shown" not in printed
    assert target.read_text() == before
    assert not any(path.is_symlink() for path in out.rglob("*"))
    (out / "sweep.yml").unlink()
    (out / "sweep.yml").symlink_to(target)
    with pytest.raises(FileExistsError, match=r"sweep\.yml is there already and was not written by `peka-lite sweep`"):
        run_sweep(sweep, out)
    assert target.read_text() == before


def test_point_without_complete_summary_is_failed(tmp_path):
    leaves = """
from pathlib import Path
if a > 1:
    Path("summary.json").write_text('{"a": 2' + "}" * (a != 2))
if a == 4:
    Path("results/x.partial").mkdir(parents=True)
"""
    sweep = read_sweep(write_sweep(tmp_path, leaves, grid={"a": [1, 2, 3, 4]}))
    states = run_sweep(sweep, tmp_path / "out", workers=2)
    assert list(states["state"]) == ["failed", "failed", "done", "failed"]
    lines = states["last_line"].tolist()
    assert "no summary.json was written" in lines[0]
    assert "summary.json is truncated" in lines[1]
    assert "results/x.partial is unfinished" in lines[3]
    edited = read_sweep(write_sweep(tmp_path, leaves + "\nprint(a)", grid={"a": [1, 3]}))
    states = sweep_states(edited, tmp_path / "out")
    assert states[["state", "older"]].to_numpy().tolist() == [["failed", False], ["done", True]]
    assert "1 of them by an earlier version of the notebook's code" in plan_sweep(edited, tmp_path / "out")
    other = read_sweep(write_sweep(tmp_path, leaves, grid={"a": [3]}), fixed={"b": "other"})
    for function in (sweep_states, run_sweep):
        with pytest.raises(FileExistsError, match=r"a=3 has other settings \(b\)"):
            function(other, tmp_path / "out")


def test_data_of_a_stopped_point_is_reused_only_for_equal_settings(tmp_path):
    path = write_sweep(
        tmp_path, "from pathlib import Path\nleft = Path('left').exists()", WRITES_SUMMARY, grid={"a": [1]}
    )
    sweep, out = read_sweep(path), tmp_path / "out"
    job, work = build_job(sweep, sweep.points[0]), out / "a=1.partial"
    for settings, stays in ((job["settings"], True), ({"a": 7}, False)):
        work.mkdir(parents=True)
        sweep_run._write_sweep_record(sweep, out)
        (work / "left").touch()
        record = {"settings": settings, "code": sweep.code}
        (work / "point.json").write_text(json.dumps(record))
        make_point(job, out)
        assert (out / "a=1" / "left").exists() == stays
        assert json.loads((out / "a=1" / "point.json").read_text())["settings"] == job["settings"]
        (out / "a=1" / "summary.json").write_text("{")
        with pytest.raises(FileExistsError, match=r"a=1 exists, but summary\.json is truncated"):
            make_point(job, out)
        shutil.rmtree(out)


def test_concurrent_sweeps_share_one_cache(tmp_path, mini_root):
    path = tmp_path / "two.yml"
    fixed = {"cohort": str(mini_root), "slides": ["MINI1", "MINI2"], "epochs": 1, "protocol": "hest", "n_splits": 2}
    fixed |= {"label_method": "kmeans", "n_clusters": 4}
    path.write_text(yaml.safe_dump({"fixed": fixed, "list": [{"method": "bone"}, {"method": "none"}]}))
    cache = tmp_path / "cache"
    both = [command(path, "--out", str(tmp_path / o), "--workers", "1", PEKA_LITE_CACHE=str(cache)) for o in "ab"]
    for one in both:
        printed, _ = one.communicate()
        assert one.returncode == 0, printed
    a, b = ({p.parent.name: p.read_bytes() for p in (tmp_path / o).glob("method=*/metrics.csv")} for o in "ab")
    assert a == b
    assert sorted(a) == ["method=bone", "method=none"]
    assert len(list((cache / "students").glob("mini_bone_*/record.json"))) == 2  # one per fold
    assert not list(cache.rglob("*.partial"))
    assert {"table1.csv", "table2.csv", "points.csv", "points.parquet", "metrics.csv"} <= {
        p.name for p in (tmp_path / "a" / "report").iterdir()
    }
    write_report([tmp_path / "b"], tmp_path / "again")  # as `peka-lite report`
    assert (tmp_path / "again" / "points.csv").is_file()


def test_workers_fit_gpus_cores_and_memory(tmp_path, monkeypatch):
    sweep = read_sweep(write_sweep(tmp_path, grid={"a": list(range(40))}, memory=2))
    monkeypatch.setattr(sweep_run, "_list_gpus", lambda: ["4", "6"])
    assert sweep_run._plan_environments(sweep, None, 40) == [
        {"CUDA_VISIBLE_DEVICES": "4"},
        {"CUDA_VISIBLE_DEVICES": "6"},
    ]
    assert len(sweep_run._plan_environments(sweep, 1, 40)) == 1
    assert len(sweep_run._plan_environments(sweep, None, 1)) == 1  # one point left
    with pytest.raises(ValueError, match="3 are more than the 2 GPUs"):
        sweep_run._plan_environments(sweep, 3, 40)
    monkeypatch.setattr(sweep_run, "_list_gpus", list)
    monkeypatch.setattr("dask.system.CPU_COUNT", 16)
    for gib, n in ((9, 4), (1000, 16), (0.5, 1)):
        monkeypatch.setattr("distributed.system.MEMORY_LIMIT", gib * 2**30)
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("M", (), {"available": 1 << 60}))
        assert len(sweep_run._plan_environments(sweep, None, 40)) == n
    with pytest.raises(ValueError, match="must be at least 1, not 0"):
        sweep_run._plan_environments(sweep, 0, 40)


@pytest.mark.parametrize(("cores", "seen", "threads"), [(8, 8, "2"), (64, 8, "8")])
def test_points_share_cores_of_a_machine_but_not_of_a_batch_job(monkeypatch, cores, seen, threads):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("dask.system.CPU_COUNT", seen)
    worker = SimpleNamespace(address="tcp://10.0.0.1:7", state=SimpleNamespace(nthreads=1))
    assert sweep_run._share_cores(worker, {"tcp://10.0.0.1": 4})["OMP_NUM_THREADS"] == threads


def test_edits_of_a_running_notebook_have_no_effect_and_its_folder_is_importable(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("FACTOR = 3")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "on_the_path.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["ours", "", os.environ.get("PYTHONPATH", "")]))
    (tmp_path / "data.csv").write_text("7")
    code = """
import json, os, sys, beside, on_the_path
from pathlib import Path
assert sys.path.count(str(Path(notes).parent)) == 1  # the notebook's folder, not the current one
path = Path(notes).parent / "walk.ipynb"
path.write_text(path.read_text().replace("beside.FACTOR", "100"))
assert Path(b).read_text() == "7"
json.dump({"got": a * beside.FACTOR}, open("summary.json", "w"))
"""
    sweep = read_sweep(write_sweep(tmp_path, code, grid={"a": [1, 2], "b": ["data.csv"]}))
    states = run_sweep(sweep, tmp_path / "out", workers=1)
    assert list(states["state"]) == ["done", "done"], states["last_line"].tolist()
    got = [json.loads((tmp_path / "out" / name / "summary.json").read_text())["got"] for name in states.index]
    assert got == [3, 6]


def test_points_without_cache_status_are_timed():
    states = pd.DataFrame({"state": ["done", "failed"], "seconds": [30.0, 9.0]}, index=["a=1", "a=2"])
    assert get_measured_seconds(states) == {"a=1": 30.0}
    assert get_measured_seconds(states.assign(cached=True)) == {}


def test_live_table_shows_markup_as_text(tmp_path):
    sweep = read_sweep(write_sweep(tmp_path, grid={"a": [1, 2]}))
    states = pd.DataFrame(
        {"state": "missing", "seconds": float("nan"), "older": False, "cached": False}, index=["a=1", "a=2"]
    )
    board = Board(sweep, states)
    board.console = Console(file=io.StringIO(), force_terminal=True, width=120, height=5)
    with board.live(dashboard="http://x", slots=2):
        board.event({"point": "a=1", "worker": "tcp://x:1"})
        board.event({"point": "a=2", "worker": "tcp://x:1"})
        board.ended("a=1", "OSError: [/data/x.h5] is [red]not[/red] there")
        board.event({"point": "a=1", "worker": "tcp://x:1"})  # late
        board.console.print(board._table())
    shown = board.console.file.getvalue()
    assert "0 of 2 done, 1 running, 1 failed, 0 waiting" in shown
    assert "OSError: [/data/x.h5] is [red]not[/red] there" in shown


def test_stream_of_a_notebook_gets_lines(tmp_path, monkeypatch):
    sweep = read_sweep(write_sweep(tmp_path, grid={"a": [1]}))
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", stream)
    states = pd.DataFrame({"state": "missing", "seconds": float("nan"), "older": False, "cached": False}, index=["a=1"])
    board = Board(sweep, states)
    with board.live(slots=2):
        board.event({"point": "a=1", "worker": "tcp://x:1"})
        board.ended("a=1", None)
    assert stream.getvalue() == "2 at once\n[1/1] a=1 done in 0 s; 0 s left\n"


def test_progress_line_is_printed_during_long_points(tmp_path, pipe):
    sweep = read_sweep(write_sweep(tmp_path, grid={"a": [1, 2]}))
    states = {"state": "missing", "seconds": float("nan"), "cached": False, "older": False}
    board = Board(sweep, pd.DataFrame(states, index=["a=1", "a=2"]))
    with board.live(dashboard="http://x", slots=2):
        board.event({"point": "a=1", "worker": "tcp://x:1"})
        pipe.wait_for("0 of 2 done, 1 running, 0 failed, 1 waiting, .* left")


def test_only_visible_gpus_are_listed(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep_run._list_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-7f")
    assert sweep_run._list_gpus() == ["3", "GPU-7f"]


def timed_board(tmp_path, took, grid, **keys):
    """Return the board of a sweep of runs, given (state, seconds, cached) of each point."""
    path = tmp_path / "runs.yml"
    fixed = {"cohort": "mini", "weights": "random", "epochs": 1}
    path.write_text(yaml.safe_dump({"fixed": fixed, "grid": grid} | keys))
    sweep = read_sweep(path)
    states = pd.DataFrame(took, columns=["state", "seconds", "cached"], index=[p.name for p in sweep.points])
    return Board(sweep, states.assign(older=False, last_line=""))


NEVER = ("missing", float("nan"), False)


def test_time_left_is_estimated_from_similar_points(tmp_path):
    took = [("done", 30, False), NEVER, ("done", 90, False), NEVER]
    board = timed_board(tmp_path, took, {"method": ["none", "bone"], "seed": [0, 1]})
    assert board.describe_time_left() == "2 min 0 s"  # 30 s as frozen, 90 s as Bone
    board.slots = 2
    assert board.describe_time_left() == "1 min 30 s"  # at least the longest point
    board.event({"point": "method=none,seed=1", "worker": "tcp://x:1"})
    board.ended("method=none,seed=1", None)
    assert board.describe_time_left() == "1 min 30 s"


def test_time_left_without_similar_points_is_unknown(tmp_path):
    took = [("done", 200, False), NEVER, NEVER, NEVER]
    board = timed_board(tmp_path, took, {"method": ["none", "bone"], "seed": [0, 1]})
    assert board.describe_time_left() == "more than 3 min 20 s"
    board = timed_board(tmp_path, [NEVER] * 4, {"method": ["none", "bone"], "seed": [0, 1]})
    assert board.describe_time_left() == "an unknown time"
    board.event({"point": "method=none,seed=0", "worker": "tcp://x:1"})
    board.running["method=none,seed=0"] = time.monotonic() - 500, "tcp://x:1"
    board.ended("method=none,seed=0", "it broke")  # not an estimate for the others
    assert board.describe_time_left() == "an unknown time"


def test_time_left_of_a_point_beyond_its_estimate_is_unknown(tmp_path):
    took = [("done", 30, False), NEVER]
    board = timed_board(tmp_path, took, {"seed": [0, 1]})
    board.event({"point": "seed=1", "worker": "tcp://x:1"})
    assert board.describe_time_left() == "30 s"
    board.running["seed=1"] = time.monotonic() - 100, "tcp://x:1"
    assert board.describe_time_left() == "an unknown time"
    board.ended("seed=1", None)
    assert board.describe_time_left() == "0 s"


def test_cached_points_are_not_used_for_estimates(tmp_path):
    took = [("done", 2, True), ("failed", 1, False), NEVER, NEVER]
    board = timed_board(tmp_path, took, {"seed": [0, 1, 2, 3]})
    assert board.describe_time_left() == "an unknown time"
    board.event({"point": "seed=1", "worker": "tcp://x:1"})
    board.ended("seed=1", None, cached=True)
    board.ended("seed=2", None)  # made by another sweep
    assert (board.describe_time_left(), board.done) == ("an unknown time", 3)
    board = timed_board(tmp_path, [("done", 2, True), ("done", 60, False), NEVER, NEVER], {"seed": [0, 1, 2, 3]})
    assert board.describe_time_left() == "2 min 0 s"


def test_plan_reports_unknown_run_times(tmp_path):
    path = tmp_path / "runs.yml"
    fixed = {"cohort": "mini", "weights": "random", "epochs": 1}
    path.write_text(yaml.safe_dump({"fixed": fixed, "grid": {"method": ["none", "bone"], "seed": [0, 1]}}))
    sweep, out = read_sweep(path), tmp_path / "out"
    (out / "log").mkdir(parents=True)
    record = {"state": "done", "seconds": 50.0, "cached": False}  # its folder was removed
    (out / "log" / "method=none,seed=0.json").write_text(json.dumps(record))
    plan = plan_sweep(sweep, out).splitlines()[-1]
    assert plan.endswith("run time about 1 min 40 s, estimated from 1 timed, plus 2 of unknown run time")
    (out / "log" / "method=none,seed=0.json").write_text(json.dumps(record | {"cached": True}))
    assert plan_sweep(sweep, out).splitlines()[-1].endswith("run time unknown")


def test_cached_students_are_detected(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path))
    job = {"notebook": None, "settings": {"features": "student", "backbone": "mini", "method": "bone"}}
    other = tmp_path / "students" / "mini_0123456789abcdef" / "features.npy"
    other.parent.mkdir(parents=True)
    other.touch()
    begun = time.time()
    assert sweep_run._used_cache(job, since=begun)
    trained = tmp_path / "students" / "mini_bone_0123456789abcdef" / "features.npy"
    trained.parent.mkdir()
    trained.touch()
    assert not sweep_run._used_cache(job, since=begun)
    os.utime(trained, (begun - 60, begun - 60))
    assert sweep_run._used_cache(job, since=begun)
    assert not sweep_run._used_cache(job | {"notebook": {}}, since=begun)
    control = {"notebook": None, "settings": job["settings"] | {"features": "depth"}}
    assert not sweep_run._used_cache(control, since=begun)


def fake_package(folder, text):
    """Write a package that precedes the real one on a worker's path, and return that path."""
    sweeps = folder / "peka_lite" / "experiments" / "sweeps"
    sweeps.mkdir(parents=True)
    (folder / "peka_lite" / "__init__.py").write_text(text)
    (sweeps / "run.py").touch()
    return folder


def test_workers_with_missing_or_other_package_are_reported_at_once(tmp_path, monkeypatch):
    from distributed import Client, LocalCluster

    sweep = read_sweep(write_sweep(tmp_path, WRITES_SUMMARY, grid={"a": [1, 2]}))
    out, lacks = tmp_path / "out", "raise ModuleNotFoundError(\"No module named 'peka_lite'\")"
    paths = [fake_package(tmp_path / "none", lacks), fake_package(tmp_path / "old", "__version__ = '0.0.9'")]
    start = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny", "--no-dashboard", "--nthreads", "1"]
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=":0", silence_logs=50) as cluster:
        address, quiet = cluster.scheduler_address, {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        workers = [
            subprocess.Popen([*start, address], env=os.environ | {"PYTHONPATH": str(path)}, cwd=path, **quiet)
            for path in paths
        ]
        try:
            with Client(address) as client:
                client.wait_for_workers(2, timeout=120)
            with pytest.raises(
                ValueError, match=r"worker tcp://\S+ cannot import peka_lite \(No module named"
            ) as error:
                run_sweep(sweep, out, scheduler=address)
            assert "has peka_lite 0.0.9" in str(error.value)
            assert "Install peka_lite" in str(error.value)
            assert not out.exists()
            # The first call has no result, as if the workers joined later.
            real, calls = sweep_run._find_mismatches, []
            monkeypatch.setattr(sweep_run, "_find_mismatches", lambda c: real(c) if calls else calls.append(c))
            states = run_sweep(sweep, out, scheduler=address)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert list(states["state"]) == ["failed", "failed"]
    assert states["last_line"].str.contains("worker tcp://.*peka_lite.*Install peka_lite").all()


def test_point_fails_after_its_worker_died_three_times(tmp_path, monkeypatch):
    import dask
    from distributed import LocalCluster

    kills = """
import os, signal, sys
if any("peka_lite.experiments.sweeps.points" in word for word in sys.orig_argv):
    if '"a=1"' in sys.stdin.readline():
        open(os.environ["DEATHS"], "a").write("x")
        os.kill(os.getppid(), signal.SIGKILL)
    print("ValueError: planted", flush=True)
    os._exit(1)
"""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(kills)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("DEATHS", str(tmp_path / "deaths"))
    sweep = read_sweep(write_sweep(tmp_path, WRITES_SUMMARY, grid={"a": [1, 2]}))
    settings = {"distributed.scheduler.allowed-failures": 2, "distributed.scheduler.worker-saturation": 1.0}
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0") as cluster,
    ):
        states = run_sweep(sweep, tmp_path / "out", scheduler=cluster.scheduler_address)
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert list(states["state"]) == ["failed", "failed"]
    assert states.loc["a=1", "last_line"].startswith("its worker died 3 times, the last at tcp://127.0.0.1:")
    assert states.loc["a=2", "last_line"] == "ValueError: planted"
