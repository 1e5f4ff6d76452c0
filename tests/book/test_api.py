"""Every public name shows an example, which a reader can paste after `import peka_lite as pk`."""

import ast
import builtins
import doctest
import inspect

import peka_lite as pk

PACKAGES = [name for name in pk.__all__ if inspect.ismodule(getattr(pk, name))]
PUBLIC = {
    f"{package}.{name}": getattr(getattr(pk, package), name)
    for package in PACKAGES
    for name in getattr(pk, package).__all__
}
# Shown by the example of another function.
WITHOUT_EXAMPLE = {
    "backbones.build_network", "backbones.preprocess", "data.tissue_window", "probe.gather",
}  # fmt: skip
CALLABLE = [name for name, thing in PUBLIC.items() if callable(thing)]


def docstrings(name):
    """Return a name's own docstring and, for a class, those of its methods."""
    thing = PUBLIC[name]
    parts = [thing]
    if inspect.isclass(thing):
        parts += [getattr(part, "__func__", part) for part in vars(thing).values() if callable(part)]
        parts += [part.fget for part in vars(thing).values() if isinstance(part, property)]
    return [part.__doc__ or "" for part in parts if getattr(part, "__module__", "").startswith("peka_lite")]


def foreign_names(example):
    """Return names that an example reads and neither Python, nor it itself, nor `import peka_lite as pk` gives."""
    tree = ast.parse(example)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    given = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | {"pk", *dir(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            given |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler | ast.FunctionDef):
            given.add(node.name)
        elif isinstance(node, ast.arg):
            given.add(node.arg)
    return sorted({node.id for node in names} - given)


def test_every_public_callable_has_an_example():
    without = [name for name in CALLABLE if not any(">>>" in text for text in docstrings(name))]
    assert set(without) == WITHOUT_EXAMPLE, f"no example in the docstring of {', '.join(without)}"


def test_every_public_example_can_be_pasted():
    missing = {}
    for name in CALLABLE:
        for text in docstrings(name):
            example = "".join(part.source for part in doctest.DocTestParser().get_examples(text))
            if missing_names := foreign_names(example):
                missing[name] = missing_names
    assert not missing, f"examples that need more than `import peka_lite as pk`: {missing}"
