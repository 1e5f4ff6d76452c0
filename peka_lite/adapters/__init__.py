"""Adapters of a frozen network: Bone (PEKA, equation 3), LoRA, AdaLoRA and MiSS."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names: __init__.pyi
