"""Read the gene order of a model and map other gene names to it."""

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

# Columns of HGNC's complete set (genenames.org), in order of priority.
_NAME_COLUMNS = ("symbol", "prev_symbol", "alias_symbol")
_COLUMNS = (*_NAME_COLUMNS, "ensembl_gene_id")
_TEXT_KINDS = ("text", "pickle")  # the oldest pickles are text
_MAX_HEADER = 10_000  # characters of a table's first line
_MAX_BYTES = 2**26  # HGNC's set has 17 million
_MAX_GENES = 2**20  # HGNC's set has 45,000


def read_vocabulary(genes: str | os.PathLike | Sequence[str]) -> pd.Index:
    """Read a gene order: a TSV file with columns gene_name and index, a JSON list, or a sequence of names."""
    if not isinstance(genes, str | os.PathLike):
        names, source = list(genes), "genes"
    else:
        source = path = Path(genes)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: gene list not found; run `peka-lite fetch scfoundation-genes`")
        try:
            names = _read_list(path) if path.suffix == ".json" else _read_order(path)
        except (ValueError, KeyError) as error:
            expected = (*_TEXT_KINDS, "packed") if path.suffix == ".gz" else _TEXT_KINDS
            reason = describe_mismatch(path, expected) or str(error).removeprefix(f"{path}: ")
            raise ValueError(
                f"{path}: not a gene list ({reason}); use a TSV file with columns gene_name and index, or a JSON list"
            ) from error
    index = pd.Index(names)
    if not len(index) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{source}: a gene list must contain at least one name, and names only")
    if not index.is_unique:
        raise ValueError(f"{source}: gene {index[index.duplicated()][0]!r} occurs more than once")
    return index


def read_gene_mapping(path: str | os.PathLike, vocabulary: Sequence[str]) -> dict[str, str]:
    """Read a mapping from Ensembl ids, former symbols and aliases to a vocabulary's symbols.

    The file is HGNC's complete set as TSV (columns symbol, prev_symbol, alias_symbol, ensembl_gene_id; lists split by
    ``|``), from ``peka-lite fetch hgnc``. A name of two genes is assigned by priority (symbol, then former symbol, then
    alias), and left out if both have the same priority. The vocabulary's symbols are no keys.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: gene mapping not found; run `peka-lite fetch hgnc`")
    if mismatch := describe_mismatch(path, _TEXT_KINDS):
        raise ValueError(f"{path}: not a gene mapping: {mismatch}")
    symbols = set(vocabulary)
    names_of = [[[name for name in cell.split("|") if name] for cell in cells] for cells in _read_genes(path)]
    genes_of: dict[str, list[int]] = {}  # vocabulary symbol -> genes with this name in the column of highest priority
    for column in range(len(_NAME_COLUMNS)):
        matches = defaultdict(list)
        for gene, columns in enumerate(names_of):
            for name in filter(symbols.__contains__, columns[column]):
                matches[name].append(gene)
        genes_of = matches | genes_of
    targets: list[dict[str, set[str | None]]] = [defaultdict(set) for _ in _COLUMNS]
    for gene, (*columns, ids) in enumerate(names_of):
        target = next((name for names in columns for name in names if genes_of.get(name) == [gene]), None)
        for names, targets_of in zip((*columns, ids), targets, strict=True):
            for name in names:  # also of genes that the vocabulary lacks: their names must not map to another gene
                targets_of[name].add(target)
    mapping: dict[str, str | None] = {}
    seen = {*symbols, ""}
    for column in targets:
        mapping |= {name: next(iter(genes)) for name, genes in column.items() if name not in seen and len(genes) == 1}
        seen |= column.keys()
    return {name: target for name, target in mapping.items() if target is not None}


def rename(names: Sequence[str], vocabulary: pd.Index, mapping: Mapping[str, str] | None = None) -> pd.Index:
    """Rename columns to the vocabulary's symbols where these are known.

    Versions of Ensembl ids (``.12``) are dropped. Numbers added by `AnnData.var_names_make_unique` (``TBCE-1`` next to
    ``TBCE``) are removed.
    """
    columns, mapping = set(names), mapping or {}

    def rename_one(name: str) -> str:
        if name in vocabulary:
            return name
        bare = name.split(".")[0] if name.startswith("ENS") else name
        if bare in mapping:
            return mapping[bare]
        gene, _, copy = name.rpartition("-")
        return gene if copy.isdigit() and gene in columns and gene in vocabulary else name

    return pd.Index([rename_one(str(name)) for name in names])


def align_to_vocabulary(
    adata: ad.AnnData, genes: pd.Index, *, mapping: Mapping[str, str] | None = None, logged: bool = False
) -> tuple[sparse.csr_matrix, float]:
    """Reorder the columns of expression to the vocabulary by gene name: (N, len(genes)) float32, and the coverage.

    Columns of the same gene are summed; if `logged`, as counts (expm1). The coverage is that of `align_genes`; below
    one half it is a ValueError.
    """
    names = rename(adata.var_names, genes, mapping)
    sum_as_counts = logged and not names.is_unique
    if sum_as_counts:
        adata = ad.AnnData(np.expm1(sparse.csr_matrix(adata.X, dtype=np.float64, copy=True)), adata.obs, adata.var)
    X, coverage = align_genes(adata, genes, names=names)
    if coverage >= 0.5:
        return np.log1p(X) if sum_as_counts else X, coverage
    unknown = [str(column) for column, name in zip(adata.var_names, names, strict=True) if name not in genes]
    if sum(name.startswith("ENS") for name in unknown) > len(unknown) / 2:
        download = "pass the file of `peka-lite fetch hgnc` as mapping= (--teacher-mapping), or name genes by symbol"
        fix = "the mapping does not contain these ids" if mapping else download
        raise ValueError(
            f"genes are named by Ensembl ids ({', '.join(unknown[:3])}, ...), but the vocabulary has symbols: {fix}"
        )
    raise ValueError(
        f"only {coverage:.0%} of the data's expressed genes are in the vocabulary, and at least half must be. "
        f"Unknown: {', '.join(unknown[:10])}. The vocabulary has, for example: {', '.join(genes[:10])}"
    )


def _read_list(path: Path) -> list:
    if isinstance(names := parse_json(read_text(path)), list):
        return names
    raise ValueError(f"it contains a {type(names).__name__}")


def _read_order(path: Path) -> list[str]:
    # Read as text: "NA" is a gene name, not a missing value.
    text, columns = read_text(path), ["gene_name", "index"]
    if len(text.partition("\n")[0]) > _MAX_HEADER:
        raise ValueError(f"its first line has more than {_MAX_HEADER:,} characters")
    table = pd.read_csv(io.StringIO(text), sep="\t", dtype=str, keep_default_na=False, usecols=columns)
    table["index"] = pd.to_numeric(table["index"])
    table = table.sort_values("index")
    if table["index"].tolist() != list(range(len(table))):
        raise ValueError("column index must count from 0")
    return table["gene_name"].tolist()


def _read_genes(path: Path) -> list[list[str]]:
    """Read the names of each gene by column, and its Ensembl id, from HGNC's set."""
    lines = csv.reader(io.StringIO(read_text(path, longest=_MAX_BYTES), newline=""), delimiter="\t")
    try:
        header = next(lines, [])
        if missing := set(_COLUMNS) - set(header):
            raise ValueError(f"{path}: columns {', '.join(sorted(missing))} are missing; use HGNC's complete set")
        places, rows = [header.index(name) for name in _COLUMNS], []
        for cells in lines:
            row = [cells[place] if place < len(cells) else "" for place in places]  # trailing empty cells may be absent
            rows += [row] if any(row) else []
            if len(rows) > _MAX_GENES:
                raise ValueError(f"{path}: more than {_MAX_GENES:,} genes; use HGNC's complete set")
    except csv.Error as error:
        raise ValueError(f"{path}: not a gene mapping: line {lines.line_num} cannot be parsed ({error})") from None
    return rows
