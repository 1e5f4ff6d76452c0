"""Read torch.save files without running code that they contain."""

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

_CHUNKS = 5  # pickles at the start of a torch.save file before PyTorch 1.6
_LARGEST = 2**24  # bytes of a pickle without tensor values; a model of a billion weights has 1e5
_DEEPEST = 100  # nested containers; an optimizer state has 5
_COPIES = 8  # limit for tensors, values and compressed entries, as a multiple of the file size
_GROWS = {"APPEND": 1, "BUILD": 1, "SETITEM": 2, "APPENDS": None, "SETITEMS": None, "ADDITEMS": None}  # None: to a mark
#: PyTorch allows these, but their values may be larger than the file without limit.
_NOT_READ = re.compile(
    r"(builtins|__builtin__)\.bytearray|torch\.serialization\._get_layout|torch(\.\w+)*\.(?!Tensor$)[A-Z]\w*Tensor"
    r"|torch\._utils\._rebuild_(qtensor|sparse_tensor|meta_tensor_no_storage|nested_tensor|wrapper_subclass)"
)
_TENSORS = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_\w+|torch\.(\w+Storage|Size|device|[a-z]+\d+|bool)"
)


class _Oversized(ValueError):
    """Report a file whose values take far more memory than the file."""


def _alias(module: str, name: str, function: Callable) -> Callable:
    """Return a function that pickles name ``module.name``, whatever its name in the installed version."""

    def alias(*values):
        return function(*values)

    alias.__module__, alias.__name__, alias.__qualname__ = module, name, name  # PyTorch 2.6 reads __name__
    return alias


def _name_only(known: type) -> Callable:
    """Return a placeholder for a class that a file may name, as a defaultdict does, but not call."""

    def refuse(*_):
        raise ValueError(f"it calls {known.__name__}")

    return _alias(known.__module__, known.__name__, refuse)


def _scalar(kind: np.dtype, value: bytes):
    if not isinstance(value, bytes) or len(value) != kind.itemsize:
        raise ValueError("one of its NumPy scalars is malformed")
    return _SCALAR(kind, value)


_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = {type(np.dtype(c)) for c in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"}
#: Plain types that PyTorch's safe list lacks. A defaultdict is read as an equal dict, since PyTorch 2.10 fills exact
#: dicts only. NumPy 1 and 2 have different names for one function, whose bytes pass through codecs.encode.
ALLOWED = (
    _alias("collections", "defaultdict", lambda *_: {}), set,
    *map(_name_only, (dict, list, tuple, int, float, str, bool)),
    *(_alias(module, "scalar", _scalar) for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    np.dtype, *_NUMBERS, codecs.encode,
)  # fmt: skip
#: Also allowed by timm: the options of a training script, stored beside the weights.
OPTIONS = (argparse.Namespace,)


def read_torch_file(
    path: Path,
    *,
    kind: str,
    instead: str,
    published: Callable[[Path], bool] | None = None,
    also: Iterable = (),
    device="cpu",
    mmap=True,
):
    """Read a torch.save file of tensors, plain values, NumPy scalars and the classes in `also`.

    Raises ValueError for another kind of file, for one that would run code, and for values or tensors that take many
    times the memory of the file. Its message has the `kind` of file that is expected, and, if the file names code, the
    fix `instead`, unless the file is the `published` one. With `mmap`, tensors are read from disk when they are used.
    """
    if other := describe_mismatch(path, {"torch", "pickle"}):
        raise ValueError(f"{path}: cannot be read as {kind}: {other}")
    with torch.serialization.safe_globals([*ALLOWED, *also]):
        try:
            _check_pickles(path)
            try:
                value = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
            except RuntimeError:  # the format before PyTorch 1.6 cannot be memory-mapped
                value = torch.load(path, map_location=device, weights_only=True)
            _check_tensors(value, path.stat().st_size)
            return value
        except _Oversized as error:
            raise ValueError(f"{path}: cannot be read as {kind} ({error})") from None
        except Exception as error:  # a truncated file fails anywhere; PyTorch's message suggests an unsafe load
            reason, names = _reason(error), _refused_names(path)
    if not names:
        fix = "fetch it again, or save it again with torch.save"
        raise ValueError(f"{path}: cannot be read as {kind} ({reason}); {fix}")
    if published and published(path):
        instead = "it is the published file (same SHA-256): another copy does not help, report these names to peka_lite"
    code = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(f"{path}: refused, for reading it would run code that it names: {code}; {instead}")


def _check_pickles(path: Path) -> None:
    """Check, before pickles are read, that they do not expand to far more than their size."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if (unpacked := sum(entry.file_size for entry in entries)) > _COPIES * size:
                raise _Oversized(f"its {len(entries)} entries unpack to {unpacked:,} bytes of a file of {size:,}")
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
    """Check the number of values in one pickle, and their depth, without building them."""
    sizes, parts, built, stack, marks, memo, begin = [], [], [], [], [], {}, file.tell()
    for op, value, place in pickletools.genops(file):
        if place - begin > _LARGEST:
            raise _Oversized(f"its pickle has more than {_LARGEST:,} bytes")
        if op.name == "MARK":
            marks.append(len(stack))
        elif op.name in _GROWS:  # the last values go to the container below them
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
            raise _Oversized(f"it holds values of {name}, which may take any amount of memory; save dense tensors")
        elif op.name not in ("PROTO", "FRAME", "STOP"):
            marked = pickletools.markobject in op.stack_before
            at = marks.pop() if marked else len(stack) - len(op.stack_before)
            parts.append(stack[at:])
            sizes.append(1 + len(value) // 8 if isinstance(value, str | bytes) else 1)
            stack[at:] = [len(sizes) - 1]
            if op.name in ("REDUCE", "NEWOBJ"):
                built.append(len(sizes) - 1)
    most = _COPIES * (file.tell() - begin) + 1_000_000
    if sum(_count_values(sizes, parts, [*built, *stack], most)) > most:
        raise _Oversized(f"its pickle expands to more than {most:,} values")


def _count_values(sizes: list[int], parts: list[list[int]], roots: list[int], most: int) -> list[int]:
    """Return the number of values in each root, with nested ones; at most `most` + 1."""
    known, depth, open_ = {}, {}, set()
    for root in roots:
        todo = [root]
        while todo:
            at = todo[-1]
            if at in known:
                todo.pop()
            elif at in open_:
                todo.pop()
                open_.remove(at)
                known[at] = min(sizes[at] + sum(known[part] for part in parts[at]), most + 1)
                depth[at] = 1 + max((depth[part] for part in parts[at]), default=0)
                if depth[at] > _DEEPEST:
                    raise _Oversized(f"its values are nested more than {_DEEPEST} levels deep")
            else:
                open_.add(at)
                if any(part in open_ for part in parts[at]):
                    raise _Oversized("one of its values contains itself")
                todo += parts[at]
    return [known[root] for root in roots]


def _check_tensors(value, size: int) -> None:
    """Check the memory of tensors against the file's `size` in bytes; a tensor of stride 0 grows when copied."""
    todo, taken = [value], 0
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            taken += value.numel() * value.element_size()
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise _Oversized("it has sparse, quantized or meta tensors; save dense ones")
            if taken > _COPIES * size:
                raise _Oversized(f"its tensors take more than {taken:,} bytes, the file has {size:,}")
        elif isinstance(value, Mapping):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo += vars(value).values()


def _refused_names(path: Path) -> list[str]:
    """Return the functions and classes that a file names and PyTorch does not allow, without importing them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # it supports only the format since PyTorch 1.6, with pickle protocol 2
        allowed = {f"{known.__module__}.{known.__qualname__}" for known in ALLOWED}
        return sorted(name for name in _find_globals(path) - allowed if not _TENSORS.fullmatch(name))


def _find_globals(path: Path) -> set[str]:
    """Return every global that is named in the pickles of a file."""
    names, strings, memo, top = set(), [], {}, None
    with suppress(Exception), _pickles(path) as file:  # tensor values follow the pickles
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
    """Return an error's message in one line, without PyTorch's advice to read the file unchecked."""
    words = re.sub(r"^Weights only load failed.*?WeightsUnpickler error:", "", str(error), flags=re.S).strip()
    line = next(iter(words.splitlines()), "").split(" Please use ")[0][:160]
    if line.startswith("Unsupported operand"):
        return "its pickle protocol is not 2, as torch.save writes"
    return type(error).__name__ if not line or "weights_only" in line else line
