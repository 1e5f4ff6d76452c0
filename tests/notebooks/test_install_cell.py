"""Each notebook's first cell, in an environment like Colab's: most packages there, and a PyTorch of another version."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PREINSTALLED_TORCH = {"torch": "2.12.0+cu128", "torchvision": "0.27.0+cu128"}  # of neither file of pins
PINS = re.compile(r"^([\w.-]+)==([\w.+-]+)((?: ;[^\\\n]*)?)(?: \\)?$", re.M)
COLAB_LACKS = {"anndata", "igraph", "leidenalg", "openslide-bin", "openslide-python", "scanpy", "squidpy"}
NOT_FOR_IT = re.compile(r"nvidia-|triton|cuda-|torch$|torchvision$|jupyter-book|sphinx|playwright")


def first_cell(path):
    return next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


def write_wheel(folder, name, version):
    """A package of this name and version that holds nothing but its version."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f'__version__ = "{version}"\n')
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def python_3_13():
    """A Python 3.13, as `.ci/smoke` looks for one; None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in (os.environ.get("PYTHON313"), "python3.13", *sorted(pyenv.glob("3.13*/bin/python"))):
        if command := name and shutil.which(name):
            answer = subprocess.run([command, "--version"], capture_output=True, text=True)
            if answer.stdout.startswith("Python 3.13."):
                return command
    return None


@pytest.fixture(scope="module", params=["the lock", "Python 3.13"])
def colab(request, tmp_path_factory):
    """The Python of a new environment: the pinned packages less what Colab lacks, and a PyTorch of another version."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is absent: a clean environment cannot be made quickly")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git repository here that the cell could install from")
    base, file = sys.executable, "requirements.lock"
    if request.param == "Python 3.13":
        base, file = python_3_13(), "constraints-3.13.txt"
        if base is None:
            pytest.skip("no Python 3.13 here ($PYTHON313, python3.13, pyenv)")
    folder = tmp_path_factory.mktemp("colab")
    python = folder / "env" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--seed", "--python", base, str(folder / "env")], check=True)
    pins = PINS.findall((ROOT / file).read_text())
    assert len(pins) > 100
    preinstalled = [f"{n}=={v}{when}" for n, v, when in pins if n not in COLAB_LACKS and not NOT_FOR_IT.match(n)]
    (folder / "there.txt").write_text("\n".join(preinstalled))
    wheels = [str(write_wheel(folder, name, version)) for name, version in PREINSTALLED_TORCH.items()]
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "--no-deps"]
    # Not from here: uv would read the constraints of this project's own file.
    subprocess.run([*install, "-r", str(folder / "there.txt")], check=True, cwd=folder)
    subprocess.run([*install, *wheels], check=True, cwd=folder)
    return python


def installed(python):
    code = "from importlib.metadata import distributions as d; print(*(f'{x.name}=={x.version}' for x in d()))"
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return dict(line.lower().split("==") for line in done.stdout.split())


def test_all_notebooks_open_with_the_same_cell():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1


def test_first_cell_installs_what_is_missing_and_moves_nothing(colab, tmp_path):
    before = installed(colab)
    assert {name: before[name] for name in PREINSTALLED_TORCH} == PREINSTALLED_TORCH
    assert not COLAB_LACKS & before.keys()
    cell = re.sub('REPOSITORY = ".*"', f'REPOSITORY = "file://{ROOT}"', first_cell(NOTEBOOKS[0]))
    (tmp_path / "cell.ipy").write_text(cell)
    done = subprocess.run(
        [str(colab), "-m", "IPython", "--no-banner", str(tmp_path / "cell.ipy")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    after = installed(colab)
    assert {"peka-lite", *COLAB_LACKS} <= after.keys(), done.stdout[-2000:] + done.stderr[-2000:]
    assert {name: after[name] for name in before} == before
    code = "import torch, peka_lite as pk; print(torch.__version__, len(pk.backbones.BACKBONES))"
    imported = subprocess.run([str(colab), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert imported.stdout.split()[:1] == [PREINSTALLED_TORCH["torch"]], imported.stderr[-2000:]


def test_without_an_address_the_first_cell_says_what_to_do(colab, tmp_path):
    subprocess.run([str(colab), "-m", "pip", "uninstall", "--quiet", "--yes", "peka-lite"], check=True)
    (tmp_path / "cell.ipy").write_text(re.sub('REPOSITORY = ".*"', 'REPOSITORY = ""', first_cell(NOTEBOOKS[0])))
    done = subprocess.run(
        [str(colab), "-m", "IPython", "--no-banner", str(tmp_path / "cell.ipy")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "in a clone of the repository, first" in done.stdout + done.stderr
