"""Threads that wait sleep: OMP_WAIT_POLICY is set before PyTorch is loaded, unless the user has decided."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DECIDED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def torch_says(tmp_path):
    """Return a function that runs Python with a `torch` that only writes what it finds set when it is loaded."""
    (tmp_path / "torch.py").write_text(f"import os\nprint([os.environ.get(k) for k in {DECIDED}])\nos._exit(7)")

    def run(*command, **decided):
        env = {k: v for k, v in os.environ.items() if k not in DECIDED}
        env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONUNBUFFERED": "1"} | decided
        done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 7, done.stderr
        return done.stdout.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "peka_lite", "train", "--cohort", "mini", "--out", "model"),
        ("-m", "peka_lite.cli.main", "embed", "--cohort", "mini", "--backbone", "mini", "--out", "f.h5ad"),
        ("-c", "import peka_lite as pk; pk.embed_tiles"),
        ("-c", "from peka_lite.experiments.run import run"),
    ],
)
def test_it_is_set_when_torch_is_loaded(torch_says, command):
    assert torch_says(*command) == "['PASSIVE', None, None, None]"


@pytest.mark.parametrize(
    ("decided", "stays"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "['ACTIVE', None, None, None]"),
        ({"OMP_WAIT_POLICY": ""}, "['', None, None, None]"),
        ({"GOMP_SPINCOUNT": "1000"}, "[None, '1000', None, None]"),
        ({"KMP_BLOCKTIME": "200"}, "[None, None, '200', None]"),
        ({"KMP_LIBRARY": "turnaround"}, "[None, None, None, 'turnaround']"),
    ],
)
def test_what_the_user_has_decided_stays(torch_says, decided, stays):
    assert torch_says("-c", "import peka_lite, torch", **decided) == stays


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_load_the_library_before_torch(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    loaded = re.findall(r"^\s*(?:import|from) (torch|timm|peka_lite)\b", source, flags=re.M)
    assert loaded[0] == "peka_lite"
