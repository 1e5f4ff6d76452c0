"""Spaces in which student and teacher are compared."""

from __future__ import annotations

KD_SPACES = ("embedding", "logits")
