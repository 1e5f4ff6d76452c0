"""Read the published scFoundation checkpoint without running code; sizes come from its config."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from peka_lite._core._torch_files import read_torch_file
from peka_lite.data.download import find_fetched, is_published
from peka_lite.teachers._encoder import Encoder, EncoderConfig

_ENCODER_PREFIXES = ("token_emb.", "pos_emb.", "encoder.")  # the other tensors belong to the decoder
_GENE_LISTS = ("OS_scRNA_gene_index.19264.tsv", "gene_names.json")


def read_encoder(path: Path, *, key: str) -> Encoder:
    """Read the encoder of one entry as float32 on the CPU. Errors are those of `ScFoundation.from_checkpoint`."""
    entry = _read_entry(path, key)
    try:
        return _build(EncoderConfig.from_checkpoint(entry["config"]), entry["state_dict"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)[:400]
        raise ValueError(f"{path}: entry {key!r} holds no scFoundation model: {reason}") from error


def find_genes(path: Path) -> Path:
    """Return the gene list in a checkpoint's folder, or the one in the cache."""
    adjacent = (path.with_name(name) for name in _GENE_LISTS)
    if genes := next(filter(Path.is_file, adjacent), None) or find_fetched("scfoundation-genes"):
        return genes
    fix = "pass one, or run `peka-lite fetch scfoundation-genes`"
    raise FileNotFoundError(f"no gene list next to {path} ({' or '.join(_GENE_LISTS)}) or in the cache: {fix}")


def _read_entry(path: Path, key: str) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: checkpoint not found; run `peka-lite fetch scfoundation`")
    instead = "take the published file (`peka-lite fetch scfoundation`), or save tensors and plain values only"
    file = read_torch_file(path, kind="a checkpoint", instead=instead, published=partial(is_published, "scfoundation"))
    if not isinstance(file, dict) or key not in file:
        content = ", ".join(map(str, file)) if isinstance(file, dict) else type(file).__name__
        raise ValueError(f"{path}: no entry {key!r}; it has {content}")
    return file[key]


def _build(config: EncoderConfig, state: Mapping[str, torch.Tensor]) -> Encoder:
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        encoder = Encoder(config)
    tensors = {name: tensor for name, tensor in state.items() if name.startswith(_ENCODER_PREFIXES)}
    with warnings.catch_warnings():  # on the meta device nothing is copied: names and shapes are compared
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        encoder.load_state_dict(tensors, strict=True)
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    encoder.load_state_dict(tensors, strict=True, assign=True)
    return encoder
