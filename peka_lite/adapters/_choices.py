"""Adapter methods and the layers they adapt."""

from __future__ import annotations

METHODS = ("none", "bone", "lora", "adalora", "miss")

LAYERS = ("qkv", "proj")
