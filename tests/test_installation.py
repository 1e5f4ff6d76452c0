"""Installation: pinned versions are consistent, and the smoke test skips a missing Python."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_pins(file):
    """Return name -> version of the packages pinned in a file."""
    lines = re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / file).read_text(), re.M)
    return {name.lower(): Version(version) for name, version in lines}


@pytest.mark.parametrize("file", ["requirements.lock", "constraints-3.13.txt"])
def test_pins_meet_all_requirements_and_torchvision_matches_torch(file):
    pinned = read_pins(file)
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["notebook"]:
        requirement = Requirement(line)
        assert pinned[requirement.name.lower()] in requirement.specifier, line
    torch, torchvision = pinned["torch"], pinned["torchvision"]
    assert (torch.major, torchvision.major, torch.minor + 15) == (2, 0, torchvision.minor)


def test_python_3_13_pins_a_newer_torch_than_the_lock():
    assert read_pins("constraints-3.13.txt")["torch"] > read_pins("requirements.lock")["torch"]


def run_smoke(*options, **environment):
    if shutil.which("bash") is None:
        pytest.skip("bash is absent")
    command = ["bash", str(ROOT / ".ci" / "smoke"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_smoke_prints_one_line_if_the_python_is_missing(tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho Python 3.12.9\n")
    other.chmod(0o755)
    done = run_smoke("9.13", PYTHON913=str(other), PYENV_ROOT=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "smoke: no Python 9.13 here ($PYTHON913, python9.13, pyenv), so it was not tried\n"
