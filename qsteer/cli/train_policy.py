"""``qsteer train-policy``: the policy, by behaviour cloning."""

import argparse
from dataclasses import replace

from qsteer.cli.options import (
    Commands,
    add_command,
    add_task_option,
    add_training_options,
    natural_int,
    select_given,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Clone the data's behaviour: the policy that is then frozen."
    parser = add_command(commands, "train-policy", run, text)
    add_task_option(parser)
    parser.add_argument(
        "--residual-layers",
        type=natural_int,
        help="of the recipe's width, in place of its plain hidden layers",
    )
    parser.add_argument(
        "--layer-norm",
        action="store_true",
        default=None,
        help="the policy has LayerNorm, which fits better; default: the recipe's, without",
    )
    add_training_options(parser, "policy")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.data import Episodes
    from qsteer.envs.ogbench import load
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.training import train_policy

    task = RECIPES[args.task]
    training = replace(task.policy, **select_given(args, "seed", "steps", "compile", "layer_norm"))
    if args.residual_layers is not None:
        hidden = tuple(training.hidden[:1]) * (1 + args.residual_layers)
        training = replace(training, hidden=hidden, residual=True)
    out = start_run(args, args.out or run_directory(args.task, args.seed) / "policy")
    train, _ = load(task.environment(), args.data or task.data_path)
    train_policy(Episodes.from_ogbench(train), out, training, device=args.device)
    print(f"policy: {out}")
