"""Write the table of what each chapter costs, from the notebooks that were run for this book."""

import sys
from pathlib import Path

import nbformat

HEAD = "| chapter | wall time | memory | GPU | measured on |\n| --- | ---: | ---: | --- | --- |\n"


def costs_table(notebooks: list[Path]) -> str:
    """Return a Markdown table, a line a notebook; links are relative to the folder above theirs."""
    lines, total = [], 0
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        title = notebook.cells[0].source.splitlines()[0].removeprefix("# ")
        cost = notebook.metadata.get("cost")
        chapter = f"[{int(path.name[:2])} {title}]({path.parent.name}/{path.name})"
        if cost is None:
            lines.append(f"| {chapter} | not run | | | |")
            continue
        total += cost["seconds"]
        lines.append(f"| {chapter} | {cost['seconds']} s | {cost['gib']} GiB | none | {cost['machine']} |")
    if total:
        lines.append(f"| all, added up | {total // 60} min {total % 60} s | | | |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / "costs_table.md").write_text(costs_table(sorted(folder.glob("*.ipynb"))))
