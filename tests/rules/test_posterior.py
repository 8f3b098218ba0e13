"""Posterior guidance against the exact gradient of the log-tilt potential, and against Tweedie.

V_t(x) = log E[exp Q(x1) | x_t = x] of a mixture is known for linear and quadratic Q (`Mixture.log_tilt`).
A Gaussian's posterior N(D, P) is sampled without an error by D + sqrt(P) eps: a posterior of three arguments.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    CountingField,
    CountingValue,
    Gaussian,
    Host,
    Mixture,
    as_installed,
    bumpy,
    constant,
    fixed_times,
    guidance,
    noise,
    nonlinear,
    norms,
    total,
)
from guidance_rules import POSTERIORS, RAW, by_name
from small_maps import untrained

import qsteer
from qsteer.maps import GlassPosterior, MetaFlowMap, MetaMapConfig

EXACT = {**RAW, "standardize": False}
GAUSSIAN = Gaussian(torch.tensor([[0.5, -1.0]], dtype=DOUBLE), torch.tensor([[0.3, 0.7]], dtype=DOUBLE))
MIXTURE = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=DOUBLE),
    noise(3, 1, 2, seed=7),
    torch.tensor([0.4, 0.6, 0.8], dtype=DOUBLE),
)
LINEAR = (torch.tensor([[1.5, -0.8]], dtype=DOUBLE), torch.tensor([[0.0, 0.0]], dtype=DOUBLE))
QUADRATIC = (torch.tensor([[1.0, 0.5]], dtype=DOUBLE), torch.tensor([[2.0, 0.7]], dtype=DOUBLE))


def gaussian_posterior(eps: torch.Tensor, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return GAUSSIAN.denoised(x, t) + GAUSSIAN.variance(x, t).sqrt() * eps


def score(tilt: tuple[torch.Tensor, torch.Tensor]) -> qsteer.Value:
    slope, curvature = tilt
    return qsteer.value(lambda a: (slope * a - 0.5 * curvature * a**2).flatten(1).sum(1))


def black_box(value: qsteer.Value) -> qsteer.Value:
    """The same score from numpy: nothing for autograd to hold on to."""
    return qsteer.value(lambda a: torch.from_numpy(np.asarray(value(a.detach()).numpy())))


def exact(base: Mixture, x: torch.Tensor, t: float, tilt: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(base.log_tilt(x, fixed_times(t, len(x)), *tilt).sum(), x)[0]


def values_of(rule: type, value: qsteer.Value) -> qsteer.Value:
    return value if rule is qsteer.Posterior else black_box(value)


# ----------------------------------------------------------------------------------------- the exact gradient


@pytest.mark.parametrize("tilt", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
def test_log_tilt_of_a_mixture_is_that_of_integration(tilt):
    """The closed form everything below compares with, by quadrature in one dimension."""
    one = Mixture(MIXTURE.weights, MIXTURE.means[:, :, :1], MIXTURE.stds)
    x, t, a = torch.tensor([[[-0.7]], [[0.4]]], dtype=DOUBLE), 0.4, torch.linspace(-9, 9, 40001, dtype=DOUBLE)
    slope, curvature = tilt[0][:, :1], tilt[1][:, :1]
    prior = one.log_density(a[:, None, None], fixed_times(1.0, len(a)))
    log_posterior = (prior - 0.5 * ((x[:, 0] - t * a) / (1 - t)) ** 2).log_softmax(1)
    expected = (log_posterior + slope[0] * a - 0.5 * curvature[0] * a**2).logsumexp(1)
    torch.testing.assert_close(one.log_tilt(x, fixed_times(t, 2), slope, curvature), expected)


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
@pytest.mark.parametrize("t", [0.2, 0.7])
@pytest.mark.parametrize("tilt", [LINEAR, QUADRATIC], ids=["linear", "quadratic"])
def test_gradient_approaches_the_exact_one_at_the_rate_of_monte_carlo(rule, t, tilt):
    """rms over 300 independent estimates is proportional to N^-1/2."""
    base = Mixture(torch.ones(1, dtype=DOUBLE), GAUSSIAN.mean[None], torch.ones(1, dtype=DOUBLE))
    base = Shifted(base, GAUSSIAN)
    x = torch.tensor([[[0.3, -0.6]]], dtype=DOUBLE).expand(300, 1, 2)
    truth, value = exact(base, x, t, tilt), values_of(rule, score(tilt))
    torch.manual_seed(0)
    sizes = (16, 64, 256, 1024)
    errors = []
    for n in sizes:
        got = guidance(
            rule(gaussian_posterior, 1.0, n, **EXACT), qsteer.field(GAUSSIAN.velocity), value, x, t
        )
        errors.append(float((got - truth).square().flatten(1).sum(1).mean().sqrt() / norms(truth)[0]))
    print(f"relative rms at N = {sizes}: {errors}")
    if rule is qsteer.Posterior and tilt is LINEAR:
        assert max(errors) < 1e-12  # grad Q is a constant: no sample is needed
        return
    rate = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -0.57 < rate < -0.43 and errors[-1] < 0.15


@dataclass(frozen=True)
class Shifted:
    """The log-tilt of a Gaussian of one std per entry, which fields.Mixture does not have."""

    mixture: Mixture
    gaussian: Gaussian

    def log_tilt(self, x, t, slope, curvature):
        d, p = self.gaussian.denoised(x, t), self.gaussian.variance(x, t)
        shrunk = 1 + curvature * p
        return (((d + p * slope) ** 2 / shrunk - d**2) / (2 * p) - shrunk.log() / 2).flatten(1).sum(1)


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
@pytest.mark.parametrize("t", [0.2, 0.5])
def test_gradient_on_a_mixture_with_glass_approaches_the_exact_one_at_that_rate(rule, t):
    """40 inner steps, whose bias is below the error of one estimate from 512 samples."""
    x = torch.tensor([[[0.3, -0.4]]], dtype=DOUBLE).expand(200, 1, 2)
    truth, value, field = exact(MIXTURE, x, t, QUADRATIC), score(QUADRATIC), qsteer.field(MIXTURE.velocity)
    torch.manual_seed(0)
    sizes, errors = (8, 32, 128), []
    for n in (*sizes, 512):
        got = guidance(
            rule(GlassPosterior(steps=40), 1.0, n, **EXACT), field, values_of(rule, value), x[: 25600 // n], t
        )
        errors.append(float((got - truth[:1]).square().flatten(1).sum(1).mean().sqrt() / norms(truth)[0]))
    bias = float(norms(got.mean(0, keepdim=True) - truth[:1]) / norms(truth)[0])
    rate = np.polyfit(np.log(sizes), np.log(errors[:3]), 1)[0]
    tweedie = guidance(qsteer.Tweedie(1.0, **RAW), field, value, x[:1], t)
    off = float(norms(tweedie - truth[:1]) / norms(truth)[0])
    print(f"t={t}: relative rms {errors}, rate {rate:.2f}, bias {bias:.3f}, Tweedie is off by {off:.3f}")
    assert -0.65 < rate < -0.38 and errors[-1] < 0.15 and bias < 0.06
    assert off > 3 * bias


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_a_score_with_steps_has_a_gradient_too(t):
    """Q = 1.5 [a > 0]: grad V = c phi(z) D' / sqrt(P) / (1 + c Phi(z)), c = e^1.5 - 1, z = D / sqrt(P)."""
    one = Gaussian(GAUSSIAN.mean[:, :1], GAUSSIAN.std[:, :1])
    x, times = torch.tensor([[[-0.2]], [[0.1]]], dtype=DOUBLE), fixed_times(t, 2)
    value = qsteer.value(lambda a: 1.5 * (a[:, 0, 0] > 0).double())

    def posterior(eps, x, t):
        return one.denoised(x, t) + one.variance(x, t).sqrt() * eps

    d, p = one.denoised(x, times), one.variance(x, times)
    z, slope, gain = d / p.sqrt(), t * one.std**2 / ((1 - t) ** 2 + t**2 * one.std**2), math.e**1.5 - 1
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    expected = gain * density * slope / p.sqrt() / (1 + gain * torch.special.ndtr(z))
    torch.manual_seed(0)
    rule = qsteer.GradientFreePosterior(posterior, 1.0, 200000, **EXACT)
    got = guidance(rule, qsteer.field(one.velocity), value, x, t)
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)


def test_tau_multiplies_the_value():
    x, field = noise(4, 1, 2), qsteer.field(GAUSSIAN.velocity)
    double = qsteer.value(lambda a: 2 * bumpy(a))
    for rule in POSTERIORS:
        pushes = []
        for tau, value in ((2.0, VALUE), (1.0, double)):
            torch.manual_seed(0)
            pushes.append(guidance(rule(gaussian_posterior, 1.0, 8, tau=tau, **EXACT), field, value, x, 0.5))
        torch.testing.assert_close(*pushes)


# ----------------------------------------------------------------------------------------- Tweedie as a limit


@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize("scaling", ["match_norm", "clip_norm", "raw", "sigma"])
@pytest.mark.parametrize("posterior", ["glass", "mlp", "transformer"])
def test_samples_that_do_not_deviate_make_it_tweedie(posterior, scaling, samples):
    """With any scaling, standardised or not: their weights are equal. The critic clips, straight through."""
    x, field, sampler = 2 * noise(3, 2, 2), BASE, GlassPosterior(steps=1)
    if posterior != "glass":
        sampler, context = untrained(posterior)
        field = qsteer.field(lambda x, t, _: nonlinear(x, t), context)
    for t in (0.1, 0.5, 0.9):
        expected = guidance(qsteer.Tweedie(0.3, scaling=scaling), field, VALUE, x, t)
        assert norms(expected).min() > 1e-3
        for standardize in (False, True):
            rule = qsteer.Posterior(sampler, 0.3, samples, scaling=scaling, standardize=standardize)
            torch.testing.assert_close(guidance(rule, field, VALUE, x, t), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("posterior", ["glass", "mlp", "transformer"])
@pytest.mark.parametrize("samples", [3, 8])
def test_samples_that_do_not_deviate_give_weights_nothing_to_weigh(posterior, samples):
    """In float32, where the rounding error of a mean would be scaled up to a push of full strength."""
    x, context = noise(3, 2, 2, dtype=torch.float32), noise(3, 4, dtype=torch.float32)
    sampler = GlassPosterior(steps=1)
    if posterior != "glass":
        sampler, context = untrained(posterior)
        sampler = sampler.float()
        context = context.float() if posterior == "mlp" else (context[0].float(), context[1])
    field = qsteer.field(lambda x, t, _: nonlinear(x, t), context)
    rule = qsteer.GradientFreePosterior(sampler, 0.3, samples)
    for t in (0.1, 0.5, 0.9):
        assert torch.equal(guidance(rule, field, VALUE, x, t), torch.zeros_like(x))


def test_a_trained_map_is_no_tweedie():
    meta, context = untrained("mlp")
    meta.net.last.weight.data += 0.5
    field = qsteer.field(lambda x, t, _: nonlinear(x, t), context)
    x = noise(3, 2, 2)
    ours, tweedie = (
        guidance(rule, field, VALUE, x, 0.5) for rule in (qsteer.Posterior(meta, 0.3), qsteer.Tweedie(0.3))
    )
    assert norms(ours - tweedie).min() > 1e-2


# --------------------------------------------------------------------------- scalings, masks, standardisation


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
@pytest.mark.parametrize("t", [0.02, 0.5, 0.9])
def test_scalings_multiply_one_gradient(rule, t):
    x, field = noise(4, 2, 2), BASE
    v, pushes = nonlinear(x, fixed_times(t, 4)), {}
    for scaling in ("raw", "match_norm", "clip_norm", "sigma"):
        torch.manual_seed(0)
        method = rule(GlassPosterior(steps=3), 0.3, 8, scaling=scaling, clip=None, standardize=False)
        pushes[scaling] = guidance(method, field, VALUE, x, t)
    g = pushes["raw"] / 0.3
    unit, ratio = g / norms(g)[:, None, None], (norms(v) / norms(g))[:, None, None]
    torch.testing.assert_close(pushes["match_norm"], 0.3 * ratio * g, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(norms(pushes["match_norm"]), 0.3 * norms(v), rtol=1e-5, atol=0)
    torch.testing.assert_close(pushes["clip_norm"], 0.3 * ratio.clamp(max=1) * g, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pushes["sigma"], 0.3 * min(1 / t - 1, 25.0) * g, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(unit).all()


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_t_zero_and_strength_zero_are_left_alone(rule):
    x, value, state = noise(3, 2, 2), CountingValue(bumpy), torch.get_rng_state()
    steered = rule(GlassPosterior())(BASE, value)
    assert torch.equal(steered(x, 0.0), nonlinear(x, fixed_times(0.0, 3)))
    assert rule(GlassPosterior(), alpha=0.0)(BASE, value) is BASE
    assert value.tally.calls == 0 and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_entries_which_the_critic_does_not_see_are_not_pushed_nor_counted(rule):
    mask, x = torch.tensor([[1, 0], [1, 1], [0, 0]]), noise(4, 3, 2)
    push = guidance(rule(GlassPosterior(), 0.3), BASE, qsteer.value(bumpy, mask=mask), x, 0.5)
    seen = mask.bool()
    assert (push[:, ~seen] == 0).all() and (push[:, seen] != 0).any(0).all()
    v = torch.where(seen, nonlinear(x, fixed_times(0.5, 4)), 0.0)
    torch.testing.assert_close(norms(push), 0.3 * norms(v), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
@pytest.mark.parametrize("standardize", [True, False])
def test_standardising_forgets_the_critics_scale_and_offset(rule, standardize):
    x, pushes = noise(4, 2, 2), []
    for scale, offset in ((1.0, 0.0), (7.0, 300.0), (1e-3, -2.0)):
        torch.manual_seed(0)
        value = qsteer.value(lambda a, scale=scale, offset=offset: scale * bumpy(a) + offset)
        pushes.append(guidance(rule(GlassPosterior(), 0.3, standardize=standardize), BASE, value, x, 0.5))
    for push in pushes[1:]:
        if standardize:
            torch.testing.assert_close(push, pushes[0], rtol=1e-3, atol=1e-5)
        else:
            assert norms(push - pushes[0]).max() > 0.01
    method = rule(GlassPosterior(), samples=6)
    q = 10 * noise(6, 4)
    psi = method.tilt(q)
    torch.testing.assert_close(psi.mean(0), torch.zeros(4, dtype=DOUBLE))
    torch.testing.assert_close(psi.std(0, unbiased=False), torch.ones(4, dtype=DOUBLE))


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_samples_are_clipped_where_the_critic_is_asked(rule):
    asked, x = [], 3 * noise(4, 1, 2)

    def value(a):
        asked.append(a.detach())
        return total(a)

    guidance(rule(gaussian_posterior, clip=(-0.5, 0.25)), BASE, qsteer.value(value), x, 0.2)
    assert asked[0].min() == -0.5 and asked[0].max() == 0.25


# ------------------------------------------------------------------------------------------- cost and binding


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("rule", "backward"), [(POSTERIORS[0], True), (POSTERIORS[1], False)])
def test_cost_of_a_guided_step_with_glass(rule, backward, steps):
    field, value, x = CountingField(nonlinear), CountingValue(bumpy), noise(3, 2, 2)
    rule(GlassPosterior(steps=steps), samples=5)(field, value)(x, fixed_times(0.4, 3))
    assert field.tally.rows == [3] + [15] * (steps - 1)
    assert value.tally.rows == [15]
    assert field.tally.backwards == backward * steps and value.tally.backwards == backward


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_a_function_of_three_arguments_is_a_posterior_and_the_velocity_is_not_differentiated(rule):
    field, x = CountingField(GAUSSIAN.velocity), noise(3, 1, 2)
    torch.manual_seed(0)
    got = guidance(rule(gaussian_posterior, 1.0, 4, **EXACT), field, VALUE, x, 0.4)
    assert field.tally.backwards == 0 and field.tally.rows == [3, 3]  # the other is guidance's own
    torch.manual_seed(0)
    eps, leaf, times = torch.randn(4, 3, 1, 2, dtype=DOUBLE), x.clone().requires_grad_(), fixed_times(0.4, 3)
    x1 = gaussian_posterior(eps, leaf, times)
    q = torch.stack([bumpy(sample) for sample in x1])
    if rule is qsteer.Posterior:
        expected = torch.autograd.grad(q.exp().mean(0).log().sum(), leaf)[0]
    else:
        w = (q.exp() / q.exp().sum(0))[:, :, None, None]
        expected = 0.4 / 0.6**2 * ((w * x1).sum(0) - x1.mean(0)).detach()
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_posterior_of_another_policy_becomes_the_steered_policys():
    """Its first step uses the velocity which the rule knows: half of one policy would be none."""
    x, pushes = noise(3, 2, 2), []
    for posterior in (GlassPosterior(steps=3), GlassPosterior(qsteer.field(constant), 3)):
        torch.manual_seed(0)
        pushes.append(guidance(qsteer.Posterior(posterior), BASE, VALUE, x, 0.4))
    assert torch.equal(*pushes)


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_the_global_seed_reproduces_the_samples(rule):
    x, outs = noise(3, 2, 2), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(qsteer.sample(BASE, VALUE, x, rule=rule(GlassPosterior(), 0.3)))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
@pytest.mark.parametrize("posterior", ["glass", "meta"])
def test_candidates_are_steered_for_their_own_observation_and_bound_once(rule, posterior):
    goals = torch.tensor([-300.0, 0.0, 500.0], dtype=DOUBLE)[:, None]
    field = qsteer.field(lambda x, t, o: o[:, None] + torch.sin(x), goals)
    value = qsteer.value(lambda a, o: -(a - o[:, None]).square().flatten(1).sum(1), goals)
    encoded = []
    sampler = GlassPosterior()
    if posterior == "meta":
        sampler = MetaFlowMap(MetaMapConfig(2, 2, 1, hidden=(8,))).double()
        encode = sampler.net.encode
        sampler.net.encode = lambda features: encoded.append(len(features)) or encode(features)
    torch.manual_seed(0)
    out = qsteer.sample(
        field, value, noise(3, 2, 2), rule=rule(sampler, 0.2, 4, clip=None), sampler=qsteer.BestOfN(3)
    )
    assert ((out - goals[:, None]).abs() < 150).all()
    assert encoded == ([3] if posterior == "meta" else [])


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_a_mirrored_host_in_float32_is_steered_as_the_paper_is(rule):
    host = Host(lambda x, u: -MIXTURE.velocity(x.double(), 1 - u.double()).to(x.dtype))
    x, outs = noise(4, 1, 2, dtype=torch.float32), []
    for field in (host, qsteer.field(lambda x, t: MIXTURE.velocity(x.double(), t.double()).to(x.dtype))):
        torch.manual_seed(0)
        outs.append(qsteer.sample(field, VALUE, x, rule=rule(GlassPosterior(), 0.3)))
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-3)
    assert outs[0].dtype == torch.float32


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_guidance_raises_the_value_and_negated_lowers_it(rule):
    x, value = noise(200, 1, 2), score(QUADRATIC)
    field = qsteer.field(MIXTURE.velocity)
    torch.manual_seed(0)
    method = rule(GlassPosterior(), 0.3)
    up, base, down = (
        value(qsteer.sample(field, value, x, rule=r)).mean() for r in (method, None, qsteer.Negated(method))
    )
    assert up - base > 0.1 and base - down > 0.1


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("rule", POSTERIORS, **by_name)
def test_wrong_arguments_are_refused(rule):
    with as_installed():
        for bad in (GlassPosterior, "glass", None):
            with pytest.raises(TypeError, match=r"posterior: expected a function.*pass an instance"):
                rule(bad)
        with pytest.raises(
            ValueError, match="samples, tau: expected at least 1 and a positive number, got 0"
        ):
            rule(GlassPosterior(), samples=0)
        for tau in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="samples, tau"):
                rule(GlassPosterior(), tau=tau)
        with pytest.raises(ValueError, match="expected a finite strength"):
            rule(GlassPosterior(), alpha=-0.1)


def test_posterior_needs_a_differentiable_value():
    with pytest.raises(ValueError, match="differentiable in the action"):
        guidance(qsteer.Posterior(GlassPosterior()), BASE, black_box(VALUE), noise(2, 2, 2), 0.5)
