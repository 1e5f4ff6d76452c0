"""Slides that name their genes alike: another spelling is read, another kind of names is left out by name."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peka_lite.data._format import HestFormatError

if TYPE_CHECKING:
    from peka_lite.data.hest import Slide

ALIKE = 0.5  # least share of the smaller set of names that the other holds
ONE_KIND = (
    "Give all slides the same names in var_names, symbols or Ensembl ids of one species, or read those of one kind "
    "alone (ids, --slides)"
)
_GENOME = re.compile(r"(GRCh3[78]|hg19|hg38)_+")  # Space Ranger's prefix where it counted two genomes
_VERSION = re.compile(r"(ENS[A-Z]*\d+)\.\d+")
_NO_GENE = re.compile(
    r"blank|neg(ative)?_?(control|prb|probe)|antisense|unassigned|deprecated|intergenic", re.IGNORECASE
)


def keep_one_naming(slides: Sequence[Slide], place: Path) -> tuple[list[Slide], dict[str, str]]:
    """Keep the slides that name their genes alike; whatever their order, the same ones.

    Two slides are alike where at least half of the names of the one with fewer are names of the other too, controls of
    imaging panels aside. The largest group that is linked in this way stays. A slide outside it is read where its names
    without spaces, genome prefix and Ensembl version, or those in a column of ``var``, are the group's; its `var_names`
    are set to these. Any other is left out.

    Parameters
    ----------
    slides
        As read; the `adata` of those that are read by other names is changed.
    place
        Names the data in an error.

    Returns
    -------
    list of Slide
        In the order given.
    dict
        Slide id -> why it was left out.

    Raises
    ------
    HestFormatError
        If fewer than two of several slides are left, or no group is the largest.

    Warns
    -----
    UserWarning
        For each slide that is read by other names, or left out.
    """
    groups = _groups(slides)
    if len(groups) == 1:
        return list(slides), {}
    outside = [[s for other in groups if other is not group for s in other] for group in groups]
    readings = [_readings(others, group) for group, others in zip(groups, outside, strict=True)]

    def rank(k: int) -> tuple:  # of two groups that could each be read as the other, symbols, and plain names
        names = groups[k][0].adata.var_names
        ensembl, plain = (float(np.mean(part)) for part in (names.str.startswith("ENS"), names.map(_bare) == names))
        return len(groups[k]), len(readings[k]), (ensembl < 0.5, plain) if readings[k] else ()

    first, second = sorted(range(len(groups)), key=rank, reverse=True)[:2]
    stays, readable = groups[first], readings[first]
    if len(stays) + len(readable) < 2 or (not readable and rank(first) == rank(second)):
        kinds = "; ".join(f"{', '.join(s.id for s in g[:3])}: {_three(g[0].adata.var_names)}" for g in groups[:4])
        raise HestFormatError(place, f"the slides share no gene names of one kind ({kinds})", ONE_KIND)
    known, left_out = _names(stays), {}
    for slide in outside[first]:
        own = slide.adata.var_names
        if slide.id in readable:
            names, source = readable[slide.id]
            warnings.warn(f"{slide.id}: genes are read by {source} ({_three(names)}), not {_three(own)}", stacklevel=3)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Variable names are not unique")
                slide.adata.var_names = names
            slide.adata.var_names_make_unique()
            continue
        theirs = stays[0].adata.var_names
        left_out[slide.id] = (
            f"genes of another kind ({_three(own[~own.isin(known)])}) than in the other slides "
            f"({_three(theirs[~theirs.isin(own)])}): {_share(set(own), known):.0%} of the names are shared"
        )
        warnings.warn(f"left out {slide.id}: {left_out[slide.id]}. {ONE_KIND}", stacklevel=3)
    return [s for s in slides if s.id not in left_out], left_out


def _groups(slides: Iterable[Slide]) -> list[list[Slide]]:
    """Group slides whose names are linked, by id; the largest group first."""
    groups: list[tuple[list[set[str]], list[Slide]]] = []  # distinct sets of names, and the slides
    for slide in sorted(slides, key=lambda s: s.id):
        names = set(slide.adata.var_names)
        linked = [g for g in groups if any(_share(names, other) >= ALIKE for other in g[0])]
        sets, members = [n for g in linked for n in g[0]], [s for g in linked for s in g[1]]
        groups = [g for g in groups if not any(g is one for one in linked)]
        groups.append((sets if names in sets else [*sets, names], sorted([*members, slide], key=lambda s: s.id)))
    return sorted((members for _, members in groups), key=lambda members: (-len(members), members[0].id))


def _share(a: set[str], b: set[str]) -> float:
    """Return the share of the smaller set's names that are in the other."""
    small, large = sorted((a, b), key=len)
    genes = {name for name in small - large if not _NO_GENE.match(name)}  # what is in neither may be a control
    shared = len(small & large)
    return shared / max(1, shared + len(genes))


def _readings(slides: Iterable[Slide], group: Sequence[Slide]) -> dict[str, tuple[list[str], str]]:
    """Return new names of the slides that can be read with the group's, and where these come from."""
    spelled, found = {_bare(name): name for name in sorted(_names(group))}, {}
    for slide in slides:
        var = slide.adata.var
        columns = {"their names without spaces, prefix and version": var.index.to_series()}
        columns |= {f"var[{name!r}]": column for name, column in var.items()}
        best = 0.0
        for source, column in columns.items():
            if not any(isinstance(value, str) for value in column):
                continue
            pairs = zip(column, var.index, strict=True)
            texts = [text if isinstance(text, str) and text.strip() else own for text, own in pairs]
            names = [spelled.get(_bare(text), text) for text in texts]
            share = _share(set(names), set(spelled.values()))
            if share >= ALIKE and share > best:
                best, found[slide.id] = share, (names, source)
    return found


def _bare(name: str) -> str:
    name = _GENOME.sub("", name.strip(), count=1) if _GENOME.match(name.strip()) else name.strip()
    return match[1] if (match := _VERSION.fullmatch(name)) else name


def _names(slides: Iterable[Slide]) -> set[str]:
    return set().union(*(s.adata.var_names for s in slides))


def _three(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])
