"""Slide viewer: stored data equal the input, names are escaped, and the page works in a browser."""

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

from peka_lite.maps import local_pcc, slide_viewer
from peka_lite.maps.viewer import SlideViewer

NASTY = "</script><b>&'\"{{data}}"


def example(n=40, genes=4, *, names=None, image=(150, 200), seed=0, **options):
    """Return a viewer of random spots on a gray slide, after its input."""
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


def read_data(viewer):
    return json.loads(re.search(r"\}\)\((\{.*\})\);\n</script>", viewer.html).group(1))


def decode(text, dtype=np.uint8):
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def read_image(viewer):
    text = re.search(r'src="data:image/jpeg;base64,([^"]+)"', viewer.html).group(1)
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_expression_is_stored_within_half_a_step():
    _, Y, P, names, viewer = example()
    data = read_data(viewer)
    order = [names.index(gene) for gene in data["genes"]]
    for key, values in (("measured", Y), ("predicted", P)):
        low, step = np.array(data["low"]), np.array(data["step"])
        back = low + step * decode(data[key]).reshape(len(names), -1).T
        assert (np.abs(back - values[:, order]) <= step / 2 + 1e-12).all()
    both = np.concatenate([Y, P])[:, order]
    np.testing.assert_allclose(data["step"], np.ptp(both, axis=0) / 255)
    np.testing.assert_allclose(np.array(data["scale"]).T, np.percentile(both, [1, 99], axis=0))
    np.testing.assert_allclose(data["reach"], np.percentile(np.abs(Y - P)[:, order], 99, axis=0))


def test_correlations_and_nan_are_stored():
    adata, Y, P, names, _ = example()
    Y[:, 2] = 1.0  # its correlation is undefined
    data = read_data(slide_viewer(adata, Y, P, genes=names, n_neighbors=6))
    xy, local = adata.obsm["spatial"], decode(data["local"]).reshape(len(names), -1)
    for gene, codes in zip(data["genes"], local, strict=True):
        g = names.index(gene)
        expected = local_pcc(xy, Y[:, [g]], P[:, [g]], n_neighbors=6)
        assert (np.isnan(expected) == (codes == 255)).all()
        np.testing.assert_allclose(codes[codes < 255] / 127 - 1, expected[codes < 255], atol=0.5 / 127 + 1e-9)
    over = local_pcc(xy, Y, P, over="genes")
    np.testing.assert_allclose(decode(data["over"]) / 127 - 1, over, atol=0.5 / 127 + 1e-9)
    assert data["genes"][-1] == "G2"
    assert data["pcc"][-1] is None


def test_genes_are_listed_by_their_pcc():
    _, Y, P, names, viewer = example()
    data = read_data(viewer)
    pcc = {name: pearsonr(Y[:, g], P[:, g]).statistic for g, name in enumerate(names)}
    assert data["genes"] == sorted(names, key=pcc.get, reverse=True)
    np.testing.assert_allclose(data["pcc"], sorted(pcc.values(), reverse=True))


def test_constant_prediction_is_reported_and_scales_are_not_empty():
    adata, Y, P, names, _ = example(n=300)
    P[:, 0] = -0.5
    P[:, 1] = Y[:, 1] = 2.0
    Y[:, 2] = P[:, 2] = 0
    P[7, 2] = 3.0
    data = read_data(slide_viewer(adata, Y, P, genes=names, n_neighbors=6))
    scale, flat, reach = ({g: data[key][i] for i, g in enumerate(data["genes"])} for key in ("scale", "flat", "reach"))
    assert flat["G0"] == "is constant on this slide: -0.5 on all 300 spots"
    assert (scale["G1"], reach["G1"]) == ([1.5, 2.5], 0.5)
    assert (scale["G2"], reach["G2"], flat["G2"]) == ([0, 3], 3, None)  # one high spot
    assert flat["G3"] is None


def test_two_genes_have_no_correlation_over_genes():
    assert read_data(example(genes=2)[-1])["over"] == ""


def test_spots_have_the_right_position_on_the_image(mini_cohort):
    slide = mini_cohort.slides[0]
    Y = np.random.default_rng(0).random((slide.n_spots, 3))
    viewer = slide_viewer(slide.adata, Y, Y + 1, genes=list("ABC"))
    library = next(iter(slide.adata.uns["spatial"].values()))
    image, scale = library["images"]["downscaled_fullres"], library["scalefactors"]["tissue_downscaled_fullres_scalef"]
    stored = np.asarray(read_image(viewer), dtype=float)
    xy = decode(read_data(viewer)["xy"], "<f4").reshape(-1, 2)
    colors = stored[*(xy[:, ::-1] * stored.shape[:2]).astype(int).T]
    expected = image[*(slide.adata.obsm["spatial"][:, ::-1] * scale).astype(int).T].astype(float)
    assert np.corrcoef(colors.ravel(), expected.ravel())[0, 1] > 0.95


def test_large_image_is_downscaled_with_its_aspect_ratio():
    *_, viewer = example(image=(3000, 5000))
    assert max(read_image(viewer).size) <= 1000
    adata, Y, P, names, _ = example(image=(3000, 5000))
    adata.obsm["spatial"] = adata.obsm["spatial"] * (30, 15)
    width, height = read_image(slide_viewer(adata, Y, P, genes=names, n_neighbors=6)).size
    assert width == 1000
    assert 400 < height < 650


def test_html_of_50_genes_at_250_spots_is_small():
    *_, viewer = example(n=250, genes=50, n_neighbors=18)
    picture = len(re.search(r"base64,([^\"]+)\"", viewer.html).group(1))
    assert len(viewer.html) - picture < 100_000


def test_names_and_title_are_escaped():
    *_, viewer = example(names=[NASTY, "<img src=x>", "A&B"], genes=3, title=NASTY)
    assert viewer.html.count("</script>") == 1
    assert "<img src=x>" not in viewer.html
    assert "<b>" not in viewer.html
    assert "&lt;/script&gt;&lt;b&gt;&amp;&#x27;&quot;{{data}}" in viewer.html
    assert set(read_data(viewer)["genes"]) == {NASTY, "<img src=x>", "A&B"}


def test_html_is_deterministic_and_ids_differ():
    first, repeated, other = (example(seed=s)[-1] for s in (0, 0, 1))
    assert first == repeated
    ids = [re.search(r'data-viewer="(\w+)"', v.html).group(1) for v in (first, other)]
    assert ids[0] != ids[1]
    assert all(v.html.count(i) == 2 for v, i in zip((first, other), ids, strict=True))


def test_html_has_no_placeholders_and_no_urls():
    *_, viewer = example()
    assert "{{" not in viewer.html
    assert not re.search(r"https?://|@import|\bimport\(|fetch\(", viewer.html)


def test_viewer_displays_its_html_and_has_a_short_repr():
    *_, viewer = example()
    assert viewer._repr_html_() == viewer.html
    assert repr(viewer) == "SlideViewer(title='4 genes at 40 spots')"


def test_save_writes_only_the_page(tmp_path):
    *_, viewer = example(title="Eins & zwei")
    assert viewer.save(tmp_path / "slide.html") == tmp_path / "slide.html"
    page = (tmp_path / "slide.html").read_text(encoding="utf-8")
    assert viewer.html in page
    assert "<title>Eins &amp; zwei</title>" in page
    assert [p.name for p in tmp_path.iterdir()] == ["slide.html"]


def test_failed_save_leaves_the_old_page(tmp_path, monkeypatch):
    *_, viewer = example()
    old = viewer.save(tmp_path / "slide.html").read_text(encoding="utf-8")
    monkeypatch.setattr("peka_lite.maps.viewer.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace(viewer, title="another").save(tmp_path / "slide.html")
    assert [(p.name, p.read_text(encoding="utf-8")) for p in tmp_path.iterdir()] == [("slide.html", old)]


def view_with(**changes):
    adata, Y, P, names, _ = example()
    inputs = {"adata": adata, "measured": Y, "predicted": P, "genes": names, "n_neighbors": 6}
    for key, change in changes.items():
        inputs[key] = change(inputs[key])
    adata, measured, predicted = (inputs.pop(key) for key in ("adata", "measured", "predicted"))
    return slide_viewer(adata, measured, predicted, **inputs)


def with_hole(A):
    A = A.copy()
    A[3, 1] = np.nan
    return A


def without(key):
    def remove(adata):
        adata = adata.copy()
        del (adata.uns if key == "image" else adata.obsm)["spatial"]
        return adata

    return remove


@pytest.mark.parametrize(
    ("changes", "message"),
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
def test_mismatched_input_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        view_with(**changes)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if not executable:
        pytest.skip("no chromium on the PATH (Debian: apt-get install chromium)")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Return a function that opens a page of viewers; finally check that nothing was logged or requested."""
    messages, schemes, contexts = [], [], []

    def opened(*viewers, width=900, **options):
        assert all(isinstance(v, SlideViewer) for v in viewers)
        viewers[0].save(path := tmp_path / "page.html")
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</main>", "".join(v.html for v in viewers[1:]) + "</main>"), encoding="utf-8")
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: schemes.append(request.url.split(":")[0]))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.peka-viewer[data-ready]').length > 0")
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert messages == []
    assert set(schemes) <= {"file", "data"}
    assert schemes.count("file") == len(contexts)


def pixels(page, nth=0):
    return page.evaluate("n => document.querySelectorAll('.peka-viewer canvas')[n].toDataURL()", nth)


def read_colors(page, xy):
    """Return the colors (n, 4) at positions relative to the canvas' width and height, from a copy of it."""
    script = """xy => {
        const c = document.querySelector('.peka-viewer canvas'), copy = new OffscreenCanvas(c.width, c.height);
        const pen = copy.getContext('2d', { willReadFrequently: true });
        pen.drawImage(c, 0, 0);
        return xy.map(([x, y]) => [...pen.getImageData(x * c.width, y * c.height, 1, 1).data]) }"""
    return np.array(page.evaluate(script, xy.tolist()))


LAYERS = ["measured", "predicted", "residual", "local", "over"]


def choose(page, layer):
    page.locator(f"input[value={layer}]").check()


def test_selecting_a_gene_updates_spots_and_text(opened):
    *_, viewer = example()
    page, data = opened(viewer), read_data(viewer)
    before = pixels(page)
    assert page.locator("option").all_inner_texts()[0] == f"{data['genes'][0]} ({data['pcc'][0]:.2f})"
    page.get_by_label("Gene, with its PCC on this slide").select_option("2")
    assert pixels(page) != before
    assert page.locator(".peka-about strong").inner_text() == f"PCC {data['pcc'][2]:.2f}"
    assert f"spots colored by {data['genes'][2]}, Measured" in page.get_by_role("img").last.get_attribute("aria-label")


def test_layers_have_different_spots_and_scales(opened):
    page = opened(example()[-1])
    images, scales = [], []
    for layer in LAYERS:
        choose(page, layer)
        images.append(pixels(page))
        scales.append([text.lstrip("≤≥ ") for text in page.locator(".peka-ticks span").all_inner_texts()])
    assert len(set(images)) == 5
    assert scales[0] == scales[1]
    assert scales[2][0] == "−" + scales[2][2]
    assert scales[3] == ["−1.00", "PCC over 6 neighbors", "1.00"]


def test_spots_have_matplotlibs_colors(opened):
    from matplotlib import colormaps

    _, Y, _, names, viewer = example(n=12, n_neighbors=4)
    page, data = opened(viewer), read_data(viewer)
    page.get_by_label("Spot opacity").fill("100")
    xy, g = decode(data["xy"], "<f4").reshape(-1, 2), names.index(data["genes"][0])
    gaps = np.linalg.norm(xy[:, None] - xy, axis=-1) + np.eye(len(xy))
    low, high = data["scale"][0]
    alone = np.flatnonzero(gaps.min(1) > 0.08)
    assert len(alone) >= 3
    expected = 255 * colormaps["viridis"](np.clip((Y[alone, g] - low) / (high - low), 0, 1))
    assert np.abs(read_colors(page, xy[alone]) - expected).max() < 8


def test_arrow_keys_select_spots_and_show_their_values(opened):
    _, Y, P, names, viewer = example()
    page, data = opened(viewer), read_data(viewer)
    page.locator("canvas").focus()
    texts = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
        texts.append(page.locator("output[aria-live=polite]").inner_text())
    spots = [int(re.match(r"Spot (\d+) of 40", text).group(1)) - 1 for text in texts]
    assert spots[0] == 0
    x, y = decode(data["xy"], "<f4").reshape(-1, 2).T
    assert x[spots[1]] >= x[spots[0]]
    assert y[spots[2]] >= y[spots[1]]
    assert x[spots[3]] <= x[spots[2]]
    assert len(set(texts)) >= 3
    g = names.index(data["genes"][0])
    value = re.search(r"Measured (−?[\d.]+), Predicted (−?[\d.]+)", texts[-1])
    shown = [float(v.replace("−", "-")) for v in value.groups()]
    np.testing.assert_allclose(shown, [Y[spots[3], g], P[spots[3], g]], atol=data["step"][0] / 2 + 0.005)


def test_values_of_the_spot_under_the_pointer_are_shown(opened):
    *_, viewer = example()
    page, data = opened(viewer), read_data(viewer)
    box = page.locator("canvas").bounding_box()
    x, y = decode(data["xy"], "<f4").reshape(-1, 2)[7].tolist()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    assert page.locator("output").inner_text().startswith(f"Spot 8 of 40 ({data['spots'][7]})")


def test_opacity_changes_the_spots(opened):
    page = opened(example()[-1])
    before = pixels(page)
    page.get_by_label("Spot opacity").fill("20")
    assert pixels(page) != before


def test_several_viewers_on_a_page_are_independent(opened):
    first, second = example()[-1], example(seed=1)[-1]
    page = opened(first, second, first)
    before = [pixels(page, n) for n in range(3)]
    page.locator(".peka-viewer").nth(2).locator("input[value=residual]").check()
    page.locator(".peka-viewer").nth(1).locator("select").select_option("3")
    after = [pixels(page, n) for n in range(3)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False]
    checked = page.eval_on_selector_all("input:checked", "inputs => inputs.map(i => i.value)")
    assert checked == ["measured", "measured", "residual"]


def test_script_defines_no_global_names(opened):
    js = "Object.getOwnPropertyNames(window)"
    with_viewer = set(opened(example()[-1]).evaluate(js))
    assert with_viewer == set(opened(replace(example()[-1], html="<p class='peka-viewer' data-ready>")).evaluate(js))


def test_special_characters_in_names_are_displayed(opened):
    page = opened(example(names=[NASTY, "<img src=x>", "A&B"], genes=3, title=NASTY)[-1])
    assert {text.rsplit(" (", 1)[0] for text in page.locator("option").all_inner_texts()} == {
        NASTY,
        "<img src=x>",
        "A&B",
    }
    assert page.locator(".peka-title").inner_text() == NASTY
    assert page.title() == NASTY


def test_page_fits_a_phones_width(opened):
    page = opened(
        example(title="A title_that_is_longer_than_any_phone_is_wide" * 2)[-1], width=360, device_scale_factor=3
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    canvas = page.locator("canvas").bounding_box()
    assert canvas["x"] >= 0
    assert canvas["x"] + canvas["width"] <= 360
    assert page.locator("canvas").evaluate("c => c.width") == pytest.approx(3 * canvas["width"], abs=1)


def test_canvas_resizes_with_the_page(opened):
    page = opened(example()[-1], width=400)
    before = page.locator("canvas").evaluate("c => c.width")
    page.set_viewport_size({"width": 330, "height": 700})
    page.wait_for_function("w => document.querySelector('.peka-viewer canvas').width < w", arg=before)


def test_text_has_enough_contrast_in_every_theme(opened):
    page = opened(example()[-1])
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


def test_axe_reports_no_violations(opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(example()[-1])
    report = axe.Axe().run(page, options={"rules": {"page-has-heading-one": {"enabled": False}}})
    assert report.violations_count == 0, report.generate_report()
