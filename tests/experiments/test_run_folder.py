"""Break every field of every file of a run and of a model: each is refused in one sentence, or does not matter."""

import copy
import csv
import json
import shutil
import warnings
from functools import partial, reduce

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from run_folders import complete_summary, training_summary, write_run_folder
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import write_folder

from peka_lite.cli.main import main
from peka_lite.experiments import RunConfig, RunFolder, load_trained
from peka_lite.experiments.settings import SETTINGS
from peka_lite.reports import read_runs, write_report

pytestmark = pytest.mark.filterwarnings("ignore:.*random weights")
ABSENT = object()


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Write a run with scores."""
    return write_run_folder(tmp_path_factory.mktemp("scored") / "run", method="bone")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Write a run with probes, adapters and the training curves of two students."""
    folder = write_folder(tmp_path_factory.mktemp("model") / "run")
    curve = {"epoch": [0, 1], "loss": 1.0, "kd": 0.5, "ce": 1.5, "accuracy": 0.4, "seconds": 2.0, "waiting": 0.1}
    pd.concat([pd.DataFrame(curve).assign(fold=f) for f in "01"]).to_csv(folder / "training.csv", index=False)
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """Return a function that copies a folder."""
    return lambda folder: shutil.copytree(folder, tmp_path / "run", dirs_exist_ok=True)


def broken_values(value):
    """Return the four ways to break a value: absent, null, of another type, out of range."""
    other = 7 if isinstance(value, str | list | dict | bool) else "text"
    ranges = {bool: "yes", int: -1, float: -1e300, str: "two\nlines", list: [[None]], dict: {"": []}}
    return [ABSENT, None, other, ranges.get(type(value), [])]


def leaves(value, place=()):
    """Yield the place of every field of nested mappings, and of the first item of each list."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield (*place, name)
            yield from leaves(part, (*place, name))
    elif isinstance(value, list) and value:
        yield (*place, 0)


def changed(content, place, value):
    content = copy.deepcopy(content)
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    if value is ABSENT:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def require_sentence(error, path):
    """Check that an error is one line that names the file."""
    message = str(error)
    assert "\n" not in message
    assert path.name in message, message


def opens(read, path):
    """Return the result of a reader, or None if it refuses the file in one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message=".*random weights")
            return read()
    except (ValueError, FileNotFoundError, UserWarning) as error:
        require_sentence(error, path)
        return None


def test_every_field_of_a_summary_is_checked(scored, model, copy_of):
    refused = 0
    for folder, summary in ((scored, json.loads((scored / "summary.json").read_text())), (model, training_summary())):
        path = copy_of(folder) / "summary.json"
        for place in leaves(summary):
            for value in broken_values(reduce(lambda inner, name: inner[name], place, summary)):
                path.write_text(json.dumps(changed(summary, place, value)))
                run = opens(partial(RunFolder.open, path.parent), path)
                refused += run is None
                if run is None and value is not ABSENT:
                    with pytest.raises(ValueError, match=str(place[0])):
                        RunFolder.open(path.parent)
    assert refused > 300


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_a_config_is_checked(scored, model, copy_of, name):
    for folder in (scored, model):
        path = copy_of(folder) / "config.yml"
        fields = RunConfig(**yaml.safe_load(path.read_text())).as_dict()
        for value in [*broken_values(fields[name]), {"a": 1}, [["deep"]]]:
            path.write_text(yaml.safe_dump(changed(fields, (name,), value)))
            run = opens(partial(RunFolder.open, path.parent), path)
            if run is None:
                with pytest.raises(ValueError, match=rf"config\.yml: .*{name}"):
                    RunFolder.open(path.parent)
            elif folder is scored:
                opens(partial(read_runs, [path.parent]), path.parent)
            else:
                opens(partial(load_trained, path.parent, device="cpu"), path.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no settings"), ("[1]", "no settings"), ("text", "no settings"), ("{tau: {deep: [1]}}", "tau is a number"),
        ("{flavour: mint}", "unknown setting 'flavour'"), ("{1: 2}", "unknown setting '1'"), ("a: [", "damaged"),
        ("a: &x [1]\nb: *x", "anchor or alias"), ("\x00", "damaged"), ("{tau: 1, tau: 2}", "is there twice"),
        ("a:\n" + "\n".join(" " * k + "a:" for k in range(1, 60)), "nested more than"),
    ],
)  # fmt: skip
def test_damaged_config_is_refused(scored, copy_of, content, message):
    path = copy_of(scored) / "config.yml"
    path.write_text(content)
    for read in (RunFolder.open, lambda folder: read_runs([folder]), load_trained):
        with pytest.raises(ValueError, match=message) as caught:
            read(path.parent)
        require_sentence(caught.value, path)


@pytest.mark.parametrize("content", ["", "[1]", "1", '{"a": ', "{" * 5000, '{"split": NaN}', '"text"'])
def test_damaged_summary_is_refused(scored, copy_of, content):
    path = copy_of(scored) / "summary.json"
    path.write_text(content)
    for read in (RunFolder.open, lambda folder: read_runs([folder]), load_trained):
        with pytest.raises(ValueError, match=r"summary\.json") as caught:
            read(path.parent)
        require_sentence(caught.value, path)


def write_table(table, path):
    if path.suffix == ".csv":
        table.to_csv(path, index=False, quoting=csv.QUOTE_MINIMAL)
    else:
        table.to_parquet(path, index=False)


@pytest.mark.parametrize("name", ["metrics.csv", "slides.parquet", "training.csv"])
def test_every_column_of_a_table_is_checked(scored, model, copy_of, name):
    path = copy_of(model if name == "training.csv" else scored) / name
    table = pd.read_csv(path) if name.endswith(".csv") else pd.read_parquet(path)
    run = RunFolder.open(path.parent)
    read = {"metrics.csv": run.metrics, "slides.parquet": run.moments, "training.csv": run.training}[name]
    assert len(read()) == len(table)
    for column in table:
        numeric = pd.api.types.is_numeric_dtype(table[column]) and (name, column) != ("training.csv", "fold")
        broken = [table.drop(columns=column)]
        if numeric:
            broken += [table.assign(**{column: "text"}), table.assign(**{column: -1e9})]
        for content in broken:
            write_table(content, path)
            if opens(read, path) is None:
                with pytest.raises(ValueError, match=column):
                    read()
            else:  # columns that older versions lack, and numbers without bounds
                assert column in ("r2", "rmse", "spearman", "mean_y", "mean_p", "cov", "loss", "kd", "ce")
    for content in (b"", b"fold", b"\xff\xfe\x00", b"PAR1", path.read_bytes()[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read()


@pytest.mark.parametrize("name", ["probe.safetensors", "adapter.safetensors"])
def test_every_field_of_a_record_is_checked(model, copy_of, name):
    path = copy_of(model) / name
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    (entry,) = (key for key, text in metadata.items() if text.startswith("{"))
    record = json.loads(metadata[entry])
    refused = 0
    for place in leaves(record):
        for value in broken_values(reduce(lambda inner, part: inner[part], place, record)):
            path.unlink()
            save_file(tensors, path, metadata | {entry: json.dumps(changed(record, place, value))})
            refused += opens(partial(load_trained, path.parent, device="cpu"), path) is None
    assert refused > 50
    for key, tensor in tensors.items():
        without = {} if key.endswith(".range") else {k: v for k, v in tensors.items() if k != key}  # 0.1 has no ranges
        for content in filter(None, (without, tensors | {key: tensor.flatten()[:1].clone()})):
            path.unlink()
            save_file(content, path, metadata)
            with pytest.raises(ValueError, match=name) as caught:
                [load_trained(path.parent, fold=fold, device="cpu") for fold in (0, 1)]
            require_sentence(caught.value, path)


def test_every_column_of_predictions_is_checked(scored, copy_of):
    run = RunFolder.open(copy_of(scored))
    obs = pd.DataFrame({"slide": ["S1"], "patient": ["P"], "barcode": ["b"], "fold": [0]}, index=["S1/b"])
    path, X = run.path / "predictions.h5ad", np.zeros((1, 2), np.float32)
    ad.AnnData(X, obs=obs, layers={"measured": X}).write_h5ad(path)
    assert run.predictions().n_obs == len(run.spots()) == 1
    for name in obs:
        for broken in (obs.drop(columns=name), obs.assign(**{name: "x" if name == "fold" else 5})):
            ad.AnnData(X, obs=broken, layers={"measured": X}).write_h5ad(path)
            for read in (run.predictions, run.spots):
                with pytest.raises(ValueError, match=rf"predictions\.h5ad: obs has no {name}"):
                    read()
    ad.AnnData(X, obs=obs).write_h5ad(path)
    with pytest.raises(ValueError, match="layer measured is missing"):
        run.predictions()


def test_folder_made_elsewhere_opens(scored, copy_of, monkeypatch):
    path = copy_of(scored) / "config.yml"
    settings = yaml.safe_load(path.read_text())
    elsewhere = {"cohort": "/other/cohort", "device": "cuda:3", "weights": "/other/uni.bin", "patients": "/p.csv"}
    path.write_text(yaml.safe_dump(settings | elsewhere))
    run = RunFolder.open(path.parent)
    assert run.config.device == "cuda:3"
    assert run.config.cohort == "/other/cohort"
    (loaded,) = read_runs([path.parent])
    assert loaded.config["weights"] == "/other/uni.bin"


def test_report_of_a_broken_run_names_file_and_field(scored, tmp_path, capsys):
    run = shutil.copytree(scored, tmp_path / "runs" / "bad")
    summary = json.loads((run / "summary.json").read_text())
    summary["scores"]["log1p"]["pooled"]["pcc"] = "high"
    (run / "summary.json").write_text(json.dumps(summary))
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 2
    assert "summary.json: scores.log1p.pooled.pcc must be a number, not 'high'" in capsys.readouterr().err
    shutil.copytree(scored, tmp_path / "runs" / "good")
    with pytest.warns(UserWarning, match=r"skipped: .*bad.*scores\.log1p\.pooled\.pcc"):
        write_report([tmp_path / "runs"], tmp_path / "report")


def test_summary_is_checked_before_it_is_written(scored):
    assert complete_summary().keys() >= json.loads((scored / "summary.json").read_text()).keys()
    assert not np.isnan(RunFolder.open(scored).metrics()["pcc"]).all()
