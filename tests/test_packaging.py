"""What a checkout promises about itself; `make package` checks what the built wheel gives a user."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qsteer

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {
    "qsteer": ROOT / "qsteer",
    "qsteer.adapters": ROOT / "adapters",
    "qsteer.critics": ROOT / "critics",
}


def test_version_has_one_source():
    installed = importlib.metadata.version("qsteer")
    assert qsteer.__version__ == installed, "stale install: touch pyproject.toml and run make setup"


def test_extras_can_be_installed_by_name():
    extras = {"lerobot", "ogbench", "metaworld", "libero", "robomimic"}
    extras |= {"serve", "plots", "docs", "dev"}
    assert set(PYPROJECT["project"]["optional-dependencies"]) == extras
    assert set(importlib.metadata.metadata("qsteer").get_all("Provides-Extra")) == extras


def test_every_package_of_the_tree_is_listed():
    found = {
        ".".join([name, *file.parent.relative_to(folder).parts])
        for name, folder in FOLDERS.items()
        for file in folder.rglob("*.py")
        if "lerobot_policy_qsteer" not in file.parts  # a distribution of its own
    }
    assert found == set(PYPROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", ["adapters", "critics"])
def test_symlink_and_package_dir_agree(name):
    assert (ROOT / "qsteer" / name).readlink() == Path("..", name)
    assert PYPROJECT["tool"]["setuptools"]["package-dir"][f"qsteer.{name}"] == name
    file = importlib.import_module(f"qsteer.{name}").__file__
    assert Path(file).resolve() == FOLDERS[f"qsteer.{name}"] / "__init__.py"


def test_import_loads_no_extra():
    """`import qsteer` works where no extra is installed."""
    code = "import sys, qsteer, qsteer.adapters, qsteer.critics; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "qsteer.critics" in loaded
    extras = {"lerobot", "transformers", "ogbench", "gymnasium", "mujoco", "matplotlib", "imageio", "PIL"}
    extras |= {"msgpack", "websockets", "prometheus_client", "openpi_client", "libero", "robosuite"}
    extras |= {"h5py", "beartype", "pytest"}
    assert not extras.intersection(loaded)


def test_names_imported_late_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "qsteer" / "__init__.py").read_text())
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
    }
    assert seen == qsteer._HOMES
    assert sorted(name for names in seen.values() for name in names) == sorted(qsteer.__all__)
    assert all(hasattr(qsteer, name) for name in qsteer.__all__) and not hasattr(qsteer, "nothing")
