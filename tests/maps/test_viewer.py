"""The slide viewer: what it holds is what it was given, nothing in a name becomes code, and it works in a browser."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
from PIL import Image
from scipy.stats import pearsonr

from peka_lite.maps.local_pcc import local_pcc
from peka_lite.maps.viewer import SlideViewer, slide_viewer

NASTY = "</script><b>&'\"{{data}}"


def made_up(n=40, genes=4, *, names=None, image=(150, 200), seed=0, **options):
    """A viewer of random spots on a gray slide, and what it was made from."""
    rng = np.random.default_rng(seed)
    factors = {"tissue_downscaled_fullres_scalef": 0.1, "spot_diameter_fullres": 55.0}
    picture = {"images": {"downscaled_fullres": np.full((*image, 3), 200, np.uint8)}, "scalefactors": factors}
    xy = rng.uniform(200, 1300, (n, 2))
    adata = ad.AnnData(np.ones((n, 1)), obsm={"spatial": xy}, uns={"spatial": {"S": picture}})
    Y = rng.gamma(1.0, 1.0, (n, genes)) * np.arange(1, genes + 1)
    P = Y + rng.normal(size=Y.shape) * np.arange(genes, 0, -1)
    names = names or [f"G{g}" for g in range(genes)]
    options = {"n_neighbors": 6} | options
    return adata, Y, P, names, slide_viewer(adata, Y, P, genes=names, **options)


def data_of(viewer):
    return json.loads(re.search(r"\}\)\((\{.*\})\);\n</script>", viewer.html).group(1))


def numbers(text, dtype=np.uint8):
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def picture_of(viewer):
    text = re.search(r'src="data:image/jpeg;base64,([^"]+)"', viewer.html).group(1)
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_expression_comes_back_within_half_a_step():
    _, Y, P, names, viewer = made_up()
    data = data_of(viewer)
    at = [names.index(gene) for gene in data["genes"]]
    for key, given in (("measured", Y), ("predicted", P)):
        low, step = np.array(data["low"]), np.array(data["step"])
        back = low + step * numbers(data[key]).reshape(len(names), -1).T
        assert (np.abs(back - given[:, at]) <= step / 2 + 1e-12).all()
    both = np.concatenate([Y, P])[:, at]
    np.testing.assert_allclose(data["step"], np.ptp(both, axis=0) / 255)
    np.testing.assert_allclose(np.array(data["scale"]).T, np.percentile(both, [1, 99], axis=0))
    np.testing.assert_allclose(data["reach"], np.percentile(np.abs(Y - P)[:, at], 99, axis=0))


def test_correlations_come_back_and_nan_stays_nan():
    adata, Y, P, names, _ = made_up()
    Y[:, 2] = 1.0  # no correlation is defined for it
    data = data_of(slide_viewer(adata, Y, P, genes=names, n_neighbors=6))
    xy, local = adata.obsm["spatial"], numbers(data["local"]).reshape(len(names), -1)
    for gene, codes in zip(data["genes"], local, strict=True):
        g = names.index(gene)
        expected = local_pcc(xy, Y[:, [g]], P[:, [g]], n_neighbors=6)
        assert (np.isnan(expected) == (codes == 255)).all()
        np.testing.assert_allclose(codes[codes < 255] / 127 - 1, expected[codes < 255], atol=0.5 / 127 + 1e-9)
    over = local_pcc(xy, Y, P, over="genes")
    np.testing.assert_allclose(numbers(data["over"]) / 127 - 1, over, atol=0.5 / 127 + 1e-9)
    assert data["genes"][-1] == "G2"
    assert data["pcc"][-1] is None


def test_genes_are_offered_by_their_pcc():
    _, Y, P, names, viewer = made_up()
    data = data_of(viewer)
    pcc = {name: pearsonr(Y[:, g], P[:, g]).statistic for g, name in enumerate(names)}
    assert data["genes"] == sorted(names, key=pcc.get, reverse=True)
    np.testing.assert_allclose(data["pcc"], sorted(pcc.values(), reverse=True))


def test_a_flat_prediction_is_said_to_be_and_no_scale_is_one_value():
    adata, Y, P, names, _ = made_up(n=300)
    P[:, 0] = -0.5
    P[:, 1] = Y[:, 1] = 2.0
    Y[:, 2] = P[:, 2] = 0
    P[7, 2] = 3.0
    data = data_of(slide_viewer(adata, Y, P, genes=names, n_neighbors=6))
    scale, flat, reach = ({g: data[key][i] for i, g in enumerate(data["genes"])} for key in ("scale", "flat", "reach"))
    assert flat["G0"] == "does not vary on this slide, it is -0.5 on all 300 spots"
    assert (scale["G1"], reach["G1"]) == ([1.5, 2.5], 0.5)
    assert (scale["G2"], reach["G2"], flat["G2"]) == ([0, 3], 3, None)  # one hot spot
    assert flat["G3"] is None


def test_two_genes_have_no_correlation_over_genes():
    assert data_of(made_up(genes=2)[-1])["over"] == ""


def test_spots_lie_on_the_picture_where_they_lie_on_the_slide(mini_cohort):
    slide = mini_cohort.slides[0]
    Y = np.random.default_rng(0).random((slide.n_spots, 3))
    viewer = slide_viewer(slide.adata, Y, Y + 1, genes=list("ABC"))
    library = next(iter(slide.adata.uns["spatial"].values()))
    image, scale = library["images"]["downscaled_fullres"], library["scalefactors"]["tissue_downscaled_fullres_scalef"]
    picture = np.asarray(picture_of(viewer), dtype=float)
    place = numbers(data_of(viewer)["xy"], "<f4").reshape(-1, 2)
    here = picture[*(place[:, ::-1] * picture.shape[:2]).astype(int).T]
    there = image[*(slide.adata.obsm["spatial"][:, ::-1] * scale).astype(int).T].astype(float)
    assert np.corrcoef(here.ravel(), there.ravel())[0, 1] > 0.95


def test_a_large_image_is_made_small_and_keeps_its_shape():
    *_, viewer = made_up(image=(3000, 5000))
    assert max(picture_of(viewer).size) <= 1000
    adata, Y, P, names, _ = made_up(image=(3000, 5000))
    adata.obsm["spatial"] = adata.obsm["spatial"] * (30, 15)
    width, height = picture_of(slide_viewer(adata, Y, P, genes=names, n_neighbors=6)).size
    assert width == 1000
    assert 400 < height < 650


def test_fifty_genes_at_250_spots_are_small():
    *_, viewer = made_up(n=250, genes=50, n_neighbors=18)
    picture = len(re.search(r"base64,([^\"]+)\"", viewer.html).group(1))
    assert len(viewer.html) - picture < 100_000


def test_names_and_title_are_text_and_never_code():
    *_, viewer = made_up(names=[NASTY, "<img src=x>", "A&B"], genes=3, title=NASTY)
    assert viewer.html.count("</script>") == 1
    assert "<img src=x>" not in viewer.html
    assert "<b>" not in viewer.html
    assert "&lt;/script&gt;&lt;b&gt;&amp;&#x27;&quot;{{data}}" in viewer.html
    assert set(data_of(viewer)["genes"]) == {NASTY, "<img src=x>", "A&B"}


def test_the_same_input_gives_the_same_page_and_another_gives_another_id():
    first, again, other = (made_up(seed=s)[-1] for s in (0, 0, 1))
    assert first == again
    ids = [re.search(r'data-viewer="(\w+)"', v.html).group(1) for v in (first, other)]
    assert ids[0] != ids[1]
    assert all(v.html.count(i) == 2 for v, i in zip((first, other), ids, strict=True))


def test_nothing_is_left_to_fill_in_and_no_address_is_named():
    *_, viewer = made_up()
    assert "{{" not in viewer.html
    assert not re.search(r"https?://|@import|\bimport\(|fetch\(", viewer.html)


def test_it_shows_itself_and_its_repr_is_short():
    *_, viewer = made_up()
    assert viewer._repr_html_() == viewer.html
    assert repr(viewer) == "SlideViewer(title='4 genes at 40 spots')"


def test_save_writes_a_page_and_leaves_nothing_else(tmp_path):
    *_, viewer = made_up(title="Eins & zwei")
    assert viewer.save(tmp_path / "slide.html") == tmp_path / "slide.html"
    page = (tmp_path / "slide.html").read_text(encoding="utf-8")
    assert viewer.html in page
    assert "<title>Eins &amp; zwei</title>" in page
    assert [p.name for p in tmp_path.iterdir()] == ["slide.html"]


def test_a_save_that_fails_leaves_the_old_page(tmp_path, monkeypatch):
    *_, viewer = made_up()
    old = viewer.save(tmp_path / "slide.html").read_text(encoding="utf-8")
    monkeypatch.setattr("peka_lite.maps.viewer.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(viewer, title="another").save(tmp_path / "slide.html")
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("slide.html", old)]


def wrong(**changes):
    adata, Y, P, names, _ = made_up()
    given = {"adata": adata, "measured": Y, "predicted": P, "genes": names, "n_neighbors": 6}
    for key, change in changes.items():
        given[key] = change(given[key])
    adata, measured, predicted = (given.pop(key) for key in ("adata", "measured", "predicted"))
    return slide_viewer(adata, measured, predicted, **given)


def with_hole(A):
    A = A.copy()
    A[3, 1] = np.nan
    return A


def without(key):
    def take(adata):
        adata = adata.copy()
        del (adata.uns if key == "image" else adata.obsm)["spatial"]
        return adata

    return take


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"measured": lambda A: A[:-1]}, r"measured \(39, 4\), predicted \(40, 4\), adata and genes \(40, 4\)"),
        ({"predicted": lambda A: A[:, 1:]}, r"predicted \(40, 3\), adata and genes \(40, 4\)"),
        ({"genes": lambda g: g[1:]}, r"adata and genes \(40, 3\)"),
        ({"genes": lambda g: ["G0", *g[:3]]}, "genes: G0 given more than once"),
        ({"predicted": with_hole}, "predicted: G1 not finite at every spot"),
        ({"n_neighbors": lambda _: 40}, "n_neighbors must be at least 3 and below the 40 spots, not 40"),
        ({"adata": without("image")}, r"adata: .* an image 'downscaled_fullres' in uns\['spatial'\] are needed"),
        ({"adata": without("spots")}, r"adata: obsm\['spatial'\]"),
    ],
)
def test_input_that_disagrees_is_refused_by_name(changes, says):
    with pytest.raises(ValueError, match=says):
        wrong(**changes)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no browser can be driven")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium): the page cannot be opened")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that opens a page of viewers; at the end nothing may have been logged or asked for."""
    said, asked, contexts = [], [], []

    def opened(*viewers, width=900, **options):
        assert all(isinstance(v, SlideViewer) for v in viewers)
        viewers[0].save(path := tmp_path / "page.html")
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</main>", "".join(v.html for v in viewers[1:]) + "</main>"), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url.split(":")[0]))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.peka-viewer[data-ready]').length > 0")
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []
    assert set(asked) <= {"file", "data"}
    assert asked.count("file") == len(contexts)


def pixels(page, nth=0):
    return page.evaluate("n => document.querySelectorAll('.peka-viewer canvas')[n].toDataURL()", nth)


def drawn(page, places):
    """The colors (n, 4) at shares of the canvas' width and height, from a copy of it."""
    script = """places => {
        const c = document.querySelector('.peka-viewer canvas'), copy = new OffscreenCanvas(c.width, c.height);
        const pen = copy.getContext('2d', { willReadFrequently: true });
        pen.drawImage(c, 0, 0);
        return places.map(([x, y]) => [...pen.getImageData(x * c.width, y * c.height, 1, 1).data]) }"""
    return np.array(page.evaluate(script, places.tolist()))


LAYERS = ["measured", "predicted", "residual", "local", "over"]


def choose(page, layer):
    page.locator(f"input[value={layer}]").check()


def test_another_gene_draws_other_spots_and_says_so(opened):
    *_, viewer = made_up()
    page, data = opened(viewer), data_of(viewer)
    before = pixels(page)
    assert page.locator("option").all_inner_texts()[0] == f"{data['genes'][0]} ({data['pcc'][0]:.2f})"
    page.get_by_label("Gene, with its PCC on this slide").select_option("2")
    assert pixels(page) != before
    assert page.locator(".peka-about strong").inner_text() == f"PCC {data['pcc'][2]:.2f}"
    assert f"spots colored by {data['genes'][2]}, Measured" in page.get_by_role("img").last.get_attribute("aria-label")


def test_every_layer_draws_other_spots_and_has_its_own_scale(opened):
    page = opened(made_up()[-1])
    seen, scales = [], []
    for layer in LAYERS:
        choose(page, layer)
        seen.append(pixels(page))
        scales.append([text.lstrip("≤≥ ") for text in page.locator(".peka-ticks span").all_inner_texts()])
    assert len(set(seen)) == 5
    assert scales[0] == scales[1]
    assert scales[2][0] == "−" + scales[2][2]
    assert scales[3] == ["−1.00", "PCC over 6 neighbors", "1.00"]


def test_spots_have_the_colors_of_matplotlib(opened):
    from matplotlib import colormaps

    _, Y, _, names, viewer = made_up(n=12, n_neighbors=4)
    page, data = opened(viewer), data_of(viewer)
    page.get_by_label("Spot opacity").fill("100")
    place, g = numbers(data["xy"], "<f4").reshape(-1, 2), names.index(data["genes"][0])
    gaps = np.linalg.norm(place[:, None] - place, axis=-1) + np.eye(len(place))
    low, high = data["scale"][0]
    alone = np.flatnonzero(gaps.min(1) > 0.08)
    assert len(alone) >= 3
    expected = 255 * colormaps["viridis"](np.clip((Y[alone, g] - low) / (high - low), 0, 1))
    assert np.abs(drawn(page, place[alone]) - expected).max() < 8


def test_arrow_keys_walk_from_spot_to_spot_and_speak(opened):
    _, Y, P, names, viewer = made_up()
    page, data = opened(viewer), data_of(viewer)
    page.locator("canvas").focus()
    told = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
        told.append(page.locator("output[aria-live=polite]").inner_text())
    spots = [int(re.match(r"Spot (\d+) of 40", text).group(1)) - 1 for text in told]
    assert spots[0] == 0
    x, y = numbers(data["xy"], "<f4").reshape(-1, 2).T
    assert x[spots[1]] >= x[spots[0]]
    assert y[spots[2]] >= y[spots[1]]
    assert x[spots[3]] <= x[spots[2]]
    assert len(set(told)) >= 3
    g = names.index(data["genes"][0])
    value = re.search(r"Measured (−?[\d.]+), Predicted (−?[\d.]+)", told[-1])
    shown = [float(v.replace("−", "-")) for v in value.groups()]
    np.testing.assert_allclose(shown, [Y[spots[3], g], P[spots[3], g]], atol=data["step"][0] / 2 + 0.005)


def test_the_spot_under_the_pointer_is_read_out(opened):
    *_, viewer = made_up()
    page, data = opened(viewer), data_of(viewer)
    box = page.locator("canvas").bounding_box()
    x, y = numbers(data["xy"], "<f4").reshape(-1, 2)[7].tolist()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    assert page.locator("output").inner_text().startswith(f"Spot 8 of 40 ({data['spots'][7]})")


def test_opacity_reaches_the_spots(opened):
    page = opened(made_up()[-1])
    before = pixels(page)
    page.get_by_label("Spot opacity").fill("20")
    assert pixels(page) != before


def test_two_viewers_and_one_twice_do_not_collide(opened):
    first, second = made_up()[-1], made_up(seed=1)[-1]
    page = opened(first, second, first)
    before = [pixels(page, n) for n in range(3)]
    page.locator(".peka-viewer").nth(2).locator("input[value=residual]").check()
    page.locator(".peka-viewer").nth(1).locator("select").select_option("3")
    after = [pixels(page, n) for n in range(3)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    checked = page.eval_on_selector_all("input:checked", "inputs => inputs.map(i => i.value)")
    assert checked == ["measured", "measured", "residual"]


def test_it_leaves_no_name_behind(opened):
    own = "Object.getOwnPropertyNames(window)"
    with_viewer = set(opened(made_up()[-1]).evaluate(own))
    assert with_viewer == set(opened(replace(made_up()[-1], html="<p class='peka-viewer' data-ready>")).evaluate(own))


def test_names_of_genes_are_shown_as_they_are(opened):
    page = opened(made_up(names=[NASTY, "<img src=x>", "A&B"], genes=3, title=NASTY)[-1])
    assert {text.rsplit(" (", 1)[0] for text in page.locator("option").all_inner_texts()} == {
        NASTY,
        "<img src=x>",
        "A&B",
    }
    assert page.locator(".peka-title").inner_text() == NASTY
    assert page.title() == NASTY


def test_a_phone_shows_it_without_scrolling_sideways(opened):
    page = opened(
        made_up(title="A title_that_is_longer_than_any_phone_is_wide" * 2)[-1], width=360, device_scale_factor=3
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    canvas = page.locator("canvas").bounding_box()
    assert canvas["x"] >= 0
    assert canvas["x"] + canvas["width"] <= 360
    assert page.locator("canvas").evaluate("c => c.width") == pytest.approx(3 * canvas["width"], abs=1)


def test_the_canvas_follows_its_box(opened):
    page = opened(made_up()[-1], width=400)
    before = page.locator("canvas").evaluate("c => c.width")
    page.set_viewport_size({"width": 330, "height": 700})
    page.wait_for_function("w => document.querySelector('.peka-viewer canvas').width < w", arg=before)


def test_text_can_be_read_in_every_theme(opened):
    page = opened(made_up()[-1])
    contrast = """() => {
        const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2] };
        const paper = light(getComputedStyle(document.querySelector('.peka-viewer')).backgroundColor);
        return [...document.querySelectorAll('.peka-title, .peka-name, .peka-about span, output, select')].map(e => {
            const ink = light(getComputedStyle(e).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05) }) }"""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for theme in ("", "light", "dark"):
            page.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
            assert min(page.evaluate(contrast)) > 4.5
            paper = page.locator(".peka-viewer").evaluate("e => getComputedStyle(e).backgroundColor")
            assert (paper == "rgb(255, 255, 255)") == ((theme or scheme) == "light")


def test_axe_finds_nothing_to_complain_about(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(made_up()[-1])
    found = axe.Axe().run(page, options={"rules": {"page-has-heading-one": {"enabled": False}}})
    assert found.violations_count == 0, found.generate_report()
