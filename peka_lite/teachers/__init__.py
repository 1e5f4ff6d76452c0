"""Teachers T(x) and their pseudo-labels l = KNN(x) (PEKA, section 2.2)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names: __init__.pyi
