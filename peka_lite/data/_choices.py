"""Values that data settings may take, and how to get access to gated repositories."""

from __future__ import annotations

MINI_FORMAT = 3  # of the embedded cohort; increment it when the same seed gives other bytes
NORMALIZATIONS = ("log1p-cp10k", "log1p")

#: How access to a gated repository is granted.
ACCESS = {
    "automatic": "access is granted at once",
    "manual": "access is granted by hand, which may take days",
    "institution": "access needs an institutional e-mail address and may take days",
}


def explain_gate(name: str, gate: str | None, access: str | None) -> str:
    """Return where to ask for access to something gated, and how access is granted."""
    ask = f"{name} is gated: ask for access at {gate}" if gate else f"{name} is gated: ask its owner for access"
    how = f"; {ACCESS[access]}" if access else ""
    return f"{ask}, then log in with `hf auth login` or set HF_TOKEN{how}"
