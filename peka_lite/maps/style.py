"""Set the matplotlib style of the book's and the reports' figures."""

from __future__ import annotations

STYLE = "peka_lite.maps.peka"  # matplotlib's name of peka.mplstyle in this folder


def use_style() -> None:
    """Switch to the project's matplotlib style; in Jupyter, also to vector graphics.

    The style is ``peka_lite/maps/peka.mplstyle``, with the color-blind-safe palette of Okabe and Ito.
    ``plt.style.use("peka_lite.maps.peka")`` sets only the style.

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
