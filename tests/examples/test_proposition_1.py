"""Proposition 1 of QPILOTS on a policy where everything is exact: the example's measurement, made small."""

import json
import math
import sys
from pathlib import Path

import fields
import numpy as np
import pytest
import torch
from torch import Tensor

import qsteer
from qsteer.maps import GlassPosterior

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import proposition_1 as example

torch.set_num_threads(1)

MIXTURE = fields.Mixture(
    torch.tensor(example.WEIGHTS, dtype=fields.DOUBLE),
    torch.tensor(example.MEANS, dtype=fields.DOUBLE)[:, None, None],
    torch.full((2,), example.STD, dtype=fields.DOUBLE),
)
RULES = pytest.mark.parametrize("name", example.RULES)


def times(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype)


def against_steps(name: str, sampler: qsteer.types.PosteriorSampler = example.posterior) -> list[float]:
    """W2 to the tilted law for K = 3, 6, 12, 24."""
    star = example.tilted_quantiles(example.levels(256))
    return [example.w2(example.laws(name, sampler, k, 64, 256, [0]), star) for k in (3, 6, 12, 24)]


def converges(distances: list[float]) -> bool:
    """What the proposition says of K: W2 falls at least as fast as 1 / sqrt(K)."""
    return example.loglog((3, 6, 12, 24), distances) < -0.5


def within_component(eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Samples of the right law with the naive derivative: the component is drawn as if it ignored x."""
    _, mean, _ = example.mixture(x, t)
    with torch.no_grad():
        z = example.posterior(eps, x, t)
        first = (z - mean[0]).abs() < (z - mean[1]).abs()
    shift = torch.where(first, mean[0] - mean[0].detach(), mean[1] - mean[1].detach())
    return z + shift


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_the_policy_is_the_mixture_it_says(t: float):
    x = fields.noise(7, 1, 1)
    torch.testing.assert_close(example.velocity(x, times(t, x)), MIXTURE.velocity(x, times(t, x)))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7])
def test_posterior_samples_and_their_derivatives_are_exact(t: float):
    x = fields.noise(5, 1, 1).requires_grad_()
    eps = example.noise(20_000)[:, :, None].expand(-1, 5, 1, 1)
    z = example.posterior(eps, x, times(t, x))
    torch.testing.assert_close(z.mean(0), MIXTURE.denoised(x, times(t, x)), atol=2e-4, rtol=0)
    variance = MIXTURE.covariance(x, times(t, x))
    torch.testing.assert_close(z.var(0), variance, atol=2e-3, rtol=0)
    for utility in (lambda a: a, example.psi):  # d E[f(x1)] / dx = t / (1 - t)^2 Cov(x1, f(x1))
        (slope,) = torch.autograd.grad(utility(z).mean(0).sum(), x, retain_graph=True)
        f = utility(z.detach())
        covariance = (z.detach() * f).mean(0) - z.detach().mean(0) * f.mean(0)
        torch.testing.assert_close(slope, t / (1 - t) ** 2 * covariance, atol=3e-3, rtol=0)


def test_glass_samples_the_same_posterior_as_its_steps_grow():
    x, t = fields.noise(4, 1, 1), 0.4
    eps = example.noise(400)[:, :, None].expand(-1, 4, 1, 1).contiguous()
    exact = example.posterior(eps, x, times(t, x)).sort(0).values
    field = qsteer.field(example.velocity)
    steps = (8, 16, 32, 64)
    gaps = [
        (GlassPosterior(field, m)(eps, x, times(t, x)).sort(0).values - exact).square().mean().sqrt().item()
        for m in steps
    ]
    assert gaps[0] < 0.1 and example.loglog(steps, gaps) < -0.75


def test_the_exactly_steered_flow_ends_in_the_tilted_law():
    star = example.tilted_quantiles(example.levels(200))
    steps = (12, 24, 48, 96)
    distances = [example.w2(example.limit(k, 200, everywhere=True), star) for k in steps]
    assert example.loglog(steps, distances) == pytest.approx(-1, abs=0.1)
    assert 2 * distances[-1] - distances[-2] == pytest.approx(0, abs=2e-3), "no floor"


@RULES
def test_many_samples_reach_the_limit(name: str):
    law = example.laws(name, example.posterior, 6, 512, 256, [0])
    assert example.w2(law, example.limit(6, 256)) < 0.025
    assert example.w2(law, example.limit(6, 256, everywhere=True)) > 0.025, "t = 0 is left unguided"


@RULES
def test_distance_falls_with_steps(name: str):
    distances = against_steps(name)
    assert converges(distances)
    assert example.loglog((3, 6, 12, 24), distances) == pytest.approx(-1, abs=0.15)


@RULES
def test_distance_falls_with_samples(name: str):
    edge, counts = example.limit(8, 1024), (2, 4, 8, 16)
    curve = [example.laws(name, example.posterior, 8, n, 1024, [0, 1, 2]) for n in counts]
    fit, low, high = example.slope(counts, curve, [edge] * 4)
    assert low < fit < high < -0.5, "faster than 1 / sqrt(N)"
    assert fit == pytest.approx(-1, abs=0.2)


@RULES
def test_a_posterior_that_ignores_x_is_found_out(name: str):
    def blind(eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return example.posterior(eps, 0.0 * x, t)

    assert not converges(against_steps(name, blind))


@RULES
def test_guidance_downhill_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch):
    rule = example.rule_of(name, example.posterior, 64)
    monkeypatch.setattr(example, "rule_of", lambda *_: qsteer.Negated(rule))
    distances = against_steps(name)
    assert not converges(distances)
    assert min(distances) > 1


def test_samples_without_their_derivative_serve_only_the_gradient_free_rule():
    assert not converges(against_steps("Posterior", within_component))
    assert converges(against_steps("GradientFreePosterior", within_component))


def test_few_glass_steps_leave_a_floor():
    coarse = against_steps("Posterior", GlassPosterior(steps=2))
    assert coarse[-1] > 0.1
    assert not converges(coarse)


def test_the_clamp_leaves_a_floor_beyond_26_steps():
    star = example.tilted_quantiles(example.levels(64))
    ruled, exact = (
        [example.w2(example.limit(k, 64, everywhere=flag), star) for k in (24, 96, 192)]
        for flag in (False, True)
    )
    assert ruled[0] < exact[0], "up to 26 steps the clamp does not bind"
    assert ruled[2] > 2.5 * exact[2]
    assert ruled[2] > 0.9 * ruled[1], "and more steps hardly help"


def test_w2_is_the_shift_of_a_law():
    law = example.tilted_quantiles(example.levels(100))
    assert example.w2(law, law + 0.3) == pytest.approx(0.3)
    assert example.w2(np.stack([law - 0.1, law + 0.1]), law) == pytest.approx(0), (
        "the seeds' noise averages out"
    )
    assert example.resolution(np.stack([law - 0.1, law + 0.1])) == pytest.approx(0.1)


def test_slope_of_exact_powers():
    laws = [np.full((3, 4), 2.0 / n) for n in (1, 2, 4)]
    assert example.slope((1, 2, 4), laws, [np.zeros(4)] * 3) == pytest.approx((-1, -1, -1))


def test_the_example_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(example, "STEPS", (3, 6, 12))
    monkeypatch.setattr(example, "BEYOND", (3, 6, 12, 24))
    monkeypatch.setattr(example, "SAMPLES", (1, 2, 4))
    monkeypatch.setattr(example, "GLASS", (2,))
    out, plot = tmp_path / "new" / "report.json", tmp_path / "new" / "plot.png"
    arguments = f"--chains 64 --seeds 2 --many 8 --out {out} --plot {plot}"
    monkeypatch.setattr(sys, "argv", ["proposition_1.py", *arguments.split()])
    example.main()
    report = json.loads(out.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "Posterior, slope in K" in capsys.readouterr().out
    for k, n, part in [
        *((k, report["against_k"]["samples"], ("against_k", i)) for i, k in enumerate((3, 6, 12))),
        *((report["against_n"]["steps"], n, ("against_n", i)) for i, n in enumerate((1, 2, 4))),
    ]:
        for name in example.RULES:
            distance = report[part[0]][name]["w2"][part[1]]
            assert 0 < distance <= report["constant"] * (1 / math.sqrt(k) + 1 / math.sqrt(n)) * (1 + 1e-9)
