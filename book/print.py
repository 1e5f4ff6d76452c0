"""Print the one-page book to PDF with Chromium."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def print_pdf(page: Path, target: Path) -> None:
    """Write `page` as a PDF; it appears whole or not at all."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((path for name in names if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit("make print needs chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch) / "book.pdf"
        subprocess.run(
            [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=60000",
             "--no-pdf-header-footer", f"--user-data-dir={scratch}/profile", f"--print-to-pdf={work}",
             page.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
        shutil.move(work, target.with_suffix(".part"))
    os.replace(target.with_suffix(".part"), target)


if __name__ == "__main__":
    page, target = map(Path, sys.argv[1:])
    print_pdf(page, target)
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB)")
