"""Weights that lie inside the package: where they are, and which they are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from peka_lite._core.hashing import sha256

if TYPE_CHECKING:
    from peka_lite.backbones.registry import Backbone

PREFIX = "package/"  # begins the `source` of such a row; the file's name in ``weights`` follows


def find_packaged(spec: Backbone) -> Path | None:
    """Return the file of the package that holds a row's weights; None where they come from elsewhere.

    Raises
    ------
    FileNotFoundError
        If the package should hold it and does not.

    Examples
    --------
    >>> from peka_lite.backbones.registry import BACKBONES
    >>> find_packaged(BACKBONES["mini"]).name, find_packaged(BACKBONES["uni"])
    ('mini_student.safetensors', None)
    """
    if spec.source is None or not spec.source.startswith(PREFIX):
        return None
    path = Path(str(resources.files("peka_lite.backbones").joinpath("weights", spec.source.removeprefix(PREFIX))))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the weights of {spec.name} should come with the package and are missing; install it again (in a "
            "clone, restore the file with git), or give a weights file or 'random'"
        )
    return path


def describe_file(path: Path) -> str:
    """Return a file of the package in words that change with its content: name and first digits of the SHA-256."""
    return f"package {path.name}, sha256 {sha256(path)[:12]}"
