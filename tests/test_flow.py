"""The linear path's identities against closed forms and brute force; fields and values of functions."""

import pytest
import torch
from fields import DOUBLE, Gaussian, Mixture, as_installed, fixed_times, noise, nonlinear, total

import qsteer
from qsteer.flow import ask_members, clip_through, denoise, finite_rows, interpolate, repeat_rows, score

GAUSSIAN = Gaussian(
    torch.tensor([[0.5, -1.0, 0.2]], dtype=DOUBLE), torch.tensor([[0.3, 1.0, 2.0]], dtype=DOUBLE)
)
MIXTURE = Mixture(
    torch.tensor([0.3, 0.5, 0.2], dtype=DOUBLE),
    noise(3, 2, 2, seed=7),
    torch.tensor([0.2, 0.5, 0.8], dtype=DOUBLE),
)
TIMES = [0.0, 0.1, 0.5, 0.9, 0.99]


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize(
    ("base", "shape"), [(GAUSSIAN, (1, 3)), (MIXTURE, (2, 2))], ids=["gaussian", "mixture"]
)
def test_denoised_action_is_the_posterior_mean(base, shape, t):
    x, t = noise(20, *shape), fixed_times(t, 20)
    torch.testing.assert_close(
        denoise(x, base.velocity(x, t), t), base.denoised(x, t), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_denoised_action_is_the_posterior_mean_by_brute_force_integration(t):
    """Bayes on a grid of clean actions: p(x1 | x_t) is proportional to p(x1) N(x_t; t x1, (1 - t)²)."""
    base = Mixture(MIXTURE.weights, MIXTURE.means[:, :1, :1], MIXTURE.stds)
    x1 = torch.linspace(-8, 8, 20001, dtype=DOUBLE)[:, None, None]
    prior = base.log_density(x1, fixed_times(1.0, len(x1)))
    x = torch.linspace(-2, 2, 9, dtype=DOUBLE)
    weights = (prior[:, None] - 0.5 * ((x - t * x1[:, 0]) / (1 - t)) ** 2).softmax(0)
    expected = (weights * x1[:, 0]).sum(0)
    x, times = x[:, None, None], fixed_times(t, 9)
    torch.testing.assert_close(
        denoise(x, base.velocity(x, times), times)[:, 0, 0], expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize(
    ("base", "shape"), [(GAUSSIAN, (1, 3)), (MIXTURE, (2, 2))], ids=["gaussian", "mixture"]
)
def test_score_is_the_gradient_of_the_log_density(base, shape, t):
    x, t = noise(20, *shape).requires_grad_(), fixed_times(t, 20)
    expected = torch.autograd.grad(base.log_density(x, t).sum(), x)[0]
    torch.testing.assert_close(score(x, base.velocity(x, t), t), expected, rtol=1e-8, atol=1e-8)


def test_denoised_action_is_the_mean_action_at_noise_and_the_action_itself_at_the_end():
    x = noise(5, 2, 2)
    mean = (MIXTURE.weights[:, None, None] * MIXTURE.means).sum(0)
    zero, one = fixed_times(0.0, 5), fixed_times(1.0, 5)
    torch.testing.assert_close(denoise(x, MIXTURE.velocity(x, zero), zero), mean.expand_as(x))
    torch.testing.assert_close(denoise(x, nonlinear(x, one), one), x)


def test_path_runs_from_noise_to_action_and_its_true_velocity_recovers_the_action():
    x0, x1, t = noise(4, 2, 3), noise(4, 2, 3, seed=1), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=DOUBLE)
    x = interpolate(x0, x1, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[3], x1[3])
    torch.testing.assert_close(x[1], 0.75 * x0[1] + 0.25 * x1[1])
    torch.testing.assert_close(denoise(x, x1 - x0, t), x1)
    torch.testing.assert_close(score(x[:3], (x1 - x0)[:3], t[:3]), -x0[:3] / (1 - t[:3])[:, None, None])


def test_times_of_another_dtype_do_not_change_the_chunks_dtype():
    """A mirrored clock's times are float64 beside float32 chunks."""
    x, t = noise(3, 2, 2, dtype=torch.float32), fixed_times(0.3, 3)
    for out in (denoise(x, x, t), score(x, x, t), interpolate(x, x, t)):
        assert out.dtype == torch.float32


def test_base_policy_samples_its_own_mixture():
    """In one dimension the flow is monotone: noise's quantiles must land on the mixture's quantiles."""
    base = Mixture(MIXTURE.weights, torch.tensor([-1.0, 0.3, 1.2], dtype=DOUBLE)[:, None, None], MIXTURE.stds)
    u = torch.linspace(0.005, 0.995, 199, dtype=DOUBLE)
    x = torch.distributions.Normal(0.0, 1.0).icdf(u)[:, None, None]
    a = qsteer.sample(qsteer.field(base.velocity), None, x, sampler=qsteer.Euler(400))[:, 0, 0]
    z = (a - base.means[:, :, 0]) / base.stds[:, None]
    cdf = (base.weights[:, None] * torch.special.ndtr(z)).sum(0)
    assert (cdf - u).abs().max() < 0.002  # 0.0010 found; halves with the step


def test_straight_through_clip_clips_the_value_and_not_the_gradient():
    a = torch.tensor([-3.0, -0.5, 0.0, 0.7, 5.0], dtype=DOUBLE, requires_grad=True)
    clipped = clip_through(a, (-1.0, 1.0))
    torch.testing.assert_close(clipped, torch.tensor([-1.0, -0.5, 0.0, 0.7, 1.0], dtype=DOUBLE))
    assert torch.equal(clipped[1:4], a[1:4])
    assert torch.equal(torch.autograd.grad(clipped.sum(), a)[0], torch.ones(5, dtype=DOUBLE))
    assert clip_through(a, None) is a


def test_repeated_rows_of_an_observation_stay_together():
    tree = {"a": torch.arange(3), "b": [torch.arange(6).reshape(3, 2), (torch.zeros(3, 1, 1), "text", None)]}
    out = repeat_rows(tree, 2)
    assert out["a"].tolist() == [0, 0, 1, 1, 2, 2]
    assert out["b"][0][:, 0].tolist() == [0, 0, 2, 2, 4, 4]
    assert out["b"][1][0].shape == (6, 1, 1) and out["b"][1][1:] == ("text", None)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_repeated_fields_and_values_answer_row_by_row_as_the_originals_do(k):
    obs = {"state": noise(3, 1, 1), "image": (noise(3, 2, 2, seed=1),)}
    field = qsteer.field(lambda x, t, o: o["state"] * nonlinear(x, t) + o["image"][0], obs)
    value = qsteer.value(lambda a, o: (a * o["image"][0]).flatten(1).sum(1), obs, mask=torch.ones(2, 2))
    x, t = noise(3, 2, 2, seed=2), torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    many, times = x.repeat_interleave(k, 0), t.repeat_interleave(k, 0)
    assert torch.equal(field.repeat(k)(many, times), field(x, t).repeat_interleave(k, 0))
    assert torch.equal(value.repeat(k)(many), value(x).repeat_interleave(k, 0))
    assert torch.equal(value.repeat(k).members(many), value.members(x).repeat_interleave(k, 1))
    assert value.repeat(k).mask is value.mask


def test_a_functions_value_is_an_ensemble_of_one():
    a = noise(3, 2, 2)
    assert torch.equal(qsteer.value(total).members(a), total(a)[None])


def test_finite_rows_looks_at_each_row_alone():
    x = torch.zeros(4, 2, 2)
    x[1, 0, 0], x[2, 1, 1], x[3, 0, 1] = torch.nan, torch.inf, -torch.inf
    assert finite_rows(x).tolist() == [True, False, False, False]
    assert finite_rows(x[:, 0, 0]).tolist() == [True, False, True, True]


def test_velocities_of_another_shape_are_refused_and_point_to_context():
    """A closed-over observation that broadcasts is the usual cause."""
    obs, x = torch.zeros(3, 1, 1), torch.zeros(1, 2, 2)
    with pytest.raises(
        ValueError, match=r"velocity: expected shape \(1, 2, 2\), got \(3, 2, 2\).*context=obs"
    ):
        qsteer.field(lambda x, t: x + obs)(x, torch.zeros(1))


@pytest.mark.parametrize("fn", [lambda a: a.sum(), lambda a: a[:, :1, 0], lambda a: a.sum(1)])
def test_values_of_another_shape_are_refused_with_a_remedy(fn):
    with pytest.raises(ValueError, match=r"expected shape \(3,\).*one score per row.*reduce.*squeeze"):
        qsteer.value(fn)(torch.zeros(3, 2, 2))


@pytest.mark.parametrize("make", [qsteer.field, qsteer.value])
def test_things_that_are_no_functions_are_refused_with_a_remedy(make):
    with (
        as_installed(),
        pytest.raises(TypeError, match=r"expected a function.*got Tensor; wrap it in a lambda"),
    ):
        make(torch.zeros(3))


@pytest.mark.parametrize("out", [lambda x: (x, x), lambda x: {"v": x}, lambda x: x.numpy(), lambda x: None])
def test_what_is_no_tensor_is_refused(out):
    x = torch.zeros(1, 2, 2)
    with pytest.raises(TypeError, match="velocity: expected a tensor, got"):
        qsteer.field(lambda x, t: out(x))(x, 0.5)
    with pytest.raises(TypeError, match="value: expected a tensor, got"):
        qsteer.value(out)(x)


class Shaped(qsteer.Value):
    """A critic of one's own whose values have another shape than (B,)."""

    def __init__(self, shape, members=None):
        self.shape, self.columns = shape, members

    def __call__(self, a):
        return a.flatten(1).sum(1).sum().expand(self.shape)

    def repeat(self, k):
        return self

    def members(self, a):
        return self(a)[None] if self.columns is None else torch.zeros(self.columns)


@pytest.mark.parametrize("shape", [(3, 1), (1,), (), (1, 3)], ids=str)
@pytest.mark.parametrize(
    ("rule", "sampler"),
    [
        (qsteer.Tweedie(), qsteer.Euler()),
        (qsteer.QGF(), qsteer.Euler()),
        (qsteer.NoisyGradient(), qsteer.Euler()),
        (qsteer.ThroughTime(), qsteer.Euler()),
        (qsteer.GradientFreePosterior(qsteer.maps.GlassPosterior()), qsteer.Euler()),
        (None, qsteer.BestOfN(2)),
        (None, qsteer.TrustRegion()),
        (None, qsteer.BeamSearch(2, 2)),
        (None, qsteer.FeynmanKac(2)),
        (None, qsteer.KeepBest()),
    ],
    ids=str,
)
def test_a_value_of_ones_own_that_would_broadcast_is_refused(rule, sampler, shape):
    x = noise(3, 2, 2)
    with as_installed(), pytest.raises(ValueError, match=r"value: expected shape .*one score per row"):
        qsteer.sample(qsteer.field(nonlinear), Shaped(shape), x, rule=rule, sampler=sampler)


@pytest.mark.parametrize("columns", [(3,), (2, 1), (2, 3, 1)], ids=str)
def test_members_of_another_shape_are_refused(columns):
    with pytest.raises(ValueError, match=r"value.members: expected shape .*one row per member"):
        ask_members(Shaped((3,), columns), noise(3, 2, 2))
