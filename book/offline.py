"""Sphinx extension: pages that need no other host, no script for what the build can do, and few bytes."""

import base64
import io
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from PIL import Image
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

logger = logging.getLogger(__name__)

# Launching a live kernel, and a renderer of equations: both would be fetched, neither is used.
UNUSED_SCRIPTS = ("thebe", "mathjax")


def mathml(tex: str, *, display: str = "inline") -> str:
    """Return TeX as a MathML element, which browsers draw by themselves.

    Raises
    ------
    ValueError
        When a command is not known; it would stand in the page as it is.
    """
    element = convert(tex, display=display)
    # A name such as log is an operator: without space around it, p log q reads as one word.
    names = r"<mi>(arg|cos|det|exp|inf|lim|ln|log|max|min|sin|sup|tan)</mi>(?=<m[^o])"
    element = re.sub(names, r'<mo lspace="0.17em" rspace="0.17em" form="prefix">\1</mo>', element)
    unknown = re.search(r"\\[A-Za-z]+", element)
    if unknown:
        raise ValueError(f"{unknown.group(0)} is not known to latex2mathml: write the equation without it")
    return element


def _write(translator, node, tex, *, display):
    try:
        translator.body.append(mathml(tex, display=display))
    except Exception as error:  # the converter has one class for each mistake in TeX
        logger.warning("equation %r: %s", tex, error or type(error).__name__, location=node)


def inline_math(translator, node):
    """Write an equation in a line of text."""
    translator.body.append(translator.starttag(node, "span", "", CLASS="math"))
    _write(translator, node, node.astext(), display="inline")
    translator.body.append("</span>")
    raise nodes.SkipNode


def block_math(translator, node):
    r"""Write an equation on its own line, with the number that Sphinx or a \tag gives it."""
    # The theme makes whatever has the second class a stop of the Tab key where it scrolls.
    translator.body.append(translator.starttag(node, "div", CLASS="math jp-RenderedHTMLCommon"))
    tag = re.search(r"\\tag\{([^{}]*)\}", node.astext())
    number = get_node_equation_number(translator, node) if node["number"] else tag and tag.group(1)
    if number:
        translator.body.append(f'<span class="eqno">({translator.encode(number)})')
        if node["number"]:
            translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    tex = node.astext().replace(tag.group(0), "") if tag else node.astext()
    _write(translator, node, tex, display="block")
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def leaner_page(app, pagename, templatename, context, doctree):
    """Drop scripts that nothing uses, and give bibliography entries the role that their list asks for."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if not any(word in f"{script} {script.attributes.get('body', '')}".lower() for word in UNUSED_SCRIPTS)
    ]
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def lighter_svg(svg: str, *, above: int = 20_000) -> str:
    """Return an SVG figure whose large pictures are WebP: a quarter of the bytes of a PNG of stained tissue."""

    def smaller(match):
        data = base64.b64decode(match.group(1))
        if len(data) < above:
            return match.group(0)
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).save(out, "WEBP", quality=92)
        return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"

    return re.sub(r"data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)", smaller, svg)


def lighter_figures(app, exception):
    """Rewrite the figures that this build copied."""
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir, "_images").glob("*.svg"):
        svg = path.read_text()
        light = lighter_svg(svg)
        if light != svg:
            path.write_text(light)


def setup(app):
    """Register all of it with Sphinx."""
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("html-page-context", leaner_page, priority=900)
    app.connect("build-finished", lighter_figures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
