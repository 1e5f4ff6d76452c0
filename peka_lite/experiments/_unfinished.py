"""Folders that hold no finished run or training: what each is instead, and the command that helps."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from peka_lite._core.locks import PARTIAL
from peka_lite._core.names import did_you_mean
from peka_lite._core.received import file_inside, read_yaml_inside
from peka_lite.backbones.custom import FILE as BACKBONE
from peka_lite.evaluation.protocols import PROTOCOLS, Protocol
from peka_lite.experiments._sweep_folder import is_sweep, read_sweep_folder
from peka_lite.experiments.config import RunConfig

COMMAND = Path("scratch", "command")  # in a folder at work; scratch goes at the end
SETTINGS, SUMMARY = "config.yml", "summary.json"


def explain_missing(folder: Path, *, needs: Sequence[str], what: str) -> str:
    """Say in one sentence what a folder is in place of a finished run, and what to do.

    Parameters
    ----------
    folder
        Whatever was given: a folder, a file or a path where nothing is.
    needs
        Files that it should hold.
    what
        Words for what it should be: ``"run"`` or ``"run or training"``.
    """
    said = f"{folder}: no finished {what} here"
    at_work = folder.with_name(folder.name + PARTIAL)
    if folder.name.endswith(PARTIAL) or (at_work.is_dir() and not folder.exists()):
        work = folder if folder.name.endswith(PARTIAL) else at_work
        if not (work / SETTINGS).is_file():
            return f"{said}, only what a stopped command left in {work}: give that command again, or remove the folder"
        return f"{said}, it was stopped before its end ({work}): finish it with `{remake_command(work)}`"
    if folder.is_file():
        return f"{said}, it is a file: give the folder that `peka-lite run` or `peka-lite train` made"
    if not folder.exists():
        known = [path.name for path in folder.parent.glob("*") if (path / SUMMARY).is_file()]
        return (
            f"{said}, there is no such folder{did_you_mean(folder.name, known)}; `peka-lite {_makes(what)}` makes one"
        )
    if is_sweep(folder):
        points = [str(path) for _, path in read_sweep_folder(folder).run_folders()]
        give = f"give one of its points: {_some(points)}" if points else "none of its points is finished"
        return f"{said}, it is the folder of a sweep: {give}"
    if (folder / "model.safetensors").is_file():
        return f"{said}, it is an export, which timm reads: give the folder that it was exported from"
    missing = [name for name in needs if not (folder / name).is_file()]
    inside = [str(path) for path in sorted(folder.iterdir()) if path.is_dir() and (path / SUMMARY).is_file()]
    if len(missing) == len(needs) and inside:
        return f"{said}, it holds folders of runs: give one of them: {_some(inside)}"
    said += f" ({', '.join(missing)} missing)"
    if not (folder / SETTINGS).is_file():
        return f"{said}; `peka-lite {_makes(what)}` makes one"
    if (
        (folder / SUMMARY).is_file()
        and (folder / "probe.safetensors").is_file()
        and not (folder / "metrics.csv").is_file()
    ):
        return f"{said}, a training is not scored: score its settings with `{remake_command(folder, 'run', out='NEW_FOLDER')}`"
    return f"{said}: remove the folder and give `{remake_command(folder)}`, or leave it out"


def remake_command(folder: Path, name: str | None = None, *, out: str | None = None) -> str:
    """Return the command that makes what a folder was to be, from the settings that it holds.

    `name` is ``"run"`` or ``"train"``; None is the one that the folder notes, and ``"run"`` where it notes none.
    """
    name = name or _noted(folder)
    out = out or str(folder.with_name(folder.name.removesuffix(PARTIAL)))
    try:
        words = _options(read_yaml_inside(folder, SETTINGS), folder)
    except (OSError, ValueError, AttributeError, TypeError):
        words = ["OPTIONS"]
    return " ".join(["peka-lite", name, *words, "--out", shlex.quote(out)])


def _noted(folder: Path) -> str:
    try:
        name = file_inside(folder, *COMMAND.parts, largest=32).read_text("utf-8")
    except (OSError, ValueError):
        return "run"
    return name if re.fullmatch(r"run|train( --fold \d{1,9})?", name) else "run"


def _options(given: dict, folder: Path) -> list[str]:
    """Return the options of settings that are neither the defaults nor set by the protocol."""
    protocol = PROTOCOLS.get(given.get("protocol"), Protocol(name="custom", split="patient"))
    words = []
    for field in dataclasses.fields(RunConfig):
        value = given.get(field.name, field.default)
        if field.name == "backbone" and (folder / BACKBONE).is_file():
            value = str(folder / BACKBONE)
        if value in (field.default, getattr(protocol, field.name, None)) and field.name != "protocol":
            continue
        if value is None:
            continue
        option = f"--{field.name.replace('_', '-')}"
        if value is True:
            words.append(option)
            continue
        word = ",".join(value) if isinstance(value, list) else str(value)
        words += [f"{option}={shlex.quote(word)}"] if word.startswith("-") else [option, shlex.quote(word)]
    return words


def _makes(what: str) -> str:
    return "run" if what == "run" else "train"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
