"""What the book's sources promise: messages that exist, words linked at first use, a workflow that publishes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

import peka_lite as pk
from peka_lite.reports.paper_tables import FOLDS
from peka_lite.reports.tables import CAUTION

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
TOC = yaml.safe_load((BOOK / "_toc.yml").read_text())
PAGES = [chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]]


def prose(page):
    """The running text of a page: all but headings, code, formulas, tables, directives and links to other places."""
    if "notebooks/" in page:
        cells = nbformat.read(ROOT / f"{page}.ipynb", as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = (BOOK / f"{page}.md").read_text()
    return re.sub(NOT_PROSE, " ", text)


NOT_PROSE = re.compile(
    r"^## References.*\Z"
    r"|^(```+|:::+).*?^\1\s*$"  # code and directives
    r"|^(?:#|\||\s*[-*] [^\n]*\]\(#|:Cause|:Fix)[^\n]*$"  # headings, tables, bullets that lead to a section
    r"|`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$|\{cite\}"
    r"|\[(?:[^\[\]]|\[[^\]]*\])*\]\((?!(?:\.\./)?glossary\.md)[^)]*\)",  # links to other places
    re.M | re.S,
)


def string_literals():
    """Every piece of text in the library's code, adjoining literals joined as Python joins them."""
    for path in (ROOT / "peka_lite").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_messages_of_the_library():
    headings = re.findall(r"^### (.+)$", (BOOK / "troubleshooting.md").read_text(), re.M)
    quoted = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) >= 12
    cell = next(c for c in nbformat.read(ROOT / "notebooks/01_hest_loading.ipynb", 4).cells if c.cell_type == "code")
    everything = "\n".join([*string_literals(), cell.source])
    assert [message for message in quoted if message not in everything] == []


def test_every_trouble_has_a_cause_and_a_fix():
    entries = re.split(r"^### ", (BOOK / "troubleshooting.md").read_text(), flags=re.M)[1:]
    assert all(entry.count("\n:Cause:") == 1 and entry.count("\n:Fix:") == 1 for entry in entries)


GLOSSARY = re.findall(r"^## (.+)$", (BOOK / "glossary.md").read_text(), re.M)


def test_the_glossary_is_in_order():
    assert sorted(GLOSSARY, key=str.lower) == GLOSSARY


# Everyday words too; a link at their first use would as often be wrong as right.
EVERYDAY = {"Ceiling", "Control", "Count", "Depth", "Features", "Fold", "Merge", "Run folder", "Targets", "Token"}
LINKED = [
    page
    for page in PAGES
    if page not in ("glossary", "api", "references", "cite", "security", "changelog", "contributing")
]


@pytest.mark.parametrize("page", LINKED)
def test_words_of_the_glossary_are_linked_where_they_come_first(page):
    text, folder = prose(page), "../" if "notebooks/" in page else ""
    late = []
    for term in set(GLOSSARY) - EVERYDAY:
        slug = re.sub(r"[^\w\- ]", "", term.lower()).replace(" ", "-")
        link = re.search(rf"\[[^\]]+\]\({re.escape(folder)}glossary\.md#{slug}\)", text)
        bare = re.sub(r"\[[^\]]+\]\([^)]*\)", lambda m: "\0" * len(m.group()), text)
        first = re.search(word(term), bare)
        if first and (link is None or link.start() > first.start()):
            late.append((term, text[max(0, first.start() - 30) : first.end() + 20]))
    assert late == []


def word(term):
    """What a term looks like in a sentence: names as they are, words in either case, one or several."""
    if term.lower() != term[0].lower() + term[1:]:  # PCC, AdaLoRA, HEST-1k
        return rf"(?<![\w\[-]){re.escape(term)}(?![\w-])"
    if term in ("Bone", "Leiden", "Visium"):
        return rf"(?<![\w\[-]){term}(?![\w-])"
    return rf"(?i)(?<![\w\[-]){re.escape(term.rstrip('s') if term.endswith('genes') else term)}s?(?![\w-])"


def sources():
    """Yield (location, text) of pages, cells, the library's strings and sweeps, white space collapsed."""
    for path in [ROOT / "README.md", *BOOK.glob("*.md"), *(ROOT / "peka_lite").rglob("*.yml")]:
        yield path.name, " ".join(path.read_text("utf-8").replace("\n# ", "\n").split())
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            lines = cell.source.splitlines()
            yield cell.id, " ".join((" " if cell.cell_type == "markdown" else " ; ").join(lines).split())
    for text in string_literals():
        yield text[:60], " ".join(text.split())


CORRECTED = {
    "Pearson's correlation does not rank": r"\b(rank|order)(s|ed|ing)? (the )?(spots|tiles)|\border within"
    r"|orders nothing|(spots|tiles) are (ranked|ordered)",
    "purity may fall between clusterings": r"label can only raise it|[Pp]urity cannot fall when labels are split",
    "T is the depth that is asked for": r"T and S say how deeply",
    "descent moves against the gradient": r"(pull|move)s \$S\$ along \$\(q - p\)",
    "chapters 4 to 7, 9 and 10 take no teacher": r"chapters run unchanged|The paper's setting is",
    "a pretrained teacher is not fitted on test spots": r"teacher, clusters and student saw|four steps do so under",
    "the paper's text has no word of attention": r"\| attention \(of which layers\)",
}


@pytest.mark.parametrize("wrong", CORRECTED.values(), ids=CORRECTED)
def test_what_was_corrected_is_said_nowhere(wrong):
    assert [(where, match.group()) for where, text in sources() if (match := re.search(wrong, text))] == []


def test_random_spots_are_said_of_the_released_code():
    """The paper does not name what its five folds hold out; `paper` in quotes is the protocol, not the paper."""
    the_paper = re.compile(r"(?<![`\"'])\b([Tt]he paper|PEKA|arXiv:2504\.07061|[Tt]he published)\b(?!`)")
    for where, text in sources():
        for sentence in re.split(r"(?<=[.!?;])\s", text):
            if the_paper.search(sentence) and re.search(r"random\s+(\[spots|spots?)", sentence):
                assert re.search(r"released\s+code", sentence), (where, sentence)
    cells = nbformat.read(ROOT / "notebooks/09_paper_explained.ipynb", as_version=4).cells
    (row,) = re.findall(r"^\| Held out \|.*$", "\n".join(c.source for c in cells), re.M)
    paper, code = row.split("|")[2:4]
    assert not re.search(r"random|patient|spot", paper)
    assert re.search(r"random spots: `KFold` with shuffle", code)


def test_published_values_are_shown_with_what_is_known_of_their_folds():
    for text in (pk.evaluation.PROTOCOLS["paper"].split, *(FOLDS, CAUTION["paper"])):
        assert "spot" in text
    for text in (FOLDS, CAUTION["paper"], pk.reports.read_published.__doc__):
        assert re.search(r"released code", " ".join(text.split()))
    assert "may have come from other code" in " ".join(pk.reports.read_published.__doc__.split())
    assert "may have come from other code" in FOLDS


def test_steps_that_see_held_out_rows_are_counted_with_either_teacher():
    """scFoundation is pretrained: under `paper` genes, clusters and student see test spots, and a PCA does too."""
    cells = {c.id: c.source for c in nbformat.read(ROOT / "notebooks/10_leakage_and_protocols.ipynb", 4).cells}
    namespace = {"pk": pk, "plt": plt, "np": np, "pd": pd, "HONEST": "C0", "LEAKY": "C1"}
    exec(cells["10-06"], namespace)
    title = namespace["fig"].get_suptitle()
    plt.close(namespace["fig"])
    counts = [row.to_dict() for row in namespace["leaks"].values()]
    assert counts == [{"paper": 3, "hest": 1, "strict": 0}, {"paper": 4, "hest": 1, "strict": 0}]
    assert namespace["steps"] == 7
    assert re.search(r"scFoundation.*: 3 under paper.*\n.*PCA.*: 4 under paper", title)
    assert "three of seven steps" in " ".join(cells["10-41"].split())


@pytest.mark.parametrize("page", ["../README", *LINKED])
def test_a_page_with_intervals_names_the_method(page):
    """What `interval` gives is a confidence interval by bootstrap, of patients and genes."""
    text = " ".join(prose(page).split())
    if re.search(
        r"(95%|paired).{0,20} intervals?|intervals? (resample|over patients|are over)|an interval (over|that)", text
    ):
        assert "confidence interval" in text
        assert "bootstrap" in text


def test_workflow_runs_the_checks_and_publishes_the_book():
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    steps = flow["jobs"]["check"]["steps"]
    runs = [step.get("run", "") for step in steps]
    assert any(".ci/run" in run for run in runs)
    assert any(run.startswith("make address URL=${{ github.server_url }}/") for run in runs)
    (upload,) = [step for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    assert upload["with"]["path"] == "book/_build/html"
    publish = flow["jobs"]["publish"]
    assert publish["needs"] == "check"
    assert publish["permissions"] == {"pages": "write", "id-token": "write"}
    assert any("deploy-pages" in step["uses"] for step in publish["steps"])


def test_the_table_of_costs_lists_chapters_that_ran_or_not(tmp_path):
    for name, cost in (("01_a", {"seconds": 61, "gib": 1.5, "machine": "2 CPU cores"}), ("02_b", None)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Title {name[-1]}\n\nText")])
        if cost:
            notebook.metadata["cost"] = cost
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    subprocess.run([sys.executable, str(BOOK / "costs_table.py"), str(tmp_path)], check=True)
    _, _, first, second, total = (tmp_path / "costs_table.md").read_text().splitlines()
    assert "61 s | 1.5 GiB | none | 2 CPU cores" in first
    assert f"[2 Title b]({tmp_path.name}/02_b.ipynb) | not run" in second
    assert "1 min 1 s" in total


@pytest.mark.parametrize("fails", [False, True])
def test_a_notebook_that_is_run_is_kept_whole_with_its_cost_or_not_at_all(tmp_path, fails):
    source = tmp_path / "one.ipynb"
    code = "1 / 0" if fails else "grown = bytearray(300_000_000); print(len(grown))"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(code), nbformat.v4.new_code_cell("import time; time.sleep(1)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), source)
    where = (source, tmp_path / "out" / "one.ipynb", tmp_path)
    command = [sys.executable, str(BOOK / "execute.py"), *map(str, where)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == fails
    assert (tmp_path / "out" / "one.ipynb").is_file() != fails
    if not fails:
        cost = nbformat.read(tmp_path / "out" / "one.ipynb", as_version=4).metadata["cost"]
        assert 1 <= cost["seconds"] < 300
        assert 0.3 < cost["gib"] < 3
        assert re.search(r"\d+ s, \d+\.\d GiB", done.stdout)


@pytest.mark.parametrize(
    ("starter", "wrong", "problem"),
    [
        ("x = None", ["x = 3", "x = 1\nx += 3"], ""),
        ("x = 2", [], "07-ex1-check passes before"),
        ("", [], "NameError"),
        ("x = None", ["x = 3", "x = 1\nx += 1"], "07-ex1-check accepts wrong answer 2: x = 1"),
        ("x = None", ["x = [3"], "SyntaxError"),
    ],
)
def test_a_check_has_to_fail_before_its_solution_and_on_wrong_answers(tmp_path, starter, wrong, problem):
    code = {"07-ex1": starter, "07-ex1-solution": "x = 2"}
    code["07-ex1-check"] = "assert x is not None\nassert x == 2\nprint('right')"
    cells = [nbformat.v4.new_code_cell(lines, id=name) for name, lines in code.items()]
    cells[1].metadata["tags"] = ["solution", "hide-cell"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "one.ipynb")
    (tmp_path / "wrong_answers.yml").write_text(yaml.safe_dump({"07-ex1": wrong}))
    command = [sys.executable, str(BOOK / "execute.py"), str(tmp_path / "one.ipynb"), str(tmp_path / "out.ipynb")]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode == 0) == (not problem), done.stderr
    assert problem in done.stdout + done.stderr
    if not problem:
        cells_run = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
        assert [c.id for c in cells_run] == list(code)
        assert cells_run[2].outputs[0].text == "right\n"
