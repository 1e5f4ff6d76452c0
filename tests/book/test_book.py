"""The book: builds without a warning, and with an address has Colab buttons."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/someone/peka_lite"


def build(folder, *, url):
    """Build the book from notebooks that were not run: text and code of every page, no outputs."""
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("_build", "notebooks"))
    for target in ("notebooks", "book/notebooks"):
        shutil.copytree(ROOT / "notebooks", folder / target, ignore=shutil.ignore_patterns(".*"))
    set_address = "import sys; sys.path.insert(0, 'book'); from address import set_address; "
    set_address += "from pathlib import Path; set_address(sys.argv[1], root=Path.cwd())"
    subprocess.run([sys.executable, "-c", set_address, url], cwd=folder, check=True)
    subprocess.run([sys.executable, "book/costs_table.py", "book/notebooks"], cwd=folder, check=True)
    from matplotlib.image import imsave

    imsave(folder / "book" / "notebooks" / "front_map.png", [[0.0, 1.0]])
    done = subprocess.run(
        [str(Path(sys.executable).with_name("jupyter-book")), "build", "book", "-W", "-n", "--keep-going"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "book" / "_build" / "html"


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return build(tmp_path_factory.mktemp("book"), url=ADDRESS)


def test_every_page_is_built(html):
    toc = yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())
    pages = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    assert all((html / f"{page}.html").is_file() for page in pages)
    assert {p.stem for p in (ROOT / "notebooks").glob("*.ipynb")} == {Path(p).name for p in pages if "notebooks/" in p}


def test_front_page_opens_with_a_map(html):
    body = (html / "index.html").read_text()
    body = body[body.index("<article") :]
    picture = re.search(r'<img[^>]*alt="([^"]+)"[^>]*src="([^"]+)"', body) or re.search(r"<img[^>]*>", body)
    assert "front_map" in picture.group(0)
    assert body.index(picture.group(0)) < 2500
    assert 'alt="In: a tile of an H&amp;E slide' in picture.group(0)


def test_api_page_documents_public_names(html):
    import peka_lite

    page = (html / "api.html").read_text()
    missing = [n for n in peka_lite.__all__ if f".{n}" not in page and n not in ("BACKBONES",)]
    assert not missing


def test_internal_links_and_images_exist(html):
    broken = []
    for page in (p for p in html.glob("**/*.html") if "_static" not in p.parts):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:|//", target) and not (page.parent / target).exists():
                broken.append((page.name, target))
    assert not broken


def test_an_address_makes_buttons_that_open_the_committed_notebooks(html):
    page = (html / "notebooks" / "01_hest_loading.html").read_text()
    assert (
        "https://colab.research.google.com/github/someone/peka_lite/blob/main/notebooks/01_hest_loading.ipynb" in page
    )
    assert "colab.research.google.com" not in (html / "api.html").read_text()
    assert f'REPOSITORY = \\"{ADDRESS}\\"' in (html.parents[2] / "notebooks" / "04_bone_training.ipynb").read_text()


def test_address_refuses_what_is_none():
    done = subprocess.run([sys.executable, str(ROOT / "book" / "address.py"), "github"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "make address URL=" in done.stderr
