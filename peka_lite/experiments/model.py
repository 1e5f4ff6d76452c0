"""Load the trained model of a run and predict expression from tiles."""

from __future__ import annotations

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

from peka_lite._core.device import default_device
from peka_lite._core.untrusted_files import file_inside
from peka_lite.adapters.adapt import adapter_state, merge
from peka_lite.adapters.files import backbone_fingerprint, load_adapter, read_adapter_info
from peka_lite.backbones._packaged import find_packaged
from peka_lite.backbones.custom import PACKAGED_NAMES, ROW_FILE
from peka_lite.backbones.embed import embed_tiles
from peka_lite.backbones.load import find_cached_weights, load_backbone
from peka_lite.backbones.registry import BACKBONES
from peka_lite.experiments.config import RunConfig
from peka_lite.experiments.folder import RunFolder
from peka_lite.probe.files import TENSORS, Probes
from peka_lite.probe.pca_ridge import PCARidge


@dataclass(frozen=True)
class TrainedModel:
    """Hold the student, probe and genes of one fold; `load_trained` loads them.

    Attributes
    ----------
    student
        Timm model in eval mode with its adapters merged.
    frozen
        The student before training, if the probe also uses its features (they come first). Else None.
    probe, genes
        Fitted probe, and the genes it predicts in column order.
    normalization
        Normalization of the predictions, as in `normalize`.
    config, summary, folder
        Settings, summary and folder of the run.
    fold
        The fold held out from the probe and, unless the protocol trains the student on all spots, from the student.
        None for a model of the whole cohort.
    fingerprint
        16 hex digits. Equal for equal frozen weights, adapter, probe and genes.

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
        """Return ``"all"``, or ``"fold0"`` and so on."""
        return _fold_name(self.fold)

    def predict(self, tiles, *, batch_size: int = 64, device: str | None = None, progress: bool = False) -> np.ndarray:
        """Predict normalized expression (n, genes) float32 from tiles.

        Parameters
        ----------
        tiles
            Anything that slices to uint8 (n, H, W, 3), as for `embed_tiles`.
        device
            None: the student's device.
        """
        device = device or str(next(self.student.parameters()).device)
        models = [m for m in (self.frozen, self.student) if m is not None]  # the order the probe was fitted in
        X = [embed_tiles(m, tiles, batch_size=batch_size, device=device, progress=progress) for m in models]
        return self.probe.predict(np.hstack(X)).astype(np.float32)

    @property
    def gene_pcc(self) -> np.ndarray:
        """Return each gene's PCC (genes,) on the fold's test spots; NaN if the folder has no scores of the fold."""
        if self.fold is None or not (self.folder / "metrics.csv").is_file():
            return np.full(len(self.genes), np.nan)
        scores = RunFolder(self.folder, self.config, self.summary, self.folder).metrics()
        return scores[scores["fold"] == self.fold].set_index("gene")["pcc"].reindex(self.genes).to_numpy(dtype=float)

    @property
    def target_range(self) -> np.ndarray:
        """Return each gene's smallest and largest training target (2, genes); NaN for folders of older versions."""
        return getattr(self.probe, "range_", np.full((2, len(self.genes)), np.nan))

    def describe(self) -> dict:
        """Return the model's origin, settings and scores as values that JSON can hold."""
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
            "protocol": config.resolve_protocol().name,
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
    """Load a trained model from the folder of a run or training, without its cohort and teacher.

    Parameters
    ----------
    folder
        Written by `run` or ``peka-lite train``: ``config.yml``, ``summary.json``, ``probe.safetensors`` and, for a
        trained student, ``adapter.safetensors``.
    fold
        Fold whose model to load. None: the model of the whole cohort if there is one, else that of the first fold.
    weights
        The frozen weights, as in `load_backbone`; they must be the run's. None: as in the run's settings. If the
        folder defines its own backbone (``backbone.yml``), weights are downloaded from the Hub only for ``"hub"``;
        None then takes them from the cache.
    device
        None: the GPU if there is one.

    Raises
    ------
    FileNotFoundError
        If the folder or one of its files is missing.
    ValueError
        For an unknown fold, features without a student, frozen weights other than the run's, and files of different
        runs.

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
    run = RunFolder.open(folder)
    folder, config, summary = run.path, run.config, run.summary
    if config.features not in ("student", "frozen+student"):
        raise ValueError(
            f"{folder} has features {config.features!r}, of which no model is saved; "
            "give a run with features 'student' or 'frozen+student'"
        )
    probes = run.probes()
    fold = _select_fold(folder, probes, fold)
    probe, genes = probes.probes[_fold_name(fold)]
    _require_same(folder / "probe.safetensors", "normalization", probes.normalization, config.normalization)

    source, origin = (_find_weights(folder, config), config.weights) if weights is None else (weights, None)

    def load_frozen() -> nn.Module:
        model = load_backbone(config.backbone, weights=source, seed=config.seed)
        if origin == "hub" and source != "hub":
            model.weights_origin = f"hub {model.spec.source}"
        return model

    student, state = load_frozen(), {}
    base = backbone_fingerprint(student)
    if config.method != "none":
        student = _load_adapted(folder, config, summary, student, fold)
        state = adapter_state(student)
        student = merge(student)
    if probes.fingerprint not in (None, base):
        raise ValueError(
            f"{folder / 'probe.safetensors'} was fitted on {config.backbone} with weights {summary.get('weights')!r} "
            f"(fingerprint {probes.fingerprint}), not {student.weights_origin!r} (fingerprint {base}); give the former"
        )
    both = config.features == "frozen+student"
    if len(probe.mean_) != (dim := student.spec.dim * (2 if both else 1)):
        raise ValueError(
            f"{folder / 'probe.safetensors'} takes {len(probe.mean_)} features, but the student has {dim}; "
            "it belongs to another run"
        )
    device = device or default_device()
    return TrainedModel(
        student=student.to(device),
        frozen=load_frozen().to(device) if both else None,
        probe=probe,
        genes=genes,
        normalization=probes.normalization,
        config=config,
        summary=summary,
        folder=folder,
        fold=fold,
        fingerprint=_hash_model(base, state, probe, genes),
    )


def _find_weights(folder: Path, config: RunConfig) -> str | Path:
    """Return the source of a run's frozen weights; for a backbone defined in its folder, only a local one."""
    row = BACKBONES[config.backbone]
    if config.weights != "hub" or row.source is None or row.name in PACKAGED_NAMES or find_packaged(row) is not None:
        return config.weights
    if (path := find_cached_weights(row)) is None:
        raise ValueError(
            f"{folder / ROW_FILE} needs weights of the Hub repository {row.source}, which are not in the cache; "
            "download them with --weights hub (weights='hub') or give a copy with --weights FILE"
        )
    return path


def _select_fold(folder: Path, probes: Probes, fold: int | None) -> int | None:
    names = list(probes.probes)
    if unknown := [name for name in names if not re.fullmatch(r"all|fold\d{1,9}", name)]:
        raise ValueError(f"{folder / 'probe.safetensors'} has a probe {unknown[0]!r}; expected all, or fold0, ...")
    if fold is None:
        return None if "all" in names else min(int(name.removeprefix("fold")) for name in names)
    if _fold_name(fold) not in names:
        models = "one model of the whole cohort, no folds" if names == ["all"] else f"models of {', '.join(names)}"
        raise ValueError(f"{folder} has no fold {fold}; it has {models}")
    return fold


def _load_adapted(folder: Path, config: RunConfig, summary: dict, student: nn.Module, fold: int | None) -> nn.Module:
    """Load the adapter of a fold, or the one that all folds share, into the student."""
    path = file_inside(folder, "adapter.safetensors")
    info = read_adapter_info(path)
    name = "all" if config.resolve_protocol().student == "all" else _fold_name(fold)
    student = load_adapter(student, path, name=name)
    _require_same(path, "method", info.method, config.method)
    if info.data[name] is not None and summary.get("data_fingerprint") is not None:
        _require_same(path, "data fingerprint", info.data[name], summary["data_fingerprint"])
    return student


def _require_same(path: Path, field: str, value, expected) -> None:
    if value != expected:
        raise ValueError(f"{path} has {field} {value!r}, but the run has {expected!r}; it belongs to another run")


def _fold_name(fold: int | None) -> str:
    return "all" if fold is None else f"fold{fold}"


def _hash_model(base: str, state: dict[str, torch.Tensor], probe: PCARidge, genes: tuple[str, ...]) -> str:
    digest = hashlib.sha256(json.dumps([base, list(genes)]).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    for part in TENSORS:
        digest.update(getattr(probe, f"{part}_").tobytes())
    return digest.hexdigest()[:16]
