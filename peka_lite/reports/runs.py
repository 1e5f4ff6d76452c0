"""Read finished runs for reports; name, sort and group them, and check which may share a column."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from peka_lite._core.locks import PARTIAL
from peka_lite.data._choices import NORMALIZATIONS
from peka_lite.evaluation.protocols import PROTOCOLS as KNOWN_PROTOCOLS
from peka_lite.experiments._sweep_folder import is_sweep, read_sweep_folder
from peka_lite.experiments.folder import RunFolder
from peka_lite.experiments.settings import WITH_STUDENT, update_words

PROTOCOLS = (*KNOWN_PROTOCOLS, "custom")
TARGETS = NORMALIZATIONS
COHORTS = ("breast", "kidney", "liver", "lung")
BACKBONES = {"resnet50": "ResNet-50", "ctranspath": "CTransPath", "uni": "UNI", "h-optimus-0": "H-optimus-0"}
METHODS = {"none": "frozen", "bone": "Bone", "lora": "LoRA", "adalora": "AdaLoRA", "miss": "MiSS"}
CONTROLS = {"color": "color and texture", "coordinates": "coordinates", "depth": "total count"}
INTERVALS = "95% confidence intervals: Student's t times a bootstrap standard error over patients (or slides) and genes"
SPLITS = {"patient": "patients held out", "slide": "sections held out", "spot": "random spots held out"}
ELSEWHERE = ("cohort", "slides", "patients", "device")  # covered by the data fingerprint, or without effect on scores


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: folder name, `config.yml`, `summary.json` and `slides.parquet`.

    Attributes
    ----------
    folder, metrics
        Folder of the run, and its table of scores; None for a mean over seeds.
    points
        The sweep points of the run; several if they have the same run.
    varied
        Settings of these points, as far as they agree.
    parts
        The run of each seed, for a mean over seeds (`average_seeds`).
    """

    name: str
    config: dict
    summary: dict
    moments: pd.DataFrame
    folder: Path | None = None
    metrics: pd.DataFrame | None = None
    points: tuple[str, ...] = ()
    varied: dict = dataclasses.field(default_factory=dict)
    parts: tuple[Run, ...] = ()

    def score(self, how: str = "pooled", *, normalization: str | None = None) -> dict:
        """Return pcc, ci_low, ci_high and per_fold, on the protocol's targets by default."""
        return self.summary["scores"][normalization or self.summary["normalization"]][how]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of the run, or the seeds of a mean."""
        return tuple(part.config["seed"] for part in self.parts or (self,))

    @property
    def cohort(self) -> str:
        """Cohort for titles and columns; only the whole cohort has the plain name of one of the paper's cohorts."""
        given, slides = self.config["cohort"], self.config.get("slides")
        name = Path(given).name
        if slides:
            name += f" {', '.join(slides)}" if len(slides) <= 4 else f" ({len(slides)} slides)"
        return f"{name} (folder)" if name in COHORTS and given != name else name

    @property
    def backbone(self) -> str | None:
        """Backbone of the student; None for controls."""
        return self.summary["backbone"] if self.summary["features"] in WITH_STUDENT else None

    @property
    def named_cohort(self) -> str:
        """Cohort, marked if it is synthetic."""
        return self.cohort + (" (synthetic)" if self.summary["synthetic"] else "")


def read_runs(folders: Iterable[str | os.PathLike]) -> list[Run]:
    """Read finished runs from run folders, folders that contain them (one level), or sweep folders.

    In a sweep folder, finished runs are read at any depth below its points; there may be none. A run of several points
    is read once.

    Runs that are unfinished (also any folder named ``*.partial``), truncated, unreadable or of an older version are
    skipped with a warning that names them, as long as other runs remain. So are runs outside the given folder: links
    are followed inside it only.

    Raises
    ------
    FileNotFoundError
        If a folder does not exist, or no folder has a finished run; the message names the missing files and the
        command that finishes the run.
    ValueError
        If no run can be read, or if two runs outside a sweep have the same settings.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features in ("coordinates", "depth"):
    ...     _ = pk.load_or_run(pk.RunConfig(features=features, **small), f"runs/{features}", maps=False)
    >>> [(run.name, round(run.score()["pcc"], 2)) for run in pk.reports.read_runs(["runs"])]
    [('coordinates', 0.12), ('depth', -0.01)]
    >>> pk.reports.read_runs(["runs/teacher"])
    Traceback (most recent call last):
    FileNotFoundError: runs/teacher: no such folder; give a run folder, or a folder of run folders
    """
    candidates, runs, sweeps = [], {}, False
    for folder in map(Path, folders):
        if not folder.exists() and not folder.with_name(folder.name + PARTIAL).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give a run folder, or a folder of run folders")
        if is_sweep(folder):
            sweep, sweeps = read_sweep_folder(folder), True
            candidates += [(path, folder, (point,), sweep.points[point]) for point, path in sweep.run_folders()]
            continue
        subfolders = []
        if folder.is_dir() and not RunFolder.is_run(folder):
            subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and RunFolder.is_run(path))
        candidates += [(path, folder, (), {}) for path in subfolders or [folder]]
    if not candidates and not sweeps:
        raise ValueError("a report needs at least one run folder")
    errors: list[Exception] = []
    for folder, within, points, varied in candidates:
        try:
            run = dataclasses.replace(_read_run(folder, within), points=points, varied=update_words(varied))
        except (FileNotFoundError, ValueError) as error:
            errors.append(error)
            continue
        settings = {k: v for k, v in run.config.items() if k not in ELSEWHERE}
        key = json.dumps([settings, run.summary["data_fingerprint"]], sort_keys=True)
        if (first := runs.setdefault(key, run)) is run:
            continue
        if not (first.points or points):
            raise ValueError(f"{first.folder} and {folder} are the same run (same settings, same data); leave one out")
        varied = {k: v for k, v in first.varied.items() if k in varied and varied[k] == v}
        points = tuple(dict.fromkeys(first.points + points))
        runs[key] = dataclasses.replace(first, points=points, varied=varied)
    if errors and not (runs or sweeps):
        raise errors[0]
    for error in errors:
        warnings.warn(f"skipped: {error}", stacklevel=2)
    return list(runs.values())


def row_label(run: Run) -> str:
    """Return the row name of a run: ``"frozen"``, ``"Bone"``, ``"[frozen, Bone]"``, ``"coordinates"``, ...

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> for features in ("depth", "student"):
    ...     _ = pk.load_or_run(pk.RunConfig(features=features, **small), features, maps=False)
    >>> [pk.reports.row_label(run) for run in pk.reports.read_runs(["depth", "student"])]
    ['total count', 'frozen']
    """
    features, method = run.summary["features"], METHODS[run.summary["method"]]
    if features in CONTROLS:
        return CONTROLS[features]
    if features == "teacher":
        return "teacher (upper line)"
    if features == "file":
        return f"file {Path(run.config['features']).name or '.'} (learned from: {run.summary['learned_from']})"
    name = {
        "frozen+student": f"[frozen, {method}]", "projector": f"{method}, projector",
        "frozen+projector": f"[frozen, {method} projector]",
    }.get(features, method)  # fmt: skip
    return f"{name}, shuffled teacher" if run.summary["shuffled"] else name


def sort_rows(runs: Iterable[Run]) -> list[Run]:
    """Sort runs as rows: controls, shuffled teachers, frozen, methods, concatenations, then the teacher."""

    def row_order(run):
        features, shuffled = run.summary["features"], run.summary["shuffled"]
        method = list(METHODS).index(run.summary["method"])
        if features in (*CONTROLS, "file"):
            return 0, 0, [*CONTROLS, "file"].index(features)
        if features == "teacher":
            return 4, 0, method
        return 1 if shuffled else 2, WITH_STUDENT.index(features), method

    return sorted(runs, key=row_order)


def require_shared(runs: Sequence[Run], *, across_protocols: bool = False, backbones: bool = False) -> list[Run]:
    """Return runs in row order; raise ValueError if they may not share a column.

    With `across_protocols`, runs may differ in the protocol and its settings; with `backbones`, in the student's
    weights. Otherwise the content of the weights must be equal too (`backbone_fingerprint`). A mean over seeds may be
    combined with a mean over some of these seeds.
    """
    if not runs:
        raise ValueError("a table needs at least one run")
    students = [run for run in runs if run.backbone]
    trained = [run for run in students if run.summary["method"] != "none"]
    of_protocol = () if across_protocols else ("protocol", "split", "normalization", "alpha")
    checks = [
        (field, runs) for field in ("data_fingerprint", *of_protocol, "n_splits", "seed", "n_genes", "train_share")
    ]
    if not backbones:
        loaded = [run for run in students if run.config["weights"] != "random"]
        checks += [("backbone", students), ("weights", students), ("backbone_fingerprint", loaded)]
    checks += [(field, trained) for field in ("epochs", "teacher")]
    most = widest_seeds(runs)
    for field, group in checks:
        values = [(run.summary | run.config | {"seed": format_seeds(run, most)}).get(field) for run in group]
        for run, value in zip(group, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{group[0].name} and {run.name} differ in {field} ({values[0]} and {value}) and cannot share a "
                    "column: report them separately"
                )
    rows = {}
    for run in runs:
        other = rows.setdefault((row_label(run), run.backbone, run.summary["protocol"]), run)
        if other is not run:
            fields = [k for k in run.config if k not in ELSEWHERE and run.config[k] != other.config.get(k)]
            raise ValueError(
                f"{other.name} and {run.name} would both be the row {row_label(run)!r}; they differ in "
                f"{', '.join(fields)}: report them separately"
            )
    return sort_rows(runs)


def widest_seeds(runs: Sequence[Run]) -> tuple[int, ...]:
    """Return the seeds of the run that averages most seeds, the first if several do."""
    return max((run.seeds for run in runs), key=len)


def format_seeds(run: Run, most: tuple[int, ...]) -> str:
    """Return the seeds of a run as text; those of `most` if it contains them."""
    return "+".join(map(str, most if set(run.seeds) <= set(most) else run.seeds))


def table_title(runs: Sequence[Run], *, normalization: str) -> str:
    """Return the title of a table: protocol, cohort, held-out units, targets and intervals."""
    summary, moments = runs[0].summary, runs[0].moments
    moments = moments[moments["normalization"] == normalization]
    split = ("one patient, " if summary["one_patient"] else "") + SPLITS[summary["split"]]
    n, unit = moments[summary["unit"]].nunique(), summary["unit"]
    over = f"intervals over {n} {unit}s and {moments['gene'].nunique()} genes" if n > 1 else f"no intervals: one {unit}"
    if len(seeds := widest_seeds(runs)) > 1:
        over += f", mean over {len(seeds)} seeds"
    return f"{summary['protocol']} protocol · {describe_cohort(runs)} · {split} · {normalization} targets · {over}"


def describe_cohort(runs: Sequence[Run]) -> str:
    """Return cohort and student as text."""
    text = runs[0].named_cohort
    if student := next((run for run in runs if run.backbone), None):
        text += f" · {BACKBONES.get(student.backbone, student.backbone)}"
        text += " with random weights" if student.config["weights"] == "random" else ""
    share = runs[0].config.get("train_share", 1)
    return text if share == 1 else f"{text} · {share:.0%} of the training spots"


def split_panels(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs by cohort and, if there are several, by backbone; controls are in each group."""
    groups = {}
    for cohort, group in group_runs(runs, lambda run: run.cohort).items():
        backbones = sorted({run.backbone for run in group} - {None})
        for backbone in backbones if len(backbones) > 1 else [None]:
            name = cohort if backbone is None else f"{cohort}, {BACKBONES.get(backbone, backbone)}"
            groups[name] = [run for run in group if backbone is None or run.backbone in (None, backbone)]
    return groups


def group_runs(runs: Iterable[Run], key: Callable, *, order: Sequence[str] = ()) -> dict[str, list[Run]]:
    """Group runs by `key`; the groups of `order` come first."""
    grouped = {name: [] for name in order}
    for run in runs:
        grouped.setdefault(key(run), []).append(run)
    return {name: group for name, group in grouped.items() if group}


def _read_run(folder: Path, within: Path) -> Run:
    files = RunFolder.open(folder, kind="run", within=within)
    name, config = folder.resolve().name, files.config.as_dict()
    return Run(name, config, files.summary, files.moments(), files.path, files.metrics())
