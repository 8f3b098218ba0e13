"""``qsteer train-critic``: the critic, on data."""

import argparse
from dataclasses import replace
from pathlib import Path

from qsteer.cli.options import (
    Commands,
    add_command,
    add_dataset_options,
    add_plugin_option,
    add_task_option,
    add_training_options,
    import_plugins,
    natural_float,
    positive_float,
    positive_int,
    read_task,
    refuse_given,
    select_given,
    start_run,
)

DATASET_ONLY = ("policy", "views", "features", "rewards", "failures", "horizon", "gamma", "plugin")


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Train the critic that steers: of a recipe, or of a lerobot policy on a LeRobotDataset."
    parser = add_command(commands, "train-critic", run, text)
    add_task_option(parser, alone=False)
    parser.add_argument(
        "--target", default="iql", choices=["sarsa", "monte_carlo", "iql"], help="what it regresses on"
    )
    parser.add_argument("--members", type=positive_int, help="size of the ensemble; default: the recipe's")
    parser.add_argument("--rho", type=natural_float, help="pessimism; default: the recipe's")
    add_training_options(parser, "critic")
    group = parser.add_argument_group("on a LeRobotDataset")
    add_dataset_options(group)
    group.add_argument(
        "--policy", help="the lerobot policy that is to be steered: folder, or name on the hub"
    )
    group.add_argument("--views", nargs="+", metavar="KEY", help="images that the critic sees")
    group.add_argument(
        "--features", action="store_true", help="the critic sees the policy's features, which know the task"
    )
    group.add_argument("--horizon", type=positive_int, help="actions per chunk; default: n_action_steps")
    group.add_argument("--gamma", type=positive_float, help="discount per step; default: 0.99")
    add_plugin_option(group)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.dataset is not None:
        run_on_dataset(args)
        return
    refuse_given(args, DATASET_ONLY, "without --dataset")
    from qsteer.data import Episodes
    from qsteer.envs.ogbench import load
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.training import train_critic

    name = read_task(args)
    task = RECIPES[name]
    training = replace(
        task.critic, **select_given(args, "seed", "steps", "compile", "target", "members", "rho")
    )
    out = start_run(args, args.out or run_directory(name, args.seed) / "critic")
    train, _ = load(task.environment(), args.data or task.data_path)
    train_critic(Episodes.from_ogbench(train), out, training, device=args.device)
    print(f"critic: {out}")


def run_on_dataset(args: argparse.Namespace) -> None:
    """Train a critic of a lerobot policy."""
    refuse_given(args, ("task", "data"), "beside --dataset")
    for name in ("policy", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected it beside --dataset, got none; give a folder")
    import_plugins(args)
    from qsteer.adapters import contract_of
    from qsteer.data.lerobot import open_dataset, open_policy
    from qsteer.training import CriticTraining, train_from_dataset

    out = start_run(args, Path(args.out))
    dataset = open_dataset(args.dataset)
    policy, before, _ = open_policy(args.policy, args.device)
    given = select_given(args, "seed", "steps", "compile", "target", "members", "rho", "gamma")
    training = CriticTraining(horizon=args.horizon or int(contract_of(policy).horizon or 0), **given)
    _, ranking = train_from_dataset(
        dataset,
        policy,
        before,
        out,
        training,
        views=args.views or (),
        features=args.features,
        rewards=args.rewards,
        failures=args.failures or (),
        device=args.device,
    )
    print(ranking or "held out: no chunk, for there is one episode only or those held out were cut")
    print(f"critic: {out}")
