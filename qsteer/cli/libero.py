"""``qsteer libero``: QPILOTS' table 3, a critic that learns online to steer a pretrained pi0.5."""

import argparse
from pathlib import Path

from qsteer.cli.options import (
    Commands,
    add_command,
    add_device_option,
    natural_int,
    positive_int,
    start_run,
)

TASKS = (26, 31, 38, 59, 60, 64)
"""Those of :data:`qsteer.experiments.libero.TASKS`, which the help must not import."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Run QPILOTS' table 3: on six LIBERO tasks a critic learns online to steer a frozen pi0.5."
    parser = add_command(commands, "libero", run, text)
    parser.add_argument(
        "--policy",
        required=True,
        help="directory or hub name, such as lerobot/pi05_libero_finetuned; random: tiny, of random weights",
    )
    parser.add_argument(
        "--assets", type=Path, help="folder of LIBERO's assets; default: where LIBERO looks for them"
    )
    parser.add_argument("--tasks", type=int, nargs="+", choices=TASKS, default=list(TASKS), help="numbers")
    parser.add_argument("--steps", type=positive_int, default=500_000, help="environment steps of each task")
    parser.add_argument("--episodes", type=positive_int, default=50, help="evaluation episodes of each arm")
    parser.add_argument(
        "--tuning-episodes", type=positive_int, default=20, help="of each strength, on seeds of their own"
    )
    parser.add_argument(
        "--actor",
        choices=["base", "tweedie", "posterior", "qgf-matched", "best-of-5"],
        default="tweedie",
        help="who acts while the critic learns, at the paper's strength; base: the frozen policy",
    )
    parser.add_argument(
        "--maps", type=Path, help="directory with a learnt meta flow map in meta/, for QPILOTS-M (posterior)"
    )
    parser.add_argument("--num-envs", type=positive_int, default=8, help="simulators at once")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="of the critic's updates")
    parser.add_argument("--size", type=positive_int, default=256, help="edge of rendered views, in pixels")
    parser.add_argument("--max-steps", type=positive_int, help="of an episode; default: the suite's 400")
    parser.add_argument("--seed", type=natural_int, default=0, help="training seed")
    parser.add_argument(
        "--record",
        type=positive_int,
        metavar="ROWS",
        help="only record so many of the policy's batches of each task, along random walks",
    )
    add_device_option(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/libero"), help="run directory")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from qsteer.evaluation.arms import Maps
    from qsteer.experiments.libero import Table3, format_table, record_walk, run_task
    from qsteer.experiments.libero_policy import open_frozen
    from qsteer.files import write_json

    out = start_run(args, args.out)
    plan = Table3(
        actor=args.actor,
        steps=args.steps,
        episodes=args.episodes,
        tuning_episodes=args.tuning_episodes,
        num_envs=args.num_envs,
        seed=args.seed,
        batch_size=args.batch_size,
        size=args.size,
        max_steps=args.max_steps,
    )
    makes = {task: plan.environment(task, args.assets) for task in args.tasks}
    for make_env in makes.values():
        make_env().close()  # what is missing of LIBERO is said before the policy is loaded
    maps = Maps() if args.maps is None else Maps.load(args.maps)
    if maps.meta is not None:
        maps.meta.to(args.device)
    elif args.maps is not None or args.actor == "posterior":
        raise FileNotFoundError(
            f"--maps: expected a directory with a meta flow map of the policy in meta/, got {args.maps}; "
            "distil one with examples/distill_mfm.py, or leave QPILOTS-M out"
        )
    frozen = open_frozen(args.policy, args.device)
    if args.record:
        for task, make_env in makes.items():
            folder = out / f"task{task}" / "batches"
            record_walk(make_env, frozen.preprocess, folder, rows=args.record, seed=args.seed)
            print(f"batches: {folder}")
        return
    run_name, results = f"{args.actor}-seed{args.seed}", []
    for task, make_env in makes.items():
        results.append(run_task(task, make_env, frozen, out / f"task{task}" / run_name, plan, maps=maps))
        write_json({"results": results}, out / f"{run_name}.json")
    print(f"{format_table(results)}\nresults: {out / f'{run_name}.json'}")
