"""Steer a pretrained policy with a critic: three lines, and what they do.

    python examples/wrap_pretrained.py     # a tiny random pi0.5 and a random critic: offline, half a minute
    python examples/wrap_pretrained.py --policy lerobot/pi05_libero_finetuned --critic me/libero-critic

Any pi0, pi0.5 or SmolVLA checkpoint will do; the critic must have been trained in the policy's own space:
observations after its preprocessor, actions before its postprocessor.
"""

import argparse

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy

import qsteer
from qsteer.testing import hosts as random_hosts


def load_policy(name: str | None) -> PreTrainedPolicy:
    """Load a lerobot checkpoint by name or directory; without one, make a tiny random pi0.5."""
    if name is None:
        return random_hosts.pi05()
    return get_policy_class(PreTrainedConfig.from_pretrained(name).type).from_pretrained(name)


def load_critic(name: str | None, policy: PreTrainedPolicy) -> qsteer.Critic:
    """Load a critic by name or directory; without one, make a random one that fits the policy."""
    if name is None:
        torch.manual_seed(0)
        shape = qsteer.CriticConfig(
            obs_dim=policy.config.robot_state_feature.shape[0],
            action_dim=policy.config.action_feature.shape[0],
            horizon=policy.config.n_action_steps,
        )
        critic = qsteer.Critic(shape)
    else:
        critic = qsteer.Critic.from_pretrained(name)
    return critic.to(next(policy.parameters()).device)


def main(argv: list[str] | None = None) -> None:
    """Act with and without steering."""
    parser = argparse.ArgumentParser(description="Steer a pretrained policy with a critic.")
    parser.add_argument(
        "--policy", help="lerobot checkpoint of a pi0, pi0.5 or SmolVLA (default: tiny, random)"
    )
    parser.add_argument("--critic", help="qsteer critic (default: random)")
    parser.add_argument(
        "--alpha", type=float, default=0.3, help="strength, relative to the policy's velocity"
    )
    arguments = parser.parse_args(argv)

    # What a robot would see, after the policy's preprocessor. Here: noise of the right shapes.
    policy = load_policy(arguments.policy)
    batch = random_hosts.batch(policy)

    def act() -> torch.Tensor:
        torch.manual_seed(0)  # the same noise each time, so that only the steering differs
        return policy.predict_action_chunk(batch)[0, : policy.config.n_action_steps]

    def show(name: str, actions: torch.Tensor) -> None:
        first = "  ".join(f"{number:7.3f}" for number in actions[0])
        print(f"{name:>10}: value {critic.bind(batch)(actions[None]).item():7.3f}, first action {first}")

    unsteered = act()

    # The three lines.
    critic = load_critic(arguments.critic, policy)
    handle = qsteer.steer(policy, critic, qsteer.Tweedie(alpha=arguments.alpha), trace=True)
    steered = act()

    print(f"\nWhat the rule did, by time (0 is noise, 1 the action): {handle.trace}\n")
    show("unsteered", unsteered)
    show("steered", steered)

    # Another method on the same handle: no gradient, the best of eight candidates on one prefix.
    handle.swap(rule=None, sampler=qsteer.BestOfN(8))
    show("best of 8", act())

    # Nothing stays behind.
    handle.remove()
    print(f"\nAfter removal the same as before, to the last bit: {torch.equal(act(), unsteered)}")


if __name__ == "__main__":
    main()
