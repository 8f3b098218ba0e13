"""``qsteer bench latency``: what steering costs, on random policies; no task and no checkpoint."""

import argparse
import time
from pathlib import Path

from qsteer.cli.options import Commands, add_command, add_device_option, natural_int, positive_int

HOSTS, SIZES = ("mlp", "pi0", "pi05", "smolvla"), ("tiny", "small", "full")
"""Those of :mod:`qsteer.testing.hosts`, which the help must not import."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Measure what steering costs."
    bench = commands.add_parser("bench", help=text, description=text)
    kinds = bench.add_subparsers(dest="kind", required=True, metavar="KIND")
    text = "Measure what an action costs, steered and not, on a random policy: nothing to download."
    latency = add_command(kinds, "latency", run_latency, text)
    latency.add_argument("--host", choices=HOSTS, default="pi05", help="mlp: the demonstration's policy")
    latency.add_argument(
        "--size", choices=SIZES, default="small", help="small: pi05 of 76 M parameters; full: lerobot's own"
    )
    latency.add_argument("--cameras", type=int, choices=[1, 2, 3], default=2, help="images; mlp has none")
    latency.add_argument(
        "--chunk", type=positive_int, default=10, help="actions of a chunk, such as 10 or 50"
    )
    latency.add_argument("--rows", type=positive_int, default=1, help="observations at once")
    latency.add_argument("--views", action="store_true", help="the critic sees the images too")
    latency.add_argument(
        "--arms", nargs="+", metavar="ARM", help="as for evaluate; default: those of QPILOTS' table and more"
    )
    latency.add_argument(
        "--compile", choices=["static", "graph", "inductor"], help="how the arms are compiled"
    )
    add_device_option(latency)
    latency.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 for full pi0 and pi05 on CUDA"
    )
    latency.add_argument("--threads", type=positive_int, help="torch's threads; default: as torch chooses")
    latency.add_argument("--repeats", type=positive_int, default=100, help="timed rounds of all arms")
    latency.add_argument("--warmup", type=natural_int, default=5, help="rounds before them")
    latency.add_argument(
        "--cpu-time", action="store_true", help="the process's own time, which others do not stretch"
    )
    latency.add_argument("--out", type=Path, help="JSON to write")
    latency.add_argument("--plot", type=Path, help="picture to write")


def run_latency(args: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from qsteer.bench.latency import list_methods, make_maps, make_subject, measure
    from qsteer.bench.report import as_json, format_report
    from qsteer.evaluation.arms import Maps, parse
    from qsteer.evaluation.plots import plot_latency
    from qsteer.files import check_output, write_json
    from qsteer.plotting import load_pyplot

    if args.out:
        check_output(args.out)
    if args.plot:
        formats = load_pyplot().gcf().canvas.get_supported_filetypes()
        check_output(args.plot, [f".{suffix}" for suffix in formats])
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    measured = make_subject(
        args.host,
        args.size,
        cameras=args.cameras,
        chunk=args.chunk,
        device=args.device,
        dtype=None if args.dtype is None else getattr(torch, args.dtype),
        views=args.views,
        rows=args.rows,
    )
    if args.arms:
        meta, flow = make_maps(measured)
        arms = [parse(spec, Maps(meta, flow, flow)) for spec in args.arms]
        chosen = {arm.spec: (arm.rule, arm.sampler) for arm in arms}
    else:
        chosen = list_methods(measured)
    timer = time.process_time if args.cpu_time else None
    found = measure(
        measured, chosen, mode=args.compile, repeats=args.repeats, warmup=args.warmup, timer=timer
    )
    report = as_json(found)
    print(format_report(report))
    if args.out:
        write_json(report, args.out)
        print(f"results: {args.out}")
    if args.plot:
        print(f"picture: {plot_latency(report, args.plot)}")
