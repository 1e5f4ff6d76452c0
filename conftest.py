"""Run each docstring example in an empty folder and without a display."""

import matplotlib
import pytest

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _isolate_doctest(request):
    """Run a doctest in an empty working folder, and close its figures; other tests are unchanged."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("tmp_path"))
    yield
    from matplotlib import pyplot

    pyplot.close("all")
