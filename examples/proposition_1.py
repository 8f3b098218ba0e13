"""Proposition 1 of QPILOTS, measured: how far is the steered law from the exactly tilted one?

    python examples/proposition_1.py --out benchmarks/proposition_1.json --plot docs/proposition_1.png

The proposition bounds the distance, with the ``sigma`` scaling, K uniform Euler steps and N posterior samples
a step: ``W2(law, pi*) <= C (1 / sqrt(K) + 1 / sqrt(N))``. Here the policy is a mixture of two Gaussians in
one dimension, the utility is bounded and smooth, and everything that the distance needs is exact: the
velocity, the posterior samples and their derivatives, and the quantiles of ``pi*``, so that W2 in one
dimension is the distance of sorted chains to them. Noise at t = 0 is stratified: one chain per quantile.
It takes less than a minute of one core.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import qsteer
from qsteer.maps import GlassPosterior
from qsteer.plotting import (
    BASE,
    CONTROL,
    INK,
    MUTED,
    STEERED,
    STYLE,
    add_caption,
    add_title,
    load_pyplot,
    save,
)
from qsteer.rules import PosteriorGuidance
from qsteer.types import PosteriorSampler

type Laws = NDArray[np.float64]  # (seeds, chains): sorted actions, one row per seed

WEIGHTS, MEANS, STD = (0.6, 0.4), (-1.0, 1.0), 0.5
RULES = {"Posterior": qsteer.Posterior, "GradientFreePosterior": qsteer.GradientFreePosterior}
STEPS, SAMPLES = (3, 4, 6, 8, 12, 16, 24, 48), (1, 2, 4, 8, 16, 32, 64)
FREE = 26  # the scaling clamps 1/t - 1 at 25: the first guided time, t = 1/K, is beyond for larger K
BEYOND = (*STEPS, 96, 192)
GLASS = (4, 16)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}  # 97.5 % quantile, by number of seeds
COLOURS = dict(zip(RULES, (STEERED, BASE), strict=True))
DOTS = {"marker": "o", "markersize": 6.5, "markeredgecolor": "white", "linewidth": 2}
APART = 1.2
"""Ratio of two curves' ends from which on each has its name beside it."""


def psi(a: Tensor) -> Tensor:
    """Return the utility of actions: bounded, with bounded derivatives."""
    return torch.tanh(2 * a)


@dataclass(frozen=True)
class Mixture:
    """A policy in one dimension: two Gaussians as wide as each other, of which all is known.

    Attributes:
        weights, means: of the two.
        std: of both.
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    std: float

    def parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return weights, means and standard deviations of p(x1 | x_t = x), components first."""
        over = (-1, *[1] * x.ndim)
        mean, t = torch.tensor(self.means, dtype=x.dtype).view(over), t[:, None, None]
        c2 = (1 - t) ** 2 + (t * self.std) ** 2
        off = x - t * mean
        prior = torch.tensor(self.weights, dtype=x.dtype).log().view(over)
        weight = (prior - off**2 / (2 * c2)).softmax(0)
        return weight, mean + t * self.std**2 / c2 * off, self.std * (1 - t) / c2.sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the policy's velocity, ``(D(x, t) - x) / (1 - t)``."""
        weight, mean, _ = self.parts(x, t)
        return ((weight * mean).sum(0) - x) / (1 - t)[:, None, None]

    def posterior(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Sample p(x1 | x_t = x) exactly, differentiably in x.

        Drawing a component is not differentiable, but a sample z at the fixed quantile ``F(z; x) = u`` is:
        ``dz/dx = -(dF/dx) / p(z; x)``, whichever way z was drawn. In one dimension this is the derivative of
        the exact posterior flow.
        """
        weight, mean, std = self.parts(x, t)
        with torch.no_grad():
            u = torch.special.ndtr(eps)
            first = u < weight[0]  # the quantile picks the component, what remains of it the place within
            rest = torch.where(first, u / weight[0], (u - weight[0]) / weight[1]).clamp(1e-15, 1 - 1e-15)
            z = torch.where(first, mean[0], mean[1]) + std[0] * torch.special.ndtri(rest)
        if not torch.is_grad_enabled():
            return z
        y = [(z - m) / std[0] for m in mean]
        cdf = sum(w * torch.special.ndtr(part) for w, part in zip(weight, y, strict=True))
        pdf = sum(w * torch.exp(-(part**2) / 2) for w, part in zip(weight.detach(), y, strict=True))
        return z - (cdf - cdf.detach()) * (math.sqrt(2 * math.pi) * std[0] / pdf).detach()

    def density(self, a: Tensor) -> Tensor:
        """Return the density of actions, but for a factor."""
        parts = [
            w * torch.exp(-(((a - m) / self.std) ** 2) / 2)
            for w, m in zip(self.weights, self.means, strict=True)
        ]
        return parts[0] + parts[1]


POLICY = Mixture(WEIGHTS, MEANS, STD)
mixture, velocity, posterior = POLICY.parts, POLICY.velocity, POLICY.posterior


def rule_of(name: str, sampler: PosteriorSampler, samples: int) -> PosteriorGuidance:
    """Return the rule as the proposition has it: the sigma scaling, the tilt exp(psi) itself, no clip."""
    return RULES[name](sampler, 1.0, samples, scaling="sigma", standardize=False, clip=None)


def levels(chains: int) -> Tensor:
    """Return the middle of each of ``chains`` equal parts of (0, 1)."""
    return (torch.arange(chains, dtype=torch.float64) + 0.5) / chains


def noise(chains: int) -> Tensor:
    """Return stratified noise (chains, 1, 1)."""
    return torch.special.ndtri(levels(chains))[:, None, None]


def tilted_quantiles(at: Tensor, tilt: float = 1.0) -> Laws:
    """Return quantiles of ``pi* = pi exp(tilt psi)`` by quadrature of its density."""
    a = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    density = POLICY.density(a) * torch.exp(tilt * psi(a))
    cdf = torch.cumulative_trapezoid(density, a)
    return np.interp(at.numpy(), (cdf / cdf[-1]).numpy(), a[1:].numpy())


def laws(
    name: str, sampler: PosteriorSampler, steps: int, samples: int, chains: int, seeds: Sequence[int]
) -> Laws:
    """Return the steered law for each seed of the posterior's noise."""
    rule, field = rule_of(name, sampler, samples), qsteer.field(velocity)
    value = qsteer.value(lambda a: psi(a).flatten())
    out = []
    for seed in seeds:
        torch.manual_seed(seed)
        a = qsteer.sample(field, value, noise(chains), rule=rule, sampler=qsteer.Euler(steps))
        out.append(a.flatten().sort().values.numpy())
    return np.stack(out)


def limit(steps: int, chains: int, *, everywhere: bool = False) -> Laws:
    """Return the law of infinitely many samples, which both rules share, by Gauss-Hermite quadrature.

    Args:
        steps: K.
        chains: rows of stratified noise.
        everywhere: guide t = 0 too, and never clamp: the exactly steered ODE, up to its Euler steps.
    """
    node, mass = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
    node, mass = node[:, None, None, None, None], (mass / mass.sum())[:, None, None, None, None]
    rule, x = rule_of("Posterior", posterior, 1), noise(chains)
    for i in range(steps):
        t = torch.full((chains,), i / steps, dtype=x.dtype)
        weight, mean, std = mixture(x, t)
        z = mean + std * node
        tilted = weight * mass * torch.exp(psi(z))
        moved = (tilted * z).sum((0, 1)) / tilted.sum((0, 1)) - (weight * mean).sum(0)
        ratio = torch.ones_like(t)  # the scaling's factor over its exact value, (1 - t) / t
        if not everywhere:
            ratio = torch.where(rule.guides(t), rule.scale(t, t, t) * t / (1 - t), 0.0)
        x = x + (velocity(x, t) + (ratio / (1 - t))[:, None, None] * moved) / steps
    return x.flatten().sort().values.numpy()


def w2(a: Laws, b: Laws) -> float:
    """Return the distance of two laws, seeds averaged: a seed's noise must not count as distance."""
    return float(np.sqrt(np.mean((np.atleast_2d(a).mean(0) - np.atleast_2d(b).mean(0)) ** 2)))


def resolution(a: Laws) -> float:
    """Return the distance that the posterior's noise alone leaves between the seeds' average and its law."""
    return float(np.sqrt(a.var(0, ddof=1).mean() / len(a)))


def loglog(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of ``log y`` against ``log x``."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slope(at: Sequence[int], curve: Sequence[Laws], targets: Sequence[Laws]) -> tuple[float, float, float]:
    """Return the log-log slope of W2 against ``at``, and its 95 % interval by the jackknife over seeds."""
    seeds = len(curve[0])

    def fit(keep: list[int]) -> float:
        distances = [w2(a[keep], b) for a, b in zip(curve, targets, strict=True)]
        return loglog(at, distances)

    whole = fit(list(range(seeds)))
    without = np.array([fit([s for s in range(seeds) if s != left]) for left in range(seeds)])
    half = STUDENT[seeds] * math.sqrt((seeds - 1) / seeds * ((without - without.mean()) ** 2).sum())
    return whole, whole - half, whole + half


def measure(chains: int, seeds: int, many: int, fine: int = 24) -> dict[str, Any]:
    """Return all distances: against K with ``many`` samples, against N with ``fine`` steps."""
    began, each = time.process_time(), range(seeds)
    few = max(chains // 4, 64)  # where N is large, fewer chains do
    star = {n: tilted_quantiles(levels(n)) for n in (few, chains)}
    rng = np.random.default_rng(0)
    pairs = [tilted_quantiles(torch.from_numpy(np.sort(rng.random((2, chains))))) for _ in range(20)]

    against_k, against_n, constant = {}, {}, 0.0
    free = [k for k in STEPS if k <= FREE]
    edge = limit(fine, chains)
    for name in RULES:
        curve = [laws(name, posterior, k, many, few, each) for k in STEPS]
        against_k[name] = {
            "w2": [w2(a, star[few]) for a in curve],
            "resolution": [resolution(a) for a in curve],
            "slope": slope(free, curve[: len(free)], [star[few]] * len(free)),
        }
        for steps in GLASS:
            sampler = GlassPosterior(steps=steps)
            glass = [laws(name, sampler, k, min(many, 64), few, [0]) for k in free]
            against_k[name][f"glass_{steps}"] = [w2(a, star[few]) for a in glass]

        curve = [laws(name, posterior, fine, n, chains, each) for n in SAMPLES]
        start = name != "Posterior"  # the gradient-free rule does nothing with a single sample
        against_n[name] = {
            "w2": [w2(a, star[chains]) for a in curve],
            "w2_to_limit": [w2(a, edge) for a in curve],
            "resolution": [resolution(a) for a in curve],
            "slope": slope(SAMPLES[start:], curve[start:], [edge] * (len(SAMPLES) - start)),
        }
        points = [(k, many) for k in STEPS] + [(fine, n) for n in SAMPLES]
        distances = against_k[name]["w2"] + against_n[name]["w2"]
        ratios = [d / (k**-0.5 + n**-0.5) for (k, n), d in zip(points, distances, strict=True)]
        constant = max(constant, *ratios)

    exact = {k: (limit(k, chains), limit(k, chains, everywhere=True)) for k in BEYOND}
    return {
        "chains": {"against_k": few, "against_n": chains},
        "seeds": seeds,
        "torch": torch.__version__,
        "cpu_seconds": time.process_time() - began,
        "unsteered": w2(tilted_quantiles(levels(chains), 0.0), star[chains]),
        "independent_exact_samples": float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in pairs])),
        "constant": constant,
        "against_k": {"steps": STEPS, "samples": many, **against_k},
        "against_n": {"steps": fine, "samples": SAMPLES, **against_n},
        "infinite_samples": {
            "steps": BEYOND,
            "rules": [w2(exact[k][0], star[chains]) for k in BEYOND],
            "guided_everywhere": [w2(exact[k][1], star[chains]) for k in BEYOND],
            "slope_rules": loglog(free, [w2(exact[k][0], star[chains]) for k in free]),
            "slope_guided_everywhere": loglog(BEYOND, [w2(exact[k][1], star[chains]) for k in BEYOND]),
        },
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw W2 against K and against N."""
    plt = load_pyplot()
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.6), layout="constrained")
        for ax in (left, right):
            ax.set(xscale="log", yscale="log")
        _draw_steps(left, report)
        _draw_samples(right, report)
        for ax in (left, right):
            ax.minorticks_off()
            ax.set_yticks([0.01, 0.03, 0.1, 0.3, 1.0], ["0.01", "0.03", "0.1", "0.3", "1"])
            ax.set_ylim(0.003, 2.2)
        add_caption(
            fig,
            f"W2: distance between the laws of actions; dots: {report['seeds']} seeds averaged; band: "
            "what their noise hides; slopes with 95 % intervals",
        )
        save(fig, path)


def _note(ax: Any, x: float, y: float, text: str, colour: str, **style: Any) -> None:
    ax.annotate(
        text,
        (x, y),
        **{"xytext": (6, 0), "textcoords": "offset points", "va": "center", **style},
        color=colour,
    )


def _draw_steps(ax: Any, report: dict[str, Any]) -> None:
    part, endless = report["against_k"], report["infinite_samples"]
    free, last = [k for k in STEPS if k <= FREE], BEYOND[-1]
    _draw_ground(ax, (STEPS[0], free[-1]), (1.5, 1.5 * (STEPS[0] / free[-1]) ** 0.5), part, STEPS)
    ax.plot(BEYOND, endless["guided_everywhere"], color=MUTED, linewidth=1)
    ax.plot(BEYOND, endless["rules"], color=INK, linewidth=1.3, linestyle=(0, (1, 1.5)))
    ends = {"guided_everywhere": "guided at every t,\nno clamp, N = ∞", "rules": "as qsteer guides,\nN = ∞"}
    for name, text in ends.items():
        _note(ax, last, endless[name][-1], text, INK if name == "rules" else MUTED, fontsize=8.5)
    for name, colour in COLOURS.items():
        curves = {m: part[name][f"glass_{m}"] for m in GLASS}
        for curve in curves.values():
            ax.plot(free, curve, color=colour, linewidth=1.2, alpha=0.6)
        ends_at = [curve[-1] for curve in curves.values()]
        if max(ends_at) < APART * min(ends_at):  # their names would cover each other
            text = f"GLASS, {' and '.join(map(str, GLASS))} steps"
            _note(ax, free[-1], min(ends_at), text, colour, fontsize=8.5, ha="right", xytext=(-8, -8))
        else:
            for m, curve in curves.items():
                _note(ax, free[-1], curve[-1], f"GLASS, {m} steps", colour, fontsize=8.5)
        ax.plot(STEPS, part[name]["w2"], color=colour, **DOTS)
    add_title(ax, f"K varies, N = {part['samples']}")
    ax.set_xlabel("Euler steps K", loc="left")
    ax.set_ylabel("W2 to the exactly tilted law", loc="top")
    ax.set_xticks([3, 6, 12, 24, 48, 96, 192], ["3", "6", "12", "24", "48", "96", "192"])
    ax.set_xlim(2.7, 560)
    ax.spines["bottom"].set_bounds(2.7, last)


def _draw_samples(ax: Any, report: dict[str, Any]) -> None:
    part, last = report["against_n"], SAMPLES[-1]
    _draw_ground(ax, (1, last), (1.3, 1.3 * last**-0.5), part, SAMPLES)
    for name, colour in COLOURS.items():
        ax.plot(SAMPLES, part[name]["w2"], color=colour, linewidth=1.2, alpha=0.6)
        ax.plot(SAMPLES, part[name]["w2_to_limit"], color=colour, **DOTS)
    _note(ax, last, part["Posterior"]["w2"][-1], "thin: to the exactly\ntilted law", MUTED, fontsize=8.5)
    _note(ax, last, part["Posterior"]["w2_to_limit"][-1], "thick: to the\nlaw of N = ∞", INK, fontsize=8.5)
    add_title(ax, f"N varies, K = {part['steps']}")
    ax.set_xlabel("posterior samples N", loc="left")
    ax.set_ylabel("W2 to the law named at the right", loc="top")
    ax.set_xticks(SAMPLES, [str(n) for n in SAMPLES])
    ax.set_xlim(0.9, 420)
    ax.spines["bottom"].set_bounds(0.9, last)


def _draw_ground(ax: Any, ends: tuple[int, int], bound: tuple[float, float], part: Any, at: Any) -> None:
    """Draw the bound's slope, and what the noise of the seeds lets one see."""
    ax.plot(ends, bound, color=CONTROL, linewidth=1.4, linestyle=(0, (4, 3)))
    _note(ax, ends[1], bound[1], "slope −1/2:\nthe bound's", MUTED, fontsize=8.5, va="bottom")
    noise_level = np.maximum(*(part[name]["resolution"] for name in RULES))
    ax.fill_between(at, 1e-3, noise_level, color=CONTROL, alpha=0.22, linewidth=0)
    _note(ax, at[0], 0.0036, "noise of the seeds", MUTED, fontsize=8.5)
    for row, (name, colour) in enumerate(COLOURS.items()):
        fit, low, _ = part[name]["slope"]
        text = f"{name}: slope {fit:.2f} ± {fit - low:.2f}".replace("-", "−")
        style = {"xycoords": "axes fraction", "xytext": (0, -6 - 13 * row), "ha": "right"}
        _note(ax, 1.0, 1.0, text, colour, fontsize=9, **style)


def main() -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chains", type=int, default=2048, help="rows of stratified noise (a quarter for K)")
    parser.add_argument("--seeds", type=int, default=5, choices=STUDENT, help="of the posterior's noise")
    parser.add_argument("--many", type=int, default=128, help="N while K varies")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--plot", type=Path, help="picture to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(args.chains, args.seeds, args.many)

    print(f"unsteered: W2 {report['unsteered']:.3f}; the bound holds with C = {report['constant']:.2f}")
    for name in RULES:
        for axis, part in (("K", report["against_k"]), ("N", report["against_n"])):
            each = part["steps" if axis == "K" else "samples"]
            print(f"{name}, slope in {axis}: {{:.2f}} ({{:.2f}} to {{:.2f}})".format(*part[name]["slope"]))
            print("  " + "  ".join(f"{n}: {d:.4f}" for n, d in zip(each, part[name]["w2"], strict=True)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    main()
