"""``qsteer train-critic``: the critic, on data."""

import argparse
from dataclasses import replace

from qsteer.cli.options import (
    Commands,
    add_command,
    add_task_option,
    add_training_options,
    natural_float,
    positive_int,
    select_given,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Train the critic that steers."
    parser = add_command(commands, "train-critic", run, text)
    add_task_option(parser)
    parser.add_argument(
        "--target", default="iql", choices=["sarsa", "monte_carlo", "iql"], help="what it regresses on"
    )
    parser.add_argument("--members", type=positive_int, help="size of the ensemble; default: the recipe's")
    parser.add_argument("--rho", type=natural_float, help="pessimism; default: the recipe's")
    add_training_options(parser, "critic")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.data import Episodes
    from qsteer.envs.ogbench import load
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.training import train_critic

    task = RECIPES[args.task]
    training = replace(
        task.critic, **select_given(args, "seed", "steps", "compile", "target", "members", "rho")
    )
    out = start_run(args, args.out or run_directory(args.task, args.seed) / "critic")
    train, _ = load(task.environment(), args.data or task.data_path)
    train_critic(Episodes.from_ogbench(train), out, training, device=args.device)
    print(f"critic: {out}")
