"""What book/offline.py makes of equations and figures, without a build."""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("latex2mathml", reason="latex2mathml is not installed: equations cannot be converted")
pytest.importorskip("sphinx", reason="sphinx is not installed")


@pytest.fixture(scope="module")
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "book"))
        import offline

        yield offline
        sys.modules.pop("offline", None)


def test_an_equation_becomes_mathml(offline):
    element = offline.mathml(r"\tau^2\,\mathrm{KL}(p\,\|\,q)", display="block")
    assert element.startswith("<math")
    assert 'display="block"' in element
    assert "<msup><mi>&#x003C4;</mi><mn>2</mn></msup>" in element
    assert "\\" not in element


def test_an_unknown_command_is_named(offline):
    with pytest.raises(ValueError, match=r"\\qeq is not known"):
        offline.mathml(r"a \qeq b")


def test_names_of_functions_keep_their_distance(offline):
    assert 'rspace="0.17em" form="prefix">log</mo><mi>q' in offline.mathml(r"\log q")
    assert "<mi>log</mi>" in offline.mathml(r"\log(q)")


def picture(size):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 4), dtype=np.uint8)).save(out, "PNG")
    return f'<image href="data:image/png;base64,\n{base64.b64encode(out.getvalue()).decode()}"/>'


def test_large_pictures_in_a_figure_get_lighter_and_small_ones_stay(offline):
    from PIL import Image

    small, large = picture(10), picture(200)
    svg = offline.lighter_svg(f"<svg>{small}{large}</svg>")
    assert small in svg
    assert len(svg) < 0.8 * len(small + large)
    webp = svg.split("data:image/webp;base64,")[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(webp))).size == (200, 200)
