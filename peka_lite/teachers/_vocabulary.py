"""Gene names: the order a model was trained with, and how other names lead to it."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from peka_lite._core._file_kinds import describe_mismatch, parse_json, read_text
from peka_lite.data.expression import align_genes

# Columns of HGNC's complete set (genenames.org), the more binding name first.
_NAMES = ("symbol", "prev_symbol", "alias_symbol")
_TEXT = ("text", "pickle")  # the oldest pickles are text
_HEAD = 10_000  # letters of a table's first line
_LONGEST = 2**26  # bytes of HGNC's set, which has 17 million
_MOST = 2**20  # genes of it, 45,000


def read_vocabulary(genes: str | os.PathLike | Sequence[str]) -> pd.Index:
    """Read a gene order: a TSV file with columns gene_name and index, a JSON list, or the names themselves.

    Raises
    ------
    FileNotFoundError, ValueError
        For a file that is missing or is no such table, and for a name that stands twice.
    """
    if not isinstance(genes, str | os.PathLike):
        names, source = list(genes), "genes"
    else:
        source = path = Path(genes)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such gene list; `peka-lite fetch scfoundation-genes` fetches it")
        try:
            names = _read_list(path) if path.suffix == ".json" else _read_order(path)
        except (ValueError, KeyError) as error:
            wanted = (*_TEXT, "packed") if path.suffix == ".gz" else _TEXT
            seen = describe_mismatch(path, wanted) or str(error).removeprefix(f"{path}: ")
            raise ValueError(
                f"{path}: no gene list ({seen}); it is a TSV file with columns gene_name and index, or a JSON list"
            ) from error
    index = pd.Index(names)
    if not len(index) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{source}: a gene list holds names, at least one, and nothing else")
    if not index.is_unique:
        raise ValueError(f"{source}: gene {index[index.duplicated()][0]!r} stands more than once")
    return index


def read_gene_mapping(path: str | os.PathLike, vocabulary: Sequence[str]) -> dict[str, str]:
    """Read how Ensembl ids, former symbols and aliases lead to a vocabulary's symbols.

    Parameters
    ----------
    path
        HGNC's complete set as TSV (columns symbol, prev_symbol, alias_symbol, ensembl_gene_id; lists split by ``|``);
        ``peka-lite fetch hgnc`` fetches it.
    vocabulary
        The symbols to arrive at.

    Returns
    -------
    dict
        Name -> symbol of the vocabulary. A name of the vocabulary stays what it is. A name that two genes carry is
        settled by the more binding kind (symbol before former symbol before alias) and left out where it is not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such gene mapping; `peka-lite fetch hgnc` fetches HGNC's complete set")
    if other := describe_mismatch(path, _TEXT):
        raise ValueError(f"{path}: no gene mapping: {other}")
    rows = _read_genes(path)
    known = set(vocabulary)
    carried = [[[part for part in column.split("|") if part] for column in names] for *names, _ in rows]
    owners: dict[str, list[int]] = {}  # vocabulary symbol -> the genes that carry it in its most binding kind
    for kind in range(len(_NAMES)):
        found = defaultdict(list)
        for gene, names in enumerate(carried):
            for name in names[kind]:
                if name in known:
                    found[name].append(gene)
        owners = dict(found) | owners
    goal_of = {
        gene: next((name for kind in names for name in kind if owners.get(name) == [gene]), None)
        for gene, names in enumerate(carried)
    }
    claims: list[dict[str, set[str | None]]] = [defaultdict(set) for _ in (*_NAMES, "ensembl_gene_id")]
    for gene, names in enumerate(carried):
        for kind, found in enumerate([*names, [rows[gene][-1]]]):
            for name in found:  # a gene the vocabulary lacks claims its names too: they are no other gene's
                claims[kind][name].add(goal_of[gene])
    mapping: dict[str, str | None] = {}
    settled = {*known, ""}
    for kind in claims:
        mapping |= {name: next(iter(goals)) for name, goals in kind.items() if name not in settled and len(goals) == 1}
        settled |= kind.keys()
    return {name: goal for name, goal in mapping.items() if goal is not None}


def rename(names: Sequence[str], vocabulary: pd.Index, mapping: Mapping[str, str] | None = None) -> pd.Index:
    """Give every column the vocabulary's name where one is known.

    Ensembl ids lose their version (``.12``). Copies that `AnnData.var_names_make_unique` numbered (``TBCE-1`` beside
    ``TBCE``) get their gene's name back.
    """
    own, mapping = set(names), mapping or {}

    def one(name: str) -> str:
        if name in vocabulary:
            return name
        bare = name.split(".")[0] if name.startswith("ENS") else name
        if bare in mapping:
            return mapping[bare]
        gene, _, copy = name.rpartition("-")
        return gene if copy.isdigit() and gene in own and gene in vocabulary else name

    return pd.Index([one(str(name)) for name in names])


def align_to_vocabulary(
    adata: ad.AnnData, genes: pd.Index, *, mapping: Mapping[str, str] | None = None, logged: bool = False
) -> tuple[sparse.csr_matrix, float]:
    """Put expression into the vocabulary's order by name, whatever the number of columns.

    Columns that name one gene are summed; with `logged`, as the counts their logarithms stand for.

    Returns
    -------
    scipy.sparse.csr_matrix
        (N, len(genes)) float32.
    float
        Coverage, as in `align_genes`.

    Raises
    ------
    ValueError
        Where the vocabulary knows fewer than half of the expressed genes.
    """
    names = rename(adata.var_names, genes, mapping)
    in_logs = logged and not names.is_unique
    if in_logs:
        adata = ad.AnnData(np.expm1(sparse.csr_matrix(adata.X, dtype=np.float64, copy=True)), adata.obs, adata.var)
    X, coverage = align_genes(adata, genes, names=names)
    if coverage >= 0.5:
        return np.log1p(X) if in_logs else X, coverage
    unknown = [str(own) for own, name in zip(adata.var_names, names, strict=True) if name not in genes]
    if sum(name.startswith("ENS") for name in unknown) > len(unknown) / 2:
        get = "give mapping= (--teacher-mapping) the file that `peka-lite fetch hgnc` prints, or name genes by symbol"
        fix = "this mapping does not lead to them" if mapping else get
        raise ValueError(
            f"genes are named by Ensembl ids ({', '.join(unknown[:3])}, ...), the vocabulary holds symbols: {fix}"
        )
    raise ValueError(
        f"only {coverage:.0%} of the data's expressed genes are in the vocabulary, and at least half must be. "
        f"Unknown: {', '.join(unknown[:10])}. The vocabulary has, for example: {', '.join(genes[:10])}"
    )


def _read_list(path: Path) -> list:
    names = parse_json(read_text(path))
    if not isinstance(names, list):
        raise ValueError(f"it holds a {type(names).__name__}")
    return names


def _read_order(path: Path) -> list[str]:
    # As text: "NA" would be no gene.
    text, columns = read_text(path), ["gene_name", "index"]
    if len(text.partition("\n")[0]) > _HEAD:
        raise ValueError(f"its first line has more than {_HEAD:,} letters")
    table = pd.read_csv(io.StringIO(text), sep="\t", dtype=str, keep_default_na=False, usecols=columns)
    table["index"] = pd.to_numeric(table["index"])
    table = table.sort_values("index")
    if table["index"].tolist() != list(range(len(table))):
        raise ValueError("column index must count from 0")
    return table["gene_name"].tolist()


def _read_genes(path: Path) -> list[list[str]]:
    """Read HGNC's set: of each gene its names by kind, and its Ensembl id."""
    lines = csv.reader(io.StringIO(read_text(path, longest=_LONGEST), newline=""), delimiter="\t")
    wanted = (*_NAMES, "ensembl_gene_id")
    try:
        head = next(lines, [])
        if missing := set(wanted) - set(head):
            raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing; is it HGNC's complete set?")
        places, rows = [head.index(name) for name in wanted], []
        for cells in lines:
            row = [cells[place] if place < len(cells) else "" for place in places]  # blanks at the end may be left out
            rows += [row] if any(row) else []
            if len(rows) > _MOST:
                raise ValueError(f"{path}: holds more than {_MOST:,} genes; is it HGNC's complete set?")
    except csv.Error as error:
        raise ValueError(f"{path}: no gene mapping: line {lines.line_num} is no line of a table ({error})") from None
    return rows
