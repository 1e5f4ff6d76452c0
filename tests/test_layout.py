"""The library is laid out as the paper goes: ten packages, one-way imports, small faces."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import peka_lite

ROOT = Path(peka_lite.__file__).parent
PACKAGES = (
    "data", "teachers", "backbones", "adapters", "transfer", "probe", "evaluation", "maps", "experiments", "reports",
)  # fmt: skip


def test_the_top_level_holds_twelve_packages():
    entries = {path.name for path in ROOT.iterdir() if path.name not in ("__pycache__", ".DS_Store")}
    assert entries == {*PACKAGES, "_core", "cli", "__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("folder", sorted(path.parent for path in ROOT.glob("*/**/__init__.py")), ids=lambda p: p.name)
def test_a_package_has_at_most_ten_public_modules_and_a_small_face(folder):
    public = [path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")]
    assert len(public) <= 10, public
    assert len((folder / "__init__.py").read_text().splitlines()) <= 20


def test_imports_go_one_way():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=ROOT.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("name", PACKAGES)
def test_a_face_offers_what_its_stub_names(name):
    package = import_module(f"peka_lite.{name}")
    stub = ast.parse(Path(package.__file__).with_name("__init__.pyi").read_text())
    homes = {alias.name: node.module for node in stub.body for alias in node.names}
    assert sorted(homes) == package.__all__
    for attribute, module in homes.items():
        # A function stays what its package offers, although a module may have its name (`evaluation.folds`).
        assert getattr(package, attribute) is getattr(import_module(f"peka_lite.{name}.{module}"), attribute)


def test_the_top_level_offers_packages_and_verbs():
    packages = set(PACKAGES)
    assert packages < set(peka_lite.__all__)
    verbs = set(peka_lite.__all__) - packages
    assert 15 <= len(verbs) <= 25
    for name in verbs:
        home = getattr(peka_lite, name).__module__.split(".")[1]
        assert getattr(import_module(f"peka_lite.{home}"), name) is getattr(peka_lite, name)
    assert callable(peka_lite.run)


def test_editors_see_the_names_that_are_offered():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name for node in block.body for alias in node.names}
    assert seen == set(peka_lite.__all__) - set(PACKAGES)


@pytest.mark.parametrize(
    "code",
    [
        "import peka_lite",
        "from peka_lite.cli.main import main; main(['run', '--method', 'bonne', '--out', 'x'])",
        "import peka_lite as pk\ntry: pk.RunConfig(method='bonne')\nexcept ValueError: pass",
    ],
)
def test_pytorch_is_not_imported_before_a_setting_is_refused(code, tmp_path):
    code += "\nimport sys; print(sorted({'torch', 'anndata', 'pandas', 'sklearn', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr[-2000:]
