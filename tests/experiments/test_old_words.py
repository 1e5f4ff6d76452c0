"""Files of version 0.1 stay readable: its spelling is taken for today's."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import peka_lite as pk
from peka_lite._core._processes import Processes
from peka_lite.backbones import BACKBONES, read_backbone
from peka_lite.data import read_manifest
from peka_lite.experiments import RunConfig, RunFolder, read_sweep
from peka_lite.experiments.sweeps.points import build_job, read_finished
from peka_lite.reports import protocol_table, read_runs

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks" / "results" / "2026-11-25_protocols_mini"


@pytest.mark.parametrize(("old", "new"), [("colour", "color"), ("backbone", "student")])
def test_features_of_an_old_run_are_read(old, new):
    assert RunConfig(features=old, method="none").features == new
    pk.experiments.check_field("features", old)


def test_a_stored_run_of_version_0_1_is_reported_beside_others():
    assert yaml.safe_load((STORED / "strict_colour" / "config.yml").read_text())["features"] == "colour"
    (color,) = read_runs([STORED / "strict_colour"])
    assert color.config["features"] == color.summary["features"] == "color"
    table = protocol_table(read_runs(sorted(STORED.glob("strict_*"))))
    assert "color and texture" in str(table)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*/*/config.yml")), ids=lambda p: p.parent.name
)
def test_a_stored_run_of_version_0_1_opens(path):
    run = RunFolder.open(path.parent)
    assert len(run.metrics()) > 0
    assert set(run.moments()["fold"]) == set(run.metrics()["fold"])


def test_an_unfinished_run_of_version_0_1_is_resumed(tmp_path):
    config = RunConfig(features="color", method="none")
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / "config.yml").write_text(yaml.safe_dump(config.as_dict() | {"features": "colour"}))
    with RunFolder.create(tmp_path / "out", config, command="run", processes=Processes("cpu")) as same:
        assert same == work
    (tmp_path / "out").rename(work)
    (work / "config.yml").write_text(yaml.safe_dump(config.as_dict() | {"features": "depth"}))
    with pytest.raises(FileExistsError, match="an unfinished run with other settings"):
        pk.run(config, tmp_path / "out")


def test_a_finished_point_of_version_0_1_is_not_repeated(tmp_path):
    (tmp_path / "sweep.yml").write_text(yaml.safe_dump({"fixed": {"method": "none"}, "list": [{"features": "colour"}]}))
    sweep = read_sweep(tmp_path / "sweep.yml")
    job = build_job(sweep, sweep.points[0])
    folder = tmp_path / "out" / job["name"]
    folder.mkdir(parents=True)
    settings = job["settings"] | {"features": "colour"}
    (folder / "summary.json").write_text(json.dumps({"n_folds": 2}))
    (folder / "point.json").write_text(json.dumps({"settings": settings, "code": None}))
    assert read_finished(tmp_path / "out", job)["settings"]["features"] == "color"


def test_licence_in_a_backbones_row_is_read(tmp_path):
    row = dict(
        name="mine",
        arch="vit_small_patch16_224",
        source=None,
        dim=384,
        licence="MIT",
        bone_r=64,
        mean=[0.5] * 3,
        std=[0.2] * 3,
    )
    (tmp_path / "row.yml").write_text(yaml.safe_dump(row))
    assert read_backbone(tmp_path / "row.yml").license == "MIT"
    assert "licence" not in {field.name for field in dataclasses.fields(BACKBONES["mini"])}


def test_licence_in_a_manifest_is_read(tmp_path):
    text = (ROOT / "data_manifest.yml").read_text()
    assert "license:" in text
    (tmp_path / "old.yml").write_text(text.replace("license:", "licence:"))
    assert {name: entry.license for name, entry in read_manifest(tmp_path / "old.yml").items()} == {
        name: entry.license for name, entry in read_manifest().items()
    }
