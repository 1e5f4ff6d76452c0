"""Settings of a run, checked before any work starts."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from peka_lite._core._yaml import is_line
from peka_lite._core.names import did_you_mean
from peka_lite.adapters._choices import LAYERS, METHODS
from peka_lite.backbones._packaged import find_packaged
from peka_lite.backbones.custom import get_backbone, is_backbone_file
from peka_lite.backbones.registry import BACKBONES, check_block_size
from peka_lite.data._choices import NORMALIZATIONS
from peka_lite.data.cohorts import find_cohort
from peka_lite.data.download import cache_dir, find_fetched
from peka_lite.evaluation.protocols import PROTOCOLS, SPLITS, Protocol
from peka_lite.probe._choices import check_alpha
from peka_lite.teachers._choices import LABEL_METHODS, TEACHERS
from peka_lite.transfer._choices import KD_SPACES

# A sweep checks thousands of settings, so heavy packages (PyTorch, scanpy, ...) are imported where they are used.
if TYPE_CHECKING:
    from peka_lite.teachers.pseudolabels import PseudoLabeler

FEATURES = ("student", "frozen+student", "projector", "teacher", "color", "coordinates", "depth")
WITH_STUDENT = FEATURES[:3]
OLD_FEATURES = {"backbone": "student", "colour": "color"}  # names of earlier versions, still accepted

_TYPES = {
    "str": ((str,), "text (str)"),
    "int": ((int,), "a whole number (int)"),
    "float": ((int, float), "a number (float or int)"),
    "bool": ((bool,), "True or False"),
    "tuple[str, ...]": ((tuple, list), "a list of names (str)"),
    "None": ((NoneType,), "None"),
}
_NAMES = {
    "protocol": PROTOCOLS, "features": FEATURES, "teacher": TEACHERS, "method": METHODS,
    "split": SPLITS, "layers": LAYERS, "label_method": LABEL_METHODS, "kd_space": KD_SPACES,
    "normalization": NORMALIZATIONS,
}  # fmt: skip
_ABOVE_0 = ("resolution", "n_clusters", "tau", "epochs", "batch_size", "lr", "n_genes", "min_genes")
_AT_LEAST = {"r": 1, "kd_weight": 0, "ce_weight": 0, "micro_batch": 1, "n_splits": 2, "seed": 0}
_AT_MOST = {"seed": 2**32 - 1}  # the limit of NumPy and scikit-learn
_SHARES = ("train_share", "max_mito")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that decide a run's numbers, stored field by field as `config.yml` in its folder.

    Attributes
    ----------
    cohort
        ``"mini"`` (the packaged synthetic cohort, written to the cache when missing), a folder in HEST-1k's layout, or
        a fetched cohort of the manifest (``"breast"``, ...).
    slides
        Slide ids to use; all by default.
    patients
        CSV file with columns id and patient; it overrides the patients of metadata and manifest.
    protocol
        ``"paper"`` (the folds of its released code), ``"hest"`` or ``"strict"`` (`PROTOCOLS`). It sets split,
        normalization, alpha and the rows that each step may use. With None the three fields apply as given, and every
        step is fitted on training rows.
    features
        Input of the probe. ``"student"`` (alias ``"backbone"``): the backbone's pooled output. ``"frozen+student"``:
        features of the frozen and the adapted student, concatenated. ``"projector"``, an ablation: the adapted
        student's features after its projector, in the teacher's space. Controls without a student: ``"color"`` (color
        and texture of the tile), ``"coordinates"`` (position on the slide), ``"depth"`` (total count) and
        ``"teacher"`` (embedding of the measured expression, an upper bound).
    teacher, backbone, method
        Names that `load_teacher`, `BACKBONES` and `adapt` accept. A backbone may be a YAML file (`read_backbone`): it
        is registered, and the field then holds its name.
    split
        As in `folds`. A protocol that holds out patients accepts ``"slide"`` for a cohort of one patient.
    layers
        Attention layer that is adapted, ``"qkv"`` or ``"proj"``.
    shuffle_teacher
        Control: train the student on the teacher embedding and label of another spot.
    train_share
        Share of every slide's training spots that is used, 0 to 1.
    teacher_checkpoint, teacher_genes, teacher_mapping
        Files of teacher ``"scfoundation"``: weights, gene list and gene mapping, as in `ScFoundation.from_checkpoint`.
    weights
        ``"hub"`` (published weights; those of ``"mini"`` are part of the package), a file, or ``"random"``.
    r
        Block size or rank; None takes the backbone's default.
    label_method, resolution, n_clusters
        Pseudo-labels: ``"knn-leiden"`` with `resolution`, or ``"kmeans"`` with `n_clusters`.
    kd_space, tau, kd_weight, ce_weight, epochs, batch_size, lr, augment
        As in `TransferModel` and `fit`.
    micro_batch, recompute, compile
        Memory use and compilation, as in `fit`; results are equal up to rounding.
    normalization, n_genes
        Targets: normalization of the counts, and number of highly variable genes.
    alpha
        Regularization strength of the probe: ``"hest"`` or a number (`PCARidge`), or ``"inner"``, chosen by inner
        cross-validation. Never choose a number from test scores.
    n_splits, seed, min_genes, max_mito, device
        Number of folds; seed of every random choice; quality control as in `qc`; None takes a GPU if there is one.

    Examples
    --------
    >>> import peka_lite as pk
    >>> config = pk.RunConfig(protocol="strict", method="lora")
    >>> config.split, config.alpha, config.block_size
    ('patient', 'inner', 32)
    >>> pk.RunConfig(protocol="strict", alpha=10.0)
    Traceback (most recent call last):
    ValueError: protocol 'strict' has alpha 'inner', not 10.0; leave alpha out
    """

    cohort: str = "mini"
    slides: tuple[str, ...] | None = None
    patients: str | None = None
    protocol: str | None = None
    features: str = "student"
    teacher: str = "pca"
    teacher_checkpoint: str | None = None
    teacher_genes: str | None = None
    teacher_mapping: str | None = None
    backbone: str = "mini"
    method: str = "bone"
    split: str | None = None
    weights: str = "hub"
    r: int | None = None
    layers: str = "qkv"
    label_method: str = "knn-leiden"
    resolution: float | None = None
    n_clusters: int | None = None
    kd_space: str = "embedding"
    tau: float = 2.0
    kd_weight: float = 0.5
    ce_weight: float = 0.5
    epochs: int = 50
    batch_size: int = 32
    lr: float = 1e-4
    augment: bool = False
    micro_batch: int | None = None
    recompute: bool = False
    compile: bool = False
    shuffle_teacher: bool = False
    train_share: float = 1.0
    normalization: str | None = None
    n_genes: int = 50
    alpha: str | float | None = None
    n_splits: int = 5
    seed: int = 0
    min_genes: int = 200
    max_mito: float | None = None
    device: str | None = None

    def __post_init__(self):
        for field in _FIELDS:
            check_field(field, getattr(self, field))
        object.__setattr__(self, "backbone", get_backbone(self.backbone).name)
        if self.slides is not None:
            object.__setattr__(self, "slides", tuple(self.slides))
        self._resolve_protocol()
        object.__setattr__(self, "features", OLD_FEATURES.get(self.features, self.features))
        if self.features not in WITH_STUDENT and self.method != "none":
            raise ValueError(f"features {self.features!r} use no student: set method 'none'")
        if self.method == "none" and (self.features in ("frozen+student", "projector") or self.shuffle_teacher):
            raise ValueError(
                "method 'none' trains no student: 'frozen+student', 'projector' and shuffle_teacher need another method"
            )
        if self.resolution is not None and self.label_method != "knn-leiden":
            raise ValueError("resolution belongs to label_method 'knn-leiden'; kmeans takes n_clusters")
        if self.n_clusters is not None and self.label_method != "kmeans":
            raise ValueError("n_clusters belongs to label_method 'kmeans'; knn-leiden takes resolution")
        spec = BACKBONES[self.backbone]
        if self.method != "none" and spec.bone_r is None:
            raise ValueError(f"backbone {spec.name!r} takes only method 'none': it has no plain attention layers")
        if self.r is not None and self.method == "none":
            raise ValueError(f"r={self.r} does not fit method {self.method!r}; leave r out")
        if self.method == "bone":
            check_block_size(spec, self.block_size)
        if self.weights == "hub":
            find_packaged(spec)  # raises if packaged weights are missing
        if self.weights not in ("hub", "random") and not Path(self.weights).is_file():
            raise FileNotFoundError(f"{self.weights}: no such weights file; give a file, 'hub' or 'random'")
        for field in ("teacher_checkpoint", "teacher_genes", "teacher_mapping"):
            if (path := getattr(self, field)) is None:
                continue
            if self.teacher != "scfoundation":
                raise ValueError(f"{field} belongs to teacher 'scfoundation', not {self.teacher!r}")
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file for {field}")
        if self.teacher == "scfoundation" and self.teacher_checkpoint is None and find_fetched("scfoundation") is None:
            raise FileNotFoundError(
                "teacher 'scfoundation' needs weights: run `peka-lite fetch scfoundation`, or give teacher_checkpoint"
            )
        if not Path(self.cohort).is_dir():
            _require_cohort(self.cohort, cache_dir())
        if (self.device or "").startswith("cuda"):
            from peka_lite._core.device import default_device

            if default_device() == "cpu":
                raise ValueError(f"device {self.device!r}: PyTorch finds no GPU; run `peka-lite doctor` for the reason")

    def _resolve_protocol(self):
        """Fill in the fields that the protocol sets, and check that given ones agree."""
        protocol = PROTOCOLS[self.protocol] if self.protocol else Protocol(name="custom", split="patient")
        for field in ("split", "normalization", "alpha"):
            given, fixed = getattr(self, field), getattr(protocol, field)
            if given is None:
                object.__setattr__(self, field, fixed)
            elif self.protocol and given != fixed and (field, fixed, given) != ("split", "patient", "slide"):
                raise ValueError(f"protocol {self.protocol!r} has {field} {fixed!r}, not {given!r}; leave {field} out")

    def resolve_protocol(self) -> Protocol:
        """Return the protocol in use, named ``"custom"`` if `protocol` is None."""
        protocol = PROTOCOLS[self.protocol] if self.protocol else Protocol(name="custom", split=self.split)
        return dataclasses.replace(protocol, split=self.split, normalization=self.normalization, alpha=self.alpha)

    @property
    def block_size(self) -> int:
        """Block size or rank in use."""
        return self.r or BACKBONES[self.backbone].bone_r or 0

    def load_teacher(self):
        """Return the teacher, not yet fitted if it learns from data."""
        from peka_lite.teachers.load import load_teacher

        names = ("checkpoint", "genes", "mapping")
        files = {name: path for name in names if (path := getattr(self, f"teacher_{name}")) is not None}
        return load_teacher(self.teacher, **files)

    def make_labeler(self) -> PseudoLabeler:
        """Return the pseudo-labeler, not yet fitted."""
        from peka_lite.teachers.pseudolabels import PseudoLabeler

        options = {"resolution": self.resolution, "n_clusters": self.n_clusters}
        return PseudoLabeler(self.label_method, seed=self.seed, **{k: v for k, v in options.items() if v is not None})

    def as_dict(self) -> dict:
        """Return the fields as plain values, as in `config.yml`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def update_words(settings: dict) -> dict:
    """Return stored settings with the words of earlier versions replaced by today's."""
    old = settings.get("features") if isinstance(settings, dict) else None
    return settings | {"features": OLD_FEATURES[old]} if isinstance(old, str) and old in OLD_FEATURES else settings


_FIELDS = {field.name: field.type.split(" | ") for field in dataclasses.fields(RunConfig)}  # name -> keys of _TYPES


def check_field(field: str, value) -> None:
    """Check that one setting has a valid value, whatever the others are.

    Parameters
    ----------
    field
        A field of `RunConfig`.
    value
        Must have the declared type (an int passes as a float), a known name, and numbers within bounds. Files and
        cohorts are not looked up.

    Raises
    ------
    ValueError
        Names the field, the value, the allowed values and the closest valid name.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.check_field("lr", 1e-3)
    >>> pk.experiments.check_field("method", "bonne")
    Traceback (most recent call last):
    ValueError: unknown method 'bonne'; known: none, bone, lora, adalora, miss; did you mean 'bone'?
    >>> pk.experiments.check_field("epochs", 2.0)
    Traceback (most recent call last):
    ValueError: epochs is a whole number (int), not 2.0
    """
    if field not in _FIELDS:
        hint = did_you_mean(str(field), _FIELDS) or f"; known: {', '.join(_FIELDS)}"
        raise ValueError(f"unknown setting {field!r}{hint}")
    # Subclasses, such as NumPy's numbers, cannot be written to config.yml.
    valid = any(type(value) in _TYPES[kind][0] for kind in _FIELDS[field])
    if not valid or (field == "slides" and not all(type(slide) is str for slide in value or ())):
        expected = " or ".join(_TYPES[kind][1] for kind in _FIELDS[field])
        raise ValueError(f"{field} is {expected}, not {value!r}")
    if value is None:
        return
    if isinstance(value, str) and value and not is_line(value):
        raise ValueError(f"{field} is text of one line, not {repr(value)[:120]}")
    if field == "backbone" and not is_backbone_file(value):
        get_backbone(value)
    if field == "features":
        value = OLD_FEATURES.get(value, value)
    if field in _NAMES and value not in _NAMES[field]:
        known = _NAMES[field]
        raise ValueError(f"unknown {field} {value!r}; known: {', '.join(known)}{did_you_mean(value, known)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field} must be a finite number, not {value}")
    if field in _ABOVE_0 and value <= 0:
        raise ValueError(f"{field} must be above 0, not {value}")
    if field in _AT_LEAST and value < _AT_LEAST[field]:
        raise ValueError(f"{field} must be at least {_AT_LEAST[field]}, not {value}")
    if field in _AT_MOST and value > _AT_MOST[field]:
        raise ValueError(f"{field} must be at most {_AT_MOST[field]}, not {value}")
    if field in _SHARES and not 0 < value <= 1:
        raise ValueError(f"{field} is above 0 and at most 1, not {value}")
    if field == "alpha":
        check_alpha(value, names=("hest", "inner"))


@functools.cache
def _require_cohort(name: str, cache: Path) -> None:
    """Check that the cache has a cohort of this name; only success is remembered."""
    find_cohort(name)
