"""What steering costs on your own policy: here two layers, but any that qsteer.steer takes will do.

    python examples/benchmark_latency.py          # half a minute on one core
    qsteer bench latency --host pi05 --size small # the same for lerobot's policies with random weights

A subject is a frozen policy, its critic, and one batch as the policy gets it. A method is a rule and a
sampler. On CUDA, ``mode="graph"`` measures the methods as captured graphs.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.bench.latency import Subject, measure
from qsteer.bench.report import as_json, format_report
from qsteer.evaluation.plots import plot_latency

HORIZON, ACTION, STATE = 10, 7, 8


class Velocity(nn.Module):
    """Stands for your network: noisy chunk, time and observation in, velocity out."""

    def __init__(self) -> None:
        super().__init__()
        chunk = HORIZON * ACTION
        self.net = nn.Sequential(nn.Linear(chunk + 1 + STATE, 512), nn.GELU(), nn.Linear(512, chunk))

    def forward(self, x: Tensor, t: Tensor, obs: dict[str, Tensor]) -> Tensor:
        """Return the velocity, (B, H, A)."""
        return self.net(torch.cat([x.flatten(1), t[:, None], obs["observation.state"]], 1)).view_as(x)


def main(argv: list[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description="Measure what steering your own policy costs.")
    parser.add_argument("--repeats", type=int, default=100, help="timed rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    policy = PlainPolicy(Velocity(), HORIZON, ACTION).to(args.device).requires_grad_(False)
    config = qsteer.CriticConfig(obs_dim=STATE, action_dim=ACTION, horizon=HORIZON)
    critic = qsteer.Critic(config).to(args.device).requires_grad_(False)
    batch = {"observation.state": torch.randn(1, STATE, device=args.device)}

    methods = {
        "Tweedie": (qsteer.Tweedie(), qsteer.Euler()),
        "QGF": (qsteer.QGF(), qsteer.Euler()),
        "BestOfN(8)": (None, qsteer.BestOfN(8)),
    }
    report = as_json(measure(Subject(policy, critic, batch), methods, repeats=args.repeats))
    print(format_report(report))
    if args.plot:
        print(f"picture: {plot_latency(report, args.plot)}")


if __name__ == "__main__":
    main()
