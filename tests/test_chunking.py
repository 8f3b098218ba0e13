import pytest
import torch

import qsteer
from qsteer.chunking import continued, prefix_weights

FORMER = torch.linspace(-1, 1, 8).view(1, 4, 2)


def target(a: torch.Tensor) -> torch.Tensor:
    return -(a - 0.5).square().flatten(1).sum(1)


def hold(**given: object):
    field = qsteer.field(lambda x, t: 0.2 - x)
    return continued(field, FORMER, 6, **({"delay": 2} | given))


@pytest.mark.parametrize(
    "rule", [None, qsteer.Tweedie(0.3), qsteer.QGF(0.3), qsteer.Posterior(lambda e, x, t: e + x)]
)
def test_held_steps_end_as_they_would_unsteered(rule):
    """The velocity is of each entry alone: steering the free ones leaves the held ones bit for bit."""
    noise, value = torch.randn(3, 6, 2), qsteer.value(target)
    field = continued(
        qsteer.field(lambda x, t: 0.2 - x), FORMER.expand(3, 4, 2), 6, delay=2, schedule="zeros"
    )
    own, action = qsteer.sample(field, None, noise), qsteer.sample(field, value, noise, rule=rule)
    assert torch.equal(action[:, :2], own[:, :2])
    assert torch.equal(action[:, 2:], own[:, 2:]) == (rule is None)


def test_a_gaussian_chunk_is_conditioned_on_what_is_held():
    """Of independent entries the pull brings the held ones near the former chunk, and leaves the others."""
    noise = torch.randn(500, 6, 2)
    free = qsteer.sample(hold(delay=0, schedule="zeros").repeat(500), None, noise)
    held = qsteer.sample(hold(schedule="zeros").repeat(500), None, noise)
    assert torch.equal(held[:, 2:], free[:, 2:])
    assert (held[:, :2] - FORMER[:, :2]).abs().mean() < 0.25 * (free[:, :2] - FORMER[:, :2]).abs().mean()


def test_the_trust_region_moves_what_is_free():
    noise, value = torch.randn(1, 6, 2), qsteer.value(target)
    base = qsteer.sample(hold(), value, noise)
    moved = qsteer.sample(hold(), value, noise, sampler=qsteer.TrustRegion(0.5)) - base
    assert torch.equal(moved[:, :2], torch.zeros(1, 2, 2))
    torch.testing.assert_close(moved.norm(), torch.tensor(0.5))


def test_best_of_n_judges_the_free_part():
    """A value of the held steps alone cannot tell candidates apart: candidate 0 is kept."""
    noise = torch.randn(4, 6, 2)
    field = hold(schedule="zeros").repeat(4)
    value = qsteer.value(lambda a: a[:, :2].flatten(1).sum(1))
    torch.testing.assert_close(
        qsteer.sample(field, value, noise, sampler=qsteer.BestOfN(4)), qsteer.sample(field, value, noise)
    )


def test_the_trace_has_the_masked_push():
    trace, value = qsteer.Trace(), qsteer.value(target)
    qsteer.sample(hold(delay=4), value, torch.randn(1, 6, 2), rule=qsteer.Tweedie(0.3), trace=trace)
    assert trace.arrays()["strength"][0].tolist() == pytest.approx([0.3] * 9)


def velocity(x: torch.Tensor, t: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    return goal[:, None] - x


def test_the_fast_path_holds_each_chunk_to_its_own_former_one():
    for _ in range(3):
        field = qsteer.field(velocity, context=torch.randn(1, 2))
        field = continued(field, torch.randn(1, 4, 2), 6, delay=2)
        given = {"value": qsteer.value(target), "noise": torch.randn(1, 6, 2), "rule": qsteer.Tweedie(0.3)}
        assert torch.equal(qsteer.sample(field, **given, compile="static"), qsteer.sample(field, **given))


@pytest.mark.parametrize(
    ("sampler", "remedy"),
    [
        (qsteer.BeamSearch(2, 2, flow_map=lambda x, r, t: x), "leave flow_map out"),
        (qsteer.FeynmanKac(2), "take another sampler"),
    ],
)
def test_a_flow_map_and_stochastic_steps_cannot_be_held(sampler, remedy):
    with pytest.raises(ValueError, match=rf"real-time chunking.*{remedy}"):
        qsteer.sample(hold(), qsteer.value(target), torch.randn(1, 6, 2), sampler=sampler)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"delay": 5}, r"0 <= delay <= until <= 4.*got 5 and 4"),
        ({"delay": 3, "until": 2}, r"got 3 and 2"),
        ({"until": 5}, r"got 2 and 5"),
        ({"delay": -1}, r"got -1"),
        ({"schedule": "cubic"}, r"schedule: expected one of zeros, ones, linear, exp, got 'cubic'"),
        ({"most": 0.0}, r"most: expected a finite number above 0, got 0.0"),
    ],
)
def test_misuse(given, message):
    with pytest.raises(ValueError, match=message):
        hold(**given)
    with pytest.raises(ValueError, match=r"\(B, P, A\) with 1 to 3 steps"):
        continued(qsteer.field(lambda x, t: x), FORMER, 3, delay=1)


def test_weights_fall_from_one_to_nothing():
    for schedule in ("zeros", "ones", "linear", "exp"):
        weights = prefix_weights(schedule, 2, 5, 7)
        assert torch.equal(weights[:2], torch.ones(2)) and torch.equal(weights[5:], torch.zeros(2))
        assert (weights.diff() <= 0).all()
