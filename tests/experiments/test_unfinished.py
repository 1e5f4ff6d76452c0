"""Errors for folders without a finished run: each names the cause and a command with the same settings."""

import json
import shlex

import pytest
import yaml

from peka_lite._core._processes import Processes
from peka_lite.cli.options import parser
from peka_lite.experiments import RunConfig, RunFolder, load_run, predict_from, run, train
from peka_lite.experiments._unfinished import remake_command

SETTINGS = [
    {},
    {"protocol": "strict", "method": "lora", "epochs": 4, "r": 8},
    {"protocol": "hest", "split": "slide", "slides": ("MINI1", "MINI7")},
    {"method": "none", "split": "spot", "alpha": 10.0, "max_mito": 0.2, "train_share": 0.5},
    {"alpha": "inner", "normalization": "log1p", "augment": True, "lr": 3e-4, "seed": 7},
]


def leave_unfinished(config, out, command="run"):
    """Make the work folder that a command leaves when it is stopped."""
    with pytest.raises(KeyboardInterrupt), RunFolder.create(out, config, command=command, processes=Processes("cpu")):
        raise KeyboardInterrupt
    return out.with_name(f"{out.name}.partial")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["run", "train"])
def test_suggested_command_has_the_same_settings(mini_root, tmp_path, settings, name):
    config = RunConfig(cohort=str(mini_root), **settings)
    work = leave_unfinished(config, tmp_path / "my runs" / "bone", name)
    words = shlex.split(remake_command(work))
    assert words[:2] == ["peka-lite", name]
    options = vars(parser(command=name).parse_args(words[1:]))
    assert options.pop("out") == str(tmp_path / "my runs" / "bone")
    for extra in ("command", "maps", "fold"):
        options.pop(extra, None)
    assert RunConfig(**options) == config


def test_suggested_command_has_the_fold_of_a_training(mini_root, tmp_path):
    work = leave_unfinished(RunConfig(cohort=str(mini_root)), tmp_path / "m", "train --fold 2")
    assert remake_command(work).startswith("peka-lite train --fold 2 --cohort")


def test_error_of_other_settings_names_the_command_of_the_stopped_run(mini_root, tmp_path):
    leave_unfinished(RunConfig(cohort=str(mini_root), epochs=3), tmp_path / "a")
    with pytest.raises(FileExistsError, match=r"finish that one with `peka-lite run .*--epochs 3 --out .*/a`"):
        run(RunConfig(cohort=str(mini_root)), tmp_path / "a")
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError, match="b is there already: give another --out, or remove it"):
        run(RunConfig(cohort=str(mini_root)), tmp_path / "b")


@pytest.mark.parametrize("command", [run, train])
def test_error_of_invalid_weights_removes_only_a_new_work_folder(mini_root, tmp_path, command):
    (tmp_path / "weights.bin").write_text("<html>log in</html>")
    config = RunConfig(cohort=str(mini_root), method="none", weights=str(tmp_path / "weights.bin"))
    with pytest.raises(ValueError, match=r"weights\.bin: cannot be read as weights"):
        command(config, tmp_path / "m")
    assert not (tmp_path / "m.partial").exists()
    leave_unfinished(config, tmp_path / "m")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        command(config, tmp_path / "m")
    assert (tmp_path / "m.partial").is_dir()


def write(folder, **files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


@pytest.fixture
def folders(mini_root, tmp_path):
    """One path of each kind that is no finished run."""
    leave_unfinished(RunConfig(cohort=str(mini_root), protocol="strict", epochs=4), tmp_path / "bone")
    settings = yaml.safe_dump(RunConfig(cohort=str(mini_root), epochs=4).as_dict())
    write(tmp_path / "cut", config_yml=settings)
    write(tmp_path / "short", config_yml=settings, summary_json='{"fold": ')
    write(tmp_path / "list", config_yml=settings, summary_json="[]")
    write(tmp_path / "garbled", config_yml="a: [", summary_json="{}")
    write(tmp_path / "empty")
    write(tmp_path / "export", model_safetensors="", README_md="")
    write(tmp_path / "around" / "lora", config_yml=settings, summary_json="{}")
    points = {"seed=1": {"seed": 1}, "seed=2": {"seed": 2}}
    sweep = yaml.safe_dump({"title": "T", "notebook": None, "varied": ["seed"], "points": points})
    write(tmp_path / "sweep", sweep_yml=sweep)
    write(tmp_path / "sweep" / "seed=1", config_yml=settings, summary_json='{"n": 1}')
    (tmp_path / "genes.h5ad").write_text("")
    write(tmp_path / "genes.h5ad.node7.partial")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bone", r"bone: .*stopped before its end.*`peka-lite run .*--protocol strict --epochs 4 --out \S+/bone`"),
        ("bone.partial", r"bone\.partial: .*stopped.*`peka-lite run .*--epochs 4 --out \S+/bone`"),
        ("cut", r"cut: .*\(summary\.json missing\): remove the folder and give `peka-lite run .* --out \S+/cut`"),
        ("short", r"short/summary\.json is truncated or damaged \(.*\); remove its folder and run `peka-lite run"),
        ("list", r"list/summary\.json is not a mapping"),
        ("garbled", r"garbled/config\.yml is truncated or damaged"),
        ("empty", r"empty: .*\(config\.yml, summary\.json missing\); `peka-lite train` creates one"),
        ("export", "export: .*it is an export, which timm reads: give the folder that it was exported from"),
        ("around", r"around: .*holds folders of runs: give one of them: \S+/around/lora$"),
        ("sweep", r"sweep: .*the folder of a sweep: give one of its points: \S+/sweep/seed=1$"),
        ("genes.h5ad", "it is a file: give the folder that `peka-lite run` or `peka-lite train` made"),
        ("genes.h5ad.node7.partial", "only files of a stopped command in .*: run that command again, or remove"),
        ("shrot", "no finished run or training here, no such folder; did you mean 'short'"),
        ("nowhere/x", "no such folder; `peka-lite train` creates one"),
    ],
)  # fmt: skip
def test_error_of_a_folder_without_a_model_names_cause_and_fix(folders, name, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
        predict_from(folders / name, "MINI1", folders / "out.h5ad")
    assert "\n" not in str(caught.value)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        RunFolder.open(folders / name)
    assert not (folders / "out.h5ad").exists()


def test_load_run_reports_a_stopped_run(folders):
    with pytest.raises(FileNotFoundError, match=r"no finished run here, it was stopped .*`peka-lite run .*/bone`"):
        load_run(folders / "bone")


def test_scratch_folder_is_removed_from_a_finished_run(mini_root, tmp_path):
    config = RunConfig(cohort=str(mini_root), features="depth", method="none", split="spot", n_splits=2, n_genes=3)
    run(config, tmp_path / "depth", maps=False)
    assert not (tmp_path / "depth" / "scratch").exists()
    assert json.loads((tmp_path / "depth" / "summary.json").read_text())["n_folds"] == 2
