"""Adapter methods and the layers they adapt."""

METHODS = ("none", "bone", "lora", "adalora", "miss")
LAYERS = ("qkv", "proj")
