"""Write the repository's address where it is needed: the book's buttons and each notebook's install cell."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USAGE = "give the repository's address: make address URL=https://github.com/OWNER/REPO (or URL=none to remove it)"


def set_address(url: str, *, root: Path = ROOT) -> None:
    """Set the address in book/_config.yml and notebooks/*.ipynb; an empty one removes the buttons."""
    config = root / "book" / "_config.yml"
    text = re.sub(r'(?m)^(  url: )".*"$', rf'\g<1>"{url}"', config.read_text())
    colab = "https://colab.research.google.com" if url else ""
    text = re.sub(r'(?m)^(  colab_url: )".*"$', rf'\g<1>"{colab}"', text)
    text = re.sub(r"(?m)^(  use_repository_button: ).*$", rf"\g<1>{str(bool(url)).lower()}", text)
    config.write_text(text)
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        text = notebook.read_text()
        notebook.write_text(re.sub(r'(REPOSITORY = \\").*?(\\")', rf"\g<1>{url}\g<2>", text))


if __name__ == "__main__":
    url = sys.argv[1] if len(sys.argv) == 2 else ""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+|none", url):
        sys.exit(USAGE)
    set_address("" if url == "none" else url.removesuffix(".git"))
