"""``qsteer audit``: can this critic be trusted to steer this policy? Before a rollout."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qsteer.cli.options import (
    Commands,
    add_command,
    add_task_option,
    natural_int,
    positive_float,
    positive_int,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qsteer.policies import FlowPolicy

CHUNKS = 16
"""Chunks of an episode from which states are taken where there is no data."""


def add_parser(commands: Commands) -> None:
    """Add the command with its options."""
    text = "Audit a critic before it steers. Exit status: 0 steer, 1 do not steer or not known, 2 misuse."
    parser = add_command(commands, "audit", run, text)
    add_task_option(parser)
    parser.add_argument("--policy", type=Path, required=True, help="directory or hub name of the policy")
    parser.add_argument("--critic", type=Path, required=True, help="directory or hub name of the critic")
    parser.add_argument("--other", type=Path, help="a critic of another seed, which judges the pushes")
    parser.add_argument(
        "--data",
        type=Path,
        help="the .npz with its validation split beside it, which gives states and returns; default: states "
        "of the policy's own episodes in the simulator, and no returns",
    )
    parser.add_argument("--states", type=positive_int, default=128, help="observations")
    parser.add_argument("--samples", type=positive_int, default=16, help="actions of the policy for each")
    parser.add_argument("--gamma", type=positive_float, default=0.99, help="discount, for the data's returns")
    parser.add_argument("--seed", type=natural_int, default=0, help="of states and noise")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--plot", type=Path, help="picture to write")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    import torch

    import qsteer
    from qsteer.critics import Critic
    from qsteer.data import Episodes
    from qsteer.envs import ogbench
    from qsteer.experiments.tasks import RECIPES
    from qsteer.files import check_output
    from qsteer.plotting import load_pyplot
    from qsteer.policies import FlowPolicy

    for path in (args.out, args.plot):
        if path:
            check_output(path)
    if args.plot:
        load_pyplot()
    environment = RECIPES[args.task].environment()
    policy, critic = FlowPolicy.from_pretrained(args.policy), Critic.from_pretrained(args.critic)
    other = Critic.from_pretrained(args.other) if args.other else None
    data = None
    if args.data:
        data = Episodes.from_ogbench(ogbench.load(environment, args.data)[1])
        draw = torch.Generator().manual_seed(args.seed)
        states = data.observations[torch.randint(len(data), (args.states,), generator=draw)]
    else:
        states = visit(environment, policy, args.states, args.seed)
    found = qsteer.audit(
        policy, critic, [states], data, other=other, samples=args.samples, gamma=args.gamma, seed=args.seed
    )
    print(found)
    if args.out:
        print(f"results: {found.save(args.out)}")
    if args.plot:
        print(f"plot:    {found.plot(args.plot)}")
    sys.exit(found.status)


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
