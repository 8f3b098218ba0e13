"""``qsteer generate``: data sets from OGBench's scripted oracles."""

import argparse
from pathlib import Path

from qsteer.cli.options import Commands, add_command, add_task_option, natural_int, positive_int


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Collect a task's data with OGBench's scripted oracles."
    parser = add_command(commands, "generate", run, text)
    add_task_option(parser)
    parser.add_argument("--data", type=Path, help="the .npz to write; default runs/data/NAME.npz")
    parser.add_argument(
        "--transitions", type=positive_int, help="size of the training split; default: the recipe's"
    )
    parser.add_argument("--seed", type=natural_int, default=0, help="seed of the whole data set")
    parser.add_argument("--workers", type=positive_int, help="processes; default: one per core")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.envs.ogbench import generate
    from qsteer.experiments.tasks import RECIPES
    from qsteer.files import check_output

    task = RECIPES[args.task]
    path = check_output(args.data or task.data_path, (".npz",))
    transitions = task.transitions if args.transitions is None else args.transitions
    generate(
        task.data,
        path,
        transitions=transitions,
        val_transitions=max(1, transitions // 10),
        seed=args.seed,
        workers=args.workers,
    )
    print(f"{transitions} transitions of {task.data}: {path}")
