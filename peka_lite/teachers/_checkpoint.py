"""The published checkpoint of scFoundation: read without running code, sizes from its config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from peka_lite._core._torch_files import read_torch_file
from peka_lite.data.download import find_fetched, is_published
from peka_lite.teachers._encoder import Encoder, EncoderConfig

_OURS = ("token_emb.", "pos_emb.", "encoder.")  # the rest of the file rebuilds expression
_GENES = ("OS_scRNA_gene_index.19264.tsv", "gene_names.json")


def read_encoder(path: Path, *, key: str) -> Encoder:
    """Read one entry's encoder, float32 on the CPU; errors as `ScFoundation.from_checkpoint`."""
    entry = _read_entry(path, key)
    try:
        return _build(EncoderConfig.from_checkpoint(entry["config"]), entry["state_dict"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:400]
        raise ValueError(f"{path}: entry {key!r} holds no scFoundation model: {what}") from error


def find_genes(path: Path) -> Path:
    """Return the gene list that lies beside a checkpoint, or else the one in the cache."""
    beside = next((path.with_name(name) for name in _GENES if path.with_name(name).is_file()), None)
    if found := beside or find_fetched("scfoundation-genes"):
        return found
    raise FileNotFoundError(
        f"no gene list beside {path} ({' or '.join(_GENES)}) nor in the cache: give one, or run "
        "`peka-lite fetch scfoundation-genes`"
    )


def _read_entry(path: Path, key: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; `peka-lite fetch scfoundation` fetches scFoundation's")
    instead = "take the published file (`peka-lite fetch scfoundation`), or save tensors and plain values only"
    file = read_torch_file(path, what="a checkpoint", instead=instead, published=partial(is_published, "scfoundation"))
    if not isinstance(file, dict) or key not in file:
        there = ", ".join(map(str, file)) if isinstance(file, dict) else type(file).__name__
        raise ValueError(f"{path}: no entry {key!r}; it has {there}")
    return file[key]


def _build(config: EncoderConfig, state: Mapping[str, torch.Tensor]) -> Encoder:
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        encoder = Encoder(config)
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(_OURS)}
    with warnings.catch_warnings():  # into a network without memory nothing is copied: names and shapes are compared
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        encoder.load_state_dict(wanted, strict=True)
    wanted = {name: tensor.to(torch.float32, copy=True) for name, tensor in wanted.items()}
    encoder.load_state_dict(wanted, strict=True, assign=True)
    return encoder
