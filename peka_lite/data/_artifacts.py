"""What a manifest holds: its entries, and the check of its YAML."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import get_origin, get_type_hints

from peka_lite._core._yaml import read_yaml
from peka_lite.data._choices import ACCESS

KINDS = {"cohorts": "cohort", "checkpoints": "checkpoint", "genes": "genes", "students": "student"}
PATIENT_BASES = ("table", "title", "alone", "joined")


@dataclass(frozen=True)
class File:
    """One file: its path in the repository, its size in bytes and SHA-256; None where the hub has to tell them."""

    path: str
    size: int | None = None
    sha256: str | None = None

    def __post_init__(self):
        if PurePosixPath(self.path).is_absolute() or ".." in PurePosixPath(self.path).parts:
            raise ValueError(f"path {self.path!r} must stay inside the artifact's folder")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be a number of bytes or null, not {self.size}")
        if self.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 must be 64 lower-case hex digits or null, not {self.sha256!r}")


@dataclass(frozen=True)
class Sample:
    """One slide of a cohort, as HEST-1k's table describes it.

    Attributes
    ----------
    id, spots, genes, disease_state, oncotree
        As in the table; `spots` counts those under tissue.
    patient, patient_basis
        Who the tissue came from, and how that is known: ``"table"``, ``"title"``, ``"alone"`` or ``"joined"``.
    license
        Of the slide's own source; None where the table is silent.
    tissue
        Where it is not just the cohort's organ.
    same_as
        Another slide of the cohort that shows the same section.
    """

    id: str
    spots: int
    genes: int
    patient: str
    patient_basis: str
    disease_state: str
    oncotree: str | None
    license: str | None
    tissue: str | None = None
    same_as: str | None = None

    def __post_init__(self):
        if self.patient_basis not in PATIENT_BASES:
            raise ValueError(f"patient_basis {self.patient_basis!r} is not one of {', '.join(PATIENT_BASES)}")
        if self.spots < 1 or self.genes < 1:
            raise ValueError(f"spots and genes must be above 0, not {self.spots} and {self.genes}")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One entry of the manifest.

    Attributes
    ----------
    name, kind, title
        Its name; ``"cohort"``, ``"checkpoint"``, ``"genes"`` or ``"student"``; what it is, in words.
    repo, repo_type, revision
        Hub repository, ``"model"`` or ``"dataset"``, and the pinned commit; None takes the current one and records it.
    url
        Address of what is not on the hub.
    files, any_of
        What to fetch; where `any_of`, only the first of them that the repository holds.
    license, gate
        License, None where the source has to tell it; page to ask for access, None where nobody has to.
    access
        How it is granted there, a key of `registry.ACCESS`; None where that is not known.
    about, paper, note
        Size in words, the paper, and what a reader must know.
    slides, paper_spots
        Of a cohort: its slides, and the number of spots the PEKA paper reports.
    """

    name: str
    kind: str
    title: str
    files: tuple[File, ...]
    license: str | None
    gate: str | None
    access: str | None = None
    any_of: bool = False
    repo: str | None = None
    repo_type: str | None = None
    revision: str | None = None
    url: str | None = None
    about: str | None = None
    paper: str | None = None
    note: str | None = None
    slides: tuple[Sample, ...] = ()
    paper_spots: int | None = None

    def __post_init__(self):
        if (self.repo is None) == (self.url is None):
            raise ValueError("repo and url: give one of the two")
        if self.repo and self.repo_type not in ("model", "dataset"):
            raise ValueError(f"repo_type must be 'model' or 'dataset', not {self.repo_type!r}")
        if self.url and (self.repo_type or self.revision or len(self.files) != 1):
            raise ValueError("url goes with one file, and with neither repo_type nor revision")
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit (40 hex digits) or null, not {self.revision!r}")
        if self.access not in (None, *ACCESS):
            raise ValueError(f"access must be one of {', '.join(ACCESS)} or null, not {self.access!r}")
        if self.access and not self.gate:
            raise ValueError("access goes with gate, the page to ask on")
        if not self.files:
            raise ValueError("files is empty")
        _once("slide", [slide.id for slide in self.slides])
        _once("path", [file.path for file in self.files])
        patient = {slide.id: slide.patient for slide in self.slides}
        for slide in self.slides:
            if slide.same_as and patient.get(slide.same_as) != slide.patient:
                raise ValueError(f"slide {slide.id}: same_as {slide.same_as} must be a slide of the same patient")


@dataclass(frozen=True, eq=False)
class Manifest(Mapping):
    """The entries of a manifest by name; an unknown name is a `KeyError` that lists the known ones."""

    path: Path
    artifacts: Mapping[str, Artifact]

    def __getitem__(self, name: str) -> Artifact:
        if name not in self.artifacts:
            raise KeyError(f"nothing called {name!r} in {self.path.name}; known: {', '.join(self.artifacts)}")
        return self.artifacts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.artifacts)

    def __len__(self) -> int:
        return len(self.artifacts)


def parse_manifest(path: Path) -> Manifest:
    """Read and check a manifest; a `ValueError` names the file, the entry and the field."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such manifest; without a path the one of the package is read")
    found, where, text = [], f"{path}: ", read_yaml(path)
    try:
        top = _fields(text, {"sources", *KINDS})
        for section, kind in KINDS.items():
            for name, entry in _fields(top.get(section, {})).items():
                where = f"{path}: {section}: {name}: "
                found.append(_entry(name, kind, _fields(entry), _fields(top.get("sources", {}))))
        where = f"{path}: "
        _once("name", [artifact.name for artifact in found])
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    return Manifest(path, {artifact.name: artifact for artifact in found})


def _entry(name: str, kind: str, fields: dict, sources: dict) -> Artifact:
    if kind == "cohort":
        if (source := fields.pop("source", None)) not in sources:
            raise ValueError(f"source {source!r} is not one of {', '.join(sources)}")
        slides = [_fields(slide) for slide in _list("slides", fields.pop("slides", None))]
        slides = tuple(_build(Sample, f"slide {slide.get('id')}: ", slide) for slide in slides)
        shared = _fields(sources[source])
        if twice := fields.keys() & shared.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: given by source {source} already")
        names = _list("files", shared.pop("files", None))
        fields |= shared | {"files": [file.format(id=slide.id) for slide in slides for file in names]}
    elif misplaced := fields.keys() & {"source", "slides", "paper_spots"}:
        raise ValueError(f"{', '.join(sorted(misplaced))}: only a cohort has that")
    if "files" in fields and "any_of" in fields:
        raise ValueError("files and any_of: give one of the two")
    field = "any_of" if "any_of" in fields else "files"
    files = [{"path": f} if isinstance(f, str) else _fields(f) for f in _list(field, fields.pop(field, None))]
    files = tuple(_build(File, f"{field}: {file.get('path')}: ", file) for file in files)
    own = {"name": name, "kind": kind, "files": files, "any_of": field == "any_of"}
    return _build(Artifact, "", fields | own | ({"slides": slides} if kind == "cohort" else {}))


def _build(cls: type, where: str, fields: dict):
    hints = get_type_hints(cls)
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    try:
        _fields(fields, hints.keys())
        if missing := needed - fields.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing; null says that it is not known")
        for field, value in fields.items():
            if not isinstance(value, tuple if get_origin(hints[field]) is tuple else hints[field]):
                raise ValueError(f"{field} must be {cls.__annotations__[field]}, not {value!r}")
        return cls(**fields)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _fields(value, known=None) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"named fields are wanted here, not {value!r}")
    value = {"license" if key == "licence" else key: item for key, item in value.items()}  # version 0.1 spelled it so
    if known is not None and (unknown := value.keys() - set(known)):
        raise ValueError(f"unknown {', '.join(sorted(map(str, unknown)))}; known: {', '.join(sorted(known))}")
    return value


def _list(field: str, value) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} must be a list with something in it, not {value!r}")
    return value


def _once(what: str, values: list) -> None:
    if twice := {str(value) for value in values if values.count(value) > 1}:
        raise ValueError(f"{what} {', '.join(sorted(twice))} is given more than once")
