"""``qsteer audit``: can this critic be trusted to steer this policy? Before a rollout."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsteer.cli.options import (
    Commands,
    add_command,
    add_dataset_options,
    add_device_option,
    add_plugin_option,
    add_task_option,
    import_plugins,
    natural_int,
    positive_float,
    positive_int,
    read_task,
    refuse_given,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qsteer.policies import FlowPolicy

CHUNKS = 16
"""Chunks of an episode from which states are taken where there is no data."""
ROWS = 16
"""Frames of a dataset that are asked at once."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Audit a critic before it steers. Exit status: 0 steer, 1 do not steer or not known, 2 misuse."
    parser = add_command(commands, "audit", run, text)
    add_task_option(parser, alone=False)
    parser.add_argument("--policy", required=True, help="directory or hub name of the policy")
    parser.add_argument("--critic", required=True, help="directory or hub name of the critic")
    parser.add_argument("--other", help="a critic of another seed, which judges the pushes")
    parser.add_argument(
        "--data",
        type=Path,
        help="the .npz with its validation split beside it, which gives states and returns; default: states "
        "of the policy's own episodes in the simulator, and no returns",
    )
    group = parser.add_argument_group("of a lerobot policy: states and returns of a LeRobotDataset")
    add_dataset_options(group)
    add_device_option(group)
    add_plugin_option(group)
    parser.add_argument("--states", type=positive_int, default=128, help="observations")
    parser.add_argument("--samples", type=positive_int, default=16, help="actions of the policy for each")
    parser.add_argument(
        "--gamma",
        type=positive_float,
        help="discount of the data's returns; default: 0.99, of a LeRobotDataset the critic's",
    )
    parser.add_argument("--seed", type=natural_int, default=0, help="of states and noise")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--plot", type=Path, help="picture to write")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import qsteer
    from qsteer.critics import Critic
    from qsteer.files import check_output
    from qsteer.plotting import load_pyplot

    if args.dataset is None:
        refuse_given(args, ("rewards", "failures", "plugin"), "without --dataset")
        if args.device != "cpu":
            raise ValueError(f"--device: expected cpu without --dataset, got {args.device}; leave it out")
    else:
        refuse_given(args, ("task", "data"), "beside --dataset")
        import_plugins(args)
    for path in (args.out, args.plot):
        if path:
            check_output(path)
    if args.plot:
        load_pyplot()
    policy, inputs = read_recipe(args) if args.dataset is None else read_dataset(args)
    critic = Critic.from_pretrained(args.critic).to(args.device)
    other = Critic.from_pretrained(args.other).to(args.device) if args.other else None
    gamma = args.gamma
    if gamma is None and args.dataset is not None and critic.config.contract is not None:
        gamma = critic.config.contract.discount
    found = qsteer.audit(
        policy,
        critic,
        **inputs,
        other=other,
        samples=args.samples,
        gamma=0.99 if gamma is None else gamma,
        seed=args.seed,
    )
    print(found)
    if args.out:
        print(f"results: {found.save(args.out)}")
    if args.plot:
        print(f"plot:    {found.plot(args.plot)}")
    sys.exit(found.status)


def read_recipe(args: argparse.Namespace) -> tuple["FlowPolicy", dict[str, Any]]:
    """Return the policy of a recipe, and where it is asked."""
    import torch

    from qsteer.data import Episodes
    from qsteer.envs import ogbench
    from qsteer.experiments.tasks import RECIPES
    from qsteer.policies import FlowPolicy

    environment = RECIPES[read_task(args)].environment()
    policy = FlowPolicy.from_pretrained(args.policy)
    if not args.data:
        return policy, {"batches": [visit(environment, policy, args.states, args.seed)]}
    data = Episodes.from_ogbench(ogbench.load(environment, args.data)[1])
    draw = torch.Generator().manual_seed(args.seed)
    states = data.observations[torch.randint(len(data), (args.states,), generator=draw)]
    return policy, {"batches": [states], "data": data}


def read_dataset(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return a lerobot policy, and where it is asked: in frames which its critics' training holds out."""
    import torch

    from qsteer.data.lerobot import Seen, open_dataset, open_policy
    from qsteer.training.dataset import hold_out

    dataset = open_dataset(args.dataset)
    policy, before, _ = open_policy(args.policy, args.device)
    seen = Seen(dataset, policy, before, rewards=args.rewards, failures=args.failures or ())
    data = seen.episodes(hold_out(len(seen.lengths())))
    draw = torch.Generator().manual_seed(args.seed)
    frames = data.observations[torch.randperm(len(data), generator=draw)[: args.states], 0].long()

    def observe(numbers: torch.Tensor) -> dict[str, Any]:
        return seen.batch(numbers.flatten().long().tolist())

    batches = [observe(numbers) for numbers in frames.split(ROWS)]
    return policy, {"batches": batches, "data": data, "observe": observe}


def visit(environment: str, policy: "FlowPolicy", states: int, seed: int) -> "Tensor":
    """Return states (N, O) that the policy meets in its own episodes, at the beginnings of its chunks."""
    import torch

    import qsteer
    from qsteer.envs import ogbench
    from qsteer.envs.seeds import TUNING_SEED

    env = ogbench.make(environment)
    met: list[Tensor] = []
    draw = torch.Generator().manual_seed(seed)
    shape = 1, policy.config.horizon, policy.config.action_dim
    over, episode = True, 0
    while len(met) < states:
        if over or len(met) % CHUNKS == 0:
            observation, _ = env.reset(seed=TUNING_SEED + seed + episode)
            over, episode = False, episode + 1
        met.append(torch.from_numpy(observation).float())
        field = policy.field(met[-1][None])
        chunk = qsteer.sample(field, None, torch.randn(shape, generator=draw))[0].clamp(-1, 1)
        for action in chunk.numpy():
            observation, _, terminated, truncated, _ = env.step(action)
            if over := terminated or truncated:
                break
    env.close()
    return torch.stack(met)
