"""``qsteer adapt``: a flow map adapted to the critic by FMQ."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsteer.cli.options import (
    Commands,
    add_command,
    add_task_option,
    add_training_options,
    natural_float,
    natural_int,
    positive_int,
    select_given,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Adapt a distilled flow map to the critic, in the environment (FMQ)."
    parser = add_command(commands, "adapt", run, text)
    add_task_option(parser)
    parser.add_argument(
        "--env-steps", type=natural_int, help="environment steps; default: the recipe's; 0: on the data alone"
    )
    parser.add_argument(
        "--critic", type=Path, help="directory of the critic to start from; default runs/TASK/seedN/critic"
    )
    parser.add_argument("--eta", type=natural_float, help="radius of the trust region; default: the recipe's")
    parser.add_argument(
        "--candidates",
        type=positive_int,
        help="the critic's best of so many actions of the map acts; default: 1; with --eta 0: as MVP",
    )
    parser.add_argument("--fixed-critic", action="store_true", help="the critic stays as it is")
    add_training_options(parser, "fmq")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.critics import Critic
    from qsteer.data import Episodes
    from qsteer.envs import ogbench
    from qsteer.evaluation.plots import plot_adaptation
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.maps import FlowMap
    from qsteer.online.fmq import adapt
    from qsteer.plotting import load_pyplot
    from qsteer.policies import FlowPolicy
    from qsteer.training.loop import METRICS

    task, directory = RECIPES[args.task], run_directory(args.task, args.seed)
    given = select_given(args, "seed", "steps", "compile", "env_steps", "eta", "candidates")
    given["learn_critic"] = not args.fixed_critic
    if args.env_steps and args.steps is None:
        given["steps"] = args.env_steps  # one update per environment step
    training = replace(task.fmq, **given)
    out = start_run(args, args.out or directory / "fmq")
    load_pyplot()
    train, _ = ogbench.load(task.environment(), args.data or task.data_path)
    adapt(
        FlowMap.from_pretrained(directory / "flow").to(args.device),
        Critic.from_pretrained(args.critic or directory / "critic").to(args.device),
        FlowPolicy.from_pretrained(directory / "policy").requires_grad_(False).to(args.device),
        Episodes.from_ogbench(train),
        out,
        training,
        make_env=partial(ogbench.make, task.environment()) if training.env_steps else None,
    )
    print(
        f"fmq: {out}, distance to the offline map: {plot_adaptation(out / METRICS, out / 'adaptation.png')}"
    )
