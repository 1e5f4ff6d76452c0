"""Folders of runs and trainings: one owner of their files, of what "finished" means, and of each file's schema."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from peka_lite._core._yaml import is_line, read_yaml, yaml_text
from peka_lite._core.io import write_file, write_file_atomically
from peka_lite._core.locks import PARTIAL, lock_output_folder, move_if_absent
from peka_lite._core.outputs import check_free, check_work, find_link
from peka_lite._core.untrusted_files import file_inside, folder_inside, read_json_inside, read_yaml_inside
from peka_lite.adapters._choices import METHODS
from peka_lite.backbones.custom import ROW_FILE, is_backbone_file, restore_backbone, save_backbone
from peka_lite.data._choices import NORMALIZATIONS
from peka_lite.evaluation.protocols import PROTOCOLS, SPLITS
from peka_lite.experiments._sweep_folder import RUN_FILES
from peka_lite.experiments._tables import METRICS, MOMENTS, TRAINING, read_csv_table, read_parquet_table
from peka_lite.experiments._unfinished import COMMAND, SETTINGS, SUMMARY, explain_missing, remake_command
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.settings import FEATURES, update_words

if TYPE_CHECKING:
    import anndata as ad
    import pandas as pd

    from peka_lite._core._processes import Processes
    from peka_lite.probe.files import Probes


_EXPECTED = {  # type of pydantic's error -> what was expected
    "int_type": "must be a whole number", "float_type": "must be a number", "bool_type": "must be true or false",
    "string_type": "must be text", "list_type": "must be a list", "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}  # fmt: skip


def _check_line(value: str) -> str:
    if not is_line(value):
        raise ValueError("must be text of one line")
    return value


Line = Annotated[str, AfterValidator(_check_line)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pcc = Annotated[float, Field(ge=-1 - 1e-9, le=1 + 1e-9)]  # rounding
Normalization = Literal[NORMALIZATIONS]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Score(_Record):
    pcc: Pcc
    ci_low: float  # NaN for one patient
    ci_high: float
    per_fold: list[float]


class _Scores(_Record):
    pooled: _Score
    slides: _Score


class _Ceiling(_Record):
    pcc: float
    basis: Line


class _OtherScores(_Record):
    r2: float
    rmse: Annotated[float, Field(ge=0)]
    spearman: float


class _Summary(_Record):
    """Fields of ``summary.json`` that a run and a training have."""

    protocol: Literal[*PROTOCOLS, "custom"]
    method: Literal[METHODS]
    features: Literal[*FEATURES, "file"]
    shuffled: bool
    backbone: Line
    cohort: Line
    split: Literal[SPLITS] | None
    normalization: Normalization
    mean_pcc: Pcc | None
    epochs: Annotated[int, Field(ge=1)] | None
    teacher: Line | None
    teacher_fingerprint: Line | None
    teacher_coverage: Share | None
    weights: Line | None
    backbone_fingerprint: Line | None = None  # some folders of version 0.1 lack it
    adapted_share: Annotated[float, Field(ge=0)]  # of the frozen weights; more than 1 with a large rank
    n_labels_per_fold: list[Count]
    n_spots: Count
    slides: list[Line]
    synthetic: bool
    pca_components: Count
    data_fingerprint: Line
    seconds: Annotated[float, Field(ge=0)]
    device: Line
    versions: dict[Line, Line]


class _RunSummary(_Summary):
    split: Literal[SPLITS]
    mean_pcc: Pcc
    ci_low: float
    ci_high: float
    mean_pcc_per_fold: list[float]
    n_nan: Count
    nan_genes: list[str]
    scores: dict[Normalization, _Scores] = Field(min_length=len(NORMALIZATIONS))
    unit: Literal["patient", "slide"]
    one_patient: bool
    ceiling: dict[Normalization, _Ceiling] = Field(min_length=len(NORMALIZATIONS))
    alphas: list[Literal["hest"] | Annotated[float, Field(ge=0)]]
    n_folds: Annotated[int, Field(ge=2)]
    other_scores: dict[Normalization, _OtherScores] = {}  # folders of version 0.1 lack this and the next
    learned_from: Line = "recorded by each fit"


class _TrainingSummary(_Summary):
    fold: Count | None
    held_out: list[Line]
    alpha: Literal["hest"] | Annotated[float, Field(ge=0)]
    n_train: Count


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A finished run or training, whose files are checked when they are read.

    It opens on any machine, whatever device, weights path or cohort folder the run was made with.

    Attributes
    ----------
    path
        The folder.
    config
        Settings of the run (``config.yml``).
    summary
        Content of ``summary.json``.
    within
        Folder that links may lead to.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(features="depth", method="none", **small), "depth", maps=False)
    >>> folder = pk.experiments.RunFolder.open("depth")
    >>> folder.config.features, folder.is_training, folder.summary["n_folds"]
    ('depth', False, 2)
    >>> folder.metrics()[["fold", "gene", "pcc"]].head(2).round(2)
       fold    gene   pcc
    0     0   ADH1B  0.04
    1     0  ELAVL1 -0.13
    """

    path: Path
    config: RunConfig
    summary: dict
    within: Path

    @classmethod
    def open(cls, path: str | os.PathLike, *, kind: str = "run or training", within: Path | None = None) -> RunFolder:
        """Read the settings and the summary of a finished run or training.

        Parameters
        ----------
        kind
            ``"run"`` refuses trainings.
        within
            Folder that links may lead to; None for the folder itself.

        Raises
        ------
        FileNotFoundError
            If it is unfinished or no such folder; the message has the command that makes it.
        ValueError
            For a damaged file; names the file, the field and what was expected.
        """
        path = Path(path)
        needs = RUN_FILES if kind == "run" else RUN_FILES[:2]
        if path.name.endswith(PARTIAL) or not all((path / name).is_file() for name in needs):
            raise FileNotFoundError(explain_missing(path, needs=needs, kind=kind))
        if within is not None and path != within:
            folder_inside(path, within=within)
        within = within or path
        restore_backbone(path)
        summary = _read(path, SUMMARY, read_json_inside, within=within)
        fields = _read(path, SETTINGS, read_yaml_inside, within=within)
        return cls(path, _check_config(path / SETTINGS, fields), _check_summary(path / SUMMARY, summary), within)

    @staticmethod
    def is_run(path: Path) -> bool:
        """Return whether a folder holds a run or training, finished or not."""
        return path.name.endswith(PARTIAL) or any((path / name).is_file() for name in (SETTINGS, SUMMARY))

    @staticmethod
    def is_finished(path: Path) -> bool:
        """Return whether a folder is complete: the summary is written last, before the folder gets its name."""
        return not path.name.endswith(PARTIAL) and (path / SUMMARY).is_file()

    @property
    def is_training(self) -> bool:
        """Return whether it is of `train`, which has no scores."""
        return _is_training(self.summary)

    def file(self, name: str, *, largest: int | None = None) -> Path:
        """Return the path of a file after checking that it is a regular file of this folder."""
        return file_inside(self.path, name, within=self.within, largest=largest)

    def metrics(self) -> pd.DataFrame:
        """Read ``metrics.csv``: one row per fold and gene; genes named NA, nan or 1e5 keep their names."""
        return read_csv_table(self.file("metrics.csv", largest=2**28), METRICS)

    def moments(self) -> pd.DataFrame:
        """Read ``slides.parquet``: `slide_moments` of both normalizations, from which all scores are computed."""
        table = read_parquet_table(self.file("slides.parquet", largest=2**30), MOMENTS)
        if absent := set(NORMALIZATIONS) - set(table["normalization"]):
            raise ValueError(f"{self.path / 'slides.parquet'}: no row has normalization {' or '.join(sorted(absent))}")
        return table

    def training(self) -> pd.DataFrame:
        """Read ``training.csv``: one row per student and epoch."""
        return read_csv_table(self.file("training.csv", largest=2**28), TRAINING)

    def predictions(self) -> ad.AnnData:
        """Read ``predictions.h5ad``: held-out predictions of all spots, with layer ``measured``."""
        from peka_lite._core.hdf5 import read_anndata  # a sweep plans thousands of points without anndata

        path = self.file("predictions.h5ad")
        adata = read_anndata(path, layers=("measured",))
        if "measured" not in adata.layers:
            raise ValueError(f"{path}: layer measured is missing; {self._repeat()}")
        self._check_spots(adata.obs)
        return adata

    def spots(self) -> pd.DataFrame:
        """Read the spots of ``predictions.h5ad`` alone: slide, patient, barcode and the fold that held out each."""
        from peka_lite._core.hdf5 import read_obs

        spots = read_obs(self.file("predictions.h5ad"))
        self._check_spots(spots)
        return spots

    def _check_spots(self, spots: pd.DataFrame) -> None:
        for name, kind in (("slide", "text"), ("patient", "text"), ("barcode", "text"), ("fold", "whole numbers")):
            numeric = name in spots and spots[name].dtype.kind in "iu"
            if name not in spots or numeric != (name == "fold"):
                raise ValueError(f"{self.path / 'predictions.h5ad'}: obs has no {name} ({kind}); {self._repeat()}")

    def probes(self) -> Probes:
        """Read ``probe.safetensors``: the fitted probe and genes of each fold."""
        from peka_lite.probe.files import load_probes

        return load_probes(self.file("probe.safetensors"))

    def _repeat(self) -> str:
        return f"remove the folder and run `{remake_command(self.path)}`"

    @classmethod
    @contextlib.contextmanager
    def create(cls, out: Path, config: RunConfig, *, command: str, processes: Processes) -> Iterator[Path]:
        """Lock an output folder, yield its work folder with the settings in it, and move it to `out` at the end.

        Only the first process holds the lock. The others wait for it, and raise the same error if it fails. If the
        block raises, a work folder of an earlier command stays, and a new one is removed.

        Parameters
        ----------
        command
            ``"run"`` or ``"train --fold 2"``, for `remake_command`.

        Raises
        ------
        FileExistsError
            If `out` exists, or its work folder has other settings.
        """
        if not processes.first:
            work = processes.same(None)
            if isinstance(work, Exception):
                raise work
            yield work
            return
        with contextlib.ExitStack() as stack:
            try:
                check_free(out)
                work = stack.enter_context(lock_output_folder(out))
                _check_work(config, out, work)
            except Exception as error:
                processes.same(error)
                raise
            processes.same(work)
            existed = work.exists()
            try:
                (work / COMMAND).parent.mkdir(parents=True, exist_ok=True)
                write_file_atomically(work / COMMAND, command.encode())
                stored = config.with_backbone_name()
                write_file_atomically(work / SETTINGS, yaml_text(stored.as_dict()).encode())
                save_backbone(stored.backbone, work)
                yield work
                shutil.rmtree(work / COMMAND.parent, ignore_errors=True)
                move_if_absent(work, out)
            except Exception:
                if not existed:
                    shutil.rmtree(work, ignore_errors=True)
                raise


def write_summary(summary: dict, work: Path) -> dict:
    """Write the last file of a run's folder, after checking that `RunFolder.open` will read it; return the summary."""
    _check_summary(work / SUMMARY, summary)
    write_file(work / SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def write_metrics(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a result table as CSV with unescaped names, so that `RunFolder.metrics` returns the same table."""
    returns = table["gene"].str.contains("\r", regex=False).any()  # without quotes they would end the line
    text = table.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)
    write_file_atomically(path, text.encode())


def _check_work(config: RunConfig, out: Path, work: Path) -> None:
    """Check that `out` does not exist, and that `work` is absent or an unfinished run of the same settings."""
    check_free(out)
    check_work(work)
    if link := find_link(work):
        raise FileExistsError(f"{work} holds a link ({link}), which no command writes: remove that folder")
    path = work / SETTINGS
    if not path.is_file():
        return
    try:
        stored = _check_config(path, read_yaml(path))
    except ValueError:
        stored = None
    if stored != config.with_backbone_name():
        raise FileExistsError(
            f"{work} holds an unfinished run with other settings: remove it, give another --out, or finish that one "
            f"with `{remake_command(work)}`"
        )


def _read(folder: Path, name: str, read, *, within: Path):
    path = file_inside(folder, name, within=within)
    try:
        return read(folder, name, within=within)
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        raise ValueError(
            f"{path} is truncated or damaged ({reason}); remove its folder and run `{remake_command(folder)}`"
        ) from None


def _check_config(path: Path, fields) -> RunConfig:
    if not isinstance(fields, dict):
        raise ValueError(f"{path} has no settings; give a folder written by this version of peka_lite")
    try:
        if isinstance(fields.get("backbone"), str) and is_backbone_file(fields["backbone"]):
            raise ValueError(f"backbone is the name of a backbone defined in {ROW_FILE}, not a file")
        return RunConfig(**{str(name): value for name, value in update_words(fields).items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give a folder written by this version of peka_lite") from None


def _is_training(summary: dict) -> bool:
    return any(name in summary for name in ("fold", "held_out", "n_train"))


def _check_summary(path: Path, summary) -> dict:
    if not isinstance(summary, dict):
        raise ValueError(f"{path} is not a mapping; remove the folder and run the command again")
    summary = update_words(summary)
    if "n_taught" in summary:  # of version 0.1
        summary["n_train"] = summary.pop("n_taught")
    try:
        (_TrainingSummary if _is_training(summary) else _RunSummary).model_validate(summary)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        message, given = _EXPECTED.get(problem["type"], problem["msg"]), f", not {repr(problem['input'])[:120]}"
        message = message.removeprefix("Value error, ").replace("Input should be", "must be")
        if problem["type"] == "missing":
            message, given = "is missing (the folder may be of an older version)", ""
        raise ValueError(f"{path}: {field} {message}{given}; remove the folder and run the command again") from None
    return summary
