"""Cross-validate and score: folds, leakage checks, PCC with confidence intervals, noise ceilings."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names: __init__.pyi
