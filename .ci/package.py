"""Builds the sdist and the wheel from what git would commit, and checks what a user gets from the wheel.

The throwaway environment borrows its dependencies from this one by a .pth file. Python ignores the .pth files
inside a folder that is added so, which keeps the editable install of qsteer out; the checks verify it.
"""

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
UV = ROOT / ".ci" / "uv"
PLUGIN = Path("adapters/lerobot_policy_qsteer")
FOLDERS = {"qsteer": "", "adapters": "qsteer/", "critics": "qsteer/"}  # and their place in the wheel

IMPORTS = """
import importlib.util, sys
import qsteer, qsteer.adapters, qsteer.critics

for module in qsteer, qsteer.adapters, qsteer.critics:
    assert module.__file__.startswith(sys.prefix), f"{module.__file__} is not under {sys.prefix}"
for name in "adapters", "critics":
    assert importlib.util.find_spec(name) is None, f"{name} can be imported as a top-level module"
"""

PLUGGED = """
import sys
from lerobot.configs import PreTrainedConfig
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
import lerobot_policy_qsteer
assert lerobot_policy_qsteer.__file__.startswith(sys.prefix), lerobot_policy_qsteer.__file__
assert "qsteer" in PreTrainedConfig.get_known_choices()
"""

USER_SCRIPT = """
import torch
import qsteer
field = qsteer.field(lambda x, t: -x)
value = qsteer.value(lambda a: -a.square().sum((1, 2)))
action: torch.Tensor = qsteer.sample(field, value, torch.randn(2, 4, 3), rule=qsteer.Tweedie(alpha=0.2))
def mistake() -> None: qsteer.Tweedie(alpha="0.2")  # type: ignore[arg-type]
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Returns what the command printed; ends the check, showing it, if the command fails."""
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{done.stdout}\nfailed: {' '.join(map(str, command))}")
    return done.stdout


def copy_tree(target: Path) -> None:
    """Copies what git has or would add: a stale build folder must not reach the wheel."""
    for name in run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)


def build(tree: Path, out: Path, *options: str) -> tuple[Path, set[str]]:
    """Builds from `tree` into `out`; returns the wheel and the names of the files in it."""
    run(UV, "build", *options, "--out-dir", out, cwd=tree)
    (wheel,) = out.glob("*.whl")
    return wheel, set(zipfile.ZipFile(wheel).namelist())


def check(scratch: Path) -> None:
    """Prints one line for each promise kept; the first one broken ends the check."""
    tree, empty, env = scratch / "tree", scratch / "empty", scratch / "env"
    empty.mkdir()
    copy_tree(tree)

    wheel, files = build(tree, scratch / "by-sdist")
    _, direct = build(tree, scratch / "direct", "--wheel")
    assert files == direct, f"in only one of the two wheels: {sorted(files ^ direct)}"
    print(f"ok: {wheel.name} has the same files whether built from the sdist or from the tree")

    plugin = tree / PLUGIN
    modules = [
        path.relative_to(tree)
        for top in FOLDERS
        for kind in ("*.py", "*.html")
        for path in (tree / top).rglob(kind)
        if not path.is_relative_to(plugin)
    ]
    expected = {f"{FOLDERS[path.parts[0]]}{path}" for path in modules} | {"qsteer/py.typed"}
    contents = {name for name in files if ".dist-info/" not in name}
    assert contents == expected, f"in only one of wheel and tree: {sorted(contents ^ expected)}"
    print("ok: it holds every module, page and py.typed, all of them inside qsteer")

    run(UV, "venv", "--python", sys.executable, env, cwd=empty)
    python = env / "bin" / "python"
    plugged, inside = build(plugin, scratch / "plugin", "--wheel")
    run(UV, "pip", "install", "--python", python, "--no-deps", wheel, plugged, cwd=empty)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=empty).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-c", IMPORTS, cwd=empty)
    print("ok: qsteer, qsteer.adapters and qsteer.critics import from it, adapters and critics do not")

    assert {name for name in inside if ".dist-info/" not in name} == {
        str(path.relative_to(plugin)) for path in (plugin / plugin.name).rglob("*.py")
    }, f"in only one of the plugin's wheel and its tree: {sorted(inside)}"
    run(python, "-c", PLUGGED, cwd=empty)
    print(f"ok: {plugged.name} is found by lerobot")

    script = empty / "user_script.py"
    script.write_text(USER_SCRIPT)
    run(python, script, cwd=empty)
    mypy = (sys.executable, "-m", "mypy", "--warn-unused-ignores", "--python-executable")
    run(*mypy, python, script, cwd=empty)
    print("ok: a user's script runs, and mypy checks it against qsteer's own types")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        check(Path(scratch).resolve())
