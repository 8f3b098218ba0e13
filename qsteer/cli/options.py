"""What several commands share: how a parser is added, the options they have in common, what they check."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

if TYPE_CHECKING:
    from qsteer.envs.cluster import Cluster

TASKS = ("cube-single", "pointmaze-medium", "scene")
"""The names in :data:`qsteer.experiments.tasks.RECIPES`, which the help must not import."""

type Commands = argparse._SubParsersAction
"""What ``add_subparsers`` returns."""


class Parser(argparse.ArgumentParser):
    """A parser that answers misuse with one line, and exit status 2."""

    def error(self, message: str) -> Never:
        """Leave with a line; the usage is in the help that it names."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add the parser of a command; ``text`` is its help and its description."""
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_task_option(parser: argparse.ArgumentParser, *, alone: bool = True) -> None:
    """Add ``--task``; where there are others to choose from (not ``alone``), :func:`read_task` reads it."""
    text = "which recipe (qsteer/experiments/tasks.py)"
    if alone:
        parser.add_argument("--task", choices=TASKS, default=TASKS[0], help=text)
    else:
        text += f"; default: {TASKS[0]}"
        parser.add_argument("--task", choices=TASKS, default=argparse.SUPPRESS, help=text)


def read_task(args: argparse.Namespace) -> str:
    """Return the recipe's name."""
    return getattr(args, "task", TASKS[0])


def add_dataset_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--dataset`` and how its rewards are read."""
    parser.add_argument("--dataset", help="its folder, or its name on the hub")
    parser.add_argument(
        "--rewards",
        choices=["dataset", "sparse"],
        help="the dataset's own, or -1 per step until success; default: the former where it has them",
    )
    parser.add_argument(
        "--failures",
        nargs="+",
        type=natural_int,
        metavar="N",
        help="episodes that failed, if no column says so",
    )


def add_plugin_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--plugin``."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import it first: it registers policies or environments with lerobot; may be repeated",
    )


def add_env_options(group: argparse._ActionsContainer) -> None:
    """Add ``--env`` and what else names one of lerobot's environments."""
    group.add_argument("--env", metavar="TYPE", help="such as libero, metaworld, pusht, or a plugin's")
    group.add_argument("--env-task", metavar="NAME", help="what the environment calls a task or a suite")
    group.add_argument("--env-task-id", type=natural_int, metavar="N", help="which task of a suite")
    group.add_argument(
        "--env-options",
        nargs="+",
        default=[],
        type=option,
        metavar="NAME=VALUE",
        help="other fields of its configuration, such as episode_length=500",
    )


def import_plugins(args: argparse.Namespace) -> None:
    """Import what ``--plugin`` names, and the plugins that are installed.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    sys.path.append(str(Path.cwd()))  # where one's own module may lie
    for name in args.plugin:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise ModuleNotFoundError(
                f"--plugin: expected a module that can be imported, got {name!r}; give its name as Python "
                "imports it"
            ) from None


def refuse_given(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise if any of these options was given; "" and None and [] and False stand for none.

    Raises:
        ValueError: one was.
    """
    if given := [
        name for name in names if getattr(args, name.replace("-", "_"), None) not in (None, [], False)
    ]:
        raise ValueError(f"--{given[0]}: expected none {why}; leave it out")


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")


def add_training_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the options of every training command; ``kind`` names the folder of the result."""
    parser.add_argument(
        "--data", type=Path, help="the .npz to read, generated or official; default runs/data/NAME.npz"
    )
    parser.add_argument("--steps", type=positive_int, help="gradient steps; default: the recipe's")
    parser.add_argument("--seed", type=natural_int, default=0, help="training seed")
    add_device_option(parser)
    add_compile_option(parser)
    parser.add_argument("--out", type=Path, help=f"run directory; default runs/TASK/seedN/{kind}")


def add_ray_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--ray`` and how simulators are dealt out; :func:`read_cluster` reads them."""
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="run the simulators on a Ray cluster: auto, local or HOST:PORT; default: on this machine",
    )
    parser.add_argument(
        "--envs-per-actor",
        type=positive_int,
        metavar="N",
        help="simulators that share a core of the cluster; default: 1",
    )


def read_cluster(args: argparse.Namespace) -> "Cluster | None":
    """Return the cluster to run simulators on; None: this machine."""
    if args.ray is None:
        refuse_given(args, ("envs-per-actor",), "without --ray")
        return None
    from qsteer.envs.cluster import Cluster

    return Cluster(address=args.ray, envs_per_actor=args.envs_per_actor or 1)


def add_compile_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--compile``."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile updates and actions, for a minute or more at the first ones",
    )


def select_given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given; the recipe has the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def start_run(args: argparse.Namespace, out: Path) -> Path:
    """Check that a run directory can be written to, and keep it for what is said when the run is interrupted.

    Raises:
        OSError: it cannot.
    """
    from qsteer.files import check_directory

    args.run_directory = check_directory(out)
    return out


def positive_int(text: str) -> int:
    """Read a whole number of at least 1."""
    return _at_least(1, text)


def natural_int(text: str) -> int:
    """Read a whole number of at least 0."""
    return _at_least(0, text)


def positive_float(text: str) -> float:
    """Read a finite number above 0."""
    if not (number := _finite(text)) > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def natural_float(text: str) -> float:
    """Read a finite number of at least 0."""
    if not (number := _finite(text)) >= 0:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return number


def option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; the value is a number, true, false or null as in JSON, or else text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def device(text: str) -> str:
    """Read the name of a device that this machine has."""
    if text == "cpu":
        return text
    import torch

    try:
        torch.empty(1, device=text)
    except Exception as error:  # torch has one kind for each way in which a device is not there
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(
            f"expected a device of this machine, got {text!r} ({reason}); cpu always is one"
        ) from None
    return text


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return number


def _finite(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return number
