"""Fit and score the linear probe h(F(x)): PCA, ridge and Pearson correlation (PEKA, equations 1 and 7)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names: __init__.pyi
