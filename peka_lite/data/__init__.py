"""HEST-1k's layout, tiles and counts: reading, checking and choosing (PEKA, section 3.1)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names: __init__.pyi
