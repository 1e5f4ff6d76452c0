"""Names of the adapter methods and of the layers that they adapt."""

from __future__ import annotations

METHODS = ("none", "bone", "lora", "adalora", "miss")

LAYERS = ("qkv", "proj")
