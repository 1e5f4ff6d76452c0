"""Read finished runs for reports; name, sort and group them, and check which may share a column."""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

from peka_lite._core.names import short_name
from peka_lite._core.untrusted_files import file_inside, folder_inside, read_json_inside, read_yaml_inside
from peka_lite.evaluation.scores import MOMENTS
from peka_lite.experiments._sweep_folder import RUN_FILES, is_sweep, read_sweep_folder
from peka_lite.experiments._unfinished import PARTIAL, SETTINGS, SUMMARY, explain_missing, remake_command
from peka_lite.experiments.config import FEATURES, WITH_STUDENT, update_words

PROTOCOLS = ("paper", "hest", "strict", "custom")
TARGETS = ("log1p-cp10k", "log1p")
COHORTS = ("breast", "kidney", "liver", "lung")
BACKBONES = {"resnet50": "ResNet-50", "ctranspath": "CTransPath", "uni": "UNI", "h-optimus-0": "H-optimus-0"}
METHODS = {"none": "frozen", "bone": "Bone", "lora": "LoRA", "adalora": "AdaLoRA", "miss": "MiSS"}
CONTROLS = {"color": "color and texture", "coordinates": "coordinates", "depth": "total count"}
INTERVALS = "95% confidence intervals: Student's t times a bootstrap standard error over patients (or slides) and genes"
SPLITS = {"patient": "patients held out", "slide": "sections held out", "spot": "random spots held out"}
_UNITS = ("slide", "patient")
# Fields of summary.json: their allowed values, or their type.
_FIELDS = {
    "protocol": PROTOCOLS, "method": METHODS, "features": FEATURES, "shuffled": bool, "backbone": str, "cohort": str,
    "split": SPLITS, "normalization": TARGETS, "scores": dict, "ceiling": dict, "unit": _UNITS, "one_patient": bool,
    "synthetic": bool, "slides": list, "data_fingerprint": str,
}  # fmt: skip
_SETTINGS = {"cohort": str, "seed": int, "weights": str, "teacher": str, "slides": list | None}  # of config.yml
_COLUMNS = {"normalization": str, "fold": int, **dict.fromkeys(("slide", "patient", "gene"), str)}  # of slides.parquet
_COLUMNS |= dict.fromkeys(MOMENTS, float)
_LARGEST_MOMENTS = 2**30  # bytes; 20,000 genes on 100 slides in 5 folds take 900 MB
_CODECS, _ENCODINGS = {"SNAPPY", "UNCOMPRESSED"}, {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
ELSEWHERE = ("cohort", "slides", "patients", "device")  # covered by the data fingerprint, or without effect on scores


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: folder name, `config.yml`, `summary.json` and `slides.parquet`.

    Attributes
    ----------
    folder
        Folder of the run; None for a mean over seeds.
    points
        The sweep points of the run; several if they have the same run.
    varied
        Settings of these points, as far as they agree.
    parts
        The run of each seed, for a mean over seeds (`average_seeds`).
    within
        Folder passed by the user; links in `folder` must not lead out of it.
    """

    name: str
    config: dict
    summary: dict
    moments: pd.DataFrame
    folder: Path | None = None
    points: tuple[str, ...] = ()
    varied: dict = dataclasses.field(default_factory=dict)
    parts: tuple[Run, ...] = ()
    within: Path | None = None

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
        if folder.is_dir() and not _is_run(folder):
            subfolders = sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
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
    name = {"frozen+student": f"[frozen, {method}]", "projector": f"{method}, projector"}.get(features, method)
    return f"{name}, shuffled teacher" if run.summary["shuffled"] else name


def sort_rows(runs: Iterable[Run]) -> list[Run]:
    """Sort runs as rows: controls, shuffled teachers, frozen, methods, concatenations, then the teacher."""

    def row_order(run):
        features, shuffled = run.summary["features"], run.summary["shuffled"]
        method = list(METHODS).index(run.summary["method"])
        if features in CONTROLS:
            return 0, 0, list(CONTROLS).index(features)
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


def _is_run(folder: Path) -> bool:
    return folder.name.endswith(PARTIAL) or any((folder / name).is_file() for name in (SETTINGS, SUMMARY))


def _read_run(folder: Path, within: Path) -> Run:
    if folder != within:
        folder_inside(folder, within=within)
    if folder.name.endswith(PARTIAL) or not all((folder / name).is_file() for name in RUN_FILES):
        raise FileNotFoundError(explain_missing(folder, needs=RUN_FILES, kind="run"))
    for name in (*RUN_FILES, "metrics.csv"):
        if name in RUN_FILES or (folder / name).exists():
            file_inside(folder, name, within=within)
    try:
        summary = read_json_inside(folder, "summary.json", within=within)
        config = read_yaml_inside(folder, "config.yml", within=within)
        moments = _read_moments(file_inside(folder, "slides.parquet", within=within, largest=_LARGEST_MOMENTS))
        if not (isinstance(summary, dict) and isinstance(config, dict)):
            raise ValueError("its settings or its summary are not a mapping")
        summary, config = update_words(summary), update_words(config)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: cannot read a file of the run ({reason}); remove the folder and run `{remake_command(folder)}`"
        ) from None
    if missing := [field for field in _FIELDS if field not in summary]:
        raise ValueError(f"{folder / 'summary.json'}: no {', '.join(missing)}; it has an older format, repeat the run")
    if problem := _find_invalid(config, summary, moments):
        raise ValueError(f"{folder}: {problem}; `peka-lite run` does not write this, repeat the run")
    return Run(folder.resolve().name, config, summary, moments, folder, within=within)


def _read_moments(path: Path) -> pd.DataFrame:
    """Read the known columns of ``slides.parquet``, after checking the sizes in its metadata."""
    import pyarrow
    from pyarrow.parquet import ParquetFile, read_metadata

    try:
        metadata = read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        for name, kind in _COLUMNS.items():
            if schema.names.count(name) != 1 or not _has_type(schema.field(name).type, kind):
                raise ValueError(f"column {name} is missing, duplicated, or not of type {kind.__name__}")
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        parts = [group.column(k) for group in groups for k in range(group.num_columns)]
        known = [part for part in parts if part.path_in_schema in _COLUMNS]
        if any(part.compression not in _CODECS or not {*part.encodings} <= _ENCODINGS for part in known):
            raise ValueError("its compression or encoding is not one that runs write")
        # Moments are 8-byte numbers that hardly compress.
        rows, size = sum(group.num_rows for group in groups), path.stat().st_size
        if rows > max(2**20, size // 16):
            raise ValueError(f"its {size:,} bytes cannot hold the {rows:,} rows of its metadata")
        with ParquetFile(path, read_dictionary=[name for name, kind in _COLUMNS.items() if kind is str]) as file:
            table = file.read(columns=list(_COLUMNS), use_threads=False)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    columns = {}
    for name, kind in _COLUMNS.items():
        column = table.column(name)
        if kind is not float and column.null_count:
            raise ValueError(f"{path}: column {name} has missing values")
        columns[name] = column.to_pandas()
        if kind is str:
            categories = columns[name].cat.categories
            if len(table) * max(map(len, categories), default=0) > 2**32:
                raise ValueError(f"{path}: names in column {name} are too long")
            columns[name] = pd.Series(categories.to_numpy(dtype=object)[columns[name].cat.codes])
    return pd.DataFrame(columns)


def _has_type(arrow_type, kind: type) -> bool:
    import pyarrow.types as types

    if kind is str:
        arrow_type = arrow_type.value_type if types.is_dictionary(arrow_type) else arrow_type
        return types.is_string(arrow_type) or types.is_large_string(arrow_type)
    return types.is_integer(arrow_type) or (kind is float and types.is_floating(arrow_type))


def _find_invalid(config: dict, summary: dict, moments: pd.DataFrame) -> str | None:
    """Describe the first value of a run that a report cannot use; None if all are valid."""
    for fields, known, file in ((summary, _FIELDS, "summary.json"), (config, _SETTINGS, "config.yml")):
        for name, allowed in known.items():
            value = fields.get(name)
            is_type = not isinstance(allowed, tuple | dict)
            if not (_is_instance(value, allowed) if is_type else isinstance(value, str) and value in allowed):
                return f"{name} in {file} is {_shorten(value)}"
    for name, value in config.items():
        if not isinstance(name, str) or not all(map(_is_scalar, value if isinstance(value, list) else [value])):
            return f"{name!r} in config.yml is {_shorten(value)}"
    if not all(isinstance(slide, str) for slide in [*summary["slides"], *(config.get("slides") or ())]):
        return "slides are not strings"
    for fields, name in ((config, "train_share"), (summary, "seconds")):
        if name in fields and not _is_number(fields[name]):
            return f"{name} is {_shorten(fields[name])}"
    for target in TARGETS:
        ceiling, scores = summary["ceiling"].get(target), summary["scores"].get(target)
        if not (isinstance(ceiling, dict) and isinstance(ceiling.get("basis"), str) and _is_number(ceiling.get("pcc"))):
            return f"ceiling of {target} in summary.json is {_shorten(ceiling)}"
        for how in ("pooled", "slides"):
            score = scores.get(how) if isinstance(scores, dict) else None
            numbers = [score.get(k) for k in ("pcc", "ci_low", "ci_high")] if isinstance(score, dict) else [None]
            folds = score.get("per_fold") if isinstance(score, dict) else None
            if not (all(map(_is_number, numbers)) and isinstance(folds, list) and all(map(_is_number, folds))):
                return f"the {how} score of {target} in summary.json is {_shorten(score)}"
        if not (moments["normalization"] == target).any():
            return f"no row of {target} in slides.parquet"
    return None


def _shorten(value: object) -> str:
    return short_name(repr(value), longest=80)


def _is_instance(value: object, kind) -> bool:
    return isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)


def _is_number(value: object) -> bool:
    return _is_instance(value, int | float)


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float | None)
