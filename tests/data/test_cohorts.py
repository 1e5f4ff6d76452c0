"""Cohorts are opened by name or folder; fetched ones take their patients from the manifest."""

import json
import shutil

import pytest

from peka_lite.data import cohort_root, open_cohort
from peka_lite.data._choices import MINI_FORMAT
from peka_lite.data.cohorts import find_cohort
from peka_lite.experiments import RunConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fetched(mini_root, tmp_path):
    """Return two synthetic slides as a fetched breast cohort, with no patient in the metadata."""
    root = tmp_path / "fetched"
    slides = {"MINI1": "TENX13", "MINI2": "TENX14"}
    for kind, ending in (("st", "h5ad"), ("patches", "h5"), ("metadata", "json")):
        (root / kind).mkdir(parents=True)
        for name, fetched_name in slides.items():
            shutil.copy(mini_root / kind / f"{name}.{ending}", root / kind / f"{fetched_name}.{ending}")
    for path in (root / "metadata").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"patient": ""}))
    (root / "fetched.json").write_text(json.dumps({"name": "breast"}))
    return root


@pytest.mark.parametrize("record", ["[]", '{"name": ["breast"], "files": {}}', "{" * 10_000])
def test_an_invalid_record_in_a_cohort_folder_is_refused(fetched, record):
    (fetched / "fetched.json").write_text(record)
    with pytest.raises(ValueError, match=r"fetched\.json: .*remove it"):
        open_cohort(fetched)


def test_the_embedded_cohort_is_written_once(cache, monkeypatch):
    written = []
    monkeypatch.setattr("peka_lite.data.mini.cohort.write_mini_cohort", lambda root: written.append(root) or root)
    assert find_cohort("mini") == cache / f"mini-{MINI_FORMAT}"
    assert not written
    assert cohort_root("mini") == cache / f"mini-{MINI_FORMAT}"
    assert written == [cache / f"mini-{MINI_FORMAT}"]


def test_a_folder_is_a_cohort(tmp_path):
    assert cohort_root(tmp_path) == tmp_path


def test_an_unknown_cohort_is_refused_with_the_known_names():
    with pytest.raises(FileNotFoundError, match=r"no such cohort folder.*breast, kidney, liver, lung"):
        find_cohort("nowhere")
    with pytest.raises(FileNotFoundError, match="no such cohort folder"):
        find_cohort("scfoundation")  # an artifact, but no cohort


def test_the_error_for_an_unfetched_cohort_gives_the_command():
    with pytest.raises(FileNotFoundError, match="peka-lite fetch kidney"):
        RunConfig(cohort="kidney", weights="random").check()


def test_a_fetched_cohort_is_found_by_name(fetched, monkeypatch):
    monkeypatch.setattr("peka_lite.data.cohorts.find_fetched", lambda name: fetched if name == "breast" else None)
    assert find_cohort("breast") == fetched
    assert RunConfig(cohort="breast", weights="random").cohort == "breast"


def test_a_fetched_cohort_takes_its_patients_from_the_manifest(fetched):
    assert [s.patient for s in open_cohort(fetched, min_genes=1).slides] == ["TENX Block A", "TENX Block A"]


def test_given_patients_override_the_manifest(fetched, tmp_path):
    table = tmp_path / "patients.csv"
    table.write_text("id,patient\nTENX13,one\nTENX14,two\n")
    assert [s.patient for s in open_cohort(fetched, patients=table, min_genes=1).slides] == ["one", "two"]


def test_a_section_under_two_ids_is_read_once(fetched):
    for kind, ending in (("st", "h5ad"), ("patches", "h5"), ("metadata", "json")):
        for old, new in {"TENX13": "MEND51", "TENX14": "NCBI537"}.items():
            (fetched / kind / f"{old}.{ending}").rename(fetched / kind / f"{new}.{ending}")
    (fetched / "fetched.json").write_text(json.dumps({"name": "lung"}))
    cohort = open_cohort(fetched, min_genes=1)
    assert [s.id for s in cohort.slides] == ["MEND51"]
    assert cohort.left_out == {"NCBI537": "same section as MEND51"}
    assert len(open_cohort(fetched, slides=["MEND51", "NCBI537"], min_genes=1).slides) == 2


def test_a_folder_fetched_by_a_custom_entry_is_read_as_any_folder(fetched):
    (fetched / "fetched.json").write_text(json.dumps({"name": "custom"}))
    assert [s.patient for s in open_cohort(fetched, min_genes=1).slides] == [None, None]
