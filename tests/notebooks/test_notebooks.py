"""Notebooks: kept clean, and right on real slides. `make book` runs them all, exercises unsolved and solved."""

import ast
import importlib
import inspect
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import yaml

import peka_lite as pk

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
PAGES = [NOTEBOOKS[0].parents[1] / "README.md", *sorted((NOTEBOOKS[0].parents[1] / "book").glob("*.md"))]
NAMES = ["01_hest_loading", "02_scfoundation_embeddings", "03_knn_pseudolabels", "04_bone_training", "05_evaluation",
         "06_spatial_pcc_maps", "07_sweeps", "08_default_models", "09_paper_explained", "10_leakage_and_protocols",
         "11_your_own_slides"]  # fmt: skip
WRONG = yaml.safe_load(NOTEBOOKS[0].with_name("wrong_answers.yml").read_text("utf-8"))
SMALL = {"epochs": 1, "n_splits": 3}
ANATOMY = ("**You will learn**", "**You need**", "## Key takeaways", "## Exercises", "## What's next", "## References")


def tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


def execute(name, folder, **parameters):
    source = next(p for p in NOTEBOOKS if p.stem == name)
    known = papermill.inspect_notebook(str(source))
    assert parameters.keys() <= known.keys()
    settings = {k: v for k, v in SMALL.items() if k in known} | parameters
    cwd = os.getcwd()
    try:
        return papermill.execute_notebook(
            str(source), str(folder / source.name), settings,
            cwd=str(folder), progress_bar=False, log_output=False,
        )  # fmt: skip
    finally:
        os.chdir(cwd)


def test_the_walk_is_complete():
    assert [p.stem for p in NOTEBOOKS] == NAMES


def names_used(source):
    """Yield (package, name) for each import from the library and each ``pk.package.name`` of a cell's code."""
    tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", source))  # IPython's own lines
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.asname) for alias in node.names if alias.name.startswith("peka_lite"))
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("peka_lite"):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            match re.fullmatch(r"pk\.(\w+)(?:\.(\w+))?", ast.unparse(node)):
                case re.Match() as match if not match[1].startswith("__"):
                    in_package = match[2] and inspect.ismodule(getattr(pk, match[1]))
                    yield (f"peka_lite.{match[1]}", match[2]) if in_package else ("peka_lite", match[1])


@pytest.mark.parametrize("path", [*NOTEBOOKS, *PAGES], ids=lambda p: p.stem)
def test_only_public_names_are_used_one_dot_from_a_package(path):
    if path.suffix == ".ipynb":
        cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    else:
        cells = re.findall(r"(?ms)^```python\n(.*?)^```", path.read_text("utf-8"))
    used = {pair for source in cells for pair in names_used(source)}
    assert used or path.suffix == ".md"
    for package, name in used - {("peka_lite", "pk")}:
        assert package.count(".") <= 1, f"from {package} import {name}"
        assert name in importlib.import_module(package).__all__, f"{package}.{name} is not public"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)
    (parameters,) = tagged(notebook, "parameters")
    assert all(re.match(r"\w+: [\w| ]+ = .+", line) for line in parameters.source.splitlines())
    assert "pip install" in code[0].source
    assert code[1] is parameters
    text = path.read_text()
    assert not re.search(r'"/(home|root|work|Users|tmp)/', text)
    at = [text.find(heading) for heading in ANATOMY]
    assert -1 not in at, ANATOMY[at.index(-1)]
    assert at == sorted(at)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_exercises_are_complete(path):
    """Three to five, each a task, a cell to fill in, a folded solution and a check, in this order."""
    cells = nbformat.read(path, as_version=4).cells
    starts = [i for i, c in enumerate(cells) if "exercise" in c.metadata.get("tags", [])]
    assert 3 <= len(starts) <= 5
    for n, i in enumerate(starts, 1):
        task, starter, solution, check = cells[i - 1 : i + 3]
        assert f"### Exercise {n}: " in task.source
        number = f"{path.stem[:2]}-ex{n}"
        assert [c.id for c in (starter, solution, check)] == [number, f"{number}-solution", f"{number}-check"]
        assert solution.metadata["tags"] == ["solution", "hide-cell"]
        assert solution.metadata["jupyter"]["source_hidden"]
        assert solution.source.startswith(f"# @title Solution {n}\n")
        assert check.metadata["tags"] == ["check"]
        assert check.source.count("assert ") >= 1


def test_every_check_has_wrong_answers_to_refuse():
    """`make book` runs them; this checks that each exercise has two or more different ones."""
    cells = {c.id: c.source for path in NOTEBOOKS for c in nbformat.read(path, as_version=4).cells}
    exercises = [name.removesuffix("-check") for name in cells if name.endswith("-check")]
    assert list(WRONG) == exercises
    for exercise, answers in WRONG.items():
        assert len(set(answers)) == len(answers) >= 2, exercise
        for answer in answers:
            assert open_names(cells[exercise]) <= bound(ast.parse(answer)), (exercise, answer)


def open_names(starter):
    """Names that a starter leaves to the learner: None, nothing in a container, or a function without a body."""
    names = set()
    for node in ast.parse(starter).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            if any(isinstance(n, ast.Constant) and n.value is None for n in ast.walk(node.value)):
                names |= {t.id for t in targets}
    return names


def bound(tree):
    """Names that a module's code defines or assigns."""
    names = (n for n in ast.walk(tree) if isinstance(n, ast.Name | ast.FunctionDef))
    return {n.name if isinstance(n, ast.FunctionDef) else n.id for n in names}


def test_the_leak_of_chapter_5_is_found_where_it_is():
    """Each suspect is a labeler of its own; C alone saw held-out rows, seven of them."""
    cells = {c.id: c.source for c in nbformat.read(NOTEBOOKS[4], as_version=4).cells}
    rng = np.random.default_rng(0)
    namespace = {"pk": pk, "np": np, "E": rng.normal(size=(90, 4)).astype(np.float32)}
    namespace["folds"] = [(np.arange(60), np.arange(60, 90))]
    exec(cells["05-ex3"], namespace)
    assert len({id(suspect) for suspect in namespace["suspects"].values()}) == 3
    for answer in WRONG["05-ex3"]:
        exec(answer, namespace)
        with pytest.raises(AssertionError):
            exec(cells["05-ex3-check"], namespace)
    exec(cells["05-ex3-solution"], namespace)
    assert (namespace["guilty"], namespace["strangers"]) == ("C", 7)
    exec(cells["05-ex3-check"], namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_key_takeaways_lead_to_their_sections(path):
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown")
    sections = {slug(heading) for heading in re.findall(r"^#{2,3} (.+)$", text, re.M)}
    bullets = re.search(r"## Key takeaways\n+((?:[-* ].*\n?)+)", text).group(1)
    bullets = re.split(r"^- ", bullets, flags=re.M)[1:]
    assert 3 <= len(bullets) <= 6
    for bullet in bullets:
        assert sections & set(re.findall(r"\]\(#([^)]+)\)", bullet)), bullet


def slug(heading):
    """A heading's anchor, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_knows_every_parameter(path):
    """It overlooks an annotation such as `list | None`, and warns of the parameter when it is passed."""
    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    named = [line.split(":")[0] for line in cell.source.splitlines()]
    assert list(papermill.inspect_notebook(str(path))) == named


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_alt_text(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and re.search(r"plt\.subplots|_map\(|relplot", cell.source):
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.id


@pytest.mark.parametrize("name", ["06_spatial_pcc_maps", "09_paper_explained"])
def test_later_chapters_ask_for_the_students_of_chapter_5(name):
    first, later = (
        {k: v["default"] for k, v in papermill.inspect_notebook(str(NOTEBOOKS[NAMES.index(n)])).items()}
        for n in ("05_evaluation", name)
    )
    shared = first.keys() & later.keys()
    assert {"cohort", "slides", "backbone", "weights", "protocol", "split", "epochs", "n_splits", "seed"} <= shared
    assert {k: first[k].split("#")[0].strip() for k in shared} == {k: later[k].split("#")[0].strip() for k in shared}


def test_one_page_on_real_slides(her2st, tmp_path):
    chosen = {"cohort": str(her2st), "slides": ["HER2_C2", "HER2_C3"], "split": "slide", "protocol": "hest"}
    done = execute("06_spatial_pcc_maps", tmp_path, **chosen)
    assert "synthetic" not in str([o for c in done.cells for o in c.get("outputs", []) if "text" in o])
    assert (tmp_path / "results" / "front_map.png").is_file()


def test_scfoundation_is_named_in_its_figures(mini_root, golden, tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    checkpoint = str(golden / "scfoundation" / "toy_models_ckpt.pt")
    chosen = {"cohort": str(mini_root), "teacher": "scfoundation", "teacher_checkpoint": checkpoint}
    done = execute("02_scfoundation_embeddings", tmp_path, **chosen)
    shown = str([o["text"] for c in done.cells for o in c.get("outputs", []) if "text" in o])
    assert "ScFoundation(toy_models_ckpt.pt, cell" in shown
    assert "random weights" not in shown
