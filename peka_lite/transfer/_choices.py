"""Spaces in which student and teacher are compared."""

KD_SPACES = ("embedding", "logits")
