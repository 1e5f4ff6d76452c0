"""Read the names and types of a notebook's parameters from its parameters cell, without running it."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

_TYPES = {"int": (int,), "float": (float, int), "str": (str,), "bool": (bool,), "list": (list,), "dict": (dict,)}
_TYPES |= {"tuple": (list,), "None": (NoneType,), "List": (list,), "Dict": (dict,)}
_NUMBER = (int, float)


@dataclass(frozen=True)
class Parameter:
    """Describe the type of a parameter, as text and as allowed Python types; None allows any value."""

    description: str
    types: tuple[type, ...] | None

    def check(self, name: str, value) -> None:
        """Raise ValueError for a value of another type."""
        if self.types is not None and type(value) not in self.types:
            raise ValueError(f"{name} is {self.description}, not {value!r}")


def read_parameters(path: Path) -> dict[str, Parameter]:
    """Return the parameters assigned in the cell tagged ``parameters``, by name.

    The type is that of an annotation with plain types (``int``, ``list[str]``, ``float | None``), else that of the
    default. A default of None allows None.

    Raises
    ------
    ValueError
        If the file is not a notebook, has no such cell, or its kernel is not Python or not installed.
    """
    try:
        notebook = json.loads(path.read_text("utf-8"))
        cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        code = ["".join(c["source"]) for c in cells]
        tagged = [text for c, text in zip(cells, code, strict=True) if "parameters" in c["metadata"].get("tags", [])]
        kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path.name} is not a notebook of format 4; save it again in Jupyter") from None
    if not tagged:
        raise ValueError(f"{path.name} has no cell tagged 'parameters'; add this tag to its first code cell")
    _check_kernel(path, kernel)
    try:
        body = ast.parse(tagged[0]).body
    except SyntaxError as error:
        raise ValueError(
            f"{path.name}: the parameters cell is not valid Python ({error.msg}, line {error.lineno})"
        ) from None
    parameters = {}
    for line in body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            parameters[line.target.id] = _parse_annotation(line.annotation, line.value)
        elif isinstance(line, ast.Assign):
            names = [n for target in line.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            plain = all(isinstance(target, ast.Name) for target in line.targets)
            parameters |= {n.id: _infer_type(line.value) if plain else Parameter("anything", None) for n in names}
    return parameters


def _parse_annotation(annotation: ast.expr, default: ast.expr | None) -> Parameter:
    text = ast.unparse(annotation).strip("'\"")
    inner = text.removeprefix("typing.")
    inner = f"{inner[9:-1]} | None" if inner.startswith("Optional[") else inner
    types = []
    for name in (part.strip().partition("[")[0] for part in inner.split("|")):
        if name not in _TYPES:
            return Parameter(text, None)
        types += _TYPES[name]
    if isinstance(default, ast.Constant) and default.value is None:
        types.append(NoneType)
    return Parameter(text, tuple(types))


def _infer_type(default: ast.expr) -> Parameter:
    try:
        kind = type(ast.literal_eval(default))
    except (ValueError, TypeError, SyntaxError):
        return Parameter("anything", None)
    if kind in _NUMBER:
        return Parameter("a number", _NUMBER)
    kind = list if kind is tuple else kind
    return Parameter(kind.__name__, (kind,)) if kind in (str, bool, list, dict) else Parameter("anything", None)


def _check_kernel(path: Path, name: str | None) -> None:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    if name is None:
        raise ValueError(f"{path.name} names no kernel; choose one in Jupyter and save it")
    try:
        language = KernelSpecManager().get_kernel_spec(name).language
    except NoSuchKernel:
        raise ValueError(f"{path.name} needs the kernel {name!r}, which is not installed") from None
    if language != "python":
        raise ValueError(f"{path.name} is written in {language}; give a Python notebook")
