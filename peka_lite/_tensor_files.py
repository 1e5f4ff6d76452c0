"""Tensors on disk with a record of what they are: written whole or not at all, and read only as what they say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from peka_lite._file_kinds import misfit

FORMAT = 1


def require_name(name: str) -> None:
    """Refuse what cannot name a set of tensors: ``{name}.{tensor}`` must come apart at the first dot."""
    if not name or "." in name:
        raise ValueError(f"a set of tensors is named without a dot, as 'all' or 'fold0', not {name!r}")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], record: dict, *, kind: str) -> None:
    """Write tensors and a JSON record as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    stamp = json.dumps({"kind": kind, "format": FORMAT, **record})
    try:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt", "peka_lite": stamp}
        )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: str | os.PathLike, *, kind: str) -> dict:
    """Return the record of a file of `write_tensors`; what is not one of this kind is a ValueError."""
    with _opened(path) as file:
        stamp = (file.metadata() or {}).get("peka_lite")
    record = {} if stamp is None else json.loads(stamp)
    if record.pop("kind", None) != kind:
        raise ValueError(
            f"{path} is no {kind} file of peka_lite, or one of a version that kept no record: make it anew"
        )
    if (written := record.pop("format", None)) != FORMAT:
        raise ValueError(f"{path} is written in format {written}, this peka_lite reads format {FORMAT}: update it")
    return record


def read_tensors(path: str | os.PathLike, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one set of a file of `write_tensors`, without the set's name."""
    with _opened(path) as file:
        names = [k for k in file.keys() if k.startswith(f"{name}.")]  # noqa: SIM118 - safe_open is no dict
        return {k.removeprefix(f"{name}."): file.get_tensor(k) for k in names}


def _opened(path: str | os.PathLike):
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        seen = misfit(Path(path), {"safetensors"}) or error
        raise ValueError(f"{path} is truncated or no safetensors file ({seen})") from None
