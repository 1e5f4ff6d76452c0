"""Train a student on teacher embeddings and pseudo-labels (PEKA, equations 2 and 4 to 6)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names: __init__.pyi
