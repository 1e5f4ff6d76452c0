"""Settings of a run, checked together before any work starts."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from peka_lite._core.cache import cache_dir
from peka_lite.backbones._packaged import find_packaged
from peka_lite.backbones.custom import get_backbone, is_backbone_file
from peka_lite.backbones.registry import Backbone, check_block_size
from peka_lite.data.cohorts import find_cohort
from peka_lite.data.download import find_fetched
from peka_lite.evaluation.protocols import PROTOCOLS, Protocol
from peka_lite.experiments.settings import (
    FEATURES,
    WITH_STUDENT,
    Settings,
    check_field,
    list_attributes,
    split_features,
)

# A sweep checks thousands of settings, so heavy packages (PyTorch, scanpy, ...) are imported where they are used.
if TYPE_CHECKING:
    from peka_lite.teachers.pseudolabels import PseudoLabeler

_ADAPTED = FEATURES[1:4]  # need a trained student


class RunConfig(Settings):
    """Settings of a run, stored field by field as `config.yml` in its folder.

    The constructor checks each setting and that they fit together; it looks at no file and no device, so that the
    settings of a run can be read on any machine. `check` looks at those, and `describe_settings` lists all settings.

    Raises
    ------
    ValueError
        For an unknown setting, an invalid value, and settings that exclude each other.

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

    def __init__(self, **settings):
        super().__init__(**{name: check_field(name, value) for name, value in settings.items()})
        self._resolve_protocol()
        self._check_together()

    def _resolve_protocol(self) -> None:
        """Fill in the fields that the protocol sets, and check that given ones agree."""
        protocol = PROTOCOLS[self.protocol] if self.protocol else Protocol(name="custom", split="patient")
        for field in ("split", "normalization", "alpha"):
            given, fixed = getattr(self, field), getattr(protocol, field)
            if given is None:
                self.__dict__[field] = fixed  # the model is frozen for its users
            elif self.protocol and given != fixed and (field, fixed, given) != ("split", "patient", "slide"):
                raise ValueError(f"protocol {self.protocol!r} has {field} {fixed!r}, not {given!r}; leave {field} out")

    def _check_together(self) -> None:
        if self.feature_kind not in WITH_STUDENT and self.method != "none":
            raise ValueError(f"features {self.features!r} use no student: set method 'none'")
        if self.method == "none" and (self.features in _ADAPTED or self.shuffle_teacher):
            raise ValueError(
                f"method 'none' trains no student: {', '.join(map(repr, _ADAPTED))} and shuffle_teacher need "
                "another method"
            )
        if self.resolution is not None and self.label_method != "knn-leiden":
            raise ValueError("resolution belongs to label_method 'knn-leiden'; kmeans takes n_clusters")
        if self.n_clusters is not None and self.label_method != "kmeans":
            raise ValueError("n_clusters belongs to label_method 'kmeans'; knn-leiden takes resolution")
        if self.r is not None and self.method == "none":
            raise ValueError(f"r={self.r} does not fit method {self.method!r}; leave r out")
        for field in ("teacher_checkpoint", "teacher_genes", "teacher_mapping"):
            if getattr(self, field) is not None and self.teacher != "scfoundation":
                raise ValueError(f"{field} belongs to teacher 'scfoundation', not {self.teacher!r}")
        if not is_backbone_file(self.backbone):
            self._check_adapter(self.spec)

    def _check_adapter(self, spec: Backbone) -> None:
        if self.method != "none" and spec.bone_r is None:
            raise ValueError(f"backbone {spec.name!r} takes only method 'none': it has no plain attention layers")
        if self.method == "bone":
            check_block_size(spec, self.block_size)

    def check(self) -> None:
        """Look for the files, the cohort and the device that the settings name.

        Raises
        ------
        FileNotFoundError
            If a file or the cohort is missing; names the setting and the fix.
        ValueError
            For an invalid backbone file, and a GPU that PyTorch does not find.
        """
        spec = self.spec  # reads the file of a custom backbone
        self._check_adapter(spec)
        if self.weights == "hub":
            find_packaged(spec)  # raises if packaged weights are missing
        elif self.weights != "random" and not Path(self.weights).is_file():
            raise FileNotFoundError(f"{self.weights}: no such weights file; give a file, 'hub' or 'random'")
        for field in ("teacher_checkpoint", "teacher_genes", "teacher_mapping"):
            if (path := getattr(self, field)) is not None and not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file for {field}")
        if self.feature_kind == "file" and not Path(path := split_features(self.features)[0]).exists():
            raise FileNotFoundError(f"{path}: no such file or folder of features")
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

    @property
    def spec(self) -> Backbone:
        """Row of the backbone; that of a YAML file is read and registered."""
        return get_backbone(self.backbone)

    @property
    def feature_kind(self) -> str:
        """Name of `features`, ``"file"`` for the path of a file or folder."""
        return self.features if self.features in FEATURES else "file"

    @property
    def block_size(self) -> int:
        """Block size or rank in use."""
        return self.r or self.spec.bone_r or 0

    def resolve_protocol(self) -> Protocol:
        """Return the protocol in use, named ``"custom"`` if `protocol` is None."""
        protocol = PROTOCOLS[self.protocol] if self.protocol else Protocol(name="custom", split=self.split)
        return dataclasses.replace(protocol, split=self.split, normalization=self.normalization, alpha=self.alpha)

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
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self}

    def with_backbone_name(self) -> RunConfig:
        """Return the settings with the backbone's YAML file replaced by its registered name, as they are stored."""
        return self.model_copy(update={"backbone": self.spec.name})


@functools.cache
def _require_cohort(name: str, cache: Path) -> None:
    """Check that the cache has a cohort of this name; only success is remembered."""
    find_cohort(name)


RunConfig.__doc__ = RunConfig.__doc__.replace("    Raises\n", f"{list_attributes()}\n\n    Raises\n", 1)
