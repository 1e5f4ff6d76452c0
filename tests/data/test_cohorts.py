"""Cohorts by name: embedded, fetched, or a folder; with the manifest's patients where it is a fetched one."""

import json
import shutil

import pytest

import peka_lite.data.cohorts as room
from peka_lite.data._choices import MINI_FORMAT
from peka_lite.data.cohorts import cohort_root, find_cohort, open_cohort
from peka_lite.experiments.config import RunConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetched(mini_root, tmp_path):
    """Two synthetic slides that pass for a fetched breast cohort; their metadata name no patient."""
    root = tmp_path / "fetched"
    slides = {"MINI1": "TENX13", "MINI2": "TENX14"}
    for kind, ending in (("st", "h5ad"), ("patches", "h5"), ("metadata", "json")):
        (root / kind).mkdir(parents=True)
        for ours, theirs in slides.items():
            shutil.copy(mini_root / kind / f"{ours}.{ending}", root / kind / f"{theirs}.{ending}")
    for path in (root / "metadata").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"patient": ""}))
    (root / "fetched.json").write_text(json.dumps({"name": "breast"}))
    return root


@pytest.mark.parametrize("record", ["[]", '{"name": ["breast"], "files": {}}', "{" * 10_000])
def test_a_record_of_something_else_in_a_received_folder_is_named(fetched, record):
    (fetched / "fetched.json").write_text(record)
    with pytest.raises(ValueError, match=r"fetched\.json: .*remove it"):
        open_cohort(fetched)


def test_the_embedded_cohort_is_written_once(cache, monkeypatch):
    asked = []
    monkeypatch.setattr("peka_lite.data.mini.cohort.write_mini_cohort", lambda root: asked.append(root) or root)
    assert find_cohort("mini") == cache / f"mini-{MINI_FORMAT}"
    assert not asked
    assert cohort_root("mini") == cache / f"mini-{MINI_FORMAT}"
    assert asked == [cache / f"mini-{MINI_FORMAT}"]


def test_a_folder_is_a_cohort(tmp_path):
    assert cohort_root(tmp_path) == tmp_path


def test_what_is_neither_folder_nor_name_is_refused_beside_the_names():
    with pytest.raises(FileNotFoundError, match=r"no such cohort folder.*breast, kidney, liver, lung"):
        find_cohort("nowhere")
    with pytest.raises(FileNotFoundError, match="no such cohort folder"):
        find_cohort("scfoundation")  # an artifact, but no cohort


def test_a_cohort_that_is_not_fetched_says_how_to_fetch_it():
    with pytest.raises(FileNotFoundError, match="peka-lite fetch kidney"):
        RunConfig(cohort="kidney", weights="random")


def test_a_fetched_cohort_is_found_by_name(fetched, monkeypatch):
    monkeypatch.setattr(room, "find_fetched", lambda name: fetched if name == "breast" else None)
    assert find_cohort("breast") == fetched
    assert RunConfig(cohort="breast", weights="random").cohort == "breast"


def test_a_fetched_cohort_takes_its_patients_from_the_manifest(fetched):
    assert [s.patient for s in open_cohort(fetched, min_genes=1).slides] == ["TENX Block A", "TENX Block A"]


def test_the_readers_own_patients_come_first(fetched, tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("id,patient\nTENX13,one\nTENX14,two\n")
    assert [s.patient for s in open_cohort(fetched, patients=table, min_genes=1).slides] == ["one", "two"]


def test_a_section_under_two_ids_is_read_once(fetched):
    for kind, ending in (("st", "h5ad"), ("patches", "h5"), ("metadata", "json")):
        for theirs, lung in {"TENX13": "MEND51", "TENX14": "NCBI537"}.items():
            (fetched / kind / f"{theirs}.{ending}").rename(fetched / kind / f"{lung}.{ending}")
    (fetched / "fetched.json").write_text(json.dumps({"name": "lung"}))
    cohort = open_cohort(fetched, min_genes=1)
    assert [s.id for s in cohort.slides] == ["MEND51"]
    assert cohort.left_out == {"NCBI537": "same section as MEND51"}
    assert len(open_cohort(fetched, slides=["MEND51", "NCBI537"], min_genes=1).slides) == 2


def test_a_folder_fetched_by_an_entry_of_ones_own_is_read_as_any_folder(fetched):
    (fetched / "fetched.json").write_text(json.dumps({"name": "my own"}))
    assert [s.patient for s in open_cohort(fetched, min_genes=1).slides] == [None, None]
