"""A critic learns to steer a frozen vision-language-action policy on one LIBERO task, from nothing.

With a checkpoint:

    python examples/train_sarsa_online.py --policy lerobot/pi05_libero_finetuned --task 64 --device cuda

Without ``--policy`` a tiny pi0.5 of random weights acts: it solves nothing, and shows that everything runs.
The critic sees both cameras at 64 pixels and the state (``--features``: the policy's own prefix too), and
learns by SARSA, which never asks the policy for an action of its own. Needs ``qsteer[lerobot,libero]``.
"""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

import qsteer
from qsteer.critics import CriticConfig, LiveCritic
from qsteer.envs import libero
from qsteer.online import OnlineTraining, train_online
from qsteer.online.actors import HostActor
from qsteer.training.critic import CriticTraining

VIEWS = tuple(libero.VIEWS)


def main() -> None:
    """Train, and print what it cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", help="directory or hub name of a pi0, pi0.5 or SmolVLA for LIBERO")
    parser.add_argument("--task", type=int, default=64, help="number of the LIBERO-90 task")
    parser.add_argument("--alpha", type=float, default=0.2, help="strength of the guidance")
    parser.add_argument(
        "--features",
        type=int,
        default=0,
        help="the critic sees the policy's prefix too, so wide; 0: it does not",
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--members", type=int, default=10, help="of the critic's ensemble")
    parser.add_argument(
        "--strides", type=int, nargs=4, default=[2, 1, 1, 1], help="of its encoder; 2 2 1 1 costs a third"
    )
    parser.add_argument("--env-steps", type=int, default=500_000)
    parser.add_argument("--warmup", type=int, default=5_000, help="unsteered steps at first")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--evaluate-every", type=int, default=25_000, help="0: never")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tracker", help="tensorboard, wandb, trackio, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/libero"))
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    policy, preprocess, postprocess = load(args.policy, args.device)
    horizon = policy.config.n_action_steps
    config = CriticConfig(
        obs_dim=8, action_dim=7, horizon=horizon, hidden=(128, 128, 128), members=args.members, views=VIEWS,
        strides=args.strides,
        features=args.features,
    )  # fmt: skip
    torch.manual_seed(0)
    critic = LiveCritic(qsteer.Critic(config).to(args.device))
    actor = HostActor(policy, critic, preprocess, postprocess, libero.TASKS[args.task].instruction)
    training = OnlineTraining(
        critic=CriticTraining(
            target="sarsa", horizon=horizon, ema=0.005, warmup=500, decay=300_000, batch_size=args.batch_size
        ),
        env_steps=args.env_steps,
        num_envs=args.num_envs,
        row=horizon,  # only the observations of decisions are rendered, and stored
        warmup=args.warmup,
        evaluate_every=args.evaluate_every,
        log_every=min(500, args.env_steps // 5),
        checkpoint_every=min(5_000, args.env_steps // 5),
    )
    make_env = partial(libero.make, args.task)
    rule = qsteer.Tweedie(args.alpha)
    train_online(make_env, actor, critic, args.out, training, rule=rule, tracker=args.tracker)
    print(f"critic and metrics: {args.out}")


def load(name: str | None, device: str) -> tuple[Any, Any, Any]:
    """Return the policy and lerobot's processors for it; without a name, small and random ones."""
    if name is None:
        from qsteer.testing import hosts as random_hosts

        policy = random_hosts.pi05(shape=random_hosts.LIBERO)
        return policy.to(device), *random_hosts.processors(policy)
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(name)
    config.device = device
    policy = get_policy_class(config.type).from_pretrained(name, config=config)
    return policy.to(device), *make_pre_post_processors(policy.config, name)


if __name__ == "__main__":
    main()
