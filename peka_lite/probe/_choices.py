"""Check the regularization strength of the probe."""

from __future__ import annotations

from peka_lite._core.names import did_you_mean


def check_alpha(alpha, *, names: tuple[str, ...] = ("hest",)) -> None:
    """Raise a ValueError unless `alpha` is one of the names or a number of at least 0."""
    suggestion = ""
    if isinstance(alpha, str):
        if alpha in names:
            return
        suggestion = did_you_mean(alpha, names)
    elif isinstance(alpha, int | float) and alpha >= 0:
        return
    raise ValueError(f"alpha is {', '.join(map(repr, names))} or a number of at least 0, not {alpha!r}{suggestion}")
