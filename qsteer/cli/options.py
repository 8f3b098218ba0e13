"""What several commands share: how a parser is added, and the options they have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsteer.experiments.tasks import RECIPES

type Commands = argparse._SubParsersAction
"""What ``add_subparsers`` returns."""


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add the parser of a command; ``text`` is its help and its description."""
    parser = commands.add_parser(
        name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(run=run)
    return parser


def add_task_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--task``."""
    parser.add_argument(
        "--task", choices=RECIPES, default="cube-single", help="which recipe (qsteer/experiments/tasks.py)"
    )


def add_training_options(parser: argparse.ArgumentParser, kind: str) -> None:
    """Add the options of every training command; ``kind`` names the folder of the result."""
    parser.add_argument(
        "--data", type=Path, help="the .npz to read, generated or official; default runs/data/NAME.npz"
    )
    parser.add_argument("--steps", type=int, help="gradient steps; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0, help="training seed")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help=f"run directory; default runs/TASK/seedN/{kind}")


def select_given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the options that were given; the recipe has the others."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
