"""The README and the documentation do what they say: snippets run, commands parse, files are there.

The Python blocks of a page run one after another in one namespace. A block behind a comment ``not run: why``
needs a download, a simulator or a GPU: it is compiled, its imports and attributes are looked up, and its
calls are compared with signatures. Shell blocks run in bash with every command replaced by a stub, so that
loops and braces are expanded; what ``qsteer`` and the examples would get is parsed by their own parsers.
"""

import argparse
import ast
import importlib
import inspect
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from qsteer import cli
from qsteer.evaluation import arms

ROOT = Path(__file__).parents[2]
LEROBOT = "lerobot.configs.train"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(python|bash)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*\Z")
STUB = """#!{bash}
{{ printf '%s\\0' {name} "$@"; printf '\\n'; }} >> {log}
"""


class Block(NamedTuple):
    """A fenced block of a page, and the number of the line before its first."""

    page: Path
    line: int
    code: str
    runs: bool


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = []
    for match in FENCE.finditer(text):
        indent, kind, code = match.groups()
        if kind == language:
            code = re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)
            line = text[: match.start(3)].count("\n")
            found.append(Block(page, line, code, not NOT_RUN.search(text[: match.start()])))
    return found


def pages_with(language: str) -> list[Any]:
    return [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if blocks(p, language)]


class Names(ast.NodeVisitor):
    """Looks up what a block that does not run names, and compares its calls with signatures."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = dict(known)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = load(alias.name)
            if module is not None:
                self.known[alias.asname or alias.name.partition(".")[0]] = module

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = load(node.module or "")
        for alias in node.names if module is not None else ():
            submodule = f"{node.module}.{alias.name}"
            thing = getattr(module, alias.name) if hasattr(module, alias.name) else load(submodule)
            assert thing is not None, f"there is no {submodule}"
            self.known[alias.asname or alias.name] = thing

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.find(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.find(node.func)
        starred = any(isinstance(a, ast.Starred) for a in node.args) or any(
            k.arg is None for k in node.keywords
        )
        if called is not None and not starred:
            inspect.signature(called).bind(*node.args, **{str(k.arg): k for k in node.keywords})
        self.generic_visit(node)

    def find(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if not isinstance(node, ast.Attribute):
            return None
        owner = self.find(node.value)
        if not isinstance(owner, ModuleType | type):
            return None
        assert hasattr(owner, node.attr), f"{ast.unparse(node.value)} has no {node.attr}"
        return getattr(owner, node.attr)


def load(name: str) -> ModuleType | None:
    """Import a module; one of a package that is not installed here is None."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert (error.name or "").partition(".")[0] not in ("qsteer", "lerobot", "torch"), error
        return None


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": f"snippets of {page.name}"}
    for block in blocks(page, "python"):
        source = "\n" * block.line + block.code
        code = compile(source, str(page), "exec")  # a failure shows the page's own line
        if block.runs:
            exec(code, namespace)
        else:
            Names(namespace).visit(ast.parse(source))


class Parsed(Exception):  # noqa: N818 (nothing is wrong)
    """Raised in the place of running a command whose arguments were understood."""


@pytest.fixture
def parsing(monkeypatch):
    """Let every program end where it has parsed its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.syspath_prepend(ROOT / "examples")


def commands(block: Block, directory: Path) -> list[list[str]]:
    """Return the commands of a shell block, as bash would call them."""
    log, binaries = directory / "log", directory / ".venv/bin"
    binaries.mkdir(parents=True)
    names = "qsteer python pip make git accelerate apt-get pre-commit lerobot-eval lerobot-train ray".split()
    bash = shutil.which("bash")
    for name in names:
        (binaries / name).write_text(STUB.format(bash=bash, name=name, log=log))
        (binaries / name).chmod(0o755)
    (directory / ".venv-metaworld").symlink_to(".venv")
    log.touch()
    script = f"cd() {{ :; }}\n{block.code}"
    done = subprocess.run(
        [bash, "-eu", "-c", script],
        cwd=directory,
        env={"PATH": str(binaries), "R": "runs/cube-single/seed0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, f"{block.page.name}:{block.line}: {done.stderr}"
    return [line.rstrip("\0").split("\0") for line in log.read_text().splitlines()]


@pytest.mark.parametrize("page", pages_with("bash"))
def test_shell_blocks(page, tmp_path, monkeypatch, parsing, capsys):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for number, block in enumerate(blocks(page, "bash")):
        for program, *arguments in commands(block, tmp_path / str(number)):
            where = f"{page.name}:{block.line}: {program} {' '.join(arguments)}"
            check_files(arguments, where, kept=block.runs)
            match program:
                case "qsteer":
                    check_command(arguments, where)
                case "python" | "accelerate" if arguments[0].startswith("examples/"):
                    monkeypatch.setattr(sys, "argv", arguments)
                    with pytest.raises(Parsed):
                        runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")
                case "lerobot-eval":
                    plugin = pytest.importorskip("lerobot_policy_qsteer")
                    known = {field.name for field in fields(plugin.QSteerConfig)} | {"path", "type"}
                    named = {a.partition("=")[0] for a in arguments if a.startswith("--policy.")}
                    assert {name.removeprefix("--policy.") for name in named} <= known, where
                case "lerobot-train":
                    known = {field.name for field in fields(pytest.importorskip(LEROBOT).TrainPipelineConfig)}
                    assert {re.split("[.=]", a.removeprefix("--"))[0] for a in arguments} <= known, where
                case "make":
                    assert {a for a in arguments if "=" not in a} <= {*targets}, where
                case "pip":
                    asked = re.findall(r"\[([a-z,]+)\]", " ".join(arguments))
                    assert {extra for group in asked for extra in group.split(",")} <= {*extras}, where


def check_command(arguments: list[str], where: str) -> None:
    """Parse a ``qsteer`` command with its own parser, and the arms that it names."""
    arguments = ["cpu" if argument == "cuda" else argument for argument in arguments]  # whatever is here
    try:
        cli.main(arguments)
    except Parsed as parsed:
        options = vars(parsed.args[0])
    except SystemExit:
        pytest.fail(f"{where}: does not parse")
    for arm in [*(options.get("arms") or ()), *filter(None, [options.get("arm")])]:
        try:
            arms.parse(arm)
        except FileNotFoundError:
            pass  # a map, which is not given here


def check_files(arguments: list[str], where: str, *, kept: bool) -> None:
    """Find the files of the checkout that a command names; results only where they are kept."""
    for argument in arguments:
        folder = argument.partition("/")[0]
        if folder == "examples" or (kept and folder in ("benchmarks", "docs") and Path(argument).suffix):
            assert (ROOT / argument).exists() or list(ROOT.glob(argument)), f"{where}: there is no {argument}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "docs" not in p.parts], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_outside_the_documentation(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), f"{page.name}: there is no {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_the_text(page):
    """Files of the checkout that a page names in its text are there, patterns match something."""
    folders = "benchmarks", "critics", "examples", "tests"
    for path in re.findall(rf"`((?:{'|'.join(folders)})/[^` ]+)`", FENCE.sub("", page.read_text())):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: there is no {path}"


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_reference_is_complete():
    """Every module has a page, and every name that a package exports is described where it is defined."""
    pytest.importorskip("sphinx")
    conf = runpy.run_path(str(ROOT / "docs/conf.py"))
    text = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    roots = [name for names in re.findall(r"<!-- modules: (.+) -->", text) for name in names.split()]
    documented = [module.__name__ for root in roots for module in conf["modules_of"](root)]
    assert len(documented) == len(set(documented)), "a module is on two pages"
    modules = {module.__name__: module for module in conf["modules_of"]("qsteer")}
    assert set(modules) - set(documented) <= {"qsteer"}
    described = {name for module in modules.values() for _, name in conf["described"](module)}
    exported = {
        conf["public_name"](getattr(m, n), m.__name__, n)
        for m in modules.values()
        for n in getattr(m, "__all__", ())
    }
    assert exported <= described
