"""Settings of a run: one row each, from which command line, sweep checks, cache keys and documentation are made."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from peka_lite._core._yaml import is_line
from peka_lite._core.cache import cache_dir
from peka_lite._core.names import did_you_mean
from peka_lite.adapters._choices import LAYERS, METHODS
from peka_lite.backbones._packaged import find_packaged
from peka_lite.backbones.custom import get_backbone, is_backbone_file
from peka_lite.backbones.registry import Backbone, check_block_size
from peka_lite.data._choices import NORMALIZATIONS
from peka_lite.data.cohorts import find_cohort
from peka_lite.data.download import find_fetched
from peka_lite.evaluation.protocols import PROTOCOLS, SPLITS, Protocol
from peka_lite.probe._choices import check_alpha
from peka_lite.teachers._choices import LABEL_METHODS, TEACHERS
from peka_lite.transfer._choices import KD_SPACES

# A sweep checks thousands of settings, so heavy packages (PyTorch, scanpy, ...) are imported where they are used.
if TYPE_CHECKING:
    import pandas as pd

    from peka_lite.teachers.pseudolabels import PseudoLabeler

FEATURES = ("student", "frozen+student", "projector", "frozen+projector", "teacher", "color", "coordinates", "depth")
WITH_STUDENT = FEATURES[:4]
_ADAPTED = FEATURES[1:4]  # need a trained student
#: Names of earlier versions, and names of the design, still accepted.
OLD_FEATURES = {"backbone": "student", "frozen+backbone": "frozen+student", "colour": "color"}
DECIDES = MappingProxyType(
    {
        "data": "what is read, and who is held out",
        "student": "teacher, pseudo-labels, adapters and training; in the key of every cached student",
        "probe": "what is predicted, and from which features",
        "memory": "speed and memory; results are equal up to rounding",
    }
)
_KINDS = {
    str: "text (str)", int: "a whole number (int)", float: "a number (float or int)", bool: "True or False",
    tuple: "a list of names (str)", type(None): "None",
}  # fmt: skip


def setting(default, text: str, decides: str, *, metavar=None, choices=(), path: bool = False, **bounds):
    """Return a row of the table: default, help, what it decides, and its bounds (``gt``, ``ge``, ``le``)."""
    extra = {"decides": decides, "metavar": metavar, "choices": tuple(choices), "path": path}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


class RunConfig(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    cohort: str = setting(
        "mini", "'mini' (synthetic, embedded), a folder in HEST-1k's layout, or a fetched cohort ('breast', ...)",
        "data", metavar="COHORT", path=True,
    )  # fmt: skip
    slides: tuple[str, ...] | None = setting(
        None, "slide ids to use, comma-separated; all by default", "data", metavar="ID,ID"
    )
    patients: str | None = setting(
        None,
        "CSV file with columns id,patient; it overrides the cohort's own patients",
        "data",
        metavar="FILE",
        path=True,
    )
    protocol: str | None = setting(
        None, "sets split, normalization, alpha and the rows of each fit; without one, all steps fit on training rows",
        "data", choices=PROTOCOLS,
    )  # fmt: skip
    split: str | None = setting(None, "what a fold holds out; patient by default", "data", choices=SPLITS)
    n_splits: int = setting(5, "number of folds", "data", metavar="N", ge=2)
    train_share: float = setting(
        1.0, "share of every slide's training spots that is used", "data", metavar="SHARE", gt=0, le=1
    )
    min_genes: int = setting(200, "drop spots with fewer expressed genes", "data", metavar="N", gt=0)
    max_mito: float | None = setting(
        None,
        "drop spots with a larger mitochondrial share of counts; none by default",
        "data",
        metavar="SHARE",
        gt=0,
        le=1,
    )
    backbone: str = setting(
        "mini", "mini, uni, h-optimus-0, ... (`BACKBONES`), or the YAML file of a custom one", "student",
        metavar="NAME", path=True,
    )  # fmt: skip
    weights: str = setting(
        "hub", "hub (the published weights; those of mini are in the package), a weights file, or random", "student",
        metavar="WEIGHTS", path=True,
    )  # fmt: skip
    method: str = setting("bone", "adapters of the student; none keeps it frozen", "student", choices=METHODS)
    r: int | None = setting(None, "block size or rank; the backbone's by default", "student", metavar="N", ge=1)
    layers: str = setting("qkv", "attention layer that gets adapters", "student", choices=LAYERS)
    teacher: str = setting("pca", "single-cell model that embeds the expression", "student", choices=TEACHERS)
    teacher_checkpoint: str | None = setting(
        None, "scFoundation's models.ckpt; the fetched one by default", "student", metavar="FILE", path=True
    )
    teacher_genes: str | None = setting(
        None,
        "scFoundation's gene list; by default beside the checkpoint, or fetched",
        "student",
        metavar="FILE",
        path=True,
    )
    teacher_mapping: str | None = setting(
        None, "HGNC's complete set, for Ensembl ids and aliases", "student", metavar="FILE", path=True
    )
    label_method: str = setting(
        "knn-leiden", "clustering that makes the pseudo-labels", "student", choices=LABEL_METHODS
    )
    resolution: float | None = setting(None, "resolution of knn-leiden (1.0)", "student", metavar="X", gt=0)
    n_clusters: int | None = setting(None, "number of clusters of kmeans (100)", "student", metavar="N", gt=0)
    kd_space: str = setting(
        "embedding", "what is distilled: the teacher's embedding (the paper), or logits (the authors' code)", "student",
        choices=KD_SPACES,
    )  # fmt: skip
    tau: float = setting(2.0, "temperature of the distillation loss", "student", metavar="X", gt=0)
    kd_weight: float = setting(0.5, "weight of the distillation loss", "student", metavar="X", ge=0)
    ce_weight: float = setting(0.5, "weight of the pseudo-label loss", "student", metavar="X", ge=0)
    epochs: int = setting(50, "passes over the training tiles", "student", metavar="N", gt=0)
    batch_size: int = setting(32, "tiles per step", "student", metavar="N", gt=0)
    lr: float = setting(1e-4, "Adam's learning rate", "student", metavar="X", gt=0)
    augment: bool = setting(False, "flip and rotate the tiles at random", "student")
    shuffle_teacher: bool = setting(False, "control: train each tile with another spot's expression", "student")
    seed: int = setting(0, "seed of every random choice", "student", metavar="N", ge=0, le=2**32 - 1)
    features: str = setting(
        "student", "input of the probe: the student's output, with the frozen student's before it (frozen+), projected "
        "to the teacher's space (projector), a control, or a file or folder of features made elsewhere",
        "probe", choices=FEATURES, metavar="KIND|FILE", path=True,
    )  # fmt: skip
    normalization: str | None = setting(
        None, "of the predicted counts; log1p-cp10k by default", "probe", choices=NORMALIZATIONS
    )
    n_genes: int = setting(50, "number of highly variable genes that are predicted", "probe", metavar="N", gt=0)
    alpha: str | float | None = setting(
        None, "regularization strength of the ridge: hest (HEST-bench's formula, by default), inner (chosen on inner "
        "folds) or a number; never choose a number from test scores", "probe", metavar="ALPHA",
    )  # fmt: skip
    micro_batch: int | None = setting(
        None, "tiles at once on a device; the whole batch by default", "memory", metavar="N", ge=1
    )
    recompute: bool = setting(
        False, "recompute activations for their gradients: far less memory, a third more time", "memory"
    )
    compile: bool = setting(False, "use torch.compile where it works", "memory")
    device: str | None = setting(
        None, "cpu, cuda, cuda:1, ...; a GPU where there is one by default", "memory", metavar="DEVICE"
    )

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
            self._check_adapter()

    def _check_adapter(self) -> None:
        if self.method != "none" and self.spec.bone_r is None:
            raise ValueError(f"backbone {self.spec.name!r} takes only method 'none': it has no plain attention layers")
        if self.method == "bone":
            check_block_size(self.spec, self.block_size)

    def check(self) -> None:
        """Look for the files, the cohort and the device that the settings name.

        Raises
        ------
        FileNotFoundError
            If a file or the cohort is missing; names the setting and the fix.
        ValueError
            For an invalid backbone file, and a GPU that PyTorch does not find.
        """
        self._check_adapter()
        if self.weights == "hub":
            find_packaged(self.spec)  # raises if packaged weights are missing
        elif self.weights != "random" and not Path(self.weights).is_file():
            raise FileNotFoundError(f"{self.weights}: no such weights file; give a file, 'hub' or 'random'")
        for field in ("teacher_checkpoint", "teacher_genes", "teacher_mapping"):
            if (path := getattr(self, field)) is not None and not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file for {field}")
        if self.feature_kind == "file" and not Path(self.features).exists():
            raise FileNotFoundError(f"{self.features}: no such file or folder of features")
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table of settings.

    Attributes
    ----------
    kinds
        Types of valid values; None where the setting may be left out.
    help, metavar, choices
        For the command line; `choices` are the valid names, empty for free values.
    decides
        Key of `DECIDES`.
    path
        Whether the value may be the path of a file or folder.
    """

    name: str
    kinds: tuple[type, ...]
    default: object
    help: str
    decides: str
    metavar: str | None
    choices: tuple[str, ...]
    path: bool
    adapter: TypeAdapter = dataclasses.field(repr=False, compare=False)


def _read_table() -> dict[str, Setting]:
    hints, table = get_type_hints(RunConfig), {}
    for name, field in RunConfig.model_fields.items():
        hint = hints[name]
        kinds = tuple(getattr(kind, "__origin__", kind) for kind in get_args(hint)) if hint not in _KINDS else (hint,)
        adapter = TypeAdapter(Annotated[hint, field], config=ConfigDict(strict=True))
        table[name] = Setting(name, kinds, field.default, field.description, adapter=adapter, **field.json_schema_extra)
    return table


SETTINGS = MappingProxyType(_read_table())


def settings_deciding(*what: str) -> tuple[str, ...]:
    """Return the names of the settings that decide one of these (keys of `DECIDES`), in the table's order."""
    return tuple(name for name, row in SETTINGS.items() if row.decides in what)


def describe_settings() -> pd.DataFrame:
    """Return the table of settings: default, what each decides, valid values and meaning.

    Examples
    --------
    >>> import peka_lite as pk
    >>> table = pk.experiments.describe_settings()
    >>> table.loc["tau", ["default", "decides", "meaning"]].to_list()
    [2.0, 'student', 'temperature of the distillation loss']
    """
    import pandas as pd

    rows = {
        name: [row.default, row.decides, ", ".join(row.choices) or " or ".join(_KINDS[k] for k in row.kinds), row.help]
        for name, row in SETTINGS.items()
    }
    columns = ["default", "decides", "values", "meaning"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns, dtype=object).rename_axis("setting")


def update_words(settings: dict) -> dict:
    """Return stored settings with the words of earlier versions replaced by today's."""
    old = settings.get("features") if isinstance(settings, dict) else None
    return settings | {"features": OLD_FEATURES[old]} if isinstance(old, str) and old in OLD_FEATURES else settings


def check_field(field: str, value):
    """Check one setting, whatever the others are, and return its value as it is stored.

    Parameters
    ----------
    field
        A field of `RunConfig`.
    value
        Must have the declared type (an int passes as a float, NumPy's scalars as Python's), a known name, and numbers
        within bounds. Files and cohorts are not looked up.

    Raises
    ------
    ValueError
        Names the field, the value, the allowed values and the closest valid name.

    Examples
    --------
    >>> import peka_lite as pk
    >>> pk.experiments.check_field("lr", 1e-3)
    0.001
    >>> pk.experiments.check_field("method", "bonne")
    Traceback (most recent call last):
    ValueError: unknown method 'bonne'; known: none, bone, lora, adalora, miss; did you mean 'bone'?
    >>> pk.experiments.check_field("epochs", 2.0)
    Traceback (most recent call last):
    ValueError: epochs is a whole number (int), not 2.0
    """
    if field not in SETTINGS:
        hint = did_you_mean(str(field), SETTINGS) or f"; known: {', '.join(SETTINGS)}"
        raise ValueError(f"unknown setting {field!r}{hint}")
    row = SETTINGS[field]
    value = tuple(value) if isinstance(value, list) else value
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{field} must be a finite number, not {value}")
    try:
        value = row.adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(_explain(row, value, error)) from None
    if isinstance(value, str) and value and not is_line(value):
        raise ValueError(f"{field} is text of one line, not {repr(value)[:120]}")
    if field == "features" and value in OLD_FEATURES:
        value = OLD_FEATURES[value]
    if field == "backbone" and not is_backbone_file(value):
        get_backbone(value)
    if field == "alpha" and value is not None:
        check_alpha(value, names=("hest", "inner"))
    if field == "features" and (Path(value).suffix in (".h5", ".h5ad", ".npy") or "/" in value):
        return value
    if row.choices and value is not None and value not in row.choices:
        raise ValueError(
            f"unknown {field} {value!r}; known: {', '.join(row.choices)}{did_you_mean(value, row.choices)}"
        )
    return value


def _explain(row: Setting, value, error: ValidationError) -> str:
    """Return pydantic's errors of one setting as one sentence."""
    details = {problem["type"]: problem.get("ctx", {}) for problem in error.errors()}
    words = {"greater_than": "above", "greater_than_equal": "at least", "less_than_equal": "at most"}
    if kind := next((kind for kind in details if kind in words), None):
        limit = next(iter(details[kind].values()))
        return f"{row.name} must be {words[kind]} {int(limit) if limit == int(limit) else limit}, not {value}"
    value = list(value) if isinstance(value, tuple) else value
    return f"{row.name} is {' or '.join(_KINDS[kind] for kind in row.kinds)}, not {value!r}"


@functools.cache
def _require_cohort(name: str, cache: Path) -> None:
    """Check that the cache has a cohort of this name; only success is remembered."""
    find_cohort(name)


def _list_attributes() -> str:
    """Return the table as the section of a docstring."""
    rows = [f"{name}\n" + textwrap.indent(textwrap.fill(f"{row.help}.", 116), "    ") for name, row in SETTINGS.items()]
    return textwrap.indent("Attributes\n----------\n" + "\n".join(rows), "    ")


RunConfig.__doc__ = RunConfig.__doc__.replace("    Raises\n", f"{_list_attributes()}\n\n    Raises\n", 1)
