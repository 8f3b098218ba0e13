"""``qsteer protocol``: OGBench from offline to online."""

import argparse
from dataclasses import fields
from pathlib import Path

from qsteer.cli.options import (
    Commands,
    add_command,
    add_compile_option,
    add_device_option,
    natural_int,
    positive_float,
    positive_int,
    select_given,
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
        "--arms",
        nargs="+",
        default=[],
        metavar="ARM",
        help="how to steer, such as best-of-8; default: Tweedie with the paper's strength",
    )
    parser.add_argument(
        "--scale", type=positive_float, default=1.0, help="of all numbers of steps; 1: the paper's"
    )
    parser.add_argument(
        "--offline-only", action="store_true", help="measure the arms under the offline critic alone"
    )
    parser.add_argument(
        "--target", choices=["sarsa", "td", "iql"], help="of the critic; default: the paper's, td"
    )
    parser.add_argument("--offline-steps", type=positive_int, help="in place of the paper's million")
    parser.add_argument("--online-steps", type=positive_int, help="in place of the paper's 500,000")
    parser.add_argument("--updates-per-step", type=positive_float, help="online; default: the paper's, 1")
    parser.add_argument(
        "--num-envs", type=positive_int, help="simulators of each seed; default: the paper's, 1"
    )
    parser.add_argument("--evaluate-every", type=natural_int, help="environment steps; 0: at the end alone")
    parser.add_argument("--episodes", type=positive_int, help="of an evaluation; default: the paper's, 50")
    parser.add_argument("--batch-size", type=positive_int, help="of an update; default: the paper's, 256")
    parser.add_argument(
        "--hidden", type=positive_int, nargs="+", help="widths; default: the paper's, 4 of 512"
    )
    parser.add_argument("--members", type=positive_int, help="of the critic; default: the paper's, 10")
    parser.add_argument("--ema", type=positive_float, help="of the target critic; default: the paper's, .005")
    parser.add_argument(
        "--clones", action="store_true", default=None, help="policies go on cloning online, as the papers' do"
    )
    add_compile_option(parser)
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
    from qsteer.experiments.protocol import Size, find_domain, format_results

    if args.report:
        print(format_results(args.report))
        return
    from qsteer.experiments.protocol_run import run_protocol

    task = find_domain(args.domain)
    size = Size(**select_given(args, *(field.name for field in fields(Size)))).scaled(args.scale)
    out = args.out or Path("runs/protocol") / f"{args.domain}-{args.task}"
    results = run_protocol(
        task,
        args.task,
        args.data or task.data_path,
        start_run(args, out),
        seeds=args.seeds,
        arms=args.arms,
        size=size,
        online=not args.offline_only,
        device=args.device,
    )
    print(f"{format_results([results])}\nresults: {results}")
