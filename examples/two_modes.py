"""Two modes and a critic that errs between them: where does a posterior pay, and the denoised action mislead?

    python examples/two_modes.py --out benchmarks/two_modes.json

A policy proposes two kinds of actions, around -1 and 1, never between; the kind around 1 is rarer and
better. The critic is right at both kinds. Between them, where there is no data, it says what ``bump`` says:
0, it goes over from one to the other; above 0, it overestimates; below 0, it is wary. All else
is exact: velocity, posterior, and the law ``pi exp(tilt Q)``, whose shares of the kinds are known. Early
in the chain the denoised action lies between the kinds. Takes a minute of one core.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from proposition_1 import Mixture, noise
from torch import Tensor

import qsteer
from qsteer.files import write_json
from qsteer.maps import GlassPosterior
from qsteer.types import Rule, Sampler

POLICY = Mixture((0.8, 0.2), (-1.0, 1.0), 0.15)
BUMPS = (0.0, 1.5, -1.5)
"""How far the critic is off half way between the two kinds."""
FAR = 3.5
"""Standard deviations from a kind's mean, from which on an action is of neither kind."""


@dataclass(frozen=True)
class Critic:
    """1 / (1 + exp(-a / 0.1)), and ``bump`` half way: within 0.02 of 0 and 1 at the two kinds.

    Attributes:
        bump: error in the middle.
    """

    bump: float

    def __call__(self, a: Tensor) -> Tensor:
        """Return the value of actions (B, 1, 1)."""
        return (torch.sigmoid(10 * a) + self.bump * torch.exp(-((a / 0.25) ** 2) / 2)).flatten()


def shares(a: Tensor, weight: Tensor | None = None) -> dict[str, float]:
    """Return the shares of actions of the better kind, and of neither."""
    near = [(a.flatten() - mean).abs() < FAR * POLICY.std for mean in POLICY.means]
    weight = torch.full_like(a.flatten(), 1 / a.numel()) if weight is None else weight
    return {"better": float(weight[near[1]].sum()), "neither": float(weight[~(near[0] | near[1])].sum())}


def exact(critic: Critic, tilt: float) -> dict[str, float]:
    """Return the shares under ``pi exp(tilt Q)``, by quadrature."""
    a = torch.linspace(-3, 3, 100_001, dtype=torch.float64)
    density = POLICY.density(a) * torch.exp(tilt * critic(a))
    return shares(a, density / density.sum())


def tilts(samples: int) -> dict[str, Callable[[float], Rule]]:
    """Return the rules that aim at ``pi exp(tilt Q)``: the sigma scaling, no clip."""
    same: dict[str, Any] = {"scaling": "sigma", "clip": None}
    mean: dict[str, Any] = {"standardize": False, **same}
    return {
        "tweedie": lambda tilt: qsteer.Tweedie(tilt, **same),
        "qgf": lambda tilt: qsteer.QGF(tilt, **same),
        "posterior": lambda tilt: qsteer.Posterior(POLICY.posterior, tilt, samples, **mean),
        "posterior-1024": lambda tilt: qsteer.Posterior(POLICY.posterior, tilt, 1024, **mean),
        "posterior-glass-4": lambda tilt: qsteer.Posterior(GlassPosterior(), tilt, samples, **mean),
        "posterior-glass-16": lambda tilt: qsteer.Posterior(GlassPosterior(steps=16), tilt, samples, **mean),
        "gradient-free": lambda tilt: qsteer.GradientFreePosterior(POLICY.posterior, tilt, samples, **mean),
        "gradient-free-glass-4": lambda tilt: qsteer.GradientFreePosterior(
            GlassPosterior(), tilt, samples, **mean
        ),
    }


def matched(samples: int) -> dict[str, Callable[[float], Rule]]:
    """Return the rules as they are used: of a norm relative to the velocity's."""
    same: dict[str, Any] = {"clip": None}
    return {
        "tweedie": lambda alpha: qsteer.Tweedie(alpha, **same),
        "qgf": lambda alpha: qsteer.QGF(alpha, scaling="match_norm", **same),
        "posterior": lambda alpha: qsteer.Posterior(POLICY.posterior, alpha, samples, **same),
        "posterior-glass-4": lambda alpha: qsteer.Posterior(GlassPosterior(), alpha, samples, **same),
        "gradient-free": lambda alpha: qsteer.GradientFreePosterior(POLICY.posterior, alpha, samples, **same),
        "random-direction": lambda alpha: qsteer.RandomDirection(alpha, **same),
    }


def act(critic: Critic, chains: int, rule: Rule | None, sampler: Sampler) -> dict[str, float]:
    """Return the shares of actions from stratified noise."""
    torch.manual_seed(0)
    field, value = qsteer.field(POLICY.velocity), qsteer.value(critic)
    return shares(qsteer.sample(field, value, noise(chains), rule=rule, sampler=sampler))


def main() -> None:
    """Measure, print a table, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--tilts", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--out", type=Path, default=Path("runs/two_modes.json"))
    args = parser.parse_args()
    began, rows, euler = time.process_time(), [], qsteer.Euler(args.steps)

    def add(bump: float, arm: str, strength: float | None, found: dict[str, float]) -> None:
        rows.append({"bump": bump, "arm": arm, "strength": strength, **found})
        shown = "" if strength is None else f"{strength:g}"
        print(f"| {bump:g} | {arm} | {shown} | {found['better']:.0%} | {found['neither']:.0%} |", flush=True)

    print("| bump | arm | strength | better kind | neither |\n|---|---|---|---|---|")
    for bump in BUMPS:
        critic = Critic(bump)
        add(bump, "frozen", None, act(critic, args.chains, None, euler))
        add(bump, "best-of-8", None, act(critic, args.chains, None, qsteer.BestOfN(8, euler)))
        for tilt in args.tilts:
            add(bump, "exact", tilt, exact(critic, tilt))
            for name, rule in tilts(args.samples).items():
                add(bump, f"{name}, sigma", tilt, act(critic, args.chains, rule(tilt), euler))
            for n in (args.samples, 4 * args.samples, 32 * args.samples):
                sampler = qsteer.FeynmanKac(n, tilt, euler)
                add(bump, f"feynman-kac-{n}", tilt, act(critic, args.chains, None, sampler))
        for alpha in args.alphas:
            for name, rule in matched(args.samples).items():
                add(bump, f"{name}, matched", alpha, act(critic, args.chains, rule(alpha), euler))
    settings = {**asdict(POLICY), "steps": args.steps, "samples": args.samples}
    spent = {"chains": args.chains, "torch": torch.__version__, "cpu_seconds": time.process_time() - began}
    print(write_json({**settings, **spent, "rows": rows}, args.out))


if __name__ == "__main__":
    main()
