"""``qsteer evaluate``: arms compared on the same episodes."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsteer.cli.options import (
    Commands,
    add_command,
    add_device_option,
    add_env_options,
    add_plugin_option,
    add_ray_options,
    add_task_option,
    import_plugins,
    natural_float,
    positive_int,
    read_cluster,
    read_task,
    refuse_given,
)

if TYPE_CHECKING:
    from qsteer.critics import Critic
    from qsteer.envs.rollouts import Rollouts
    from qsteer.types import Clip

ARMS = ("base", "tweedie=0.2", "qgf-matched=0.2", "best-of-8", "random-of-8", "random-direction=0.2")
"""What is compared of a lerobot policy, unless arms are named."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Compare arms on the evaluation seeds."
    parser = add_command(commands, "evaluate", run, text)
    add_task_option(parser, alone=False)
    parser.add_argument("--policy", required=True, help="directory or hub name of the policy")
    parser.add_argument("--critic", required=True, help="directory or hub name of the critic")
    parser.add_argument(
        "--maps", type=Path, help="directory with the learnt maps meta/, flow/, fmq/ that arms ask for"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="such as base tweedie=0.2 qgf=0.06 best-of-8 random-of-8 random-direction=0.2 random-qgf=0.06 "
        "negated=0.2 tweedie=0.2+best-of-8+keep-best; the first is what the others are compared with; "
        "default: the recipe's",
    )
    parser.add_argument(
        "--episodes", type=positive_int, default=200, help="per arm; the same ones for every arm"
    )
    parser.add_argument("--rho", type=natural_float, help="another pessimism than the critic was saved with")
    parser.add_argument("--tuning", action="store_true", help="use the tuning seeds, to choose strengths on")
    parser.add_argument("--num-envs", type=positive_int, default=8, help="simulators at once")
    parser.add_argument(
        "--compile", choices=["static", "inductor"], help="inductor: compile each arm's actions first"
    )
    add_ray_options(parser)
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument(
        "--eval-info",
        type=Path,
        help="directory for each arm's episodes, as lerobot's eval info has them",
    )
    group = parser.add_argument_group("of a lerobot policy, in one of lerobot's environments")
    add_env_options(group)
    add_device_option(group)
    add_plugin_option(group)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.critics import Critic
    from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
    from qsteer.evaluation.arms import Maps, parse
    from qsteer.evaluation.compare import format_comparison
    from qsteer.experiments.tasks import RECIPES
    from qsteer.files import check_directory, check_output, write_json

    if args.env is None:
        refuse_given(args, ("env-task", "env-task-id", "env-options", "plugin"), "without --env")
        if args.device != "cpu":
            raise ValueError(f"--device: expected cpu without --env, got {args.device}; leave it out")
    else:
        refuse_given(args, ("task", "compile"), "beside --env")
        import_plugins(args)
    cluster = read_cluster(args)
    if args.out:
        check_output(args.out)
    if args.eval_info:
        check_directory(args.eval_info)
    task = RECIPES[read_task(args)]
    maps = Maps.load(args.maps).to(args.device) if args.maps else Maps()
    specs = task.arms if args.env is None else ARMS
    clip: Clip = "policy" if args.env is None else None  # as lerobot, and as steer
    arms = [parse(arm, maps, clip=clip) for arm in args.arms or specs]
    options: dict[str, Any] = {
        "arms": arms,
        "episodes": args.episodes,
        "seed": TUNING_SEED if args.tuning else EVALUATION_SEED,
        "num_envs": args.num_envs,
        "cluster": cluster,
    }
    critic = Critic.from_pretrained(args.critic).to(args.device)
    if args.rho is not None:
        critic.config = replace(critic.config, rho=args.rho)
    if args.env is None:
        report, runs = compare_recipe(args, critic, task.environment(), options)
        name = task.environment()
    else:
        report, runs, name = compare_lerobot(args, critic, options)
    report = {
        "task": name,
        "policy": str(args.policy),
        "critic": str(args.critic),
        "rho": critic.config.rho,
    } | report
    print(format_comparison(report))
    if args.out:
        write_json(report, args.out)
        print(f"results: {args.out}")
    for rollouts in runs if args.eval_info else ():
        print(f"episodes: {rollouts.save(args.eval_info / f'{rollouts.name}.json')}")


def compare_recipe(
    args: argparse.Namespace, critic: "Critic", environment: str, options: dict[str, Any]
) -> tuple[dict[str, Any], list["Rollouts"]]:
    """Compare the arms in a recipe's simulator."""
    from qsteer.envs import ogbench
    from qsteer.evaluation.compare import compare
    from qsteer.policies import FlowPolicy

    policy = FlowPolicy.from_pretrained(args.policy)
    return compare(partial(ogbench.make, environment), policy, critic, compile=args.compile, **options)


def compare_lerobot(
    args: argparse.Namespace, critic: "Critic", options: dict[str, Any]
) -> tuple[dict[str, Any], list["Rollouts"], str]:
    """Compare the arms of a lerobot policy; the name is of the environment and its task."""
    from qsteer.data.lerobot import open_policy
    from qsteer.envs.lerobot import env_config
    from qsteer.evaluation.compare import compare_driven
    from qsteer.evaluation.lerobot import drive

    config = env_config(args.env, args.env_task, args.env_task_id, dict(args.env_options))
    policy, *processors = open_policy(args.policy, args.device)
    make_env, driver = drive(config, args.env_task_id, policy, tuple(processors), critic)
    report, runs = compare_driven(make_env, driver, **options)
    number = "" if args.env_task_id is None else f" {args.env_task_id}"
    others = "".join(f", {name}={value}" for name, value in args.env_options)
    return report, runs, f"{args.env}: {config.task}{number}{others}"
