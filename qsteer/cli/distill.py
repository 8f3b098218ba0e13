"""``qsteer distill``: learnt maps of the frozen policy."""

import argparse
from dataclasses import replace

from qsteer.cli.options import (
    Commands,
    add_command,
    add_task_option,
    add_training_options,
    select_given,
    start_run,
)


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Distil a map of the frozen policy: jumps, or posterior samples."
    parser = add_command(commands, "distill", run, text)
    add_task_option(parser)
    parser.add_argument(
        "--map",
        choices=["meta", "flow"],
        default="meta",
        help="meta: meta flow map (Posterior); flow: flow map (BeamSearch)",
    )
    add_training_options(parser, "meta or flow")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    from qsteer.data import Chunks, Episodes
    from qsteer.envs.ogbench import load
    from qsteer.experiments.tasks import RECIPES, run_directory
    from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
    from qsteer.policies import FlowPolicy
    from qsteer.training.loop import processes
    from qsteer.training.maps import distil, distil_flow_map
    from qsteer.training.teachers import StateTeacher

    state = processes(args.device)
    task, directory = RECIPES[args.task], run_directory(args.task, args.seed)
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
        hidden=task.map_hidden,
        harmonics=shape.harmonics,
        residual=True,
    )
    torch.manual_seed(args.seed)
    if isinstance(config, MetaMapConfig):
        meta = MetaFlowMap(config).to(args.device)
        distil(meta, teacher, out, replace(task.meta, **given), held_out=held_out)
    else:
        distil_flow_map(FlowMap(config).to(args.device), teacher, out, replace(task.flow_map, **given))
    if state.is_main_process:
        print(f"{args.map}: {out}")
