"""Check the reading of sweeps, their states and their plan."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from run_folders import complete_summary

from peka_lite.experiments import RunConfig, plan_sweep, read_sweep, ready_sweeps, sweep_states
from peka_lite.experiments.sweeps._notebook import read_parameters
from peka_lite.experiments.sweeps.points import write_record
from peka_lite.experiments.sweeps.read import read_value

ROOT = Path(__file__).resolve().parents[3]
FIXED = {"weights": "random", "epochs": 1}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a sweep file."""

    def write(**keys):
        path = tmp_path / "sweep.yml"
        path.write_text(yaml.safe_dump({"fixed": FIXED} | keys, sort_keys=False))
        return path

    return write


def write_notebook(path, parameters, *code):
    """Write a notebook with a parameters cell and further cells of code."""
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(text) for text in code]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def test_points_are_run_configs_in_the_files_order(write):
    sweep = read_sweep(write(title="Title", grid={"method": ["none", "bone"], "seed": [0, 1]}))
    assert (sweep.name, sweep.title, sweep.varied) == ("sweep", "Title", ("method", "seed"))
    assert [p.name for p in sweep.points] == [
        "method=none,seed=0", "method=none,seed=1", "method=bone,seed=0", "method=bone,seed=1",
    ]  # fmt: skip
    assert sweep.points[3].settings == RunConfig(**FIXED, method="bone", seed=1).as_dict()


def test_number_with_exponent_is_a_number(tmp_path):
    path = tmp_path / "lr.yml"
    path.write_text("fixed: {weights: random}\ngrid:\n  lr: [1e-4, 1E3, 2.5e-05, .5e1]\n")
    assert [p.settings["lr"] for p in read_sweep(path).points] == [1e-4, 1e3, 2.5e-5, 5.0]
    assert read_value("1e-4") == 1e-4
    assert read_value("1e-4x") == "1e-4x"


def test_path_relative_to_current_folder_is_refused(write, tmp_path, mini_root, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "data").symlink_to(mini_root)
    monkeypatch.chdir(elsewhere)
    with pytest.raises(FileNotFoundError, match="cohort: no file 'data' in the sweep's folder"):
        read_sweep(write(grid={"cohort": ["data"]}))
    given = read_sweep(write(grid={"seed": [0, 0]}), fixed={"cohort": "data"})
    assert [(p.name, p.settings["cohort"]) for p in given.points] == [("seed=0", str(mini_root))]


def test_points_with_equal_settings_are_merged(write):
    sweep = read_sweep(write(list=[{}, {"tau": 2.0}, {"tau": 4.0}]))
    assert [p.name for p in sweep.points] == ["base", "tau=4.0"]


def test_given_parameter_overrides_the_files_and_does_not_vary(write):
    path = write(grid={"method": ["none", "bone"], "seed": [0, 1]})
    sweep = read_sweep(path, fixed={"seed": 7, "epochs": 3})
    assert [p.name for p in sweep.points] == ["method=none", "method=bone"]
    assert {(p.settings["seed"], p.settings["epochs"]) for p in sweep.points} == {(7, 3)}
    with pytest.raises(ValueError, match="tau is set together with others under zip or list"):
        read_sweep(write(list=[{"tau": 1.0}, {"tau": 3.0}]), fixed={"tau": 2.0})
    with pytest.raises(ValueError, match="tau is set together"):
        read_sweep(write(zip=[{"tau": [1.0], "seed": [1]}]), fixed={"tau": 2.0})
    partly = read_sweep(write(list=[{}, {"tau": 4.0}]), fixed={"tau": 3.0})
    assert [(p.name, p.settings["tau"]) for p in partly.points] == [("base", 3.0), ("tau=4.0", 4.0)]


def test_exclusions_apply_to_a_given_parameter(write):
    grid = {"method": ["none", "bone"], "seed": [0, 1], "slides": [["A", "B"], ["C"]]}
    path = write(grid=grid, exclude=[{"method": "none", "seed": 1}, {"slides": ["C"], "seed": 0}])
    assert len(read_sweep(path).points) == 4
    assert [p.name for p in read_sweep(path, fixed={"seed": 1}).points] == [
        "method=bone,slides=A+B",
        "method=bone,slides=C",
    ]
    assert [p.name for p in read_sweep(path, fixed={"seed": 0}).points] == [
        "method=none,slides=A+B",
        "method=bone,slides=A+B",
    ]


def test_paths_are_relative_to_the_file(write, tmp_path, mini_root, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "data").symlink_to(mini_root)
    sweep = read_sweep(write(grid={"cohort": ["data", "mini"]}))
    assert [p.settings["cohort"] for p in sweep.points] == [str(mini_root), "mini"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"girds": {"seed": [0]}, "grid": {"seed": [0]}}, "unknown key 'girds'; did you mean 'grid'"),
        ({"grid": {"metod": ["bone"]}}, "grid: unknown setting 'metod'; did you mean 'method'"),
        ({"list": [{"ephocs": 3}]}, "list: unknown setting 'ephocs'; did you mean 'epochs'"),
        ({"grid": {"seed": [0]}, "exclude": [{"sed": 0}]}, "unknown name in exclude, .*'sed'; did you mean 'seed'"),
        ({"zip": [{"bakbone": ["uni"]}]}, "zip: unknown setting 'bakbone'; did you mean 'backbone'"),
        ({"grid": {"method": ["bone", "bonne"]}}, "grid: unknown method 'bonne'.*did you mean 'bone'"),
        ({"grid": {"epochs": [1, 0]}}, "grid: epochs must be above 0"),
        ({"grid": {"epochs": ["ten"]}}, "grid: epochs .*'ten'"),
        ({"grid": {"method": ["none", "bone"], "r": [64]}}, "point method=none,r=64: r=64 does not fit"),
        ({}, "no parameter varies; give grid, zip or list"),
        ({"grid": {"seed": [0]}, "memory": float("nan")}, "memory must be the GiB that one point needs"),
        ({"grid": {"seed": [0]}, "memory": "lots"}, "memory must be the GiB that one point needs"),
        ({"grid": [1]}, "grid must be a mapping of parameters"),
        ({"list": [1]}, "list: every entry must map parameters"),
        ({"grid": {"seed": [0]}, "notebook": "walk.ipynb"}, "notebook: no such file 'walk.ipynb'"),
    ],
)
def test_unknown_name_error_has_file_key_and_nearest_name(write, keys, words):
    path = write(**keys)
    with pytest.raises((ValueError, FileNotFoundError), match=f"^{path}: {words}"):
        read_sweep(path)


def test_invalid_sweep_files_are_refused(tmp_path):
    path = tmp_path / "bad.yml"
    for text, words in (
        ("a: [", "invalid YAML"), ("- 1", "a sweep must be a mapping"), ("", "a sweep must be a mapping"),
        ("grid: {seed: [0]}\ngrid: {tau: [1.0]}", "'grid' is there twice"),
        ("grid: {seed: [0], seed: [1]}", "'seed' is there twice"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^{path}: .*{words}"):
            read_sweep(path)
    path.write_bytes("title: Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=f"^{path}: invalid YAML"):
        read_sweep(path)
    with pytest.raises(ValueError, match="'@x' is not valid YAML"):
        read_value("@x")
    with pytest.raises(FileNotFoundError, match="no such sweep; give a YAML file or one of ablations, quick, table1"):
        read_sweep("tabel1")


def test_notebook_parameters_are_checked_by_name_type_and_setting(write, tmp_path):
    parameters = 'method: str = "bone"\nmethods: list = []\nn: int = 3\nlr: float = 0.1\nfile: str = None'
    parameters += "\nb: bool = True"
    write_notebook(tmp_path / "walk.ipynb", parameters, "import peka_lite")

    def read(name, *values):
        return read_sweep(write(fixed={}, notebook="walk.ipynb", grid={name: list(values)}))

    sweep = read("lr", 1, 0.5)
    assert sweep.notebook == tmp_path / "walk.ipynb"
    assert [p.settings for p in sweep.points] == [{"lr": 1}, {"lr": 0.5}]
    assert len(read("file", None, "a.txt").points) == 2
    for name, value, words in (
        ("methd", "none", "unknown parameter of walk.ipynb 'methd'; did you mean 'method'"),
        ("n", 2.5, "n is int, not 2.5"),
        ("lr", {1: 2}, "lr must be made of numbers, text, lists and mappings with text as keys"),
        ("lr", float("nan"), "lr must be made of numbers, text"),
        ("n", None, "n is int, not None"),
        ("n", True, "n is int, not True"),
        ("b", 1, "b is bool, not 1"),
        ("method", "bonne", "did you mean 'bone'"),
        ("methods", ["none", "loRA"], "unknown method 'loRA'"),
    ):
        with pytest.raises(ValueError, match=words):
            read(name, value)


def test_parameters_are_parsed_as_python(tmp_path):
    path = write_notebook(
        tmp_path / "walk.ipynb",
        "import os\na: int | None = None  # x = 3\nb: str = 'p=q'\nc, d = 1, 2\ne = f = 0.1\n"
        "g: 'Optional[int]' = None\nh: os.PathLike = '.'\ni = os.sep\nj: list[str] = []\nk = True",
    )
    parameters = read_parameters(path)
    assert list(parameters) == list("abcdefghijk")
    valid = {"a": (1, None), "b": ("",), "c": (1, "x"), "e": (1, 0.5), "g": (3, None), "h": (1,), "i": (1,), "j": ([],)}
    for name, values in valid.items():
        for value in values:
            parameters[name].check(name, value)
    for name, value in (("a", "1"), ("a", 1.5), ("b", None), ("e", "x"), ("f", True), ("g", "3"), ("j", "x"), ("k", 1)):
        with pytest.raises(ValueError, match=f"^{name} is "):
            parameters[name].check(name, value)


def test_invalid_notebooks_are_refused(tmp_path):
    path = tmp_path / "x.ipynb"
    cell = {"cell_type": "code", "source": "a = ", "metadata": {"tags": ["parameters"]}}
    kernel = {"kernelspec": {"name": "python3"}}
    for content, words in (
        ("[", "not a notebook of format 4"),
        ([1], "not a notebook of format 4"),
        ({"worksheets": []}, "not a notebook of format 4"),
        ({"cells": [], "metadata": kernel}, "no cell tagged 'parameters'"),
        ({"cells": [cell], "metadata": {}}, "names no kernel"),
        ({"cells": [cell], "metadata": {"kernelspec": {"name": "julia-0"}}}, "kernel 'julia-0', which is not"),
        ({"cells": [cell], "metadata": kernel}, "the parameters cell is not valid Python"),
    ):  # fmt: skip
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=words):
            read_parameters(path)


def test_parameters_of_other_projects_notebooks_are_not_settings(write, tmp_path):
    write_notebook(tmp_path / "other.ipynb", 'method: str = "ours"')
    assert len(read_sweep(write(fixed={}, notebook="other.ipynb", grid={"method": ["a", "b"]})).points) == 2


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_tutorial_notebook_can_be_swept(write, notebook):
    sweep = read_sweep(write(fixed={"cohort": "mini"}, notebook=str(notebook), list=[{}]))
    assert [p.name for p in sweep.points] == ["base"]


def test_ready_sweeps_match_their_titles(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path))
    assert set(ready_sweeps()) == {"ablations", "quick", "table1", "table2"}
    monkeypatch.setattr("peka_lite.experiments.config.find_cohort", Path, raising=False)
    for place in ("peka_lite.experiments.config.find_fetched", "peka_lite.data.download.find_fetched"):
        monkeypatch.setattr(place, lambda name, **_: tmp_path / name, raising=False)
    read = {name: read_sweep(name) for name in ready_sweeps()}
    shown = {(p.settings["cohort"], p.settings["backbone"], p.settings["method"]) for p in read["table2"].points}
    assert len(shown) == len(read["table2"].points) == 4 * 2 * 4
    assert len(read["table1"].points) == 4 * 6
    from peka_lite.reports.paper_tables import read_published

    assert shown == {
        tuple(r) for r in read_published().query("table == 2")[["cohort", "backbone", "method"]].to_numpy()
    }
    base = read["ablations"].points[0].settings
    changed = [{k for k in base if p.settings[k] != base[k]} - {"seed"} for p in read["ablations"].points]
    assert changed.count(set()) == 3
    assert all(len(c) <= 2 for c in changed)
    assert {"kd_space", "tau", "layers", "label_method", "shuffle_teacher", "train_share", "r"} <= set().union(*changed)


def test_states_follow_folders_and_settings(write, tmp_path):
    sweep = read_sweep(write(grid={"seed": [0, 1, 2]}))
    out = tmp_path / "out"
    assert list(sweep_states(sweep, out)["state"]) == ["missing"] * 3
    (out / "seed=1.partial").mkdir(parents=True)
    done = out / "seed=0"
    done.mkdir()
    (done / "config.yml").write_text(yaml.safe_dump(sweep.points[0].settings))
    (done / "summary.json").write_text(json.dumps(complete_summary()))
    assert list(sweep_states(sweep, out)["state"]) == ["done", "unfinished", "missing"]
    (done / "summary.json").write_text('{"mean_pcc": 0.')
    assert sweep_states(sweep, out)["state"].iloc[0] == "failed"
    (done / "summary.json").write_text(json.dumps(complete_summary()))
    other = read_sweep(write(fixed=FIXED | {"tau": 3.0}, grid={"seed": [0]}))
    with pytest.raises(FileExistsError, match=r"seed=0 has other settings \(tau\)"):
        sweep_states(other, out)


@pytest.mark.parametrize(
    ("record", "state"),
    [
        ('{"state": ["failed"], "seconds": [3]}', "missing"),
        ('{"state": "other", "seconds": "x"}', "missing"),
        ('{"state": "failed", "seconds": NaN, "last_line": 5, "cached": "yes"}', "failed"),
        ('{"state": "failed", "seconds": 1e400, "last_line": null}', "failed"),
        ('{"state": "failed", "seconds": -1, "last_line": {"a": 1}}', "failed"),
        ('{"state": "failed", "seconds": 1' + "0" * 400 + "}", "failed"),
        ('{"state": "failed", "seconds": 1' + "0" * 5000 + "}", "missing"),
        ('{"state": "failed", "a": ' + "[" * 10**6 + "]" * 10**6 + "}", "missing"),
        ('{"state": "failed", "a": "' + "x" * 2**24 + '"}', "missing"),
        ("[" * 10**6, "missing"),
        ("[1]", "missing"),
        ('"failed"', "missing"),
        (b'{"state": "\xff"}', "missing"),
    ],
)
def test_invalid_values_of_a_record_are_ignored(write, tmp_path, record, state):
    sweep, log = read_sweep(write(grid={"seed": [0]})), tmp_path / "out" / "log"
    log.mkdir(parents=True)
    (log / "seed=0.json").write_bytes(record if isinstance(record, bytes) else record.encode())
    row = sweep_states(sweep, tmp_path / "out").iloc[0]
    assert row["state"] == state
    assert row["last_line"] == ""
    assert not row["cached"]
    assert math.isnan(row["seconds"])
    assert "1 to run" in plan_sweep(sweep, tmp_path / "out")


def test_last_line_of_log_is_shown_without_control_characters(write, tmp_path):
    sweep, log = read_sweep(write(grid={"seed": [0]})), tmp_path / "out" / "log"
    log.mkdir(parents=True)
    line = "\x1b]0;title\x07\x1b[2Jfell\r\nover\u202e" + "x" * 10**6
    (log / "seed=0.json").write_text(json.dumps({"state": "failed", "last_line": line}))
    shown = sweep_states(sweep, tmp_path / "out")["last_line"].iloc[0]
    assert shown.startswith(r"\x1b]0;title\x07\x1b[2Jfell\r\nover\u202ex")
    assert len(shown) == 1000
    write_record(tmp_path / "out", {"name": "seed=0"}, state="failed", last_line=line)
    assert json.loads((log / "seed=0.json").read_text())["last_line"] == shown


@pytest.mark.parametrize("record", ["{}", '{"x": 1}', '{"settings": [1], "code": null}', '{"code": null}', "[" * 10**6])
def test_point_without_readable_settings_is_refused(write, tmp_path, record):
    sweep, done = read_sweep(write(grid={"seed": [0]})), tmp_path / "out" / "seed=0"
    done.mkdir(parents=True)
    (done / "summary.json").write_text('{"mean_pcc": 0.1}')
    (done / "point.json").write_text(record)
    with pytest.raises(
        FileExistsError, match="seed=0 is not from this sweep; remove it, or give another folder with --out"
    ):
        sweep_states(sweep, tmp_path / "out")
    (done / "point.json").write_text(json.dumps({"settings": {"\x1b[31m": 1, "seed": 0}}))
    with pytest.raises(FileExistsError, match="has other settings") as error:
        sweep_states(sweep, tmp_path / "out")
    assert "\x1b" not in str(error.value)
    (done / "point.json").unlink()
    (done / "config.yml").write_text("[1]")
    with pytest.raises(FileExistsError, match="is not from this sweep"):
        sweep_states(sweep, tmp_path / "out")


def test_two_billion_points_are_refused_at_once(write, tmp_path):
    thousand = list(range(1000))
    path = write(grid={"seed": thousand, "n_genes": [*thousand], "epochs": [*thousand], "r": [1, 2]})
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_CPU, (60, 60)); "
        "resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32)); "
        "from peka_lite.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    for options in (["--dry-run"], [], ["--dry-run", "-p", "tau", "2"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "sweep", str(path), "--out", str(tmp_path / "out"), *options],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        message = "2,000,000,000 points before exclusions are more than a sweep may have (100,000); split the sweep"
        assert done.stderr == f"peka-lite: {path}: {message}\n"
    assert not (tmp_path / "out").exists()
    assert len(read_sweep(path, fixed={"n_genes": 10, "epochs": 1, "r": 2}).points) == 1000


def test_error_for_long_values_is_short(write):
    for keys, words in (
        ({"grid": {"cohort": ["x" * 10**5]}}, "cohort is text of one line, not 'xxx"),
        ({"grid": {"method": ["x" * 10**5]}}, "method is text of one line, not 'xxx"),
        ({"grid": {"slides": [[[["x"] * 1000]]]}}, "slides is a list of names"),
        ({"grid": {1: [2]}, "exclude": [{2: 3}]}, "unknown name in exclude, .*: 2; known: 1"),
        ({"grid": {"seed": [0]}, "memory": 1 << 4000}, "memory must be the GiB that one point needs, above 0, not "),
        ({"grid": {"seed": [0]}, "notebook": "x" * 10**5}, "notebook: no such file 'xxx"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
            read_sweep(write(**keys))
        assert len(str(error.value)) < 2200


def test_title_is_one_line(write):
    path = write(title="Title\n\nof\x1b[2J a\tsweep \n", grid={"seed": [0]}, memory=1e9)
    sweep = read_sweep(path)
    assert sweep.title == r"Title of\x1b[2J a sweep"
    assert sweep.as_record()["title"] == sweep.title


def test_thousand_points_are_planned_without_pytorch(write, tmp_path):
    path = write(grid={"seed": list(range(100)), "tau": [1.0, 2.0, 3.0, 4.0, 5.0], "method": ["bone", "lora"]})
    code = (
        "import sys; from peka_lite.cli.main import main; status = main(sys.argv[1:]); "
        "print([m for m in ('torch', 'scanpy', 'anndata', 'distributed') if m in sys.modules]); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "sweep", str(path), "--dry-run", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PEKA_LITE_CACHE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *points, total, heavy = done.stdout.splitlines()
    assert len(points) == 1000
    assert total.startswith("1000 points in ")
    assert "1000 to run" in total
    assert heavy == "[]"
    assert not (tmp_path / "out").exists()
