"""Names that settings of the data may take, and what to do at a closed gate."""

from __future__ import annotations

MINI_FORMAT = 3  # of the embedded cohort; raise it when the same seed would give other bytes
NORMALIZATIONS = ("log1p-cp10k", "log1p")

#: How access is granted where one has to ask.
ACCESS = {
    "automatic": "it opens at once after asking",
    "manual": "it is granted by hand, which may take days",
    "institution": "it is granted to institutional e-mail addresses alone, by hand, which may take days",
}


def explain_gate(what: str, gate: str | None, access: str | None) -> str:
    """Say what to do at a closed gate: where to ask, and how access is granted."""
    ask = f"{what} is gated: ask for access at {gate}" if gate else f"{what} is gated: ask its owner for access"
    how = f"; {ACCESS[access]}" if access else ""
    return f"{ask}, then log in with `hf auth login` or set HF_TOKEN{how}"
