"""The table of settings: one row each, from which command line, sweep checks, cache keys and documentation are made."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from peka_lite._core._yaml import is_line
from peka_lite._core.names import did_you_mean
from peka_lite.adapters._choices import LAYERS, METHODS
from peka_lite.backbones.custom import get_backbone, is_backbone_file
from peka_lite.data._choices import NORMALIZATIONS
from peka_lite.evaluation.protocols import PROTOCOLS, SPLITS
from peka_lite.probe._choices import check_alpha
from peka_lite.teachers._choices import LABEL_METHODS, TEACHERS
from peka_lite.transfer._choices import KD_SPACES

if TYPE_CHECKING:
    import pandas as pd

FEATURES = ("student", "frozen+student", "projector", "frozen+projector", "teacher", "color", "coordinates", "depth")
WITH_STUDENT = FEATURES[:4]
_FEATURE_FILES = (".h5", ".h5ad", ".npy")
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


class Settings(BaseModel):
    """The settings of a run; `RunConfig` adds what they mean together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    # fmt: off
    cohort: str = setting("mini", "'mini' (synthetic, embedded), a folder in HEST-1k's layout, or a fetched cohort "
                          "('breast', ...)", "data", metavar="COHORT", path=True)
    slides: tuple[str, ...] | None = setting(None, "slide ids to use, comma-separated; all by default", "data",
                                             metavar="ID,ID")
    patients: str | None = setting(None, "CSV file with columns id,patient; it overrides the cohort's own patients",
                                   "data", metavar="FILE", path=True)
    protocol: str | None = setting(None, "sets split, normalization, alpha and the rows of each fit; without one, all "
                                   "steps fit on training rows", "data", choices=PROTOCOLS)
    split: str | None = setting(None, "what a fold holds out; patient by default", "data", choices=SPLITS)
    n_splits: int = setting(5, "number of folds", "data", metavar="N", ge=2)
    train_share: float = setting(1.0, "share of every slide's training spots that is used", "data", metavar="SHARE",
                                 gt=0, le=1)
    min_genes: int = setting(200, "drop spots with fewer expressed genes", "data", metavar="N", gt=0)
    max_mito: float | None = setting(None, "drop spots with a larger mitochondrial share of counts; none by default",
                                     "data", metavar="SHARE", gt=0, le=1)
    backbone: str = setting("mini", "mini, uni, h-optimus-0, ... (`BACKBONES`), or the YAML file of a custom one",
                            "student", metavar="NAME", path=True)
    weights: str = setting("hub", "hub (the published weights; those of mini are in the package), a weights file, or "
                           "random", "student", metavar="WEIGHTS", path=True)
    method: str = setting("bone", "adapters of the student; none keeps it frozen", "student", choices=METHODS)
    r: int | None = setting(None, "block size or rank; the backbone's by default", "student", metavar="N", ge=1)
    layers: str = setting("qkv", "attention layer that gets adapters", "student", choices=LAYERS)
    teacher: str = setting("pca", "single-cell model that embeds the expression", "student", choices=TEACHERS)
    teacher_checkpoint: str | None = setting(None, "scFoundation's models.ckpt; the fetched one by default", "student",
                                             metavar="FILE", path=True)
    teacher_genes: str | None = setting(None, "scFoundation's gene list; by default beside the checkpoint, or fetched",
                                        "student", metavar="FILE", path=True)
    teacher_mapping: str | None = setting(None, "HGNC's complete set, for Ensembl ids and aliases", "student",
                                          metavar="FILE", path=True)
    label_method: str = setting("knn-leiden", "clustering that makes the pseudo-labels", "student",
                                choices=LABEL_METHODS)
    resolution: float | None = setting(None, "resolution of knn-leiden (1.0)", "student", metavar="X", gt=0)
    n_clusters: int | None = setting(None, "number of clusters of kmeans (100)", "student", metavar="N", gt=0)
    kd_space: str = setting("embedding", "what is distilled: the teacher's embedding (the paper), or logits (the "
                            "authors' code)", "student", choices=KD_SPACES)
    tau: float = setting(2.0, "temperature of the distillation loss", "student", metavar="X", gt=0)
    kd_weight: float = setting(0.5, "weight of the distillation loss", "student", metavar="X", ge=0)
    ce_weight: float = setting(0.5, "weight of the pseudo-label loss", "student", metavar="X", ge=0)
    epochs: int = setting(50, "passes over the training tiles", "student", metavar="N", gt=0)
    batch_size: int = setting(32, "tiles per step", "student", metavar="N", gt=0)
    lr: float = setting(1e-4, "Adam's learning rate", "student", metavar="X", gt=0)
    augment: bool = setting(False, "flip and rotate the tiles at random", "student")
    shuffle_teacher: bool = setting(False, "control: train each tile with another spot's expression", "student")
    seed: int = setting(0, "seed of every random choice", "student", metavar="N", ge=0, le=2**32 - 1)
    features: str = setting("student", "input of the probe: the student's output, with the frozen student's before it "
                            "(frozen+), projected to the teacher's space (projector), a control, or a file or folder "
                            "of features made elsewhere (FILE.h5ad:KEY for obsm)", "probe", choices=FEATURES,
                            metavar="KIND|FILE", path=True)
    normalization: str | None = setting(None, "of the predicted counts; log1p-cp10k by default", "probe",
                                        choices=NORMALIZATIONS)
    n_genes: int = setting(50, "number of highly variable genes that are predicted", "probe", metavar="N", gt=0)
    alpha: str | float | None = setting(None, "regularization strength of the ridge: hest (HEST-bench's formula, by "
                                        "default), inner (chosen on inner folds) or a number; never choose a number "
                                        "from test scores", "probe", metavar="ALPHA")
    micro_batch: int | None = setting(None, "tiles at once on a device; the whole batch by default", "memory",
                                      metavar="N", ge=1)
    recompute: bool = setting(False, "recompute activations for their gradients: far less memory, a third more time",
                              "memory")
    compile: bool = setting(False, "use torch.compile where it works", "memory")
    device: str | None = setting(None, "cpu, cuda, cuda:1, ...; a GPU where there is one by default", "memory",
                                 metavar="DEVICE")
    # fmt: on


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
    hints, table = get_type_hints(Settings), {}
    for name, field in Settings.model_fields.items():
        hint = hints[name]
        kinds = tuple(getattr(kind, "__origin__", kind) for kind in get_args(hint)) if hint not in _KINDS else (hint,)
        adapter = TypeAdapter(Annotated[hint, field], config=ConfigDict(strict=True))
        table[name] = Setting(name, kinds, field.default, field.description, adapter=adapter, **field.json_schema_extra)
    return table


SETTINGS = MappingProxyType(_read_table())


def settings_deciding(*kinds: str) -> tuple[str, ...]:
    """Return the names of the settings that decide one of these (keys of `DECIDES`), in the table's order."""
    return tuple(name for name, row in SETTINGS.items() if row.decides in kinds)


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


def split_features(value: str) -> tuple[str, str | None]:
    """Split ``FILE.h5ad:KEY``, features in ``obsm[KEY]``, into path and key; the key is None in any other path."""
    path, colon, key = value.rpartition(".h5ad:")
    return (f"{path}.h5ad", key) if colon else (value, None)


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
    if field == "features" and (Path(split_features(value)[0]).suffix in _FEATURE_FILES or "/" in value):
        return value
    if row.choices and value is not None and value not in row.choices:
        known = ", ".join(row.choices) + (", or a path such as ./FOLDER" if row.path else "")
        raise ValueError(f"unknown {field} {value!r}; known: {known}{did_you_mean(value, row.choices)}")
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


def list_attributes() -> str:
    """Return the table as the section Attributes of a class's docstring."""
    rows = [f"{name}\n" + textwrap.indent(textwrap.fill(f"{row.help}.", 112), "    ") for name, row in SETTINGS.items()]
    return textwrap.indent("Attributes\n----------\n" + "\n".join(rows), "    ")
