"""The packaged manifest is correct; fetch downloads and checks artifacts, with errors that give the fix."""

import csv
import dataclasses
import errno
import hashlib
import http.server
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from peka_lite._core import locks
from peka_lite.backbones.registry import BACKBONES
from peka_lite.data import _fetch, fetch, find_fetched, read_manifest
from peka_lite.data.download import cache_dir, patients_of

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = REPOSITORY.parent / "shared"
COHORTS = {"breast": 8, "kidney": 24, "liver": 14, "lung": 37}
COMMIT, OTHER = "a" * 40, "b" * 40
MIB = 2**20


def sha(data):
    return hashlib.sha256(data).hexdigest()


# --- the packaged manifest ---------------------------------------------------------------------------------------


def test_the_cohorts_have_the_slides_of_the_paper():
    assert {name: len(read_manifest()[name].slides) for name in COHORTS} == COHORTS


@pytest.mark.parametrize("name", COHORTS)
def test_slides_match_hests_table(name):
    table = SHARED / "real" / "HEST_v1_1_0.csv"
    if not table.is_file():
        pytest.skip("../shared/real/HEST_v1_1_0.csv is absent: the slides cannot be compared with HEST's table")
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["species"] == "Homo sapiens" and r["st_technology"] == "Visium"]
    rows = [r for r in rows if r["organ"].lower() == name and (name != "kidney" or r["oncotree_code"] == "SCCRCC")]
    expected = {
        r["id"]: (int(r["spots_under_tissue"]), int(r["nb_genes"]), r["disease_state"], r["oncotree_code"] or None)
        for r in rows
    }
    slides = {s.id: (s.spots, s.genes, s.disease_state, s.oncotree) for s in read_manifest()[name].slides}
    assert slides == expected
    assert {s.id: s.license for s in read_manifest()[name].slides} == {r["id"]: r["license"] or None for r in rows}
    named = {r["id"]: r["patient"].strip() for r in rows if r["patient"].strip()}
    assert {s.id for s in read_manifest()[name].slides if s.patient_basis == "table"} == named.keys()
    assert all(patients_of(name)[i] == f"{name} {patient}" for i, patient in named.items())


def test_notes_match_the_counts_of_slides():
    states = {name: Counter(s.disease_state for s in read_manifest()[name].slides) for name in COHORTS}
    assert states["breast"].keys() == states["kidney"].keys() == {"Cancer"}
    assert states["liver"] == {"Diseased": 5 + 4, "Healthy": 3, "Cancer": 2}
    for phrase in ("5 Diseased", "3 Healthy", "4 Diseased", "and 2 of", "not a cancer cohort"):
        assert phrase in read_manifest()["liver"].note
    for state, n in states["lung"].items():
        assert f"{n} {state}" in read_manifest()["lung"].note
    for name in COHORTS:
        assert f"{sum(s.spots for s in read_manifest()[name].slides):,}" in read_manifest()[name].note


def test_slides_of_one_section_have_one_patient_and_one_number_of_spots():
    pairs = {}
    for name in COHORTS:
        slides = {s.id: s for s in read_manifest()[name].slides}
        for slide in slides.values():
            if slide.same_as:
                pairs[slide.id] = slide.same_as
                assert slides[slide.same_as].spots == slide.spots
                assert patients_of(name)[slide.id] == patients_of(name)[slide.same_as]
    assert pairs.keys() == {"TENX23", "NCBI534", "NCBI535", "NCBI536", "NCBI537"}


def test_patients_are_merged_if_the_source_gives_none_and_differ_between_cohorts():
    patients = {name: set(patients_of(name).values()) for name in COHORTS}
    assert {name: len(names) for name, names in patients.items()} == {"breast": 6, "kidney": 24, "liver": 10, "lung": 5}
    assert len(set.union(*patients.values())) == sum(map(len, patients.values()))
    blocks = Counter(patients_of("breast").values())
    assert blocks["TENX Block A"] == 2
    for slide in (s for name in COHORTS for s in read_manifest()[name].slides):
        alone = Counter(patients_of(find_cohort_of(slide.id)).values())[slide.patient] == 1
        assert alone or slide.patient_basis in ("title", "joined"), slide.id
        assert not (alone and slide.patient_basis == "joined"), slide.id


def find_cohort_of(slide_id):
    return next(name for name in COHORTS if slide_id in patients_of(name))


def test_only_a_cohort_has_patients():
    with pytest.raises(ValueError, match="uni has no patients: it is a student"):
        patients_of("uni")


def test_students_of_the_manifest_match_the_registry():
    students = {a.name: a for a in read_manifest().values() if a.kind == "student"}
    assert students.keys() == set(BACKBONES) - {"mini"}
    for name, entry in students.items():
        spec = BACKBONES[name]
        expected = (spec.license, spec.gate, spec.access, spec.revision)
        assert (entry.license, entry.gate, entry.access, entry.revision) == expected, name
        if entry.any_of:
            assert (spec.source, entry.repo_type) == (entry.repo, "model"), name
            assert [f.path for f in entry.files] == ["model.safetensors", "pytorch_model.bin"], name
        else:
            assert spec.source == f"{entry.repo_type}s/{entry.repo}/{entry.files[0].path}", name


def test_licenses_and_gates_of_weights_match_their_sources():
    manifest = read_manifest()
    teacher, ctranspath = manifest["scfoundation"], manifest["ctranspath"]
    assert teacher.license == "scFoundation License (non-commercial research)"
    assert teacher.files[0].size == 1_432_587_886
    assert teacher.about == f"{teacher.files[0].size / 2**30:.2f} GiB"
    assert teacher.revision is None or "github" in teacher.note.lower()
    assert ctranspath.license == "AGPL-3.0"
    assert "CHIEF" in ctranspath.note
    assert "non-commercial academic" in ctranspath.note
    access = {name: manifest[name].access for name in manifest if manifest[name].gate}
    assert {access[name] for name in (*COHORTS, "h-optimus-0")} == {"automatic"}
    assert {access[name] for name in ("h0-mini", "h-optimus-1", "gigapath")} == {"manual"}
    assert {access[name] for name in ("uni", "uni2-h")} == {"institution"}
    assert access["virchow2"] is None  # not in a public source


def test_the_hash_of_the_gene_list_matches_the_file():
    path = SHARED / "real" / "scfoundation" / "OS_scRNA_gene_index.19264.tsv"
    if not path.is_file():
        pytest.skip("../shared/real/scfoundation is absent: the gene list's hash cannot be compared")
    (file,) = read_manifest()["scfoundation-genes"].files
    assert (file.size, file.sha256) == (path.stat().st_size, sha(path.read_bytes()))


def test_an_unknown_name_is_refused_with_the_known_ones():
    for function in (fetch, find_fetched, patients_of):
        with pytest.raises(ValueError, match=r"nothing called 'heart' in data_manifest.yml; known: breast, kidney"):
            function("heart")
    with pytest.raises(KeyError, match="heart"):
        read_manifest()["heart"]
    assert "heart" not in read_manifest()


# --- the check of a manifest -------------------------------------------------------------------------------------

SLIDE = {"spots": 3, "genes": 2, "patient": "P", "patient_basis": "alone", "disease_state": "Cancer"}
SLIDE |= {"oncotree": None, "license": None}


def make_entries():
    hub = {"repo": "lab/hest", "repo_type": "dataset", "revision": None, "license": "MIT", "gate": "https://ask.here"}
    model = {"title": "A model", "repo": "lab/model", "repo_type": "model", "license": None, "gate": None}
    return {
        "sources": {"hest": hub | {"files": ["st/{id}.h5ad", "patches/{id}.h5", "metadata/{id}.json"]}},
        "cohorts": {"two": {"source": "hest", "title": "Two", "slides": [SLIDE | {"id": "S1"}, SLIDE | {"id": "S2"}]}},
        "checkpoints": {"big": model | {"files": [{"path": "models.ckpt", "size": None, "sha256": None}]}},
        "students": {"small": model | {"any_of": ["model.safetensors", "pytorch_model.bin"]}},
    }


def write(folder, top):
    path = folder / "custom.yml"
    path.write_text(top if isinstance(top, str) else yaml.safe_dump(top, sort_keys=False))
    return path


def edit(where, **fields):
    def change(top):
        for key in where:
            top = top[key]
        top.update(fields)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit((), extras={}), "unknown extras; known: checkpoints"),
        (edit(("checkpoints", "big"), sise=3), "checkpoints: big: unknown sise"),
        (edit(("cohorts", "two"), license="MIT"), "cohorts: two: license: already given by source hest"),
        (edit(("cohorts", "two"), source="nest"), "cohorts: two: source 'nest' is not one of hest"),
        (edit(("cohorts", "two"), slides=None), "cohorts: two: slides must be a non-empty list"),
        (edit(("cohorts", "two", "slides", 1), id="S1"), "cohorts: two: .* S1.* is given more than once"),
        (edit(("cohorts", "two", "slides", 1), spots="many"), "two: slide S2: spots must be int, not 'many'"),
        (edit(("cohorts", "two", "slides", 1), patient_basis="guess"), "slide S2: patient_basis 'guess' is not one"),
        (
            edit(("cohorts", "two", "slides", 1), same_as="S1", patient="Q"),
            "slide S2: same_as S1 must be .* same patient",
        ),
        (edit(("sources", "hest"), files=["../{id}.h5ad"]), r"two: files: \.\./S1.h5ad: path .* must stay inside"),
        (
            edit(("checkpoints", "big"), files=[{"path": "f", "size": 0}]),
            "big: files: f: size must be a number of bytes",
        ),
        (edit(("checkpoints", "big"), files=[{"path": "f", "sha256": "ab"}]), "big: files: f: sha256 must be 64"),
        (edit(("checkpoints", "big"), any_of=["f"]), "big: files and any_of: give one of the two"),
        (edit(("checkpoints", "big"), url="https://x.y/f"), "big: repo and url: give one of the two"),
        (edit(("checkpoints", "big"), revision="main"), "big: revision must be a commit"),
        (
            edit(("checkpoints", "big"), gate="https://ask.here", access="hand"),
            "big: access must be one of automatic, manual",
        ),
        (edit(("checkpoints", "big"), gate=None, access="manual"), "big: access needs gate"),
        (edit(("checkpoints", "big"), repo_type="space"), "big: repo_type must be 'model' or 'dataset'"),
        (edit(("checkpoints", "big"), slides=[]), "big: slides: only cohorts have this field"),
        (lambda top: top["checkpoints"]["big"].pop("gate"), "big: gate missing; give null if unknown"),
        (
            lambda top: top["students"].update(big=json.loads(json.dumps(top["students"]["small"]))),
            "name big is given more than once",
        ),
        (lambda top: top["students"].update(small="UNI"), "students: small: must be a mapping of fields, not 'UNI'"),
    ],
)
def test_errors_in_a_manifest_name_entry_and_field(tmp_path, change, message):
    top = json.loads(json.dumps(make_entries()))
    change(top)
    with pytest.raises(ValueError, match=f"^{tmp_path}/custom.yml: .*{message}"):
        read_manifest(write(tmp_path, top))


def test_a_key_given_twice_is_refused(tmp_path):
    text = yaml.safe_dump(make_entries(), sort_keys=False).replace("  big:", "  big: {}\n  big:")
    with pytest.raises(ValueError, match=r"custom.yml: invalid YAML: 'big' is there twice at line \d+"):
        read_manifest(write(tmp_path, text))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.yml: no such manifest"):
        read_manifest(tmp_path / "none.yml")


# --- a local hub -------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """Server with the hub's endpoints in use: revision, paths-info, and files, redirected to another host."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.bad, self.seen, self.commit, self.sent = {}, {}, [], COMMIT, 0
        self.address = f"http://127.0.0.1:{self.server_port}"

    def downloads(self):
        return [path.rpartition(f"/{self.commit}/")[2] for path, _ in self.seen if "/cdn/" in path]

    def handle_error(self, request, client_address):
        pass  # a client that closes the connection


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.server.seen.append((path, self.headers))
        if path.startswith("/api/"):
            if self.server.bad.get("api") == "page":
                return self.reply(200, b"<html>Log in to the hotel's network</html>")
            if self.server.bad.get("api") == "gated":
                return self.reply(401, b"no", **{"X-Error-Code": "RepoNotFound"})
            about = {"id": "lab/x", "sha": self.server.commit, "tags": ["license:mit"], "siblings": []}
            return self.reply(200, json.dumps(about | {"private": False, "downloads": 0, "likes": 0}).encode())
        name = path.rpartition(f"/{self.server.commit}/")[2]
        bad = self.server.bad.get(name)
        if bad == "gated":
            return self.reply(403, b"no", **{"X-Error-Code": "GatedRepo"})
        if bad == "gone" or name not in self.server.files:
            return self.reply(404, b"no", **{"X-Error-Code": "EntryNotFound"})
        if "/resolve/" in path:  # to another host, as large files are
            port = self.server.server_port
            return self.reply(302, b"", Location=f"http://localhost:{port}{self.path.replace('/resolve/', '/cdn/')}")
        self.send_file(self.server.files[name], bad)

    def do_POST(self):
        body = urllib.parse.parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.server.seen.append((self.path, self.headers))
        entries = []
        for name in body["paths"]:
            if name in self.server.files:
                data = self.server.files[name]
                entry = {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                if not name.endswith(".json"):
                    entry["lfs"] = {"oid": sha(data), "size": len(data), "pointerSize": 130}
                entries.append(entry)
        self.reply(200, json.dumps(entries).encode())

    def send_file(self, data, bad):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if bad == "page":
            return self.reply(200, b"\n<!DOCTYPE html><title>Log in</title>")
        if bad == "endless":
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            for _ in range(500):  # far more than a client should accept
                self.server.sent += self.wfile.write(bytes(MIB))
        data = data[start:]
        sent = {"short": data[: len(data) // 2], "other": data[::-1], "stall": data[: 12 * MIB]}.get(bad, data)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{start + len(data)}")
        self.end_headers()
        self.wfile.write(sent)
        if bad == "stall":
            self.wfile.flush()
            self.rfile.read(1)  # until the client closes the connection
        self.close_connection = True

    def reply(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between attempts
    for slide in ("S1", "S2"):
        server.files[f"st/{slide}.h5ad"] = f"counts of {slide} ".encode() * 99
        server.files[f"patches/{slide}.h5"] = f"tiles of {slide} ".encode() * 99
        server.files[f"metadata/{slide}.json"] = json.dumps({"id": slide}).encode()
    server.files["models.ckpt"] = b"weights" * 999
    server.files["pytorch_model.bin"] = b"student" * 999
    server.files["genes.tsv"] = b"gene_name\tindex\n" * 99
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def manifest(tmp_path, hub):
    """Return a manifest of that hub."""
    top = make_entries()
    genes = {"path": "genes.tsv", "size": None, "sha256": sha(hub.files["genes.tsv"])}
    url = f"{hub.address}/cdn/{COMMIT}/genes.tsv"
    top["genes"] = {"list": {"title": "Genes", "url": url, "files": [genes], "license": "MIT", "gate": None}}
    return read_manifest(write(tmp_path, top))


def list_files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_a_cohort_is_fetched_with_a_record_and_not_twice(tmp_path, hub, manifest, capsys):
    root = tmp_path / "deep" / "two"
    assert find_fetched(manifest["two"], root=root) is None
    assert fetch(manifest["two"], root=root, progress=False) == root
    assert capsys.readouterr() == ("", "")
    expected = [
        f"{kind}/{s}.{end}"
        for kind, end in (("metadata", "json"), ("patches", "h5"), ("st", "h5ad"))
        for s in ("S1", "S2")
    ]
    assert list_files(root) == ["fetched.json", *expected]
    record = json.loads((root / "fetched.json").read_text())
    assert (record["name"], record["source"], record["commit"]) == ("two", "dataset lab/hest", COMMIT)
    assert record["license"] == "MIT"
    recorded = {f["path"]: (f["size"], f["sha256"]) for f in record["files"]}
    assert recorded == {name: (len(hub.files[name]), sha((root / name).read_bytes())) for name in expected}

    hub.seen.clear()
    assert find_fetched(manifest["two"], root=root) == fetch(manifest["two"], root=root, progress=False) == root
    assert not hub.seen


def test_only_missing_or_truncated_files_are_fetched_again_of_the_recorded_commit(tmp_path, hub, manifest):
    fetch(manifest["two"], root=tmp_path / "two", progress=False)
    (tmp_path / "two/metadata/S2.json").write_text("{}")
    assert find_fetched(manifest["two"], root=tmp_path / "two") is None
    (tmp_path / "two/metadata/S2.json").write_bytes(hub.files["metadata/S2.json"])
    assert find_fetched(manifest["two"], root=tmp_path / "two") is not None
    (tmp_path / "two/metadata/S2.json").write_text("{}")
    (tmp_path / "two/st/S1.h5ad").unlink()
    assert find_fetched(manifest["two"], root=tmp_path / "two") is None
    hub.seen.clear()
    fetch(manifest["two"], root=tmp_path / "two", progress=False)
    assert sorted(hub.downloads()) == ["metadata/S2.json", "st/S1.h5ad"]
    requests = [path for path, _ in hub.seen if path.startswith("/api/")]
    assert requests == [f"/api/datasets/lab/hest/{endpoint}/{COMMIT}" for endpoint in ("revision", "paths-info")]
    assert (tmp_path / "two/st/S1.h5ad").read_bytes() == hub.files["st/S1.h5ad"]


def test_files_of_another_revision_or_hash_than_pinned_are_fetched_again(tmp_path, hub, manifest):
    fetch(manifest["big"], root=tmp_path / "big", progress=False)
    later = dataclasses.replace(manifest["big"], revision=OTHER)
    assert find_fetched(later, root=tmp_path / "big") is None
    hub.commit, hub.files["models.ckpt"] = OTHER, b"WEIGHTS" * 999
    assert fetch(later, root=tmp_path / "big", progress=False).read_bytes() == hub.files["models.ckpt"]
    file = dataclasses.replace(later.files[0], sha256=sha(b"weights" * 999))
    assert find_fetched(dataclasses.replace(later, files=(file,)), root=tmp_path / "big") is None


def test_a_record_does_not_cover_files_of_another_commit(tmp_path, hub, manifest):
    root = tmp_path / "two"
    fetch(manifest["two"], root=root, progress=False)
    hub.commit, hub.bad["st/S2.h5ad"] = OTHER, "short"
    hub.files["st/S1.h5ad"] = hub.files["st/S1.h5ad"][::-1]  # of the same size
    hub.files["st/S2.h5ad"] = hub.files["st/S2.h5ad"][::-1]
    with pytest.raises(OSError, match="truncated"):
        fetch(dataclasses.replace(manifest["two"], revision=OTHER), root=root, progress=False)
    assert (root / "st/S1.h5ad").read_bytes() == hub.files["st/S1.h5ad"]
    assert find_fetched(manifest["two"], root=root) is None


def test_progress_bars_are_disabled_during_a_silent_fetch(tmp_path, hub, manifest, monkeypatch):
    from huggingface_hub import file_download
    from huggingface_hub.utils import are_progress_bars_disabled

    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    get, off = file_download.http_get, []
    monkeypatch.setattr(
        file_download, "http_get", lambda *a, **k: (off.append(are_progress_bars_disabled()), get(*a, **k))
    )
    for k, (progress, terminal) in enumerate([(False, True), (True, False), (True, True)]):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        fetch(manifest["big"], root=tmp_path / str(k), progress=progress)
    assert off == [True, True, False]
    assert not are_progress_bars_disabled()


def test_a_file_is_fetched_to_the_cache_with_the_hubs_license(tmp_path, hub, manifest, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="peka_lite")
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    place = fetch(manifest["big"])
    assert place == cache_dir() / "models" / "big" / "models.ckpt" == find_fetched(manifest["big"])
    assert json.loads((place.parent / "fetched.json").read_text())["license"] == "mit"
    line = caplog.messages[0]
    assert line.startswith("fetching big: 1 files, 7.0 kB; ")
    assert line.endswith("license mit")


def test_the_first_available_file_of_any_of_is_fetched(tmp_path, hub, manifest):
    assert fetch(manifest["small"], root=tmp_path / "a", progress=False).name == "pytorch_model.bin"
    hub.files["model.safetensors"] = b"tensors"
    assert fetch(manifest["small"], root=tmp_path / "b", progress=False).name == "model.safetensors"
    assert list_files(tmp_path / "b") == ["fetched.json", "model.safetensors"]


def test_the_token_is_sent_to_the_hub_only(tmp_path, hub, manifest):
    fetch(manifest["big"], root=tmp_path / "big", progress=False)
    tokens = {"cdn" if "/cdn/" in path else "hub": h.get("Authorization") for path, h in hub.seen}
    assert tokens == {"hub": "Bearer hf_secret", "cdn": None}


def test_a_folder_of_another_artifact_is_not_changed(tmp_path, hub, manifest):
    fetch(manifest["big"], root=tmp_path / "x", progress=False)
    assert find_fetched(dataclasses.replace(manifest["big"], name="other"), root=tmp_path / "x") is None
    with pytest.raises(ValueError, match="already has big; fetch small to another folder"):
        fetch(manifest["small"], root=tmp_path / "x", progress=False)
    assert list_files(tmp_path / "x") == ["fetched.json", "models.ckpt"]


FAILURES = {
    "short": (OSError, r"truncated: the connection was lost; fetch it again"),
    "other": (ValueError, r"wrong hash: SHA-256 \w{64}, not \w{64}; fetch it again"),
    "page": (ValueError, r"received a web page instead of data"),
    "gated": (PermissionError, r"is gated: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN"),
    "gone": (FileNotFoundError, r"is not in its repository"),
}


@pytest.mark.parametrize("bad", FAILURES)
def test_an_invalid_file_from_the_hub_is_refused_and_leaves_no_files(tmp_path, hub, manifest, bad):
    kind, sentence = FAILURES[bad]
    hub.bad["models.ckpt"] = bad
    page = "https://huggingface.co/lab/model"
    with pytest.raises(kind, match=r"^big \(models.ckpt\).*" + sentence.replace("{page}", page)) as caught:
        fetch(manifest["big"], root=tmp_path / "deep" / "big", progress=False)
    assert caught.type is kind
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("bad", "kind", "sentence"),
    [
        (
            "gated",
            PermissionError,
            r"^two is gated: ask for access at https://ask.here, then log in with `hf auth login`",
        ),
        ("page", ValueError, r"^two: received a web page instead of the hub's answer; log in to your network first$"),
    ],
)
def test_the_error_for_an_invalid_answer_of_the_hub_explains_it(tmp_path, hub, manifest, bad, kind, sentence):
    hub.bad["api"] = bad
    with pytest.raises(kind, match=sentence):
        fetch(manifest["two"], root=tmp_path / "two", progress=False)
    assert not (tmp_path / "two").exists()


def make_error(status):
    error = OSError("message of the server")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (LocalEntryNotFoundError("x"), ConnectionError, "UNI could not be fetched: the hub cannot be reached"),
        (OfflineModeIsEnabled("x"), ConnectionError, "UNI could not be fetched: HF_HUB_OFFLINE is set; unset it"),
        (make_error(401), PermissionError, "UNI is gated: ask its owner for access, then log in with `hf auth login`"),
        (make_error(503), ConnectionError, "UNI could not be fetched: the server answered 503; try again later"),
        (OSError(errno.ENOSPC, "No space left"), OSError, "UNI does not fit on the disk; free some space"),
        (PermissionError(errno.EACCES, "Denied", "/x"), PermissionError, r"UNI could not be written: Denied \(/x\)"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), ConnectionError, "UNI could not be fetched .*; go online"),
    ],
)
def test_errors_of_downloads_are_explained(error, kind, sentence):
    explained = _fetch.explain_error(error, name="UNI", gate=None)
    assert type(explained) is kind
    assert re.match(sentence, str(explained))


@pytest.mark.parametrize(
    ("access", "how"),
    [("automatic", "; access is granted at once"), ("manual", "; access is granted by hand, which may take days"),
     ("institution", "; access needs an institutional e-mail address and may take days"),
     (None, "")],
)  # fmt: skip
def test_the_error_for_a_gated_artifact_explains_access(tmp_path, hub, manifest, access, how):
    hub.bad["api"] = "gated"
    entry = dataclasses.replace(manifest["two"], access=access)
    with pytest.raises(PermissionError, match=r"^two is gated") as caught:
        fetch(entry, root=tmp_path / "two", progress=False)
    assert str(caught.value).endswith(f"then log in with `hf auth login` or set HF_TOKEN{how}")


@pytest.mark.parametrize(("announced", "problem"), [(10_000, "truncated"), (1_000, "too long")])
def test_the_size_in_the_manifest_is_checked(tmp_path, hub, manifest, announced, problem):
    file = dataclasses.replace(manifest["list"].files[0], size=announced)
    with pytest.raises(OSError, match=rf"list \(genes.tsv\) is {problem}: received 1,584 of {announced:,} bytes"):
        fetch(dataclasses.replace(manifest["list"], files=(file,)), root=tmp_path / "genes", progress=False)
    assert not (tmp_path / "genes").exists()


@pytest.mark.parametrize(("name", "path"), [("list", "genes.tsv"), ("big", "models.ckpt")])
def test_an_endless_download_is_stopped(tmp_path, hub, manifest, name, path):
    hub.bad[path] = "endless"
    size = len(hub.files[path])
    entry = dataclasses.replace(manifest[name], files=(dataclasses.replace(manifest[name].files[0], size=size),))
    with pytest.raises(OSError, match=rf"{name} \({path}\) is too long: received [\d,]+ of {size:,} bytes"):
        fetch(entry, root=tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()
    assert hub.sent < 100 * MIB


def test_a_download_of_unknown_size_leaves_free_disk_space(tmp_path, hub, manifest, monkeypatch):
    hub.bad["genes.tsv"] = "endless"
    file = dataclasses.replace(manifest["list"].files[0], size=None, sha256=None)
    monkeypatch.setattr("peka_lite.data._fetch.HEADROOM", shutil.disk_usage(tmp_path).free - 20 * MIB)
    with pytest.raises(OSError, match=r"list \(genes.tsv\) does not fit on the disk"):
        fetch(dataclasses.replace(manifest["list"], files=(file,)), root=tmp_path / "x", progress=False)
    assert hub.sent < 100 * MIB


@pytest.mark.parametrize(
    "record", ["[]", "5", '{"name": "big", "files": 3}', '{"files": [1]}', '{"files": [{"path": "a"}]}', "[" * 10_000]
)
def test_an_invalid_record_is_refused(tmp_path, manifest, record):
    (tmp_path / "fetched.json").write_text(record)
    with pytest.raises(ValueError, match=r"fetched\.json: .*remove it and fetch again"):
        find_fetched(manifest["big"], root=tmp_path)


@pytest.mark.parametrize("bad", ["short", "other", "page", "gone"])
def test_an_invalid_file_from_an_address_is_refused_and_leaves_no_files(tmp_path, hub, manifest, bad):
    kind, sentence = FAILURES[bad]
    if bad == "gone":
        sentence = "is no longer at its address"
    hub.bad["genes.tsv"] = bad
    with pytest.raises(kind, match=r"^list \(genes.tsv\).*" + sentence) as caught:
        fetch(manifest["list"], root=tmp_path / "deep" / "genes", progress=False)
    assert caught.type is kind
    assert not (tmp_path / "deep").exists()


def test_a_file_from_an_address_is_fetched_with_a_record(tmp_path, hub, manifest):
    place = fetch(manifest["list"], root=tmp_path / "genes", progress=False)
    assert place.read_bytes() == hub.files["genes.tsv"]
    record = json.loads((tmp_path / "genes/fetched.json").read_text())
    assert (record["source"], record["commit"], record["license"]) == (manifest["list"].url, None, "MIT")
    assert list_files(tmp_path / "genes") == ["fetched.json", "genes.tsv"]


def test_a_missing_file_in_the_repository_is_reported_before_downloads(tmp_path, hub, manifest):
    del hub.files["patches/S2.h5"]
    with pytest.raises(
        FileNotFoundError, match=r"lab/hest on the hub does not have patches/S2.h5 of two \(commit aaaa"
    ):
        fetch(manifest["two"], root=tmp_path / "two", progress=False)
    del hub.files["pytorch_model.bin"]
    with pytest.raises(FileNotFoundError, match=r"does not have model.safetensors, pytorch_model.bin of small"):
        fetch(manifest["small"], root=tmp_path / "small", progress=False)
    assert not hub.downloads()
    assert not (tmp_path / "two").exists()


def test_a_failed_cohort_keeps_its_finished_files_only(tmp_path, hub, manifest):
    root = tmp_path / "two"
    hub.bad["patches/S2.h5"] = "short"
    with pytest.raises(OSError, match=r"two \(patches/S2.h5\) is truncated"):
        fetch(manifest["two"], root=root, progress=False)
    assert list_files(root) == ["metadata/S1.json", "patches/S1.h5", "st/S1.h5ad", "st/S2.h5ad"]
    assert not (root / ".partial").exists()
    assert find_fetched(manifest["two"], root=root) is None

    (root / "st/S1.h5ad").write_bytes(hub.files["st/S1.h5ad"][::-1])  # same size, other bytes, no record yet
    hub.bad.clear()
    hub.seen.clear()
    fetch(manifest["two"], root=root, progress=False)
    assert {"patches/S2.h5", "st/S1.h5ad"} <= set(hub.downloads())
    assert not {"patches/S1.h5", "st/S2.h5ad"} & set(hub.downloads())
    assert (root / "st/S1.h5ad").read_bytes() == hub.files["st/S1.h5ad"]


def start_fetch(manifest, root):
    """Fetch the artifact "big" in another process."""
    code = "import sys; from peka_lite.data import *; fetch(read_manifest(sys.argv[1])['big'], root=sys.argv[2])"
    command = [sys.executable, "-c", code, manifest.path, root]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def test_fetch_resumes_after_a_killed_process(tmp_path, hub, manifest):
    data = os.urandom(MIB) * 22  # the hub's client writes 10 MiB at a time
    hub.files["models.ckpt"], hub.bad["models.ckpt"] = data, "stall"
    root = tmp_path / "big"
    child = start_fetch(manifest, root)
    part = root / ".partial" / COMMIT / "models.ckpt"
    try:
        give_up = time.monotonic() + 60
        while not (part.is_file() and part.stat().st_size >= 10 * MIB):
            assert child.poll() is None
            assert time.monotonic() < give_up
            threading.Event().wait(0.02)
    finally:
        child.kill()
        child.wait()
    size = part.stat().st_size
    assert find_fetched(manifest["big"], root=root) is None

    hub.bad.clear()
    hub.seen.clear()
    assert fetch(manifest["big"], root=root, progress=False).read_bytes() == data
    assert [h["Range"] for path, h in hub.seen if "/cdn/" in path] == [f"bytes={size}-"]
    assert list_files(root) == ["fetched.json", "models.ckpt"]


def test_a_second_fetch_waits_and_resumes_the_first(tmp_path, hub, manifest, monkeypatch):
    data = os.urandom(MIB) * 22
    hub.files["models.ckpt"], hub.bad["models.ckpt"] = data, "stall"
    root, printed, sizes = tmp_path / "big", [], []
    child = start_fetch(manifest, root)
    part = root / ".partial" / COMMIT / "models.ckpt"

    def stop_child(text):
        printed.append(text)
        child.kill()
        child.wait()
        sizes.append(part.stat().st_size)
        hub.bad.clear()
        hub.seen.clear()

    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    monkeypatch.setattr(logging.getLogger("peka_lite"), "warning", stop_child)
    try:
        give_up = time.monotonic() + 60
        while not (part.is_file() and part.stat().st_size >= 10 * MIB):
            assert child.poll() is None
            assert time.monotonic() < give_up
            threading.Event().wait(0.02)
        assert fetch(manifest["big"], root=root, progress=False).read_bytes() == data
    finally:
        child.kill()
        child.wait()
    assert printed[0].startswith(f"waiting for another process that writes {root}")
    assert [h["Range"] for path, h in hub.seen if "/cdn/" in path] == [f"bytes={sizes[0]}-"]
    assert list_files(root) == ["fetched.json", "models.ckpt"]


def test_without_locks_two_fetches_do_not_share_partial_files(tmp_path, hub, manifest, monkeypatch):
    from huggingface_hub import file_download

    def refuse(_file, _how):
        raise OSError(errno.ENOLCK, "no locks available")

    def interleave(url, data, **options):
        monkeypatch.setattr(file_download, "http_get", get)
        data.write(hub.files["models.ckpt"][:1000])
        data.flush()
        assert fetch(manifest["big"], root=tmp_path / "big", progress=False).is_file()
        get(url, data, **options | {"resume_size": 1000})

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    get = file_download.http_get
    monkeypatch.setattr(file_download, "http_get", interleave)
    assert fetch(manifest["big"], root=tmp_path / "big", progress=False).read_bytes() == hub.files["models.ckpt"]
    assert list_files(tmp_path / "big") == ["fetched.json", "models.ckpt"]


def test_an_interrupted_file_is_resumed_unless_the_commit_changed(tmp_path, hub, manifest, monkeypatch):
    def interrupt(_url, data, **_):
        data.write(hub.files["models.ckpt"][:1000])
        raise KeyboardInterrupt

    for commit, requested in ((COMMIT, "bytes=1000-"), (OTHER, None)):
        root = tmp_path / commit
        with monkeypatch.context() as patch:
            patch.setattr("huggingface_hub.file_download.http_get", interrupt)
            with pytest.raises(KeyboardInterrupt):
                fetch(manifest["big"], root=root, progress=False)
        assert list_files(root) == [f".partial/{COMMIT}/models.ckpt"]
        hub.commit = commit
        hub.seen.clear()
        fetch(manifest["big"], root=root, progress=False)
        assert [h["Range"] for path, h in hub.seen if "/cdn/" in path] == [requested]
        assert list_files(root) == ["fetched.json", "models.ckpt"]


def test_too_small_a_disk_is_reported_before_downloads(tmp_path, hub, manifest, monkeypatch):
    needed = sum(len(hub.files[f.path]) for f in manifest["two"].files)
    free = _fetch.HEADROOM + needed - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match=r"two needs 5\.\d kB and 268\.4 MB to spare, but .* has 268\.4 MB free"):
        fetch(manifest["two"], root=tmp_path / "deep" / "two", progress=False)
    assert not hub.downloads()
    assert not (tmp_path / "deep").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free + 1))
    fetch(manifest["two"], root=tmp_path / "deep" / "two", progress=False)


def test_a_network_error_is_explained_and_keeps_partial_files(tmp_path, hub, manifest, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    partial = tmp_path / "big" / ".partial" / COMMIT / "models.ckpt"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"wei")
    with pytest.raises(ConnectionError, match=r"^big could not be fetched \(\w+\); go online and try again$"):
        fetch(manifest["big"], root=tmp_path / "big", progress=False)
    assert partial.read_bytes() == b"wei"
    genes = dataclasses.replace(manifest["list"], url=f"{address}/genes.tsv")
    with pytest.raises(ConnectionError, match=r"^list \(genes.tsv\) could not be fetched"):
        fetch(genes, root=tmp_path / "deep" / "genes", progress=False)
    assert not (tmp_path / "deep").exists()


def test_the_wheel_contains_the_manifest(tmp_path):
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is absent: no wheel can be built")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = archive.read("peka_lite/data/data_manifest.yml")
    assert packed == (REPOSITORY / "data_manifest.yml").read_bytes()
