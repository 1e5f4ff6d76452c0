"""A trained model from a run's folder: student, probe and genes, ready to predict expression from tiles."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from peka_lite._core._file_kinds import parse_json, read_text
from peka_lite._core._yaml import LARGEST, is_line, read_yaml
from peka_lite._core.device import default_device
from peka_lite._core.names import read_metrics
from peka_lite._core.received import file_inside
from peka_lite.adapters.adapt import adapter_state, merge
from peka_lite.adapters.files import backbone_fingerprint, load_adapter, read_adapter_info
from peka_lite.backbones._packaged import find_packaged
from peka_lite.backbones.custom import FILE, PACKAGE, is_backbone_file, restore_backbone
from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import find_cached_weights, load_backbone
from peka_lite.backbones.registry import BACKBONES
from peka_lite.experiments._unfinished import PARTIAL, explain_missing, remake_command
from peka_lite.experiments.config import RunConfig, check_field
from peka_lite.probe.files import TENSORS, Probes, load_probes
from peka_lite.probe.pca_ridge import PCARidge


def _is_number(value) -> bool:
    return type(value) in (int, float)  # NaN and infinity too: an interval of one patient has neither end


_SUMMARY = {  # what is read of a summary, where it is not None: its check, and what passes it in words
    "n_spots": (lambda value: type(value) is int and value >= 0, "a whole number"),
    "n_taught": (lambda value: type(value) is int and value >= 0, "a whole number"),
    **dict.fromkeys(("mean_pcc", "ci_low", "ci_high"), (_is_number, "a number")),
    "mean_pcc_per_fold": (
        lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of numbers"
    ),
    **dict.fromkeys(("synthetic", "one_patient"), (lambda value: type(value) is bool, "true or false")),
    **dict.fromkeys(("unit", "data_fingerprint", "weights"), (is_line, "text of one line")),
    "slides": (lambda value: isinstance(value, list) and all(type(v) is str for v in value), "a list of names"),
    "versions": (
        lambda value: isinstance(value, dict) and all(map(is_line, (*value, *value.values()))),
        "names of packages with their versions",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TrainedModel:
    """Everything from a tile to its genes; see `load_trained`.

    Attributes
    ----------
    student
        Plain timm model in eval mode, adapters merged in.
    frozen
        The student as it was before, where the probe reads its features too (first); else None.
    probe, genes
        Fitted probe, and the genes it predicts in column order.
    normalization
        Of the predictions, as in `normalize`.
    config, summary, folder
        The run.
    fold
        Number of the fold whose test rows neither probe nor, unless the protocol says so, student learned from; None
        where one model learned from the whole cohort.
    fingerprint
        16 hex digits, the same for the same frozen weights, adapter, probe and genes.

    Examples
    --------
    >>> import peka_lite as pk
    >>> config = pk.RunConfig(method="none", slides=["MINI1", "MINI3", "MINI5"], n_splits=3, n_genes=10)
    >>> _ = pk.load_or_run(config, "frozen", maps=False)
    >>> model = pk.load_trained("frozen", fold=2)
    >>> model.predict(pk.open_cohort("mini", slides=["MINI3"]).tiles[:4]).shape
    (4, 10)
    >>> dict(zip(model.genes[:3], model.gene_pcc.round(2).tolist()))
    {'BANK1': 0.25, 'FBN1': 0.32, 'CDH1': 0.61}
    """

    student: nn.Module
    frozen: nn.Module | None
    probe: PCARidge
    genes: tuple[str, ...]
    normalization: str
    config: RunConfig
    summary: dict
    folder: Path
    fold: int | None
    fingerprint: str

    @property
    def name(self) -> str:
        """``"all"``, or ``"fold0"`` and so on."""
        return _name(self.fold)

    def predict(self, tiles, *, batch_size: int = 64, device: str | None = None, progress: bool = False) -> np.ndarray:
        """Predict normalized expression (n, genes) float32 from tiles.

        Parameters
        ----------
        tiles
            Anything that slices to uint8 (n, H, W, 3), as for `embed_tiles`.
        device
            None: where the student is.
        """
        device = device or str(next(self.student.parameters()).device)
        models = [m for m in (self.frozen, self.student) if m is not None]  # the order the probe was fitted in
        X = [embed_tiles(m, tiles, batch_size=batch_size, device=device, progress=progress) for m in models]
        return self.probe.predict(np.hstack(X)).astype(np.float32)

    @property
    def gene_pcc(self) -> np.ndarray:
        """(genes,) PCC on the spots that this model's fold held out; NaN where the folder has no scores of it."""
        table = self.folder / "metrics.csv"
        if self.fold is None or not table.is_file():
            return np.full(len(self.genes), np.nan)
        scores = read_metrics(table)
        return scores[scores["fold"] == self.fold].set_index("gene")["pcc"].reindex(self.genes).to_numpy(dtype=float)

    @property
    def target_range(self) -> np.ndarray:
        """(2, genes) least and greatest training target of each gene; NaN where an older version made the folder."""
        return getattr(self.probe, "range_", np.full((2, len(self.genes)), np.nan))

    def describe(self) -> dict:
        """Say what this model is, in values that JSON can hold."""
        config, summary = self.config, self.summary
        score = None
        if summary.get("mean_pcc") is not None:
            score = {"mean": summary["mean_pcc"], "low": summary["ci_low"], "high": summary["ci_high"]}
            score = {k: v if math.isfinite(v) else None for k, v in score.items()} | {"unit": summary["unit"]}
        return {
            "folder": self.folder.name,
            "fold": self.name,
            "fingerprint": self.fingerprint,
            "cohort": Path(config.cohort).name,
            "n_spots": summary.get("n_spots"),
            "synthetic": summary.get("synthetic"),
            "data_fingerprint": summary.get("data_fingerprint"),
            "backbone": config.backbone,
            "weights": self.student.weights_origin,
            "method": config.method,
            "features": config.features,
            "protocol": config.settled_protocol().name,
            "normalization": self.normalization,
            "genes": list(self.genes),
            "pcc": score,
            "versions": dict(summary.get("versions") or {}),
        }


def load_trained(
    folder: str | os.PathLike,
    *,
    fold: int | None = None,
    weights: str | os.PathLike | None = None,
    device: str | None = None,
) -> TrainedModel:
    """Load what a run or a training left behind; the cohort and the teacher are not needed any more.

    Parameters
    ----------
    folder
        Written by `run` or by ``peka-lite train``: ``config.yml``, ``summary.json``, ``probe.safetensors`` and, where
        a student was taught, ``adapter.safetensors``.
    fold
        Whose model to take. None: the one of the whole cohort where there is one, else the first fold's.
    weights
        Where the frozen weights are now, as in `load_backbone`; None looks where the run found them. Other weights
        than the run's are refused. Of a folder that brings its backbone's row (``backbone.yml``), weights of the hub
        are fetched for ``"hub"`` only: without it they are taken where they are in the cache already.
    device
        None: the GPU where there is one.

    Raises
    ------
    FileNotFoundError
        For a folder or file that is not there.
    ValueError
        For a fold that is not there, features without a student, frozen weights other than the run's, and files that
        do not belong together.

    Examples
    --------
    >>> import peka_lite as pk
    >>> small = {"method": "none", "slides": ["MINI3"], "split": "spot", "n_splits": 2, "n_genes": 10}
    >>> _ = pk.load_or_run(pk.RunConfig(**small), "student", maps=False)
    >>> [pk.load_trained("student", fold=fold).genes[:3] for fold in (0, 1)]
    [('ADH1B', 'ELAVL1', 'MUC16'), ('PGR', 'UBE2Q1', 'CDH1')]
    >>> pk.load_trained("student", fold=2)
    Traceback (most recent call last):
    ValueError: student has no fold 2; it has models of fold0, fold1
    """
    folder = Path(folder)
    config, summary = read_run(folder)
    if config.features not in ("student", "frozen+student"):
        raise ValueError(
            f"{folder} has features {config.features!r}: models are kept of 'student' and 'frozen+student' "
            "alone; give a run with one of these"
        )
    probes = load_probes(file_inside(folder, "probe.safetensors"))
    fold = _fold(folder, probes, fold)
    probe, genes = probes.probes[_name(fold)]
    _require_same(folder / "probe.safetensors", "normalization", probes.normalization, config.normalization)

    at, origin = (_where(folder, config), config.weights) if weights is None else (weights, None)

    def fresh() -> nn.Module:
        model = load_backbone(config.backbone, weights=at, seed=config.seed)
        if origin == "hub" and at != "hub":
            model.weights_origin = f"hub {model.spec.source}"
        return model

    student, state = fresh(), {}
    base = backbone_fingerprint(student)
    if config.method != "none":
        student = _adapted(folder, config, summary, student, fold)
        state = adapter_state(student)
        student = merge(student)
    if probes.fingerprint not in (None, base):
        raise ValueError(
            f"{folder / 'probe.safetensors'} was fitted on {config.backbone} with weights {summary.get('weights')!r} "
            f"(fingerprint {probes.fingerprint}); these are {student.weights_origin!r} (fingerprint {base}): load those"
        )
    both = config.features == "frozen+student"
    if len(probe.mean_) != (wanted := student.spec.dim * (2 if both else 1)):
        raise ValueError(
            f"{folder / 'probe.safetensors'} takes {len(probe.mean_)} features, the student gives {wanted}"
        )
    device = device or default_device()
    return TrainedModel(
        student=student.to(device),
        frozen=fresh().to(device) if both else None,
        probe=probe,
        genes=genes,
        normalization=probes.normalization,
        config=config,
        summary=summary,
        folder=folder,
        fold=fold,
        fingerprint=_fingerprint(base, state, probe, genes),
    )


def read_run(folder: Path) -> tuple[RunConfig, dict]:
    """Return settings and summary of a finished run or training, wherever its cohort and teacher are now."""
    needs = ("config.yml", "summary.json")
    if folder.name.endswith(PARTIAL) or not all((folder / name).is_file() for name in needs):
        raise FileNotFoundError(explain_missing(folder, needs=needs, kind="run or training"))
    restore_backbone(folder)
    fields, summary = (_read(file_inside(folder, name, largest=2**24)) for name in needs)
    known = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    if not isinstance(fields, dict) or (odd := fields.keys() - known.keys()):
        what = f"unknown settings {', '.join(sorted(odd))}" if isinstance(fields, dict) else "no settings"
        raise ValueError(f"{folder / 'config.yml'} holds {what}; it is not of this peka_lite")
    if not isinstance(summary, dict):
        raise ValueError(f"{folder / 'summary.json'} holds no summary; remove the folder and make it again")
    # The run checked them when it began. Its cohort, teacher files and GPU need not be here now, so not once more.
    config = object.__new__(RunConfig)
    for name, value in (known | fields).items():
        try:
            check_field(name, value)
            if name == "backbone" and is_backbone_file(value):
                raise ValueError(f"backbone is a name, whose row is in {FILE} beside it, not a file: {value!r}")
        except ValueError as error:
            raise ValueError(f"{folder / 'config.yml'}: {error}") from None
        object.__setattr__(config, name, tuple(value) if isinstance(value, list) else value)
    for name, (right, wanted) in _SUMMARY.items():
        if (value := summary.get(name)) is not None and not right(value):
            raise ValueError(f"{folder / 'summary.json'}: {name} is {wanted}, not {repr(value)[:120]}")
    return config, summary


def _where(folder: Path, config: RunConfig) -> str | Path:
    """Return where a run's frozen weights are; a row that came with the folder fetches nothing unasked."""
    row = BACKBONES[config.backbone]
    if config.weights != "hub" or row.source is None or row.name in PACKAGE or find_packaged(row) is not None:
        return config.weights
    if (path := find_cached_weights(row)) is None:
        raise ValueError(
            f"{folder / FILE} names weights of another's hub repository ({row.source}), which are not on this machine: "
            "--weights hub (weights='hub') fetches them from there, --weights FILE takes a copy"
        )
    return path


def _read(path: Path):
    try:
        if path.suffix == ".yml":
            return read_yaml(path)
        return parse_json(read_text(path, longest=LARGEST))
    except ValueError:
        raise ValueError(
            f"{path} is cut short or damaged; remove its folder and give `{remake_command(path.parent)}`"
        ) from None


def _fold(folder: Path, probes: Probes, fold: int | None) -> int | None:
    there = list(probes.probes)
    if odd := [name for name in there if not re.fullmatch(r"all|fold\d{1,9}", name)]:
        raise ValueError(f"{folder / 'probe.safetensors'} holds {odd[0]!r}; probes of a run are all, or fold0, ...")
    if fold is None:
        return None if "all" in there else min(int(name.removeprefix("fold")) for name in there)
    if _name(fold) not in there:
        has = "one model of the whole cohort, no folds" if there == ["all"] else f"models of {', '.join(there)}"
        raise ValueError(f"{folder} has no fold {fold}; it has {has}")
    return fold


def _adapted(folder: Path, config: RunConfig, summary: dict, student: nn.Module, fold: int | None) -> nn.Module:
    """Put on the adapter of a fold, or that of all where one student serves every fold."""
    path = file_inside(folder, "adapter.safetensors")
    info = read_adapter_info(path)
    name = "all" if config.settled_protocol().student == "all" else _name(fold)
    student = load_adapter(student, path, name=name)
    _require_same(path, "method", info.method, config.method)
    if info.data[name] is not None and summary.get("data_fingerprint") is not None:
        _require_same(path, "data fingerprint", info.data[name], summary["data_fingerprint"])
    return student


def _require_same(path: Path, field: str, found, wanted) -> None:
    if found != wanted:
        raise ValueError(f"{path} has {field} {found!r}, the run {wanted!r}: it belongs to another folder")


def _name(fold: int | None) -> str:
    return "all" if fold is None else f"fold{fold}"


def _fingerprint(base: str, state: dict[str, torch.Tensor], probe: PCARidge, genes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([base, list(genes)]).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for part in TENSORS:
        digest.update(getattr(probe, f"{part}_").tobytes())
    return digest.hexdigest()[:16]
