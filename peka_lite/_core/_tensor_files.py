"""Write tensors with a JSON record to safetensors files atomically, and check the record on reading."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from peka_lite._core._file_kinds import describe_mismatch
from peka_lite._core.io import report_full_disk
from peka_lite._core.outputs import write_output

FORMAT = 1
LONGEST = 2**25  # bytes of a header, which contains the record; 50 folds of 20,000 genes take a third


def require_name(name: str) -> None:
    """Check the name of a set of tensors: ``{name}.{tensor}`` is split at the first dot."""
    if not name or "." in name:
        raise ValueError(f"{name!r} cannot name a set of tensors: use a name without dots, such as 'all' or 'fold0'")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], record: dict, *, kind: str) -> None:
    """Write tensors and a JSON record to a safetensors file atomically; replace only files of the same kind."""
    from safetensors.torch import save_file

    path = Path(path)
    stamp = json.dumps({"kind": kind, "format": FORMAT, **record})
    with (
        report_full_disk(path, sum(tensor.nbytes for tensor in tensors.values())),
        write_output(path, f"peka_lite, as a file of a {kind}", may_replace=lambda p: _is_of_kind(p, kind)) as partial,
    ):
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt", "peka_lite": stamp}
        )
        os.umask(umask := os.umask(0))
        partial.chmod(0o666 & ~umask)  # safetensors makes it private to its owner


def _is_of_kind(path: Path, kind: str) -> bool:
    try:
        read_record(path, kind=kind)
    except (ValueError, TypeError, AttributeError):  # a file of another kind, or a malformed record
        return False
    return True


def read_record(path: str | os.PathLike, *, kind: str) -> dict:
    """Return the record of a file by `write_tensors`; ValueError if it is not of this kind."""
    with _open(path) as file:
        stamp = (file.metadata() or {}).get("peka_lite", "{}")
    try:
        record = json.loads(stamp)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its record is not valid JSON; create the file again") from None
    if not isinstance(record, dict) or record.pop("kind", None) != kind:
        raise ValueError(f"{path} is no {kind} file of peka_lite, or of a version without records: create it again")
    if (written := record.pop("format", None)) != FORMAT:
        written = repr(written)[:40]
        raise ValueError(f"{path} has format {written}, but this peka_lite reads format {FORMAT}: update peka_lite")
    return record


def check_record(path: str | os.PathLike, record: Mapping, expected: Mapping[str, tuple], *, whose: str) -> None:
    """Check that a record, or a part of one, has exactly the expected entries, all valid.

    Parameters
    ----------
    whose
        Owner of the record, for the message: ``"an adapter's"``.
    expected
        Name -> (function that returns whether a value is valid, description of valid values).
    """
    if not isinstance(record, Mapping) or record.keys() != expected.keys():
        has = f"it has {', '.join(map(str, record))[:120]}" if isinstance(record, Mapping) else "it is no mapping"
        raise ValueError(f"{path}: its record is not {whose} ({has}; expected are {', '.join(expected)})")
    for name, (is_valid, description) in expected.items():
        if not is_valid(record[name]):
            raise ValueError(f"{path}: its record has {name} {repr(record[name])[:120]}; it is {description}")


def is_whole_number(value, *, least: int = 1) -> bool:
    """Return whether a value is an integer of at least `least` that fits in 64 bits."""
    return type(value) is int and least <= value < 2**63


def is_finite(value) -> bool:
    """Return whether a value is a finite number."""
    return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)


def read_tensors(path: str | os.PathLike, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one set in a file by `write_tensors`, without the set's name in their keys."""
    with _open(path) as file:
        names = [k for k in file.keys() if k.startswith(f"{name}.")]  # noqa: SIM118 - safe_open is no dict
        return {k.removeprefix(f"{name}."): file.get_tensor(k) for k in names}


def _open(path: str | os.PathLike):
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with Path(path).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if LONGEST < header < Path(path).stat().st_size:
        raise ValueError(f"{path}: its header of {header:,} bytes is longer than the limit ({LONGEST:,})")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        seen = describe_mismatch(Path(path), {"safetensors"}) or error
        raise ValueError(f"{path} is truncated or not a safetensors file ({seen})") from None
