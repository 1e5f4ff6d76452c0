"""Files of torch.save, read without running what they carry."""

from __future__ import annotations

import argparse
import codecs
import io
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import torch

from peka_lite._core._file_kinds import describe_mismatch

_CHUNKS = 5  # pickles that a file of torch.save before PyTorch 1.6 begins with
_LARGEST = 2**24  # bytes of a pickle, beside which the tensors' values lie; that of a billion weights has 1e5
_DEEPEST = 100  # nested containers; an optimizer's state has 5
_COPIES = 8  # what tensors, values and compressed entries may take, as a multiple of the file that holds them
_GROWS = {"APPEND": 1, "BUILD": 1, "SETITEM": 2, "APPENDS": None, "SETITEMS": None, "ADDITEMS": None}  # None: to a mark
#: PyTorch reads these too, though what they build may be larger than the file without end.
_NOT_READ = re.compile(
    r"(builtins|__builtin__)\.bytearray|torch\.serialization\._get_layout|torch(\.\w+)*\.(?!Tensor$)[A-Z]\w*Tensor"
    r"|torch\._utils\._rebuild_(qtensor|sparse_tensor|meta_tensor_no_storage|nested_tensor|wrapper_subclass)"
)
_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.(\w+Storage|Size|device|[a-z]+\d+|bool)"
)


class _Oversized(ValueError):
    """A file whose values take far more memory than the file."""


def _known_as(module: str, name: str, function: Callable) -> Callable:
    """Return a function that stands in a pickle for ``module.name``, whatever the installed version calls it."""

    def stand_in(*values):
        return function(*values)

    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name  # PyTorch 2.6 asks for __name__
    return stand_in


def _named_only(known: type) -> Callable:
    """Return what stands for a class that files name, as a defaultdict does, and that none needs to call."""

    def refuse(*_):
        raise ValueError(f"it calls {known.__name__}")

    return _known_as(known.__module__, known.__name__, refuse)


def _scalar(kind: np.dtype, value: bytes):
    if not isinstance(value, bytes) or len(value) != kind.itemsize:
        raise ValueError("a NumPy scalar of it is no scalar")
    return _SCALAR(kind, value)


_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = {type(np.dtype(c)) for c in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}
#: Plain values that PyTorch's list of safe names lacks. A defaultdict is read as the dict that it equals, for PyTorch
#: from 2.10 on fills exact dicts only. NumPy 1 and 2 have two names for one function, whose bytes
#: go through codecs.encode.
ADMITTED = (
    _known_as("collections", "defaultdict", lambda *_: {}), set,
    *map(_named_only, (dict, list, tuple, int, float, str, bool)),
    *(_known_as(module, "scalar", _scalar) for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    np.dtype, *_NUMBERS, codecs.encode,
)  # fmt: skip
#: What timm admits too: the options of a training script, beside its weights.
OPTIONS = (argparse.Namespace,)


def read_torch_file(
    path: Path,
    *,
    what: str,
    instead: str,
    published: Callable[[Path], bool] | None = None,
    also: Iterable = (),
    device="cpu",
    mmap=True,
):
    """Read a file of torch.save: tensors, plain values, NumPy scalars and what `also` admits.

    Parameters
    ----------
    what
        What it is to be, in words, for the messages.
    instead
        What to do where a file is refused for the code that it names.
    published
        Whether a file is the published one; of that, another copy is not advised.
    also
        More classes to admit.
    device
        Where tensors go.
    mmap
        Read tensors from the disk as they are used, where the format allows.

    Raises
    ------
    ValueError
        For any other file, which is called what it is, for one that would run code, which is named, and for one whose
        values or tensors take many times the memory of the file.
    """
    if other := describe_mismatch(path, {"torch", "pickle"}):
        raise ValueError(f"{path}: cannot be read as {what}: {other}")
    with torch.serialization.safe_globals([*ADMITTED, *also]):
        try:
            _check_pickles(path)
            try:
                value = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                value = torch.load(path, map_location=device, weights_only=True)
            _check_tensors(value, path.stat().st_size)
            return value
        except _Oversized as error:
            raise ValueError(f"{path}: cannot be read as {what} ({error})") from None
        except Exception as error:  # a cut file fails wherever the reader stood; PyTorch's own words advise to run it
            reason, names = _reason(error), _refused_names(path)
    if not names:
        raise ValueError(
            f"{path}: cannot be read as {what} ({reason}); fetch it again, or save it again with torch.save"
        )
    if published and published(path):
        instead = (
            "it is the published file, by its SHA-256, so another copy will not help: report these names to peka_lite"
        )
    more = ", ..." if len(names) > 8 else ""
    raise ValueError(
        f"{path}: refused, for reading it would run code that it names: {', '.join(names[:8])}{more}; {instead}"
    )


def _check_pickles(path: Path) -> None:
    """Refuse pickles, before they are read, that stand for far more than they hold; a ValueError says what."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if (held := sum(entry.file_size for entry in entries)) > _COPIES * size:
                raise _Oversized(f"its {len(entries)} entries unpack to {held:,} bytes of a file of {size:,}")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    if entry.file_size > _LARGEST:
                        raise _Oversized(f"its pickle has {entry.file_size:,} bytes, at most {_LARGEST:,} are read")
                    _check_pickle(io.BytesIO(archive.read(entry)))
        return
    with path.open("rb") as file:
        for _ in range(_CHUNKS):
            if file.peek(1):
                _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Follow one pickle without making its values: count what they are, written out, and how deep they nest."""
    own, parts, made, stack, marks, memo, begin = [], [], [], [], [], {}, file.tell()
    for op, value, place in pickletools.genops(file):
        if place - begin > _LARGEST:
            raise _Oversized(f"its pickle has more than {_LARGEST:,} bytes")
        if op.name == "MARK":
            marks.append(len(stack))
        elif op.name in _GROWS:  # the container before gets the last values
            at = marks.pop() if _GROWS[op.name] is None else len(stack) - _GROWS[op.name]
            parts[stack[at - 1]] += stack[at:]
            del stack[at:]
        elif op.name == "MEMOIZE" or op.name.endswith("PUT"):
            memo[len(memo) if value is None else value] = stack[-1]
        elif op.name.endswith("GET"):
            stack.append(memo[value])
        elif op.name in ("POP", "POP_MARK", "DUP"):
            raise _Oversized(f"its pickle has {op.name}, which torch.save does not write")
        elif op.name == "GLOBAL" and _NOT_READ.fullmatch(name := value.replace(" ", ".")):
            raise _Oversized(f"it holds values of {name}, which may take any memory; save dense tensors")
        elif op.name not in ("PROTO", "FRAME", "STOP"):
            marked = pickletools.markobject in op.stack_before
            at = marks.pop() if marked else len(stack) - len(op.stack_before)
            parts.append(stack[at:])
            own.append(1 + len(value) // 8 if isinstance(value, str | bytes) else 1)
            stack[at:] = [len(own) - 1]
            if op.name in ("REDUCE", "NEWOBJ"):
                made.append(len(own) - 1)
    most = _COPIES * (file.tell() - begin) + 1_000_000
    if sum(_written_out(own, parts, [*made, *stack], most)) > most:
        raise _Oversized(f"its pickle stands for more than {most:,} values, each written out")


def _written_out(own: list[int], parts: list[list[int]], wanted: list[int], most: int) -> list[int]:
    """Return how many values each wanted one is, with those inside; no more than one above `most`."""
    known, depth, open_ = {}, {}, set()
    for root in wanted:
        todo = [root]
        while todo:
            at = todo[-1]
            if at in known:
                todo.pop()
            elif at in open_:
                todo.pop()
                open_.remove(at)
                known[at] = min(own[at] + sum(known[part] for part in parts[at]), most + 1)
                depth[at] = 1 + max((depth[part] for part in parts[at]), default=0)
                if depth[at] > _DEEPEST:
                    raise _Oversized(f"its values are nested more than {_DEEPEST} levels deep")
            else:
                open_.add(at)
                if any(part in open_ for part in parts[at]):
                    raise _Oversized("a value of it holds itself")
                todo += parts[at]
    return [known[root] for root in wanted]


def _check_tensors(value, size: int) -> None:
    """Refuse tensors that take far more memory than the file of `size` bytes, as one of stride 0 does when copied."""
    todo, taken = [value], 0
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            taken += value.numel() * value.element_size()
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise _Oversized("it holds tensors that are sparse, quantised or without values; save dense ones")
            if taken > _COPIES * size:
                raise _Oversized(f"its tensors take more than {taken:,} bytes, the file has {size:,}")
        elif isinstance(value, Mapping):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo += vars(value).values()


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
