"""Give the slides of a cohort one gene naming: rename genes where possible, leave out other slides."""

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

MIN_OVERLAP = 0.5  # smallest fraction of the smaller set of names that is in the larger, for one naming
ONE_KIND = (
    "Give all slides the same names in var_names (symbols or Ensembl ids of one species), or read only slides of one "
    "naming (ids, --slides)"
)
_GENOME = re.compile(r"(GRCh3[78]|hg19|hg38)_+")  # Space Ranger's prefix for references of two genomes
_VERSION = re.compile(r"(ENS[A-Z]*\d+)\.\d+")
_CONTROL = re.compile(
    r"blank|neg(ative)?_?(control|prb|probe)|antisense|unassigned|deprecated|intergenic", re.IGNORECASE
)


def keep_one_naming(slides: Sequence[Slide], path: Path) -> tuple[list[Slide], dict[str, str]]:
    """Return the slides that share one gene naming, in order, and slide id -> reason of those left out.

    Two slides are linked if at least half of the names of the one with fewer genes are in the other, not counting
    controls of imaging panels. The largest group of linked slides is kept. A slide outside it is renamed, in place, if
    its names without spaces, genome prefix and Ensembl version, or a column of ``var``, match the group's names. Other
    slides are left out; each change warns. A `HestFormatError` that names the folder `path` is raised if fewer than two
    of several slides are left, or two groups are equally large.
    """
    groups = _group_slides(slides)
    if len(groups) == 1:
        return list(slides), {}
    outside = [[s for other in groups if other is not group for s in other] for group in groups]
    renamings = [_find_renamings(others, group) for group, others in zip(groups, outside, strict=True)]

    def rank(k: int) -> tuple:  # if each of two groups can be renamed to the other: prefer symbols, then plain names
        names = groups[k][0].adata.var_names
        ensembl, plain = (float(np.mean(x)) for x in (names.str.startswith("ENS"), names.map(_strip_name) == names))
        return len(groups[k]), len(renamings[k]), (ensembl < 0.5, plain) if renamings[k] else ()

    first, second = sorted(range(len(groups)), key=rank, reverse=True)[:2]
    group, renamed = groups[first], renamings[first]
    if len(group) + len(renamed) < 2 or (not renamed and rank(first) == rank(second)):
        kinds = "; ".join(f"{', '.join(s.id for s in g[:3])}: {_show(g[0].adata.var_names)}" for g in groups[:4])
        raise HestFormatError(path, f"the slides share no gene naming ({kinds})", ONE_KIND)
    group_names, left_out = _collect_names(group), {}
    for slide in outside[first]:
        names = slide.adata.var_names
        if slide.id in renamed:
            new, source = renamed[slide.id]
            warnings.warn(f"{slide.id}: genes renamed to {source} ({_show(new)}) from {_show(names)}", stacklevel=3)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Variable names are not unique")
                slide.adata.var_names = new
            slide.adata.var_names_make_unique()
            continue
        expected = group[0].adata.var_names
        left_out[slide.id] = (
            f"gene names differ ({_show(names[~names.isin(group_names)])}) from the other slides' "
            f"({_show(expected[~expected.isin(names)])}): {_overlap(set(names), group_names):.0%} are shared"
        )
        warnings.warn(f"left out {slide.id}: {left_out[slide.id]}. {ONE_KIND}", stacklevel=3)
    return [s for s in slides if s.id not in left_out], left_out


def _group_slides(slides: Iterable[Slide]) -> list[list[Slide]]:
    """Group slides with linked names, each group sorted by id; the largest group first."""
    groups: list[tuple[list[set[str]], list[Slide]]] = []  # distinct sets of names, and the slides
    for slide in sorted(slides, key=lambda s: s.id):
        names = set(slide.adata.var_names)
        linked = [g for g in groups if any(_overlap(names, other) >= MIN_OVERLAP for other in g[0])]
        sets, members = [n for g in linked for n in g[0]], [s for g in linked for s in g[1]]
        groups = [g for g in groups if not any(g is one for one in linked)]
        groups.append((sets if names in sets else [*sets, names], sorted([*members, slide], key=lambda s: s.id)))
    return sorted((members for _, members in groups), key=lambda members: (-len(members), members[0].id))


def _overlap(a: set[str], b: set[str]) -> float:
    """Return the fraction of the smaller set's names that are in the other, without controls that are not."""
    small, large = sorted((a, b), key=len)
    genes = {name for name in small - large if not _CONTROL.match(name)}
    shared = len(small & large)
    return shared / max(1, shared + len(genes))


def _find_renamings(slides: Iterable[Slide], group: Sequence[Slide]) -> dict[str, tuple[list[str], str]]:
    """Return slide id -> (names in the group's naming, their source) of the slides that have such names."""
    spelled, renamings = {_strip_name(name): name for name in sorted(_collect_names(group))}, {}
    for slide in slides:
        var = slide.adata.var
        columns = {"var_names without spaces, prefix and version": var.index.to_series()}
        columns |= {f"var[{name!r}]": column for name, column in var.items()}
        best = 0.0
        for source, column in columns.items():
            if not any(isinstance(value, str) for value in column):
                continue
            pairs = zip(column, var.index, strict=True)
            texts = [text if isinstance(text, str) and text.strip() else name for text, name in pairs]
            names = [spelled.get(_strip_name(text), text) for text in texts]
            overlap = _overlap(set(names), set(spelled.values()))
            if overlap >= MIN_OVERLAP and overlap > best:
                best, renamings[slide.id] = overlap, (names, source)
    return renamings


def _strip_name(name: str) -> str:
    name = _GENOME.sub("", name.strip(), count=1) if _GENOME.match(name.strip()) else name.strip()
    return match[1] if (match := _VERSION.fullmatch(name)) else name


def _collect_names(slides: Iterable[Slide]) -> set[str]:
    return set().union(*(s.adata.var_names for s in slides))


def _show(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])
