"""Notebooks: kept clean, run on their own and as a chain, with small parameters."""

import os
import re
from pathlib import Path

import nbformat
import papermill
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "notebooks").glob("*.ipynb"))
NAMES = ["01_hest_loading", "02_scfoundation_embeddings", "03_knn_pseudolabels", "04_bone_training", "05_evaluation",
         "06_spatial_pcc_maps", "07_sweeps", "08_default_models"]  # fmt: skip
SMALL = {"epochs": 1, "n_splits": 3}


def execute(name, folder, **parameters):
    source = next(p for p in NOTEBOOKS if p.stem == name)
    known = papermill.inspect_notebook(str(source))
    assert parameters.keys() <= known.keys()
    wanted = {k: v for k, v in SMALL.items() if k in known} | parameters
    here = os.getcwd()
    try:
        return papermill.execute_notebook(
            str(source), str(folder / source.name), wanted, cwd=str(folder), progress_bar=False, log_output=False
        )
    finally:
        os.chdir(here)


def test_the_walk_is_complete():
    assert [p.stem for p in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not any(c.outputs or c.execution_count for c in code)
    assert len({c.id for c in notebook.cells}) == len(notebook.cells)
    tagged = [c for c in code if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert all(re.match(r"\w+: [\w| ]+ = .+", line) for line in tagged[0].source.splitlines())
    assert "pip install" in code[0].source
    assert code[1] is tagged[0]
    text = path.read_text()
    assert not re.search(r'"/(home|root|work|Users|tmp)/', text)
    for heading in ("**You will learn**", "**You need**", "## Exercises", "## What's next", "## References"):
        assert heading in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_knows_every_parameter(path):
    """It overlooks an annotation such as `list | None`, and warns of the parameter when it is passed."""
    cell = next(c for c in nbformat.read(path, as_version=4).cells if "parameters" in c.metadata.get("tags", []))
    named = [line.split(":")[0] for line in cell.source.splitlines()]
    assert list(papermill.inspect_notebook(str(path))) == named


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_figure_has_alt_text(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and re.search(r"plt\.subplots|_map\(|gene_bars|relplot", cell.source):
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.id


@pytest.mark.parametrize("name", NAMES)
def test_runs_on_its_own(name, mini_root, tmp_path):
    done = execute(name, tmp_path, cohort=str(mini_root))
    figures = sum("image/png" in o.get("data", {}) for c in done.cells for o in c.get("outputs", []))
    assert figures >= 1
    said = "".join(o["text"] for c in done.cells for o in c.get("outputs", []) if o.get("name") == "stdout")
    assert "\x1b" not in said  # nothing that only a terminal understands


def test_the_last_page_uses_the_run_of_the_page_before(mini_root, tmp_path):
    execute("05_evaluation", tmp_path, cohort=str(mini_root), methods=["bone"])
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "results").glob("*/summary.json")}
    assert len([p for p in made if "_bone_" in p.parent.name]) == 1
    execute("06_spatial_pcc_maps", tmp_path, cohort=str(mini_root))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "results").glob("*/summary.json")} == made


def test_one_page_on_real_slides(her2st, tmp_path):
    chosen = {"cohort": str(her2st), "slides": ["HER2_C2", "HER2_C3"], "split": "slide", "protocol": "hest"}
    done = execute("06_spatial_pcc_maps", tmp_path, **chosen)
    assert "synthetic" not in str([o for c in done.cells for o in c.get("outputs", []) if "text" in o])
    assert (tmp_path / "results" / "front_map.png").is_file()


def test_scfoundation_on_real_slides_is_named_in_its_figures(her2st, golden, tmp_path, monkeypatch):
    monkeypatch.setenv("PEKA_LITE_CACHE", str(tmp_path / "cache"))
    checkpoint = str(golden / "scfoundation" / "toy_models_ckpt.pt")
    slides = {"cohort": str(her2st), "slides": ["HER2_C2", "HER2_C3"], "split": "slide"}
    done = execute(
        "02_scfoundation_embeddings", tmp_path, **slides, teacher="scfoundation", teacher_checkpoint=checkpoint
    )
    shown = str([o["text"] for c in done.cells for o in c.get("outputs", []) if "text" in o])
    assert "ScFoundation(toy_models_ckpt.pt, cell" in shown
    assert "random weights" not in shown
