"""``qsteer demo``: the demonstration, from the checkpoints of a checkout or from scratch."""

import argparse
from pathlib import Path

from qsteer.cli.options import Commands, add_command, add_task_option, natural_int, positive_int, start_run


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Compare the frozen policy with steered ones on a simulated robot task."
    parser = add_command(commands, "demo", run, text)
    add_task_option(parser)
    parser.add_argument(
        "--from-scratch", action="store_true", help="make data, policy and critic first (resumes)"
    )
    parser.add_argument("--episodes", type=positive_int, default=100, help="evaluation episodes per arm")
    parser.add_argument("--num-envs", type=positive_int, default=8, help="simulators at once")
    parser.add_argument("--seed", type=natural_int, default=0, help="training seed, with --from-scratch")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="where results, plots and videos go"
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.experiments.demo import demo
    from qsteer.experiments.tasks import run_directory
    from qsteer.files import check_directory
    from qsteer.plotting import load_pyplot

    check_directory(args.out)
    load_pyplot()
    if args.from_scratch:
        start_run(args, run_directory(args.task, args.seed))

    demo(
        args.task,
        out=args.out,
        episodes=args.episodes,
        num_envs=args.num_envs,
        from_scratch=args.from_scratch,
        seed=args.seed,
    )
