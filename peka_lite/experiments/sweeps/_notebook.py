"""Parameters of a notebook: their names, types and defaults, read from its parameters cell without running it."""

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
    """One parameter: its type in words and as types that a value may have; None where any value may come.

    Examples
    --------
    >>> from peka_lite.experiments.sweeps._notebook import Parameter
    >>> Parameter("float | None", (float, int, type(None))).check("tau", "2")
    Traceback (most recent call last):
    ValueError: tau is float | None, not '2'
    """

    words: str
    types: tuple[type, ...] | None

    def check(self, name: str, value) -> None:
        """Raise ValueError for a value of another type."""
        if self.types is not None and type(value) not in self.types:
            raise ValueError(f"{name} is {self.words}, not {value!r}")


def read_parameters(path: Path) -> dict[str, Parameter]:
    """Return what the cell tagged ``parameters`` assigns, by name.

    The type is the annotation's where it names plain types (``int``, ``list[str]``, ``float | None``), and otherwise
    that of the default; None as a default allows None.

    Raises
    ------
    ValueError
        For a file that is no notebook, has no such cell, or asks for a kernel that is not Python's or not installed.
    """
    try:
        notebook = json.loads(path.read_text("utf-8"))
        cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        code = ["".join(c["source"]) for c in cells]
        tagged = [text for c, text in zip(cells, code, strict=True) if "parameters" in c["metadata"].get("tags", [])]
        kernel = notebook["metadata"].get("kernelspec", {}).get("name")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path.name} is no notebook of format 4: open it in Jupyter and save it anew") from None
    if not tagged:
        raise ValueError(f"{path.name} has no cell tagged 'parameters'; give the cell at its top that tag")
    _check_kernel(path, kernel)
    try:
        body = ast.parse(tagged[0]).body
    except SyntaxError as error:
        raise ValueError(f"{path.name}: its parameters cell is no Python ({error.msg}, line {error.lineno})") from None
    found = {}
    for line in body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            found[line.target.id] = _annotated(line.annotation, line.value)
        elif isinstance(line, ast.Assign):
            names = [n for target in line.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            plain = all(isinstance(target, ast.Name) for target in line.targets)
            found |= {n.id: _by_default(line.value) if plain else Parameter("anything", None) for n in names}
    return found


def _annotated(annotation: ast.expr, default: ast.expr | None) -> Parameter:
    words = ast.unparse(annotation).strip("'\"")
    inner = words.removeprefix("typing.")
    inner = f"{inner[9:-1]} | None" if inner.startswith("Optional[") else inner
    types = []
    for name in (part.strip().partition("[")[0] for part in inner.split("|")):
        if name not in _TYPES:
            return Parameter(words, None)
        types += _TYPES[name]
    if isinstance(default, ast.Constant) and default.value is None:
        types.append(NoneType)
    return Parameter(words, tuple(types))


def _by_default(default: ast.expr) -> Parameter:
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
        raise ValueError(f"{path.name} names no kernel: open it in Jupyter, choose one and save it")
    try:
        language = KernelSpecManager().get_kernel_spec(name).language
    except NoSuchKernel:
        raise ValueError(f"{path.name} asks for the kernel {name!r}, which is not installed here") from None
    if language != "python":
        raise ValueError(f"{path.name} is in {language}: only the parameters of Python notebooks can be checked")
