"""``qsteer distill``: learnt maps of the frozen policy."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from qsteer.cli.options import (
    Commands,
    add_command,
    add_plugin_option,
    add_task_option,
    add_training_options,
    import_plugins,
    positive_int,
    read_task,
    refuse_given,
    select_given,
    start_run,
)

HELD_OUT = 8
"""Held-out observations on which a meta flow map of a lerobot policy is judged; a flow map: 8 times these."""
BLOCK = 256
"""Frames in a file, of which the first are held out."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Distil a map of the frozen policy: jumps, or posterior samples."
    parser = add_command(commands, "distill", run, text)
    add_task_option(parser, alone=False)
    parser.add_argument(
        "--map",
        choices=["meta", "flow"],
        default="meta",
        help="meta: meta flow map (Posterior); flow: flow map (BeamSearch)",
    )
    add_training_options(parser, "meta or flow")
    parser.add_argument(
        "--width",
        type=positive_int,
        help="of the map's network; default: the recipe's, or 128",
    )
    group = parser.add_argument_group("of a lerobot policy, on a LeRobotDataset")
    group.add_argument("--policy", help="its folder, or its name on the hub")
    group.add_argument("--dataset", help="its folder, or its name on the hub")
    group.add_argument("--frames", type=positive_int, help="how many frames are drawn; default: 8192")
    group.add_argument("--batch-size", type=positive_int, help="default: 128")
    group.add_argument("--depth", type=positive_int, help="layers of the map's transformer; default: 3")
    add_plugin_option(group)


LEROBOT = ("policy", "frames", "batch-size", "depth", "plugin")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.dataset is not None:
        run_on_dataset(args)
        return
    refuse_given(args, LEROBOT, "without --dataset")
    import torch

    from qsteer.data import Chunks, Episodes
    from qsteer.envs.ogbench import load
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
    from qsteer.policies import FlowPolicy
    from qsteer.training.loop import processes
    from qsteer.training.maps import distil, distil_flow_map
    from qsteer.training.teachers import StateTeacher

    name = read_task(args)
    state = processes(args.device)
    task, directory = RECIPES[name], run_directory(name, args.seed)
    out = start_run(args, args.out or directory / args.map)
    policy = FlowPolicy.from_pretrained(directory / "policy").requires_grad_(False).to(args.device)
    shape = policy.config
    teacher, held_out = (
        StateTeacher(policy, Chunks(Episodes.from_ogbench(d).to(args.device), shape.horizon, 1.0, "actions"))
        for d in load(task.environment(), args.data or task.data_path)
    )
    given = select_given(args, "seed", "steps", "compile")
    kind = MetaMapConfig if args.map == "meta" else MapConfig
    config = kind(
        shape.horizon,
        shape.action_dim,
        shape.hidden[0],
        hidden=(args.width,) * len(task.map_hidden) if args.width else task.map_hidden,
        harmonics=shape.harmonics,
        residual=True,
    )
    torch.manual_seed(args.seed)
    if isinstance(config, MetaMapConfig):
        meta = MetaFlowMap(config).to(args.device)
        distil(meta, teacher, out, replace(task.meta, **given), held_out=held_out)
    else:
        flow_map = FlowMap(config).to(args.device)
        distil_flow_map(flow_map, teacher, out, replace(task.flow_map, **given), held_out=held_out)
    if state.is_main_process:
        print(f"{args.map}: {out}")


def run_on_dataset(args: argparse.Namespace) -> None:
    """Distil a map of a lerobot policy, a transformer that reads the policy's own prefix."""
    refuse_given(args, ("data",), "beside --dataset")
    if "task" in args:
        raise ValueError("--task: expected none beside --dataset; leave it out")
    for name in ("policy", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name}: expected it beside --dataset, got none; give a folder")
    import_plugins(args)
    import torch

    from qsteer.data.lerobot import open_policy
    from qsteer.experiments.tasks import FLOW_MAP, META
    from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
    from qsteer.training.loop import processes
    from qsteer.training.maps import JumpError, PosteriorError, distil, distil_flow_map
    from qsteer.training.teachers import HostTeacher

    state = processes(args.device)
    out = start_run(args, Path(args.out))
    policy, *_ = open_policy(args.policy, args.device)
    with state.main_process_first():
        train, held = record_frames(policy, args, out / "data")
    teacher = HostTeacher(policy, train, "data")
    shape: dict[str, Any] = {"width": args.width or 128, "depth": args.depth or 3, "heads": 4}
    given = select_given(args, "seed", "steps", "compile") | {"batch_size": args.batch_size or 128}
    torch.manual_seed(args.seed)
    judge = HostTeacher(policy, held, "data") if state.is_main_process else None
    if args.map == "meta":
        error = judge and PosteriorError(judge, observations=HELD_OUT, samples=32, steps=16)
        meta = MetaFlowMap(MetaMapConfig(*teacher.sizes(), **shape, residual=True)).to(args.device)
        distil(meta, teacher, out, replace(META, **given), held_out=error)
    else:
        jump = judge and JumpError(judge, observations=8 * HELD_OUT)
        learnt = FlowMap(MapConfig(*teacher.sizes(), **shape, residual=True)).to(args.device)
        distil_flow_map(learnt, teacher, out, replace(FLOW_MAP, **given), held_out=jump)
    if state.is_main_process:
        print(f"{args.map}: {out}")


def record_frames(policy: Any, args: argparse.Namespace, directory: Path) -> tuple[Any, Any]:
    """Record frames of the dataset, as the policy gets them, once: to learn from, and held out."""
    import torch

    from qsteer.data.batches import SafetensorsBatches, lerobot_batches, record
    from qsteer.data.lerobot import open_dataset
    from qsteer.files import read_json, write_json

    dataset, frames = open_dataset(args.dataset), args.frames or 8192
    source = {"policy": str(args.policy), "dataset": [dataset.repo_id, len(dataset)], "frames": frames}
    parts, marker = (directory / "train", directory / "held"), directory / "source.json"
    if marker.exists() and read_json(marker) != source:
        raise ValueError(
            f"{directory}: expected the frames of {source}, got those of {read_json(marker)}; use another "
            "--out"
        )
    if not marker.exists():
        batches = lerobot_batches(policy, dataset.repo_id, root=dataset.root, checkpoint=args.policy)
        draw = torch.Generator().manual_seed(0)
        numbers = torch.randperm(len(batches), generator=draw)[: frames + BLOCK].tolist()
        if len(numbers) <= BLOCK:
            raise ValueError(
                f"{args.dataset}: expected more than {BLOCK} frames, of which so many are held out, got "
                f"{len(numbers)}; record more"
            )
        for part, chosen in zip(parts, (numbers[BLOCK:], numbers[:BLOCK]), strict=True):
            record((batches.rows(chosen[i : i + BLOCK]) for i in range(0, len(chosen), BLOCK)), part)
        write_json(source, marker)
    train, held = (SafetensorsBatches(part) for part in parts)
    return train, held
