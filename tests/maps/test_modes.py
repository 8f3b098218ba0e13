"""How multimodal posteriors are, where it is known: Gaussian fields, two kinds of actions, mistakes."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fields import DOUBLE, Mixture, noise

import qsteer
from qsteer.maps.modes import Modes, measure_modes, scarce


def kinds(means: Sequence[float], std: float) -> Mixture:
    """Kinds of actions, equally likely, in one dimension."""
    return Mixture(
        torch.full((len(means),), 1 / len(means), dtype=DOUBLE),
        torch.tensor(means, dtype=DOUBLE)[:, None, None],
        torch.full((len(means),), std, dtype=DOUBLE),
    )


def measure(mixture: Mixture, states: int = 400, **options: Any) -> list[Modes]:
    generator = torch.Generator().manual_seed(0)
    return measure_modes(qsteer.field(mixture.velocity), noise(states, 1, 1), generator=generator, **options)


def test_one_kind_of_action_is_never_off_and_its_spread_is_known() -> None:
    std = 0.4
    for row in measure(kinds([0.3], std), times=(0.0, 0.5, 0.9)):
        t = row.time
        posterior = std * (1 - t) / math.hypot(1 - t, t * std)  # of x1 given x_t = t x1 + (1 - t) x0
        assert row.spread == pytest.approx(posterior, rel=0.06)
        assert row.off < 0.03


def test_between_two_kinds_the_denoised_action_is_off_until_one_is_chosen() -> None:
    rows = measure(kinds([-1.0, 1.0], 0.1), times=(0.0, 0.25, 0.5, 0.9))
    assert rows[0].spread == pytest.approx(math.hypot(1.0, 0.1), rel=0.05)
    assert rows[0].off > 0.99
    assert [row.off for row in rows] == sorted((row.off for row in rows), reverse=True)
    assert rows[-1].off < 0.03 and rows[-1].spread < 0.12


def test_the_direction_is_found_among_many_and_chance_is_no_gap() -> None:
    generator = torch.Generator().manual_seed(1)
    x1 = 0.1 * torch.randn(64, 300, 5, 5, generator=generator)
    mean = torch.zeros(300, 5, 5)
    assert scarce(x1, mean).float().mean() < 0.02
    kind = torch.where(torch.rand(64, 300, 1, 1, generator=generator) < 0.3, 1.0, -1.0)
    direction = torch.randn(5, 5, generator=generator)
    x1 = x1 + kind * direction
    assert scarce(x1, x1.mean(0)).float().mean() > 0.98
    assert scarce(x1, direction.expand(300, 5, 5)).float().mean() < 0.2  # one of the kinds itself


def test_mistakes() -> None:
    mixture = kinds([0.0], 0.4)
    for times in (0.5, 0.25), (0.0, 1.0), (-0.1,), ():
        with pytest.raises(ValueError, match=r"times: expected some that increase in \[0, 1\)"):
            measure(mixture, 2, times=times)
    with pytest.raises(ValueError, match=r"samples: expected at least 32"):
        measure(mixture, 2, samples=8)
