"""``qsteer evaluate``: arms compared on the same episodes."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from qsteer.cli.options import Commands, add_command, add_task_option, natural_float, positive_int


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Compare arms on the evaluation seeds."
    parser = add_command(commands, "evaluate", run, text)
    add_task_option(parser)
    parser.add_argument("--policy", type=Path, required=True, help="directory or hub name of the policy")
    parser.add_argument("--critic", type=Path, required=True, help="directory or hub name of the critic")
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
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument(
        "--eval-info",
        type=Path,
        help="directory for each arm's episodes, as lerobot's eval info has them",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.critics import Critic
    from qsteer.envs import ogbench
    from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
    from qsteer.evaluation.arms import Maps, parse
    from qsteer.evaluation.compare import compare, format_comparison
    from qsteer.experiments.tasks import RECIPES
    from qsteer.files import check_directory, check_output, write_json
    from qsteer.policies import FlowPolicy

    if args.out:
        check_output(args.out)
    if args.eval_info:
        check_directory(args.eval_info)
    task = RECIPES[args.task]
    policy, critic = FlowPolicy.from_pretrained(args.policy), Critic.from_pretrained(args.critic)
    maps = Maps.load(args.maps) if args.maps else Maps()
    if args.rho is not None:
        critic.config = replace(critic.config, rho=args.rho)
    report, runs = compare(
        partial(ogbench.make, task.environment()),
        policy,
        critic,
        [parse(arm, maps) for arm in args.arms or task.arms],
        episodes=args.episodes,
        seed=TUNING_SEED if args.tuning else EVALUATION_SEED,
        num_envs=args.num_envs,
        compile=args.compile,
    )
    report = {
        "task": task.environment(),
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
