"""Messages about folders without a finished run or training, with the command that fixes them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from peka_lite._core.locks import PARTIAL
from peka_lite._core.names import did_you_mean
from peka_lite._core.untrusted_files import file_inside, read_yaml_inside
from peka_lite.backbones.custom import ROW_FILE as BACKBONE
from peka_lite.evaluation.protocols import PROTOCOLS, Protocol
from peka_lite.experiments._sweep_folder import is_sweep, read_sweep_folder
from peka_lite.experiments.settings import SETTINGS as SETTINGS_TABLE

COMMAND = Path("scratch", "command")  # in an unfinished folder; scratch is removed at the end
SETTINGS, SUMMARY = "config.yml", "summary.json"


def explain_missing(folder: Path, *, needs: Sequence[str], kind: str) -> str:
    """Return one sentence on why a path is no finished run, and how to fix it.

    Parameters
    ----------
    folder
        Path of a folder or a file, or one that does not exist.
    needs
        Files that the folder should contain.
    kind
        ``"run"`` or ``"run or training"``.
    """
    message = f"{folder}: no finished {kind} here"
    partial = folder.with_name(folder.name + PARTIAL)
    if folder.name.endswith(PARTIAL) or (partial.is_dir() and not folder.exists()):
        work = folder if folder.name.endswith(PARTIAL) else partial
        if not (work / SETTINGS).is_file():
            return f"{message}, only files of a stopped command in {work}: run that command again, or remove the folder"
        return f"{message}, it was stopped before its end ({work}): finish it with `{remake_command(work)}`"
    if folder.is_file():
        return f"{message}, it is a file: give the folder that `peka-lite run` or `peka-lite train` made"
    if not folder.exists():
        known = [path.name for path in folder.parent.glob("*") if (path / SUMMARY).is_file()]
        hint = did_you_mean(folder.name, known)
        return f"{message}, no such folder{hint}; `peka-lite {_choose_command(kind)}` creates one"
    if is_sweep(folder):
        points = [str(path) for _, path in read_sweep_folder(folder).run_folders()]
        fix = f"give one of its points: {_shorten(points)}" if points else "none of its points is finished"
        return f"{message}, it is the folder of a sweep: {fix}"
    if (folder / "model.safetensors").is_file():
        return f"{message}, it is an export, which timm reads: give the folder that it was exported from"
    missing = [name for name in needs if not (folder / name).is_file()]
    runs = [str(path) for path in sorted(folder.iterdir()) if path.is_dir() and (path / SUMMARY).is_file()]
    if len(missing) == len(needs) and runs:
        return f"{message}, it holds folders of runs: give one of them: {_shorten(runs)}"
    message += f" ({', '.join(missing)} missing)"
    if not (folder / SETTINGS).is_file():
        return f"{message}; `peka-lite {_choose_command(kind)}` creates one"
    is_training = all((folder / name).is_file() for name in (SUMMARY, "probe.safetensors"))
    if is_training and not (folder / "metrics.csv").is_file():
        command = remake_command(folder, "run", out="NEW_FOLDER")
        return f"{message}, a training is not scored: score its settings with `{command}`"
    return f"{message}: remove the folder and give `{remake_command(folder)}`, or leave it out"


def remake_command(folder: Path, name: str | None = None, *, out: str | None = None) -> str:
    """Return the command that makes a folder again, from the settings stored in it.

    `name` is ``"run"`` or ``"train"``; None takes the command stored in the folder, or ``"run"`` if there is none.
    """
    name = name or _read_command(folder)
    out = out or str(folder.with_name(folder.name.removesuffix(PARTIAL)))
    try:
        words = _format_options(read_yaml_inside(folder, SETTINGS), folder)
    except (OSError, ValueError, AttributeError, TypeError):
        words = ["OPTIONS"]
    return " ".join(["peka-lite", name, *words, "--out", shlex.quote(out)])


def _read_command(folder: Path) -> str:
    try:
        name = file_inside(folder, *COMMAND.parts, largest=32).read_text("utf-8")
    except (OSError, ValueError):
        return "run"
    return name if re.fullmatch(r"run|train( --fold \d{1,9})?", name) else "run"


def _format_options(settings: dict, folder: Path) -> list[str]:
    """Return the command-line options of settings that are neither defaults nor set by the protocol."""
    protocol = PROTOCOLS.get(settings.get("protocol"), Protocol(name="custom", split="patient"))
    words = []
    for name, row in SETTINGS_TABLE.items():
        value = settings.get(name, row.default)
        if name == "backbone" and (folder / BACKBONE).is_file():
            value = str(folder / BACKBONE)
        if value is None or (value in (row.default, getattr(protocol, name, None)) and name != "protocol"):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
            continue
        word = ",".join(value) if isinstance(value, list) else str(value)
        words += [f"{option}={shlex.quote(word)}"] if word.startswith("-") else [option, shlex.quote(word)]
    return words


def _choose_command(kind: str) -> str:
    return "run" if kind == "run" else "train"


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
