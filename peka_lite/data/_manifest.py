"""Parse a manifest into its entries, and check its YAML."""

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
    """Path in the repository, size in bytes and SHA-256 of a file; None takes the size or hash from the hub."""

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
        Patient of the tissue, and where it is from: ``"table"``, ``"title"``, ``"alone"`` or ``"joined"``.
    license
        License of the slide's source; None if the table gives none.
    tissue
        Tissue, if more specific than the cohort's organ.
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
        Name; ``"cohort"``, ``"checkpoint"``, ``"genes"`` or ``"student"``; title.
    repo, repo_type, revision
        Hub repository, ``"model"`` or ``"dataset"``, and the pinned commit; None takes the current one and records it.
    url
        Address of a file that is not on the hub.
    files, any_of
        Files to fetch; with `any_of`, only the first of them that the repository has.
    license, gate
        License, None takes the source's; page to ask for access, None if access is open.
    access
        How access is granted, a key of `ACCESS`; None if unknown.
    about, paper, note
        Size as text, the paper, and remarks.
    slides, paper_spots
        Of a cohort: its slides, and the number of spots that the PEKA paper reports.
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
            raise ValueError("url needs exactly one file and neither repo_type nor revision")
        if self.revision is not None and not re.fullmatch("[0-9a-f]{40}", self.revision):
            raise ValueError(f"revision must be a commit (40 hex digits) or null, not {self.revision!r}")
        if self.access not in (None, *ACCESS):
            raise ValueError(f"access must be one of {', '.join(ACCESS)} or null, not {self.access!r}")
        if self.access and not self.gate:
            raise ValueError("access needs gate, the page to ask for access")
        if not self.files:
            raise ValueError("files is empty")
        _check_unique("slide", [slide.id for slide in self.slides])
        _check_unique("path", [file.path for file in self.files])
        patient = {slide.id: slide.patient for slide in self.slides}
        for slide in self.slides:
            if slide.same_as and patient.get(slide.same_as) != slide.patient:
                raise ValueError(f"slide {slide.id}: same_as {slide.same_as} must be a slide of the same patient")


@dataclass(frozen=True, eq=False)
class Manifest(Mapping):
    """Entries of a manifest by name; the `KeyError` of an unknown name lists the known ones."""

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
        raise FileNotFoundError(f"{path}: no such manifest; omit the path to read the package's")
    artifacts, where, content = [], f"{path}: ", read_yaml(path)
    try:
        top = _check_fields(content, {"sources", *KINDS})
        for section, kind in KINDS.items():
            for name, entry in _check_fields(top.get(section, {})).items():
                where = f"{path}: {section}: {name}: "
                artifacts.append(_parse_entry(name, kind, _check_fields(entry), _check_fields(top.get("sources", {}))))
        where = f"{path}: "
        _check_unique("name", [artifact.name for artifact in artifacts])
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    return Manifest(path, {artifact.name: artifact for artifact in artifacts})


def _parse_entry(name: str, kind: str, fields: dict, sources: dict) -> Artifact:
    if kind == "cohort":
        if (source := fields.pop("source", None)) not in sources:
            raise ValueError(f"source {source!r} is not one of {', '.join(sources)}")
        slides = [_check_fields(slide) for slide in _check_list("slides", fields.pop("slides", None))]
        slides = tuple(_build(Sample, f"slide {slide.get('id')}: ", slide) for slide in slides)
        shared = _check_fields(sources[source])
        if twice := fields.keys() & shared.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: already given by source {source}")
        names = _check_list("files", shared.pop("files", None))
        fields |= shared | {"slides": slides, "files": [f.format(id=slide.id) for slide in slides for f in names]}
    elif misplaced := fields.keys() & {"source", "slides", "paper_spots"}:
        raise ValueError(f"{', '.join(sorted(misplaced))}: only cohorts have this field")
    if "files" in fields and "any_of" in fields:
        raise ValueError("files and any_of: give one of the two")
    field = "any_of" if "any_of" in fields else "files"
    files = _check_list(field, fields.pop(field, None))
    files = [{"path": file} if isinstance(file, str) else _check_fields(file) for file in files]
    files = tuple(_build(File, f"{field}: {file.get('path')}: ", file) for file in files)
    return _build(Artifact, "", fields | {"name": name, "kind": kind, "files": files, "any_of": field == "any_of"})


def _build(cls: type, where: str, fields: dict):
    hints = get_type_hints(cls)
    required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
    try:
        _check_fields(fields, hints.keys())
        if missing := required - fields.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing; give null if unknown")
        for field, value in fields.items():
            if not isinstance(value, tuple if get_origin(hints[field]) is tuple else hints[field]):
                raise ValueError(f"{field} must be {cls.__annotations__[field]}, not {value!r}")
        return cls(**fields)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _check_fields(value, known=None) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping of fields, not {value!r}")
    value = {"license" if key == "licence" else key: item for key, item in value.items()}  # the spelling of version 0.1
    if known is not None and (unknown := value.keys() - set(known)):
        raise ValueError(f"unknown {', '.join(sorted(map(str, unknown)))}; known: {', '.join(sorted(known))}")
    return value


def _check_list(field: str, value) -> list:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field} must be a non-empty list, not {value!r}")
    return value


def _check_unique(field: str, values: list) -> None:
    if twice := {str(value) for value in values if values.count(value) > 1}:
        raise ValueError(f"{field} {', '.join(sorted(twice))} is given more than once")
