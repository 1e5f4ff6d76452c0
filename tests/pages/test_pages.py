"""The built book in a browser: every page reads, folds, scrolls and takes keys, and asks no other host for anything."""

import functools
import http.server
import re
import shutil
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "book" / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEAVIEST = 3_000_000  # bytes of a page and all it loads, unpacked
PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 900}


def toc_files(entry):
    """Every `file` of a table of contents, at any depth."""
    if isinstance(entry, list):
        return [name for part in entry for name in toc_files(part)]
    if not isinstance(entry, dict):
        return []
    return [*([entry["file"]] if "file" in entry else []), *toc_files(list(entry.values()))]


TOC = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
CHAPTERS = [name for name in toc_files(TOC) if name.startswith("notebooks/")]
PAGES = [*CHAPTERS, *(name for name in [TOC["root"], *toc_files(TOC)] if name not in CHAPTERS)]
PAGES += ["search", "genindex", "py-modindex"]


# Links, without a browser


class Links(HTMLParser):
    """Ids of a page, and what it links to or loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key == "id" or (tag == "a" and key == "name"):
                self.ids.add(value)
            elif key in ("href", "src") and value:
                self.targets.add(value)


@pytest.fixture(scope="module")
def html():
    """Folder of the built book."""
    if not (HTML / "index.html").is_file():
        pytest.skip("book/_build/html is absent: run `make book` first")
    return HTML


def test_links_pictures_and_anchors_lead_somewhere(html):
    pages = {path: Links(path) for path in html.rglob("*.html") if "_static" not in path.parts}
    broken = []
    for path, page in pages.items():
        page_path = path.relative_to(html).as_posix()
        for target in page.targets:
            parts = urlsplit(urljoin(f"book://x/{page_path}", target))
            if parts.scheme != "book":
                continue
            there = html / unquote(parts.path).lstrip("/")
            if not there.is_file():
                broken.append(f"{page_path}: {target} does not exist")
            elif parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids:
                broken.append(f"{page_path}: {target} has no such id")
    assert not broken


def test_every_page_is_built(html):
    assert all((html / f"{page}.html").is_file() for page in PAGES)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {Path(name).name for name in CHAPTERS}


def test_front_page_opens_with_a_map(html):
    body = (html / "index.html").read_text()
    body = body[body.index("<article") :]
    picture = re.search(r"<img[^>]*>", body)
    assert "front_map" in picture.group(0)
    assert picture.start() < 2500
    assert 'alt="In: a tile of an H&amp;E slide' in picture.group(0)


def test_api_page_documents_public_names(html):
    import peka_lite

    page = (html / "api.html").read_text()
    assert not [name for name in peka_lite.__all__ if f".{name}" not in page and name != "BACKBONES"]


def test_colab_buttons_are_there_exactly_where_there_is_an_address(html):
    address = yaml.safe_load((ROOT / "book" / "_config.yml").read_text())["repository"]["url"]
    having = {name for name in CHAPTERS if "colab.research.google.com" in (html / f"{name}.html").read_text()}
    assert having == (set(CHAPTERS) if address else set())


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_was_run_and_drew_a_figure(html, name):
    cells = [c for c in nbformat.read(html.parents[1] / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code"]
    assert all(c.execution_count for c in cells if c.source), name
    outputs = [o for c in cells for o in c.outputs]
    assert any("image/svg+xml" in o.get("data", {}) for o in outputs)
    printed = "".join(o["text"] for o in outputs if o.output_type == "stream")
    assert "\x1b" not in printed  # nothing that only a terminal understands


def test_no_markup_is_left_as_text(html):
    """A table or a field list that the build does not know comes out as a paragraph with its signs."""
    left = {page.name: re.findall(r"<p>(?:\||:\w+:)[^<]{,40}", page.read_text()) for page in html.rglob("*.html")}
    assert not {name: hits for name, hits in left.items() if hits}


# Pages in a browser


@dataclass
class Opened:
    """A page at a desk's width, in light mode; errors while it loaded, and its requests."""

    name: str
    page: object
    wrong: list = field(default_factory=list)
    requests: list = field(default_factory=list)


@pytest.fixture(scope="module")
def site(html):
    """Address of the book, served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path == "/favicon.ico":  # chromium asks once; the book has none
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """One headless Debian chromium for all pages."""
    if not CHROMIUM:
        pytest.skip("no chromium is on the PATH: pages cannot be opened")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pages cannot be opened"
    )
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        yield chromium
        chromium.close()


@contextmanager
def opening(browser, site, name, query=""):
    """Open a page of the book; what it asks other hosts for is noted."""
    if not (HTML / f"{name}.html").is_file():
        pytest.skip(f"book/_build/html/{name}.html is absent: run `make book` first")
    page = browser.new_page(viewport=DESK, color_scheme="light", reduced_motion="reduce")
    opened = Opened(name, page)

    def record(request):
        if not request.url.startswith((site, "data:", "blob:")):
            opened.wrong.append(f"asks another host: {request.url}")
        opened.requests.append(request.url)

    page.on("request", record)
    page.on("console", lambda message: message.type == "error" and opened.wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: opened.wrong.append(f"script: {error}"))
    page.on("requestfailed", lambda failed: opened.wrong.append(f"failed: {failed.url}"))
    page.goto(f"{site}{name}.html{query}")
    page.add_style_tag(
        content="* { transition: none !important; animation: none !important; }"
        "[data-unseen] { visibility: hidden !important; }"
    )
    yield opened
    page.close()


@pytest.fixture(scope="module", params=PAGES)
def opened(request, site, browser):
    """Each page in turn, loaded once for all tests of it."""
    with opening(browser, site, request.param) as opened:
        yield opened


@contextmanager
def unfolded(page):
    """Open all that is folded, for as long as this lasts."""
    page.evaluate("document.querySelectorAll('details:not([open])').forEach((e) => e.setAttribute('open', 'test'))")
    yield
    page.evaluate("document.querySelectorAll('details[open=test]').forEach((e) => e.removeAttribute('open'))")


def test_loads_without_an_error_or_another_host(opened):
    assert not opened.wrong, opened.name


def test_weighs_little(opened, html, site):
    files = {html / unquote(urlsplit(url).path).lstrip("/") for url in opened.requests if url.startswith(site)}
    sizes = {path.relative_to(html).as_posix(): path.stat().st_size for path in files if path.is_file()}
    assert len(sizes) > 5, f"{opened.name}: its style and scripts were not counted"
    assert sum(sizes.values()) < HEAVIEST, (opened.name, sorted(sizes.items(), key=lambda item: -item[1])[:5])


def test_pictures_are_drawn_and_have_words(opened):
    wrong = opened.page.evaluate("""() => [...document.images].flatMap((e) => {
      const wrong = [], alt = e.getAttribute("alt"), name = e.outerHTML.slice(0, 120);
      if (!e.complete || !e.naturalWidth) wrong.push(`not drawn: ${name}`);
      const decorative = alt === "" && e.closest(".peka-viewer");  // the canvas over it has the words
      if (!decorative && !alt?.trim()) wrong.push(`no alt: ${name}`);
      if (/_images[/]|[.](png|svg|jpe?g)$/.test(alt)) wrong.push(`alt is a file's name: ${name}`);
      return wrong;
    })""")
    assert not wrong, opened.name


def test_equations_are_drawn(opened):
    wrong = opened.page.evaluate(r"""() => {
      const wrong = [...document.querySelectorAll(".math")]
        .filter((e) => !(e.querySelector("math")?.getBoundingClientRect().width > 0))
        .map((e) => `not drawn: ${e.textContent}`);
      const text = document.createTreeWalker(document.querySelector("article") ?? document.body, NodeFilter.SHOW_TEXT);
      while (text.nextNode()) {
        const { data, parentElement } = text.currentNode;
        if (/\\[(\[a-zA-Z]|\$\$/.test(data) && !parentElement.closest("pre, code, script, style, .sig"))
          wrong.push(`TeX in the text: ${data.trim().slice(0, 80)}`);
      }
      return wrong;
    }""")
    assert not wrong, opened.name


def test_fits_a_phone(opened):
    opened.page.set_viewport_size(PHONE)
    width, wide = opened.page.evaluate("""() => {
      const scrolls = (e) => e && e !== document.documentElement
        && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
      const wide = [...document.querySelectorAll("body *")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement));
      return [document.documentElement.scrollWidth, wide.slice(0, 5).map((e) => e.outerHTML.slice(0, 120))];
    }""")
    opened.page.set_viewport_size(DESK)
    assert width <= PHONE["width"], (opened.name, wide)


# What a sighted reader sees of an element's focus: a ring on it, on what is drawn in its place, or on its label.
FOCUS = """() => {
  const name = (e) => e.outerHTML.slice(0, 120);
  const ring = (e) => [e, e.nextElementSibling, e.parentElement].map((x) => {
    if (!x || !x.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return "";
    const s = getComputedStyle(x), solid = s.outlineStyle !== "none" && parseFloat(s.outlineWidth) > 0;
    return `${solid ? s.outline : ""} ${s.boxShadow}`;
  });
  const check = (e) => {
    const on = ring(e);
    e.blur();
    const off = ring(e);
    e.focus({ preventScroll: true });
    return on.some((look, i) => look && look !== off[i]) ? [] : [`no visible focus: ${name(e)}`];
  };
"""


def test_keyboard_shows_where_it_is(opened):
    page, wrong, seen = opened.page, [], []
    page.evaluate("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    for _ in range(15):
        page.keyboard.press("Tab")
        name, bad = page.evaluate(FOCUS + "return [name(document.activeElement), check(document.activeElement)]; }")
        wrong += bad
        seen.append(name)
    assert len(set(seen)) > 5, f"{opened.name}: Tab does not leave {seen[-1]}"
    wrong += page.evaluate(
        FOCUS
        + """const all = document.querySelectorAll("main :is(a[href], button, summary, input, select, [tabindex='0'])");
        return [...all].filter((e) => e.checkVisibility()).slice(0, 60).flatMap((e) => {
          e.focus({ preventScroll: true });
          return document.activeElement === e ? check(e) : [];
        }); }"""
    )
    assert not wrong, opened.name


@pytest.mark.parametrize("opened", CHAPTERS, indirect=True)
def test_solutions_are_folded_and_open(opened):
    solutions = opened.page.locator(".cell.tag_solution")
    if not solutions.count():
        pytest.skip(f"{opened.name} has no exercises")
    for i in range(solutions.count()):
        fold, code = solutions.nth(i).locator("summary"), solutions.nth(i).locator("pre").first
        for shown in (False, True, False):
            assert code.is_visible() == shown, f"{opened.name}: solution {i + 1} is {'folded' if shown else 'open'}"
            fold.click()
        fold.click()


def violations(page, *, context=None, **options):
    """What axe-core finds and calls serious or critical, and headings out of order: rule, element, and why."""
    from axe_playwright_python.sync_playwright import Axe

    hits = Axe().run(page, context=context, options={"resultTypes": ["violations"], **options}).response["violations"]
    ours = ("heading-order", "empty-heading", "page-has-heading-one")
    return [
        (rule["id"], node["target"], node["html"][:120], " ".join(node["failureSummary"].split())[:300])
        for rule in hits
        if rule["impact"] in ("serious", "critical") or rule["id"] in ours
        for node in rule["nodes"]
    ]


def test_axe_finds_nothing_serious(opened):
    with unfolded(opened.page):
        hits = violations(opened.page, rules={"color-contrast": {"enabled": False}})
    assert not hits, opened.name


# Contrast is looked at once for every pair of text and ground, the rest hidden in its place: axe needs minutes for all
# words of a long page.
ONE_OF_EACH = """() => {
  const seen = new Set(), kept = new Set(), all = [...document.querySelectorAll("body *")];
  for (const e of all) {
    if (![...e.childNodes].some((c) => c.nodeType === 3 && c.data.trim()) || !e.checkVisibility()) continue;
    let ground = e, opacity = 1;
    while (ground && getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
    for (let x = e; x; x = x.parentElement) opacity *= getComputedStyle(x).opacity;
    const { color, fontSize, fontWeight } = getComputedStyle(e);
    const look = [color, ground && getComputedStyle(ground).backgroundColor, opacity, fontSize, fontWeight].join();
    if (seen.has(look)) continue;
    seen.add(look);
    e.setAttribute("data-contrast", "");
    for (let x = e; x; x = x.parentElement) kept.add(x);
  }
  for (const e of all) e.toggleAttribute("data-unseen", !kept.has(e));
  return seen.size;
}"""
SHOW_ALL = """() => ["data-contrast", "data-unseen"].forEach((name) =>
  document.querySelectorAll(`[${name}]`).forEach((e) => e.removeAttribute(name)))"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(opened, theme):
    page = opened.page
    page.emulate_media(color_scheme=theme)
    try:
        page.wait_for_function("(theme) => document.documentElement.dataset.theme === theme", arg=theme)
        ink, paper = page.evaluate("""() => ["color", "backgroundColor"].map((key) =>
          getComputedStyle(document.body)[key].match(/[0-9]+/g).slice(0, 3).reduce((sum, v) => sum + Number(v), 0))""")
        assert (ink < paper) == (theme == "light"), f"{opened.name}: {theme} mode has the other's colors"
        with unfolded(page):
            assert page.evaluate(ONE_OF_EACH) > 3
            hits = violations(page, context={"include": ["[data-contrast]"]}, runOnly=["color-contrast"])
    finally:
        page.evaluate(SHOW_ALL)
        page.emulate_media(color_scheme="light")
    assert not hits, (opened.name, theme)


# What single pages do


def test_search_finds_the_chapter_on_bone(browser, site):
    with opening(browser, site, "search", "?q=Bone") as opened:
        opened.page.locator("#search-results a[href*='04_bone_training']").first.wait_for(timeout=10_000)
        assert not opened.wrong


def test_button_changes_the_theme_and_the_next_page_keeps_it(browser, site):
    with opening(browser, site, "index") as opened:
        page, theme = opened.page, "document.documentElement.dataset.theme"
        first = page.evaluate(theme)
        for _ in range(3):  # auto, light, dark
            page.locator(".theme-switch-button:visible").first.click()
            if page.evaluate(theme) != first:
                break
        chosen = page.evaluate(theme)
        assert chosen != first
        page.goto(f"{site}search.html")
        assert page.evaluate(theme) == chosen


def test_viewer_draws_another_map_for_another_gene(browser, site):
    with opening(browser, site, "notebooks/06_spatial_pcc_maps") as opened:
        viewer = opened.page.locator(".peka-viewer")
        if not viewer.count():
            pytest.skip("notebooks/06_spatial_pcc_maps.html has no viewer: the notebook was not run")

        def drawn():
            return viewer.locator("canvas").evaluate("(canvas) => canvas.toDataURL()")

        maps = []
        for gene in (0, 1):
            viewer.locator("select").select_option(index=gene)
            maps.append(drawn())
        assert maps[0] != maps[1]
        assert re.search(r"[A-Za-z0-9+/]{200}", maps[0]), "the canvas is empty"
        viewer.locator("input[value=predicted]").check(force=True)
        assert drawn() != maps[1]
        viewer.locator("canvas").press("ArrowRight")
        assert re.search(r"\d", viewer.locator("output").inner_text()), "no spot is read out"
        assert not opened.wrong
