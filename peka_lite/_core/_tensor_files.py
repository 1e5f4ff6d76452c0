"""Tensors on disk with a record of what they are: written whole or not at all, and read only as what they say."""

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
LONGEST = 2**25  # bytes of a file's header, which holds the record; that of 50 folds of 20,000 genes takes a third


def require_name(name: str) -> None:
    """Refuse what cannot name a set of tensors: ``{name}.{tensor}`` must come apart at the first dot."""
    if not name or "." in name:
        raise ValueError(f"a set of tensors is named without a dot, as 'all' or 'fold0', not {name!r}")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], record: dict, *, kind: str) -> None:
    """Write tensors and a JSON record as one safetensors file, whole or not at all, only in the place of its kind."""
    from safetensors.torch import save_file

    path = Path(path)
    stamp = json.dumps({"kind": kind, "format": FORMAT, **record})
    with (
        report_full_disk(path, sum(tensor.nbytes for tensor in tensors.values())),
        write_output(path, f"peka_lite, as a file of a {kind}", own=lambda there: _is_own(there, kind)) as partial,
    ):
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"format": "pt", "peka_lite": stamp}
        )
        os.umask(umask := os.umask(0))
        partial.chmod(0o666 & ~umask)  # safetensors leaves it to its owner alone


def _is_own(path: Path, kind: str) -> bool:
    try:
        read_record(path, kind=kind)
    except (ValueError, TypeError, AttributeError):  # another's, whatever its record holds
        return False
    return True


def read_record(path: str | os.PathLike, *, kind: str) -> dict:
    """Return the record of a file of `write_tensors`; what is not one of this kind is a ValueError."""
    with _opened(path) as file:
        stamp = (file.metadata() or {}).get("peka_lite", "{}")
    try:
        record = json.loads(stamp)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its record cannot be read as JSON; make the file again") from None
    if not isinstance(record, dict) or record.pop("kind", None) != kind:
        raise ValueError(
            f"{path} is no {kind} file of peka_lite, or one of a version that kept no record: make it anew"
        )
    if (written := record.pop("format", None)) != FORMAT:
        written = repr(written)[:40]
        raise ValueError(f"{path} is written in format {written}, this peka_lite reads format {FORMAT}: update it")
    return record


def check_record(path: str | os.PathLike, record: Mapping, wanted: Mapping[str, tuple], *, whose: str) -> None:
    """Refuse a record, or a part of one, whose entries are not those wanted.

    Parameters
    ----------
    whose
        What it is of, for the message: ``"an adapter's"``.
    wanted
        Name -> (function that says whether a value is right, what is right in words).
    """
    if not isinstance(record, Mapping) or record.keys() != wanted.keys():
        has = f"it has {', '.join(map(str, record))[:120]}" if isinstance(record, Mapping) else "it is no mapping"
        raise ValueError(f"{path}: its record is not {whose} ({has}; wanted are {', '.join(wanted)})")
    for name, (right, words) in wanted.items():
        if not right(record[name]):
            raise ValueError(f"{path}: its record has {name} {repr(record[name])[:120]}; it is {words}")


def is_whole_number(value, *, least: int = 1) -> bool:
    """Say whether a value is a whole number of at least `least`, and no more than 64 bits hold."""
    return type(value) is int and least <= value < 2**63


def is_finite(value) -> bool:
    """Say whether a value is a number that is neither NaN nor infinite."""
    return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)


def read_tensors(path: str | os.PathLike, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of one set of a file of `write_tensors`, without the set's name."""
    with _opened(path) as file:
        names = [k for k in file.keys() if k.startswith(f"{name}.")]  # noqa: SIM118 - safe_open is no dict
        return {k.removeprefix(f"{name}."): file.get_tensor(k) for k in names}


def _opened(path: str | os.PathLike):
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with Path(path).open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if LONGEST < header < Path(path).stat().st_size:
        raise ValueError(f"{path}: its header of {header:,} bytes is longer than one here can be ({LONGEST:,})")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        seen = describe_mismatch(Path(path), {"safetensors"}) or error
        raise ValueError(f"{path} is truncated or no safetensors file ({seen})") from None
