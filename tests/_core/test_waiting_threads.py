"""Set OMP_WAIT_POLICY before PyTorch is loaded, unless the user has set it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def torch_environment(tmp_path):
    """Return a function that runs Python with a `torch` that only prints `VARIABLES` when it is loaded."""
    (tmp_path / "torch.py").write_text(f"import os\nprint([os.environ.get(k) for k in {VARIABLES}])\nos._exit(7)")

    def run(*command, **variables):
        env = {k: v for k, v in os.environ.items() if k not in VARIABLES}
        env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "PYTHONUNBUFFERED": "1"} | variables
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
def test_policy_is_set_when_torch_is_loaded(torch_environment, command):
    assert torch_environment(*command) == "['PASSIVE', None, None, None]"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "['ACTIVE', None, None, None]"),
        ({"OMP_WAIT_POLICY": ""}, "['', None, None, None]"),
        ({"GOMP_SPINCOUNT": "1000"}, "[None, '1000', None, None]"),
        ({"KMP_BLOCKTIME": "200"}, "[None, None, '200', None]"),
        ({"KMP_LIBRARY": "turnaround"}, "[None, None, None, 'turnaround']"),
    ],
)
def test_settings_of_the_user_are_unchanged(torch_environment, variables, expected):
    assert torch_environment("-c", "import peka_lite, torch", **variables) == expected


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_load_the_library_before_torch(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    loaded = re.findall(r"^\s*(?:import|from) (torch|timm|peka_lite)\b", source, flags=re.M)
    assert loaded[0] == "peka_lite"
