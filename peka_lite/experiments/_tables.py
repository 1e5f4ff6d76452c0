"""Read the tables of a run with checks of their columns, types and ranges."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Column:
    """A column: its type, bounds, and whether tables of older versions may lack it."""

    kind: type
    low: float | None = None
    high: float | None = None
    optional: bool = False


_TEXT, _FOLD, _COUNT = Column(str), Column(int, 0), Column(int, 1)
_NUMBER, _SCORE = Column(float), Column(float, -1, 1)
_NEW_NUMBER, _NEW_SCORE = Column(float, optional=True), Column(float, -1, 1, optional=True)
METRICS = {
    **dict.fromkeys(("method", "backbone", "split", "protocol", "features", "normalization"), _TEXT),
    "fold": _FOLD, "gene": _TEXT, "pcc": _SCORE, "r2": Column(float, None, 1, optional=True),
    "rmse": Column(float, 0, optional=True), "spearman": _NEW_SCORE, "n_train": _COUNT, "n_test": _COUNT,
}  # fmt: skip
MOMENTS = {
    "normalization": _TEXT, "fold": _FOLD, "slide": _TEXT, "patient": _TEXT, "gene": _TEXT, "n": Column(float, 1),
    "mean_y": _NUMBER, "mean_p": _NUMBER, "var_y": Column(float, 0), "var_p": Column(float, 0), "cov": _NUMBER,
    "spearman": _NEW_SCORE,
}  # fmt: skip
TRAINING = {
    "fold": _TEXT, "epoch": _FOLD, "loss": _NUMBER, "kd": _NUMBER, "ce": _NUMBER, "accuracy": Column(float, 0, 1),
    "seconds": Column(float, 0), "waiting": Column(float, 0),
}  # fmt: skip
_DTYPES = {str: str, int: "int64", float: "float64"}
_CODECS, _ENCODINGS = {"SNAPPY", "UNCOMPRESSED"}, {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}


def read_csv_table(path: Path, columns: dict[str, Column]) -> pd.DataFrame:
    """Read the known columns of a CSV file; texts such as NA, nan or 1e5 stay text, and empty numbers are NaN.

    Raises
    ------
    ValueError
        For a missing or duplicate column, and a value of another type or out of range; names the file and the column.
    """
    import pandas as pd

    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline(2**16)
        names = list(next(csv.reader([first]), ()))
        known = [name for name in names if name in columns]
        if not first.endswith(("\n", "\r")) or len(set(known)) < len(known):
            raise ValueError(f"its first line must name {', '.join(columns)}, each once")
        _check_present(known, columns)
        kinds = {name: _DTYPES[columns[name].kind] for name in known}
        empty = {name: [""] for name in known if columns[name].kind is float}
        options = {"keep_default_na": False, "na_values": empty}
        try:
            table = pd.read_csv(path, usecols=known, dtype=kinds, **options)
        except (ValueError, OverflowError):
            for name in known:  # find the column, which pandas does not name
                _read_column(path, name, kinds[name], **options)
            raise
        _check_ranges(table, columns)
    except (ValueError, csv.Error, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a table of results ({reason}); repeat the run") from None
    return table


def read_parquet_table(path: Path, columns: dict[str, Column]) -> pd.DataFrame:
    """Read the known columns of a Parquet file, after checking the sizes in its metadata.

    Errors are those of `read_csv_table`.
    """
    import pandas as pd
    import pyarrow
    from pyarrow.parquet import ParquetFile, read_metadata

    try:
        metadata = read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        known = [name for name in columns if name in schema.names]
        _check_present(known, columns)
        for name in known:
            if schema.names.count(name) != 1 or not _has_type(schema.field(name).type, columns[name].kind):
                raise ValueError(f"column {name} is duplicated, or not of type {columns[name].kind.__name__}")
        groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
        parts = [group.column(k) for group in groups for k in range(group.num_columns)]
        parts = [part for part in parts if part.path_in_schema in known]
        if any(part.compression not in _CODECS or not {*part.encodings} <= _ENCODINGS for part in parts):
            raise ValueError("its compression or encoding is not one that runs write")
        # Moments are 8-byte numbers that hardly compress.
        rows, size = sum(group.num_rows for group in groups), path.stat().st_size
        if rows > max(2**20, size // 16):
            raise ValueError(f"its {size:,} bytes cannot hold the {rows:,} rows of its metadata")
        with ParquetFile(path, read_dictionary=[name for name in known if columns[name].kind is str]) as file:
            content = file.read(columns=known, use_threads=False)
        table = {}
        for name in known:
            column = content.column(name)
            if columns[name].kind is not float and column.null_count:
                raise ValueError(f"column {name} has missing values")
            table[name] = column.to_pandas()
            if columns[name].kind is str:
                names = table[name].cat.categories
                if len(content) * max(map(len, names), default=0) > 2**32:
                    raise ValueError(f"names in column {name} are too long")
                table[name] = pd.Series(names.to_numpy(dtype=object)[table[name].cat.codes])
        table = pd.DataFrame(table)
        _check_ranges(table, columns)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}; repeat the run") from None
    return table


def _read_column(path: Path, name: str, kind, **options) -> None:
    import pandas as pd

    try:
        pd.read_csv(path, usecols=[name], dtype={name: kind}, **options)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"column {name}: {error}") from None


def _check_present(known: list[str], columns: dict[str, Column]) -> None:
    if missing := [name for name, column in columns.items() if name not in known and not column.optional]:
        raise ValueError(f"column {', '.join(missing)} is missing")


def _check_ranges(table: pd.DataFrame, columns: dict[str, Column]) -> None:
    for name in table:
        for limit, outside, words in (
            (columns[name].low, table[name].lt, "below"),
            (columns[name].high, table[name].gt, "above"),
        ):
            if limit is not None and outside(limit + (1e-9 if words == "above" else -1e-9)).any():
                raise ValueError(f"column {name} has a value {words} {limit}")


def _has_type(arrow_type, kind: type) -> bool:
    import pyarrow.types as types

    if kind is str:
        arrow_type = arrow_type.value_type if types.is_dictionary(arrow_type) else arrow_type
        return types.is_string(arrow_type) or types.is_large_string(arrow_type)
    return types.is_integer(arrow_type) or (kind is float and types.is_floating(arrow_type))
