"""Where the examples in docstrings run: each in an empty folder of its own, drawing without a window."""

import matplotlib
import pytest

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _example_alone(request):
    """Give a doctest its own working folder, and close the figures it leaves; other tests are left as they are."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    yield
    from matplotlib import pyplot

    pyplot.close("all")
