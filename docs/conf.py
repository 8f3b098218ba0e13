"""Settings of the documentation, for `make docs`: built from this checkout, without a network."""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAliasType

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import qsteer  # noqa: E402

project = "qsteer"
author = copyright = "The qsteer authors"
version = release = qsteer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_design"]
exclude_patterns = ["_static"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpick_ignore_regex = [
    (r"py:.*", r"(?!qsteer).*"),  # names of other projects, which cannot be looked up offline
    (r"py:.*", r".*\._.*"),  # private bases
]
suppress_warnings = ["ref.python"]  # a short name in an annotation that fits two classes: either link will do

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 90

html_title = "qsteer"
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["qsteer.css"]
html_show_sourcelink = False
html_sidebars = {
    page: [] for page in ("quickstart", "how-it-works", "troubleshooting")
}  # no siblings to show
html_theme_options = {
    "logo": {"text": "qsteer"},
    "navbar_end": ["theme-switcher"],
    "show_prev_next": True,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}

MODULES = re.compile(r"^<!-- modules: (.+) -->$", re.MULTILINE)
NAMES = re.compile(r"^<!-- names: (.+) -->$", re.MULTILINE)


def modules_of(name: str) -> Iterator[ModuleType]:
    """Yield a module or package, and the modules of the package."""
    module = importlib.import_module(name)
    yield module
    for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        if not info.name.startswith("_"):
            yield from modules_of(f"{name}.{info.name}")


def exported_names() -> dict[int, str]:
    """Return the shortest name under which a package exports an object, by the object's identity."""
    packages = [module for module in modules_of("qsteer") if hasattr(module, "__all__")]
    names: dict[int, str] = {}
    for package in sorted(packages, key=lambda package: package.__name__.count(".")):
        for name in package.__all__:
            names.setdefault(id(getattr(package, name)), f"{package.__name__}.{name}")
    return names


EXPORTED = exported_names()


def public_name(thing: Any, module: str, name: str) -> str:
    """Return the name by which users import something."""
    return EXPORTED.get(id(thing), f"{module}.{name}")


def constants(module: ModuleType) -> set[str]:
    """Return the names that a module assigns and documents, or that a package exports."""
    analyzer = ModuleAnalyzer.for_module(module.__name__)
    analyzer.analyze()
    documented = {name for scope, name in analyzer.attr_docs if not scope}
    statements = ast.parse(inspect.getsource(module)).body
    targets = [target for node in statements if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in statements if isinstance(node, ast.AnnAssign)]
    assigned = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return {name for name in assigned if name in documented or id(getattr(module, name)) in EXPORTED}


def described(module: ModuleType) -> Iterator[tuple[str, str]]:
    """Yield directive and name of all that a module defines for others, in the order of its source."""
    known = constants(module)
    for name, thing in vars(module).items():
        if name.startswith("_"):
            continue
        full = public_name(thing, module.__name__, name)
        own = getattr(thing, "__module__", None) == module.__name__
        if own and isinstance(thing, TypeAliasType):
            yield "autotype", full
        elif own and inspect.isclass(thing):
            yield "autoclass", full
        elif own and inspect.isfunction(thing):
            yield "autofunction", full
        elif name in known:
            yield "autodata", full


def reference(module: ModuleType) -> str:
    """Return a page's section on one module, in Markdown."""
    lines = [f".. automodule:: {module.__name__}", "   :no-members:", ""]
    for directive, name in described(module):
        lines.append(f".. {directive}:: {name}")
        if directive == "autoclass" and module.__name__ == "qsteer.types":
            lines.append("   :special-members: __call__")
        lines.append("")
    return "\n".join([f"## {module.__name__}", "", "```{eval-rst}", *lines, "```", ""])


def overview(package: str) -> str:
    """Return a table of what a package exports, in Markdown."""
    lines = [".. list-table::", "   :widths: 30 70", ""]
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        summary = (inspect.getdoc(thing) or "").partition("\n")[0] if callable(thing) else ""
        lines += [f"   * - :py:obj:`{package}.{name}`", f"     - {summary}"]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def write_reference(app: Sphinx, page: str, source: list[str]) -> None:
    """Write the reference where a page says ``modules: NAMES`` or ``names: PACKAGE`` in a comment."""

    def sections(match: re.Match[str]) -> str:
        return "\n".join(reference(module) for name in match[1].split() for module in modules_of(name))

    source[0] = NAMES.sub(lambda match: overview(match[1]), MODULES.sub(sections, source[0]))


def resolve_alias(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Resolve any importable name of a thing, and a field of a dataclass, which its class describes."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target.startswith("qsteer."):
        return None
    owner, _, attribute = target.rpartition(".")
    domain = env.domains.python_domain
    for name in (locate(target), f"{locate(owner)}.{attribute}", locate(owner)):
        if name in domain.objects:
            return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
    return None


def locate(target: str) -> str | None:
    """Return the documented name of an object that can be imported as ``target``."""
    module, _, name = target.rpartition(".")
    try:
        thing = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return public_name(thing, getattr(thing, "__module__", None) or module, name)


def setup(app: Sphinx) -> None:
    """Connect the above."""
    app.connect("source-read", write_reference)
    app.connect("missing-reference", resolve_alias)
