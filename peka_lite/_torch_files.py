"""Files of torch.save, read without running what they carry."""

from __future__ import annotations

import argparse
import codecs
import io
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch

from peka_lite._file_kinds import misfit
from peka_lite.manifest import is_published

_CHUNKS = 5  # pickles that a file of torch.save before PyTorch 1.6 begins with
_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.(\w+Storage|Size|device|[a-z]+\d+|bool)"
)


def _known_as(module: str, name: str, function: Callable) -> Callable:
    """Return a function that stands in a pickle for ``module.name``, whatever the installed version calls it."""

    def stand_in(*values):
        return function(*values)

    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name  # PyTorch 2.6 asks for __name__
    return stand_in


_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = {type(np.dtype(c)) for c in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}
#: Plain values that PyTorch's list of safe names lacks. A defaultdict is read as the dict that it equals, for PyTorch
#: from 2.10 on fills exact dicts only. NumPy 1 and 2 have two names for one function, whose bytes
#: go through codecs.encode.
ADMITTED = (
    _known_as("collections", "defaultdict", lambda *_: {}), dict, list, tuple, set, int, float, str, bool,
    *(_known_as(module, "scalar", _SCALAR) for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    np.dtype, *_NUMBERS, codecs.encode,
)  # fmt: skip
#: What timm admits too: the options of a training script, beside its weights.
OPTIONS = (argparse.Namespace,)


def read_torch_file(
    path: Path, *, what: str, instead: str, artifact: str | None = None, also: Iterable = (), device="cpu", mmap=True
):
    """Read a file of torch.save: tensors, plain values, NumPy scalars and what `also` admits.

    Parameters
    ----------
    what
        What it is to be, in words, for the messages.
    instead
        What to do where a file is refused for the code that it names.
    artifact
        Entry of the manifest that the file may be a copy of; of the published file another copy is not advised.
    also
        More classes to admit.
    device
        Where tensors go.
    mmap
        Read tensors from the disk as they are used, where the format allows.

    Raises
    ------
    ValueError
        For any other file, which is called what it is, and for one that would run code, which is named.
    """
    if other := misfit(path, {"torch", "pickle"}):
        raise ValueError(f"{path}: cannot be read as {what}: {other}")
    with torch.serialization.safe_globals([*ADMITTED, *also]):
        try:
            try:
                return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a cut file fails wherever the reader stood; PyTorch's own words advise to run it
            reason, names = _reason(error), _refused_names(path)
    if not names:
        raise ValueError(
            f"{path}: cannot be read as {what} ({reason}); fetch it again, or save it again with torch.save"
        )
    if artifact and is_published(artifact, path):
        instead = (
            "it is the published file, by its SHA-256, so another copy will not help: report these names to peka_lite"
        )
    more = ", ..." if len(names) > 8 else ""
    raise ValueError(
        f"{path}: refused, for reading it would run code that it names: {', '.join(names[:8])}{more}; {instead}"
    )


def _refused_names(path: Path) -> list[str]:
    """Return the functions and classes that a file names and PyTorch does not admit; nothing is imported or run."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it reads the format since PyTorch 1.6 alone, and pickles of protocol 2 alone
        admitted = {f"{known.__module__}.{known.__qualname__}" for known in ADMITTED}
        return sorted(name for name in _named(path) - admitted if not _TENSORS.fullmatch(name))


def _named(path: Path) -> set[str]:
    """Return every global that the pickles of a file name."""
    names, strings, memo, top = set(), [], {}, None
    with suppress(Exception), _pickles(path) as file:  # raw values follow the pickles
        for _ in range(_CHUNKS):
            for op, value, _ in pickletools.genops(file):
                if op.name in ("GLOBAL", "INST"):
                    names.add(value.replace(" ", "."))
                elif op.name == "STACK_GLOBAL":
                    names.add(".".join(strings[-2:]))
                elif op.name == "MEMOIZE":
                    memo[len(memo)] = top
                elif op.name.endswith("PUT"):
                    memo[value] = top
                else:
                    top = memo.get(value) if op.name.endswith("GET") else value
                    strings += [top] if isinstance(top, str) else []
    return names


def _pickles(path: Path) -> IO[bytes]:
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl"))))


def _reason(error: Exception) -> str:
    """Return an error's own words in one line, without PyTorch's advice to read the file unchecked."""
    words = re.sub(r"^Weights only load failed.*?WeightsUnpickler error:", "", str(error), flags=re.S).strip()
    line = next(iter(words.splitlines()), "").split(" Please use ")[0][:160]
    if line.startswith("Unsupported operand"):
        return "its pickle is not of torch.save's protocol 2"
    return type(error).__name__ if not line or "weights_only" in line else line
