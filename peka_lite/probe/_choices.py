"""Check of the probe's ridge penalty."""

from __future__ import annotations

from peka_lite._core.names import did_you_mean


def check_alpha(alpha, *, names: tuple[str, ...] = ("hest",)) -> None:
    """Refuse what is no ridge penalty: neither one of the names nor a number of at least 0."""
    meant = ""
    if isinstance(alpha, str):
        if alpha in names:
            return
        meant = did_you_mean(alpha, names)
    elif isinstance(alpha, int | float) and alpha >= 0:
        return
    raise ValueError(f"alpha is {', '.join(map(repr, names))} or a number of at least 0, not {alpha!r}{meant}")
