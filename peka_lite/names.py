"""Names that others chose (genes, slides, cohorts), as they are: in file names, figures, Markdown and CSV files."""

from __future__ import annotations

import csv
import hashlib
import os
import re
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST = 160  # bytes of a file's name, before its suffix
_NUMBERS = ("fold", "pcc", "n_train", "n_test")


def file_name(name: str, given: dict[str, object], *, of: object = None) -> str:
    """Return a file's name for any text, other than those given before, also where a disk knows no capitals.

    Parameters
    ----------
    name
        Any text. Letters, digits, ``_``, ``.`` and ``-`` stay as they are, others become ``-``.
    given
        Names given before, to which this one is added.
    of
        What the file is of, where another may have the same `name`; the name itself by default.
    """
    of = name if of is None else of
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-")
    if len(plain.encode()) <= LONGEST and given.setdefault(plain.casefold(), of) == of:
        return plain
    plain = plain.encode()[: LONGEST - 11].decode(errors="ignore")
    plain += f"-{hashlib.sha256(repr(of).encode()).hexdigest()[:10]}"
    given[plain.casefold()] = of
    return plain


def as_written(figure: Figure) -> Figure:
    r"""Draw every text of a figure letter by letter: ``$\frac{$`` in a gene's name is no formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def shown(name: str, *, longest: int = 40) -> str:
    """Return a name on one line, cut where it is long."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def in_markdown(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line, in a table too.

    Examples
    --------
    >>> from peka_lite.names import in_markdown
    >>> print(in_markdown("<b>|a*"))
    \<b>\|a\*
    """
    return re.sub(r"([\\`*<|])", r"\\\1", " ".join(text.splitlines()))


def write_metrics(table: pd.DataFrame, path: str | os.PathLike) -> None:
    """Write a result table as CSV."""
    returns = table["gene"].str.contains("\r", regex=False).any()  # which only quotes keep from ending a line
    table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)


def read_metrics(path: str | os.PathLike) -> pd.DataFrame:
    """Read a run's ``metrics.csv``; a gene that is called NA, nan or 1e5 keeps its name."""
    columns = pd.read_csv(path, nrows=0).columns
    text = dict.fromkeys(columns.difference(_NUMBERS), str)
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values={"pcc": [""]})
