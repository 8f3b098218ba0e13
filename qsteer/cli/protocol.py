"""``qsteer protocol``: OGBench from offline to online."""

import argparse
from pathlib import Path

from qsteer.cli.options import (
    Commands,
    add_command,
    add_device_option,
    natural_int,
    positive_float,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Run the OGBench offline-to-online protocol on a task, or sum up such runs."
    parser = add_command(commands, "protocol", run, text)
    parser.add_argument("--domain", default="cube-double", help="which domain (qsteer/experiments/tasks.py)")
    parser.add_argument("--task", type=int, choices=range(1, 6), default=2, help="number of the task, 1 to 5")
    parser.add_argument("--data", type=Path, help="the .npz to read; default runs/data/NAME.npz")
    parser.add_argument("--seeds", type=natural_int, nargs="+", default=list(range(8)), help="all at once")
    parser.add_argument(
        "--scale", type=positive_float, default=1.0, help="of all numbers of steps; 1: the paper's"
    )
    add_device_option(parser)
    parser.add_argument("--out", type=Path, help="run directory; default runs/protocol/DOMAIN-TASK")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="results.json of runs to sum up; runs nothing",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.experiments.protocol import find_domain, format_results, run_protocol

    if args.report:
        print(format_results(args.report))
        return
    task = find_domain(args.domain)
    out = args.out or Path("runs/protocol") / f"{args.domain}-{args.task}"
    results = run_protocol(
        task,
        args.task,
        args.data or task.data_path,
        start_run(args, out),
        seeds=args.seeds,
        scale=args.scale,
        device=args.device,
    )
    print(f"{format_results([results])}\nresults: {results}")
