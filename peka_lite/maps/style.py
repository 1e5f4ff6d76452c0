"""One look for every figure of the book and of reports."""

from __future__ import annotations

STYLE = "peka_lite.maps.peka"  # peka.mplstyle beside this file, by the name that matplotlib finds it under


def use_style() -> None:
    """Draw from now on in the project's matplotlib style; in Jupyter, as vector graphics.

    The style is ``peka_lite/maps/peka.mplstyle``, in the color-blind-safe colors of Okabe and Ito.
    ``plt.style.use("peka_lite.maps.peka")`` sets it alone.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> import peka_lite as pk
    >>> with plt.rc_context():
    ...     pk.maps.use_style()
    ...     plt.rcParams["axes.spines.top"], plt.rcParams["image.cmap"]
    (False, 'viridis')
    """
    import sys

    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    if "ipykernel" in sys.modules:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg")
