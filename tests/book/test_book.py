"""With an address, pages have Colab buttons and notebooks know where to install from."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "https://github.com/someone/peka_lite"
CHAPTER = "notebooks/01_hest_loading"


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    """One chapter and one plain page of a book with an address; `make book` builds them all."""
    folder = tmp_path_factory.mktemp("book")
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns("_build", "notebooks"))
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".*"))
    set_address = "import sys; sys.path.insert(0, 'book'); from address import set_address; "
    set_address += "from pathlib import Path; set_address(sys.argv[1], root=Path.cwd())"
    subprocess.run([sys.executable, "-c", set_address, ADDRESS], cwd=folder, check=True)
    toc = {"format": "jb-book", "root": CHAPTER, "chapters": [{"file": "cite"}]}
    (folder / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
    (folder / "book" / "notebooks").mkdir()
    shutil.copy(folder / f"{CHAPTER}.ipynb", folder / "book" / "notebooks")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "book", "--keep-going"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "book" / "_build" / "html"


def test_an_address_makes_buttons_that_open_the_committed_notebooks(html):
    page = (html / f"{CHAPTER}.html").read_text()
    assert f"https://colab.research.google.com/github/someone/peka_lite/blob/main/{CHAPTER}.ipynb" in page
    assert "colab.research.google.com" not in (html / "cite.html").read_text()
    assert f'REPOSITORY = \\"{ADDRESS}\\"' in (html.parents[2] / "notebooks" / "04_bone_training.ipynb").read_text()


def test_address_refuses_what_is_none():
    done = subprocess.run([sys.executable, str(ROOT / "book" / "address.py"), "github"], capture_output=True, text=True)
    assert done.returncode != 0
    assert "make address URL=" in done.stderr
