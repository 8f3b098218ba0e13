"""The steps of GLASS: exact on the flow to a round Gaussian, within a tenth at four steps on the others."""

import math

import pytest
import torch
from fields import DOUBLE, Mixture, fixed_times, noise

import qsteer
from qsteer.maps import GlassPosterior, glass_velocity

TIMES = (0.0, 0.1, 0.3, 0.5, 0.8, 0.9, 0.99)
SPREADS = {
    "narrow": torch.full((4, 10), 0.05),
    "usual": torch.full((4, 10), 0.3, dtype=DOUBLE),
    "wide": torch.ones(4, 10),
    "from narrow to wide": torch.logspace(math.log10(0.02), 0, 40).view(4, 10),
    "a plane": torch.cat([torch.full((4,), 0.5), torch.full((36,), 0.01)]).view(4, 10),
}


def gaussian(spread: torch.Tensor) -> qsteer.Field:
    """The policy whose actions are N(0, spread^2), entry by entry."""

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t[:, None, None]
        return (t * spread**2 / (t**2 * spread**2 + (1 - t) ** 2) * x - x) / (1 - t)

    return qsteer.field(velocity)


def deviation(posterior: GlassPosterior, spread: torch.Tensor, t: float) -> float:
    """Standard deviation of samples over that of the posterior, all entries together."""
    scale = (torch.tensor((1 - t) ** 2) + t**2 * spread**2).sqrt()
    x, eps = noise(1, 4, 10) * scale, noise(2000, 1, 4, 10, seed=1)
    samples = posterior(eps, x, fixed_times(t, 1))
    exact = 1 / (t**2 / (1 - t) ** 2 + 1 / spread**2)
    return float((samples.var(0)[0].sum() / exact.sum()).sqrt())


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("name", SPREADS)
def test_four_steps_have_the_posteriors_spread_within_a_tenth(name: str, t: float) -> None:
    spread = SPREADS[name].to(DOUBLE)
    assert deviation(GlassPosterior(gaussian(spread)), spread, t) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("t", TIMES)
def test_the_guess_of_the_spread_hardly_matters(t: float) -> None:
    spread = SPREADS["usual"].to(DOUBLE)
    for guess in (0.1, 1.0):
        posterior = GlassPosterior(gaussian(spread), spread=guess)
        assert deviation(posterior, spread, t) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_a_round_gaussian_is_exact_from_the_second_step_on(t: float) -> None:
    """Samples are affine in the noise: y - m shrinks by sqrt((s + 1/r'^2) / (s + 1/r^2)) at each look."""
    field, times = gaussian(SPREADS["usual"].to(DOUBLE)), fixed_times(t, 1)
    x, eps = noise(1, 4, 10), noise(1, 1, 4, 10, seed=1)
    variance = 1 / (t**2 / (1 - t) ** 2 + 1 / 0.09)
    mean = qsteer.flow.denoise(x, field(x, times), times)
    for steps in (2, 4, 9):
        odds = math.hypot(1, 0.3 * t / (1 - t)) / (steps - 1)  # of the first step, which is Euler's
        gain = (variance / (variance + odds**-2)) ** 0.5 / odds
        got = GlassPosterior(field, steps)(eps, x, times)
        torch.testing.assert_close(got[0], mean + gain * eps[0], rtol=1e-9, atol=1e-9)


MODES = Mixture(
    torch.tensor([0.3, 0.7], dtype=DOUBLE),
    torch.tensor([[[-1.0]], [[1.0]]], dtype=DOUBLE),
    torch.tensor([0.15, 0.15], dtype=DOUBLE),
)


def by_euler(field: qsteer.Field, eps: torch.Tensor, x: torch.Tensor, t: float, steps: int) -> torch.Tensor:
    n, xbar = len(eps), eps[:, 0]
    for i in range(steps):
        u = fixed_times(i / steps, n)
        xbar = xbar + glass_velocity(field, x.repeat(n, 1, 1), fixed_times(t, n), xbar, u) / steps
    return xbar[:, None]


@pytest.mark.parametrize(("t", "at"), [(0.05, 0.05), (0.3, -0.1), (0.5, 0.02), (0.6, 0.3), (0.9, 0.9)])
def test_two_modes_are_halfway_nearer_than_by_eulers_steps(t: float, at: float) -> None:
    """Wasserstein distance in one dimension: samples of sorted noise are sorted."""
    x, field = torch.full((1, 1, 1), at, dtype=DOUBLE), qsteer.field(MODES.velocity)
    eps = noise(1000, 1, 1, 1).sort(0).values
    exact = GlassPosterior(field, 200)(eps, x, fixed_times(t, 1)).sort(0).values
    ours = GlassPosterior(field)(eps, x, fixed_times(t, 1)).sort(0).values
    gap, euler = ((y - exact).abs().mean() / exact.std() for y in (ours, by_euler(field, eps, x, t, 4)))
    assert gap < 0.12 and gap < 0.6 * euler
    assert float((ours > 0).double().mean()) == pytest.approx(float((exact > 0).double().mean()), abs=0.01)


def test_a_spread_of_nothing_is_named() -> None:
    with pytest.raises(ValueError, match=r"GlassPosterior.spread: expected more than 0, got 0"):
        GlassPosterior(spread=0.0)
