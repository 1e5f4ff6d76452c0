"""Write received names (genes, slides, cohorts) unchanged to file names, figures, Markdown, HTML and CSV."""

from __future__ import annotations

import difflib
import hashlib
import html
import os
import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LONGEST = 160  # bytes of a file name without its suffix
_LINE_START = re.compile(r"^([#>=%:(~]|[-+](?![\d.])|\d{1,9}(?=[.)](?:\s|$)))")
_FORMULA = re.compile(
    r"(^|[;,\t|])([\s\"]*)(?=[=+\-@\uff1d\uff0b\uff0d\uff20])"
    r"(?![-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*(?:$|[;,|]))"
)  # at the start of a cell, for any separator of a spreadsheet; numbers do not match


def unique_file_name(name: str, given: dict[str, object], *, of: object = None) -> str:
    """Return a file name for any text, distinct from those `given` earlier even if the disk ignores case.

    Letters, digits, ``_``, ``.`` and ``-`` are unchanged, others become ``-``. The name is added to `given`. `of` is
    the object that the file is of, if several may have the same `name`.
    """
    of = name if of is None else of
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-")
    if len(plain.encode()) <= LONGEST and given.setdefault(plain.casefold(), of) == of:
        return plain
    plain = plain.encode()[: LONGEST - 11].decode(errors="ignore")
    plain += f"-{hashlib.sha256(repr(of).encode()).hexdigest()[:10]}"
    given[plain.casefold()] = of
    return plain


def disable_mathtext(figure: Figure) -> Figure:
    r"""Draw the texts of a figure literally: ``$\frac{$`` in a gene's name is not a formula."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def escape_control(text: object, *, lines: bool = False) -> str:
    r"""Escape the characters of a text that control a terminal or a page.

    These are control characters (colors, cursor, window titles), marks of text direction, line separators, and lone
    surrogates. With `lines`, line ends are unchanged.
    """
    return "".join(
        letter
        if letter.isprintable() or unicodedata.category(letter) == "Zs" or (lines and letter == "\n")
        else letter.encode("unicode_escape").decode()
        for letter in str(text)
    )


def short_name(name: str, *, longest: int = 40) -> str:
    """Return a name on one line, as `escape_control`, truncated to `longest` characters."""
    name = escape_control(name)
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def escape_markdown(text: object) -> str:
    r"""Escape text for Markdown, on one line, also in tables and at the start of a line.

    It becomes no HTML, link, image, formula, emphasis, heading or list, and no role or directive of MyST.
    """
    text = escape_control(" ".join(str(text).splitlines())).strip()
    text = re.sub(r"[\\`*<|\[{$~]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)
    return _LINE_START.sub(lambda at: f"{at[0]}\\" if at[0].isdigit() else f"\\{at[0]}", text)


def inline_code(text: object) -> str:
    """Return text as inline code of Markdown, on one line, with any backticks."""
    text = escape_control(text) or " "
    fence = _fence(text, 1)
    blank = " " if text[0] in "` " or text[-1] in "` " else ""
    return f"{fence}{blank}{text}{blank}{fence}"


def fenced_code(code: str, language: str) -> str:
    """Return code as a fenced block of Markdown, with any backticks."""
    fence = _fence(code, 3)
    return f"{fence}{language}\n{escape_control(code, lines=True).rstrip()}\n{fence}"


def escape_html(text: object) -> str:
    """Escape text for HTML, between tags and in quoted attributes."""
    return html.escape(escape_control(text))


def escape_formula(value: object) -> object:
    """Prefix text with an apostrophe if a spreadsheet would read it as a formula."""
    return _FORMULA.sub(r"\1\2'", escape_control(value)) if isinstance(value, str) else value


def write_spreadsheet_csv(table: pd.DataFrame, path: str | os.PathLike, *, index: bool) -> None:
    """Write a table as CSV for spreadsheets, with `escape_formula` for its text, index and columns."""
    import pandas as pd

    texts = [column for column, kind in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    table = table.copy()
    for column in texts:
        table.isetitem(column, table.iloc[:, column].map(escape_formula))
    table.rename(index=escape_formula if index else None, columns=escape_formula).to_csv(path, index=index)


def _fence(text: str, least: int) -> str:
    """Return `least` backticks, or more than any sequence of them in a text has."""
    return "`" * max(least, *(len(ticks) + 1 for ticks in re.findall("`+", text)), 0)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'bone'?"``, or empty text if no known name is similar."""
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
