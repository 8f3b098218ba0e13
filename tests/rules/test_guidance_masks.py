"""Entries which the critic does not see: neither pushed nor measured."""

import pytest
import torch
from fields import BASE, bumpy, constant, fixed_times, guidance, noise, nonlinear
from guidance_rules import ALL, by_name

import qsteer

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
SEEN = MASK.bool()


def seen_only(a: torch.Tensor) -> torch.Tensor:
    return bumpy(a[:, SEEN][:, :, None])


@pytest.mark.parametrize("mask", [MASK, MASK.float(), MASK.bool()], ids=["int", "float", "bool"])
@pytest.mark.parametrize("rule", ALL, **by_name)
def test_masked_entries_get_no_guidance_and_are_in_neither_norm(rule, mask):
    x, value = noise(4, 2, 3), qsteer.value(seen_only, mask=mask)
    v = nonlinear(x, fixed_times(0.5, 4))
    push = guidance(rule(0.3, scaling="match_norm"), BASE, value, x, 0.5)
    assert (push[:, ~SEEN] == 0).all()
    ratio = push[:, SEEN].norm(dim=1) / v[:, SEEN].norm(dim=1)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3), rtol=1e-6, atol=0)
    unmasked = guidance(rule(1.0, scaling="raw"), BASE, qsteer.value(seen_only), x, 0.5)
    if rule in (qsteer.Tweedie, qsteer.ThroughTime):
        assert (unmasked[:, ~SEEN].abs() > 0).all()  # the full Jacobian does reach padding: the mask matters
    direction = unmasked[:, SEEN] / unmasked[:, SEEN].norm(dim=1, keepdim=True)
    if rule is not qsteer.RandomDirection:
        torch.testing.assert_close(push[:, SEEN] / push[:, SEEN].norm(dim=1, keepdim=True), direction)


@pytest.mark.parametrize("scaling", ["match_norm", "clip_norm"])
def test_the_velocity_of_masked_entries_does_not_change_the_strength(scaling):
    x, value = noise(4, 2, 3), qsteer.value(seen_only, mask=MASK)
    louder = qsteer.field(lambda x, t: torch.where(SEEN, nonlinear(x, t), 100.0))
    for rule in (qsteer.QGF(0.3, scaling=scaling), qsteer.NoisyGradient(0.3, scaling=scaling)):
        torch.testing.assert_close(guidance(rule, louder, value, x, 0.5), guidance(rule, BASE, value, x, 0.5))


def test_masked_entries_are_the_base_policys_own_whatever_their_gradient_is():
    def bad_outside(a):
        if a.requires_grad:
            a.register_hook(lambda g: torch.where(SEEN, g, torch.nan))
        return seen_only(a)

    x, field, trace = noise(4, 2, 3, dtype=torch.float32), qsteer.field(constant), qsteer.Trace()
    value = qsteer.value(bad_outside, mask=MASK)
    out = qsteer.sample(field, value, x, rule=qsteer.QGF(0.3), trace=trace)
    base = qsteer.sample(field, None, x)
    assert torch.equal(out[:, ~SEEN], base[:, ~SEEN]) and not torch.isclose(out, base)[:, SEEN].any()
    assert trace.fallbacks == 0
