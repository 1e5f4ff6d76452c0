"""What an installation takes: versions that fit together, and a trial of the wheel where a Python is there for it."""

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


def pins(file):
    """Name -> version of every package that a file pins."""
    lines = re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / file).read_text(), re.M)
    return {name.lower(): Version(version) for name, version in lines}


@pytest.mark.parametrize("file", ["requirements.lock", "constraints-3.13.txt"])
def test_the_pins_hold_every_requirement_and_a_torchvision_of_their_torch(file):
    pinned = pins(file)
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["notebook"]:
        wanted = Requirement(line)
        assert pinned[wanted.name.lower()] in wanted.specifier, line
    torch, torchvision = pinned["torch"], pinned["torchvision"]
    assert (torch.major, torchvision.major, torch.minor + 15) == (2, 0, torchvision.minor)


def test_pins_of_python_3_13_are_another_torch_than_the_locks():
    assert pins("constraints-3.13.txt")["torch"] > pins("requirements.lock")["torch"]


def smoke(*options, **environment):
    if shutil.which("bash") is None:
        pytest.skip("bash is absent")
    command = ["bash", str(ROOT / ".ci" / "smoke"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_without_the_python_it_asks_for_the_trial_prints_one_line(tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho Python 3.12.9\n")
    other.chmod(0o755)
    done = smoke("9.13", PYTHON913=str(other), PYENV_ROOT=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "smoke: no Python 9.13 here ($PYTHON913, python9.13, pyenv), so it was not tried\n"
