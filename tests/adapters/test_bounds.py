"""Rules ask the critic within the bounds of the policy's own actions."""

from collections.abc import Iterator
from dataclasses import replace

import hosts
import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.steering.opening import open_action

RULES = (
    qsteer.Tweedie(0.3),
    qsteer.ForwardTweedie(0.3),
    qsteer.QGF(0.3, scaling="match_norm"),
    qsteer.NoisyGradient(0.3),
    qsteer.ThroughTime(0.3),
    qsteer.GradientFreePosterior(qsteer.maps.GlassPosterior(steps=2), 0.3, 2),
)


@pytest.fixture(params=hosts.LEROBOT)
def policy(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    policy = hosts.shared(request.param)
    hosts.set_steps(policy, 3)
    former = dict(policy.config.normalization_mapping)
    yield policy
    policy.config.normalization_mapping = former


def normalise(policy: nn.Module, mode: str) -> None:
    policy.config.normalization_mapping = {**policy.config.normalization_mapping, "ACTION": mode}


def steered(policy: nn.Module, rule: qsteer.types.Rule) -> tuple[Tensor, float]:
    """Return a chunk from loud noise, and the largest action entry at which the critic was asked."""
    asked: list[float] = []

    def score(a: Tensor) -> Tensor:
        asked.append(float(a.detach().abs().max()))
        return (a - 5.0).square().flatten(1).sum(1)

    field, _, noise = open_action(policy, hosts.observe(policy, 2))
    torch.manual_seed(0)
    return qsteer.sample(field, qsteer.value(score), 3 * torch.randn_like(noise), rule=rule), max(asked)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("mode", ["MEAN_STD", "QUANTILES", "QUANTILE10", "IDENTITY", "MIN_MAX"])
def test_a_lerobot_critic_is_asked_where_the_normalised_actions_are(policy, mode, rule):
    normalise(policy, mode)
    bounds = (-1.0, 1.0) if mode == "MIN_MAX" else None
    assert open_action(policy, hosts.observe(policy)).field.bounds == bounds
    action, furthest = steered(policy, rule)
    assert furthest == 1.0 if bounds else furthest > 1.0
    assert torch.equal(action, steered(policy, with_clip(rule, bounds))[0])
    other = (-0.5, 0.5)
    explicit, furthest = steered(policy, with_clip(rule, other))
    assert furthest == 0.5
    assert not torch.equal(action, explicit)


def with_clip(rule, clip):
    return replace(rule, clip=clip)


def test_a_pi_model_in_alohas_joints_has_no_bounds(monkeypatch):
    policy = hosts.build("pi0")
    normalise(policy, "MIN_MAX")
    monkeypatch.setattr(policy.config, "adapt_to_pi_aloha", True, raising=False)
    assert hosts.host_of(policy).bounds(policy) is None


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (0.0, 2.5), None])
def test_bounds_of_plain_policies_functions_and_flow_policies_reach_every_field(bounds, tmp_path):
    plain = PlainPolicy(lambda x, t, obs: -x, 2, 3, bounds=bounds)
    own = FlowPolicy(FlowPolicyConfig(3, 2, 2, hidden=(8, 8), residual=True, bounds=bounds))
    own.save_pretrained(tmp_path)
    value = qsteer.value(lambda a: a.flatten(1).sum(1))
    for field in (
        open_action(plain, torch.zeros(2, 3)).field,
        qsteer.field(lambda x, t: -x, bounds=bounds),
        own.field(torch.zeros(2, 3)),
        own.field(torch.zeros(2, 3)).truncated(1),
        FlowPolicy.from_pretrained(tmp_path).field(torch.zeros(2, 3)),
    ):
        bent = qsteer.Gated(qsteer.Tweedie())(field, value)
        for each in (field, field.repeat(3), bent, bent.repeat(3), bent.chain(4)):
            assert each.bounds == bounds


@pytest.mark.parametrize(
    "sampler",
    [
        lambda clip: qsteer.Euler(clip=clip),
        lambda clip: qsteer.BestOfN(3, qsteer.Euler(clip=clip)),
        lambda clip: qsteer.BeamSearch(2, 2, eta=0.0, inner=qsteer.Euler(clip=clip)),
        lambda clip: qsteer.FeynmanKac(3, inner=qsteer.Euler(clip=clip)),
    ],
)
def test_a_sampler_that_clips_to_the_policys_bounds_is_one_with_these_numbers(sampler):
    field = qsteer.field(lambda x, t: 0 * x, bounds=(-0.3, 0.2))
    value, x = qsteer.value(lambda a: a.flatten(1).sum(1)), torch.randn(4, 2, 3)
    found = []
    for clip in ("policy", (-0.3, 0.2), None):
        torch.manual_seed(0)
        found.append(qsteer.sample(field, value, x, sampler=sampler(clip)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: qsteer.field(lambda x, t: x, bounds=(1.0, -1.0)),
        lambda: PlainPolicy(lambda x, t, obs: x, 2, 3, bounds=(1.0, 1.0)),
        lambda: FlowPolicyConfig(3, 2, 2, bounds=(2.0, 1.0)),
    ],
)
def test_bounds_out_of_order_are_refused_where_they_are_given(make):
    with pytest.raises(ValueError, match=r"bounds: expected \(low, high\) with low < high, or None for none"):
        make()
