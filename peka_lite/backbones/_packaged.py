"""Find and identify weights that are part of the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from peka_lite._core.hashing import sha256

if TYPE_CHECKING:
    from peka_lite.backbones.registry import Backbone

PREFIX = "package/"  # prefix of `source`, before the name of a file in ``weights``


def find_packaged(spec: Backbone) -> Path | None:
    """Return the path of a row's weights in the package, or None if their source is another one.

    Raises
    ------
    FileNotFoundError
        If the file is missing from the package.
    """
    if spec.source is None or not spec.source.startswith(PREFIX):
        return None
    path = Path(str(resources.files("peka_lite.backbones").joinpath("weights", spec.source.removeprefix(PREFIX))))
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: the weights of {spec.name} are missing from the package; reinstall it (in a clone, restore the "
            "file with git), or pass a weights file or 'random'"
        )
    return path


def describe_file(path: Path) -> str:
    """Return the name of a file in the package and the first digits of its SHA-256, as text."""
    return f"package {path.name}, sha256 {sha256(path)[:12]}"
