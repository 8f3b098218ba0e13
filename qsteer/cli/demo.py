"""``qsteer demo``: the demonstration, from the checkpoints of a checkout or from scratch."""

import argparse
from pathlib import Path

from qsteer.cli.options import TASKS, Commands, add_command, natural_int, positive_int, start_run

VLA_TASKS = ("push-v3", "pick-place-v3", "drawer-open-v3")
"""The names in :data:`qsteer.experiments.vla.TASKS`, which the help must not import."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Compare the frozen policy with steered ones on a simulated robot task."
    parser = add_command(commands, "demo", run, text)
    parser.add_argument(
        "--host",
        choices=["mlp", "smolvla"],
        default="mlp",
        help="which policy: a small network in OGBench, or lerobot's SmolVLA in MetaWorld",
    )
    names = {"mlp": TASKS, "smolvla": VLA_TASKS}
    parser.add_argument(
        "--task",
        choices=(*TASKS, *VLA_TASKS),
        help="; ".join(f"of {host}: {', '.join(tasks)}" for host, tasks in names.items())
        + "; default: the first",
    )
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
    tasks = VLA_TASKS if args.host == "smolvla" else TASKS
    task = args.task or tasks[0]
    if task not in tasks:
        raise ValueError(
            f"--task: expected one of {', '.join(tasks)} for --host {args.host}, got {task!r}; choose another"
        )
    from qsteer.files import check_directory
    from qsteer.plotting import load_pyplot

    check_directory(args.out)
    load_pyplot()
    options = {
        "out": args.out,
        "episodes": args.episodes,
        "num_envs": args.num_envs,
        "from_scratch": args.from_scratch,
        "seed": args.seed,
    }
    if args.host == "smolvla":
        from qsteer.experiments.vla import demo_vla

        if args.from_scratch:
            start_run(args, Path("runs/metaworld") / f"seed{args.seed}")
        demo_vla(task, **options)
        return
    from qsteer.experiments.demo import demo
    from qsteer.experiments.tasks import run_directory

    if args.from_scratch:
        start_run(args, run_directory(task, args.seed))
    demo(task, **options)
