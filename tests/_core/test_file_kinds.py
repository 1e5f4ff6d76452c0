"""Recognize files by their content, not their name, and refuse those that would run code."""

import argparse
import collections
import dataclasses
import gzip
import hashlib
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from peka_lite._core._file_kinds import file_kind
from peka_lite._core._torch_files import read_torch_file
from peka_lite.adapters import read_adapter_info
from peka_lite.backbones import load, load_backbone
from peka_lite.data import download, read_counts, read_manifest
from peka_lite.data._fetch import check_file
from peka_lite.data._format import read_metadata, read_spots, read_tile_barcodes
from peka_lite.data._manifest import File
from peka_lite.data.download import is_published
from peka_lite.teachers import ScFoundation
from peka_lite.teachers._vocabulary import read_gene_mapping, read_vocabulary
from peka_lite.transfer._checkpoint import restore_checkpoint
from tests.tiny import TINY

PAGE = b"\xef\xbb\xbf\n<!-- proxy -->\n<!DOCTYPE HTML><html><head><title>Sign in &amp;\n accept</title></head>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:9f40\nsize 1432587886\n"
CONFUSED = {  # name -> content, kind, part of the message
    "empty": (b"", "empty", "empty (0 bytes); fetch it again"),
    "page": (PAGE, "page", "web page (HTML) with the title 'Sign in & accept'"),
    "page in UTF-16": (
        "<html><title>Entrée</title>".encode("utf-16"),
        "page",
        "web page (HTML) with the title 'Entrée'",
    ),
    "XHTML": (b"<?xml version='1.0'?>\n<html xmlns='x'></html>", "page", "web page (HTML)"),
    "pointer": (POINTER, "pointer", "Git LFS pointer to a file of 1,432,587,886 bytes; run `git lfs pull`"),
    "compressed": (gzip.compress(b"tensors"), "packed", "compressed by gzip; unpack it first"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "picture", "a PNG image"),
}


class Code:
    """Run a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def put(content, name="file"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return put


READERS = {
    "models.ckpt": lambda path: ScFoundation.from_checkpoint(path, genes=["A"]),
    "weights.pth": lambda path: load_backbone(TINY, weights=path),
    "weights.bin": lambda path: load_backbone(TINY, weights=path),
    "weights.safetensors": lambda path: load_backbone(TINY, weights=path),
    "c.pt": lambda path: restore_checkpoint(path, torch.nn.Linear(1, 1), None, None, {}),
    "adapter.safetensors": read_adapter_info,
    "genes.tsv": read_vocabulary,
    "genes.json": read_vocabulary,
    "hgnc.txt": lambda path: read_gene_mapping(path, ["A"]),
    "S1.h5ad": read_spots,
    "counts.h5ad": read_counts,
    "S1.h5": read_tile_barcodes,
    "S1.json": read_metadata,
}


@pytest.mark.parametrize("name", CONFUSED)
def test_every_reader_names_the_kind_of_another_file(write, name):
    content, kind, words = CONFUSED[name]
    for given, read in READERS.items():
        path = write(content, given)
        assert file_kind(path)[0] == kind
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            read(path)
        assert words in str(caught.value), given
        assert "weights_only" not in str(caught.value), given


@pytest.mark.parametrize("name", ["page", "page in UTF-16", "pointer"])
def test_downloaded_page_or_pointer_is_refused(write, name):
    with pytest.raises(ValueError, match=r"^HGNC: received a (web page|Git LFS pointer).* instead of data"):
        check_file(write(CONFUSED[name][0]), File("hgnc.txt"), name="HGNC")


@pytest.mark.parametrize(
    "text", ["hgnc_id\tsymbol\n", "gene_name\tindex\nA\t0\n", '["A"]', "(dp0", "cat\nsat\n", "N.\n"]
)
def test_text_is_recognized(write, text):
    assert file_kind(write(text.encode()))[0] == "text"


def refused(path, read=READERS["models.ckpt"]):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read(path)
    assert "weights_only" not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__  # PyTorch's advice is not shown
    return str(caught.value)


def test_archives_and_other_containers_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.ckpt")
    assert "it is a TorchScript archive" in refused(tmp_path / "script.ckpt")
    assert "save its state_dict()" in refused(tmp_path / "script.ckpt", READERS["weights.pth"])
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("download/models.ckpt", "")
    assert "it is a zip archive of download/models.ckpt; unpack it" in refused(tmp_path / "zip.ckpt")
    save_file({"a": torch.ones(2)}, tmp_path / "safe.ckpt")
    assert "it is a safetensors file" in refused(tmp_path / "safe.ckpt")
    torch.save({"a": torch.ones(20)}, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:400])
    assert "has no end (400 bytes); fetch it again" in refused(tmp_path / "cut.ckpt")


@pytest.mark.parametrize("given", ["w.pth", "w.bin", "w.safetensors", "w.weights"])
def test_backbone_weights_are_read_by_content_not_file_name(tmp_path, given):
    with pytest.warns(UserWarning, match="random"):
        source = load_backbone(TINY, weights="random", seed=3).state_dict()
    for kind in ("safetensors", "torch", "torch before 1.6"):
        if kind == "safetensors":
            save_file(source, tmp_path / given)
        else:
            torch.save(source, tmp_path / given, _use_new_zipfile_serialization=kind == "torch")
        read = load_backbone(TINY, weights=tmp_path / given).state_dict()
        assert all(torch.equal(source[name], read[name]) for name in source), kind


@pytest.mark.parametrize("wrap", ["state_dict", "model", "both", "module."])
def test_weights_of_a_training_script_are_read_beside_its_options(tmp_path, wrap):
    with pytest.warns(UserWarning, match="random"):
        source = load_backbone(TINY, weights="random", seed=3).state_dict()
    if wrap == "both":
        state = {"state_dict": {"model": source}}
    elif wrap == "module.":
        state = {"model": {f"module.{name}": tensor for name, tensor in source.items()}}
    else:
        state = {wrap: source}
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "log": collections.defaultdict(list, a=[1])}
    torch.save(state | beside, tmp_path / "w.pth")
    read = load_backbone(TINY, weights=tmp_path / "w.pth").state_dict()
    assert all(torch.equal(source[name], read[name]) for name in source)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2)])
def test_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    assert "no tensors by name; save the model's state_dict()" in refused(tmp_path / "w.pth", READERS["weights.pth"])


# --- code ----------------------------------------------------------------------------------------------------------

WAYS = {
    "torch": lambda value, path: torch.save(value, path),
    "torch before 1.6": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "torch, protocol 4": lambda value, path: torch.save(value, path, pickle_protocol=4),
    "torch before 1.6, protocol 4": lambda value, path: torch.save(
        value, path, pickle_protocol=4, _use_new_zipfile_serialization=False
    ),
    **{
        f"pickle {protocol}": lambda value, path, protocol=protocol: path.write_bytes(pickle.dumps(value, protocol))
        for protocol in range(6)
    },
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", ["models.ckpt", "weights.pth", "weights.safetensors", "c.pt"])
def test_code_in_a_file_is_named_and_not_run(tmp_path, way, given):
    path, ran = tmp_path / given, tmp_path / "ran"
    WAYS[way]({"cell": {"lr": 0.1}, "bomb": Code(f"touch {ran}")}, path)
    message = refused(path, READERS[given])
    assert f"refused, for reading it would run code that it names: {os.system.__module__}.system;" in message
    assert not ran.exists()
    with path.open("rb") as file:
        (torch.load(file, weights_only=False) if way.startswith("torch") else pickle.load(file))
    assert ran.exists()  # the file would have run the command


def test_environment_variable_does_not_allow_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    # The wrong number of values raises TypeError, after which timm 1.0.9 reads again without weights_only.
    class Odd:
        def __reduce__(self):
            return collections.OrderedDict, (1, 2, 3)

    for first in (Odd(), 0):
        torch.save({"odd": first, "bomb": Code(f"touch {tmp_path / 'ran'}")}, tmp_path / "w.pth")
        assert "system" in refused(tmp_path / "w.pth", READERS["weights.pth"])
    assert not (tmp_path / "ran").exists()


def test_pickled_model_is_refused_with_its_classes(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    message = refused(tmp_path / "model.pth", READERS["weights.pth"])
    assert "names: torch.nn.modules.linear.Linear; save the model's state_dict()" in message


def test_published_file_is_not_suggested_if_it_was_given(tmp_path, monkeypatch):
    path = tmp_path / "models.ckpt"
    torch.save({"cell": {"config": argparse.Namespace(a=1)}}, path)
    message = refused(path)
    assert "names: argparse.Namespace; take the published file (`peka-lite fetch scfoundation`)" in message
    known = read_manifest()["scfoundation"]
    file = dataclasses.replace(known.files[0], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(download, "_get_artifact", lambda name: dataclasses.replace(known, files=(file,)))
    assert is_published("scfoundation", path)
    message = refused(path)
    assert "names: argparse.Namespace; it is the published file (same SHA-256)" in message
    assert "take the published file" not in message


def test_fetched_file_without_hash_in_manifest_is_the_published_one(tmp_path, monkeypatch):
    row = dataclasses.replace(TINY, source="us/tiny")
    torch.save({"norm.bias": Code("true")}, tmp_path / "w.pth")
    assert "take the published file (us/tiny), or save" in refused(
        tmp_path / "w.pth", lambda p: load_backbone(row, weights=p)
    )
    monkeypatch.setattr(load, "read_manifest", lambda: {"tiny": None})
    monkeypatch.setattr(load, "is_published", lambda name, path: name == "tiny")
    assert "it is the published file" in refused(tmp_path / "w.pth", lambda path: load_backbone(row, weights=path))


# --- allowed types ----------------------------------------------------------------------------------------------

SCALARS = [
    np.float64(0.1), np.float32(1e-3), np.float16(2), np.int64(-3), np.int8(-1), np.uint8(200), np.uint64(2**63),
    np.bool_(True), np.complex64(1j), np.str_("Zürich"), np.bytes_(b"ab"),
]  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_and_defaultdicts_are_read_with_their_values(tmp_path, zipped):
    nested = collections.defaultdict(dict, {"cell": {"lr": np.float64(0.1)}, 3: {}})
    plain = {"lists": collections.defaultdict(list, a=[1]), "empty": collections.defaultdict(int), "nested": nested,
             "none": collections.defaultdict(None, {"b": 2})}  # fmt: skip
    torch.save(
        {"scalars": SCALARS, "tensor": torch.arange(3)} | plain, tmp_path / "a", _use_new_zipfile_serialization=zipped
    )
    read = read_torch_file(tmp_path / "a", kind="a checkpoint", instead="")
    assert read["scalars"] == SCALARS
    assert [type(value) for value in read["scalars"]] == [type(value) for value in SCALARS]
    assert {name: read[name] for name in plain} == plain
    assert read["tensor"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("before", "after"), [(b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core.")])
def test_scalars_are_read_under_the_names_of_numpy_1_and_2(tmp_path, before, after):
    torch.save({"lr": np.float64(0.1)}, tmp_path / "a", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content.replace(before, after))
    assert after in (tmp_path / "a").read_bytes()
    assert read_torch_file(tmp_path / "a", kind="a checkpoint", instead="") == {"lr": 0.1}


def test_allowed_types_are_reset_after_reading(tmp_path):
    torch.save({"lr": np.float64(0.1)}, tmp_path / "a")
    before = set(torch.serialization.get_safe_globals())
    read_torch_file(tmp_path / "a", kind="a checkpoint", instead="")
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("value", [np.array([1.0]), np.datetime64("2024-01-01"), np.array([None], dtype=object)])
def test_other_numpy_values_are_refused(tmp_path, value):
    torch.save({"value": value}, tmp_path / "models.ckpt")
    refused(tmp_path / "models.ckpt")
