"""Q-guided beam search against Algorithm 2 written out row by row, its counts, and its limits."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from fields import (
    BASE,
    DOUBLE,
    VALUE,
    CountingField,
    CountingValue,
    Ensemble,
    as_installed,
    bumpy,
    differences,
    noise,
    nonlinear,
    norms,
    spoiled,
    total,
)
from torch import Tensor

import qsteer
from qsteer.clock import MIRRORED, PAPER
from qsteer.maps import EulerMap, FlowMap, MapConfig
from qsteer.types import Jump

SIZES = [(1, 0, 1), (3, 0, 2), (1, 1, 1), (4, 1, 4), (3, 2, 2), (2, 3, 1)]


def curved(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """A jump that mixes entries."""
    return x + (t - r).to(x.dtype)[:, None, None] * nonlinear(x, r)


@dataclass(frozen=True)
class Recorder:
    """A jump that remembers what it was asked."""

    jump: Callable[[Tensor, Tensor, Tensor], Tensor] = curved
    asked: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor, r: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, r, t))
        return self.jump(x, r, t)


def beam(m: int = 4, k: int = 1, b: int = 4, **more: object) -> qsteer.BeamSearch:
    return qsteer.BeamSearch(particles=m, rounds=k, branches=b, **more)


# --------------------------------------------------------------------------------------------- Algorithm 2


@pytest.mark.parametrize(("m", "k", "b"), SIZES)
@pytest.mark.parametrize("snr", [0.5, 1.5])
def test_beam_search_is_algorithm_2_row_by_row(m, k, b, snr):
    """One observation, particle and branch at a time, gradients by differences, with the same noise."""
    x, eta, t = noise(3, 2, 2), 0.2, snr / (1 + snr)
    torch.manual_seed(5)
    out = qsteer.sample(BASE, VALUE, x, sampler=beam(m, k, b, snr=snr, eta=eta, flow_map=curved))
    torch.manual_seed(5)
    start = torch.cat([x[:, None], torch.randn(3, m - 1, 2, 2, dtype=DOUBLE)], 1)
    fresh = [torch.randn(3 * m * b, 2, 2, dtype=DOUBLE).view(3, m, b, 2, 2) for _ in range(k)]

    def jump(x, r):
        return curved(x[None], torch.tensor([r], dtype=DOUBLE), torch.tensor([1.0], dtype=DOUBLE))[0]

    def climb(a):
        g = differences(bumpy, a[None])[0]
        return a + eta * g / g.norm()

    for o in range(3):
        particles = [jump(a, 0.0) for a in start[o]]
        for eps in fresh:
            pool = [jump(t * particles[i] + (1 - t) * eps[o, i, j], t) for i in range(m) for j in range(b)]
            pool.sort(key=lambda a: -float(bumpy(a[None])))
            particles = [climb(a) for a in pool[:m]]
        particles = particles if k else [climb(a) for a in particles]
        expected = max(particles, key=lambda a: float(bumpy(a[None])))
        torch.testing.assert_close(out[o], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("m", "k", "b"), SIZES)
@pytest.mark.parametrize("snr", [0.5, 1.5])
def test_a_flow_map_is_called_on_m_times_one_plus_k_b_rows_and_the_critic_on_the_particles(m, k, b, snr):
    x, jump, field, value = noise(3, 2, 2), Recorder(), CountingField(nonlinear), CountingValue(bumpy)
    qsteer.sample(field, value, x, sampler=beam(m, k, b, snr=snr, flow_map=jump))
    rows = [len(asked[0]) for asked in jump.asked]
    assert rows == [3 * m] + [3 * m * b] * k and sum(rows) == 3 * m * (1 + k * b)
    assert field.tally.calls == 0
    moved = [3 * m * b, 3 * m] * k if k else [3 * m]
    assert value.tally.rows == [*moved, 3 * m] and value.tally.backwards == max(k, 1)
    starts = [0.0] + [snr / (1 + snr)] * k
    for (_, r, t), start in zip(jump.asked, starts, strict=True):
        torch.testing.assert_close(r, torch.full_like(r, start))
        assert (t == 1).all() and r.dtype == t.dtype == DOUBLE and r.ndim == t.ndim == 1


@pytest.mark.parametrize(("m", "k", "b"), SIZES)
@pytest.mark.parametrize("clock", [PAPER, MIRRORED], ids=["paper", "mirrored"])
@pytest.mark.parametrize(("steps", "rest"), [(10, 4), (7, 3), (None, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_without_a_flow_map_the_policy_integrates_from_where_it_was_renoised(
    m, k, b, clock, steps, rest, dtype
):
    x, field = noise(3, 2, 2, dtype=dtype), CountingField(nonlinear, clock=clock)
    qsteer.sample(field, VALUE, x, sampler=beam(m, k, b, inner=qsteer.Euler(steps)))
    assert field.tally.rows == [3 * m] * (steps or 10) + [3 * m * b] * rest * k


def test_the_policys_own_integration_is_an_euler_map():
    x, outs = noise(3, 2, 2), []
    for flow_map in (None, EulerMap(BASE, 7)):
        torch.manual_seed(0)
        outs.append(qsteer.sample(BASE, VALUE, x, sampler=beam(flow_map=flow_map, inner=qsteer.Euler(7))))
    assert torch.equal(*outs)


# ---------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_one_particle_without_a_round_is_the_trust_region_bit_for_bit(rule, dtype):
    x, inner, state = noise(4, 2, 2, dtype=dtype), qsteer.Euler(7, clip=(-1.0, 1.0)), torch.get_rng_state()
    out, expected = (
        qsteer.sample(BASE, VALUE, x, rule=rule, sampler=sampler)
        for sampler in (beam(1, 0, eta=0.2, inner=inner), qsteer.TrustRegion(0.2, inner=inner))
    )
    assert torch.equal(out, expected) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.3)])
@pytest.mark.parametrize("m", [1, 5])
def test_radius_zero_without_a_round_is_best_of_n_bit_for_bit(rule, m):
    x, outs = noise(4, 2, 2, dtype=torch.float32), []
    for sampler in (beam(m, 0, eta=0.0), qsteer.BestOfN(m)):
        torch.manual_seed(3)
        outs.append(qsteer.sample(BASE, VALUE, x, rule=rule, sampler=sampler))
    assert torch.equal(*outs)


def test_particle_zero_is_the_callers_noise_and_renoising_is_at_the_given_ratio():
    x, jump, snr, t = noise(3, 2, 2), Recorder(), 4.0, 0.8
    torch.manual_seed(0)
    qsteer.sample(BASE, VALUE, x, sampler=beam(4, 2, 3, snr=snr, flow_map=jump, eta=0.0))
    torch.manual_seed(0)
    pool = torch.cat([x[:, None], torch.randn(3, 3, 2, 2, dtype=DOUBLE)], 1)
    assert torch.equal(jump.asked[0][0], pool.flatten(0, 1))
    first = jump.jump(*jump.asked[0])
    eps = torch.randn(36, 2, 2, dtype=DOUBLE)
    expected = t * first.repeat_interleave(3, 0) + (1 - t) * eps
    torch.testing.assert_close(jump.asked[1][0], expected, rtol=1e-12, atol=1e-12)
    completed = jump.jump(*jump.asked[1]).view(3, 12, 2, 2)
    kept = torch.stack([a[bumpy(a).topk(4).indices] for a in completed])
    expected = t * kept.flatten(0, 1).repeat_interleave(3, 0) + (1 - t) * torch.randn(36, 2, 2, dtype=DOUBLE)
    torch.testing.assert_close(jump.asked[2][0], expected, rtol=1e-12, atol=1e-12)


def to_modes(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """The flow map of a policy whose actions are multiples of 40: noise moves no state to another's basin."""
    return 40 * torch.where((r > 0)[:, None, None], x / (0.6 * 40), x).round()


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_where_completion_undoes_the_noise_it_is_best_of_m_and_one_climb(k, eta):
    x, value = 2 * noise(6, 2, 2), qsteer.value(total)
    torch.manual_seed(0)
    pool = torch.cat([x[:, None], torch.randn(6, 3, 2, 2, dtype=DOUBLE)], 1)
    top = (40 * pool.round()).flatten(2).sum(2).amax(1)
    torch.manual_seed(0)
    out = qsteer.sample(BASE, value, x, sampler=beam(4, k, 3, eta=eta, flow_map=to_modes))
    torch.testing.assert_close(total(out), top + 2 * eta)  # the slope of the sum of 4 entries has norm 2
    assert len(set(top.tolist())) > 2


def test_a_ratio_without_noise_climbs_once_a_round():
    """snr 1e9 and the identity for a jump: best of m, moved k times along a straight slope."""
    x, value = noise(6, 2, 2), qsteer.value(total)
    for k in (1, 2, 5):
        torch.manual_seed(0)
        top = torch.cat([x[:, None], torch.randn(6, 3, 2, 2, dtype=DOUBLE)], 1).flatten(2).sum(2).amax(1)
        torch.manual_seed(0)
        out = qsteer.sample(
            BASE, value, x, sampler=beam(4, k, 2, snr=1e9, eta=0.3, flow_map=lambda x, r, t: x)
        )
        torch.testing.assert_close(total(out), top + 0.6 * k, rtol=1e-6, atol=1e-6)


def test_rounds_find_better_actions_than_best_of_as_many():
    """20 completions each; FMQ's claim on a small landscape, with the mean over 200 observations."""
    x, q = noise(200, 2, 2), {}
    for name, sampler in {"beam": beam(4, 1, 4, eta=0.0), "none": qsteer.BestOfN(4)}.items():
        torch.manual_seed(0)
        q[name] = bumpy(qsteer.sample(BASE, VALUE, x, sampler=sampler)).mean()
    assert q["beam"] > q["none"] + 0.2


# ---------------------------------------------------------------------------------------- rows and contexts


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("rule", [None, qsteer.Tweedie(0.2, clip=None)])
def test_particles_keep_their_own_observation(k, learnt, rule):
    goals = torch.tensor([-300.0, 0.0, 500.0], dtype=DOUBLE)[:, None, None]

    @dataclass(frozen=True)
    class Own(Jump):
        o: Tensor

        def __call__(self, x, r, t):
            return x + (t - r) * (self.o + 0.1 * torch.sin(x))

        def repeat(self, k):
            return Own(self.o.repeat_interleave(k, 0))

    field = qsteer.field(lambda x, t, o: o + torch.sin(x), goals)
    value = qsteer.value(lambda a, o: -(a - o).square().flatten(1).sum(1), goals)
    torch.manual_seed(0)
    sampler = beam(4, k, 3, flow_map=Own(goals) if learnt else None)
    out = qsteer.sample(field, value, noise(3, 2, 2), rule=rule, sampler=sampler)
    assert ((out - goals).abs() < 150).all()


def test_a_batch_is_searched_as_its_observations_are():
    """Particles of one observation never compete with another's: with one round the noise is replayed."""
    goals = torch.tensor([-3.0, 0.0, 5.0], dtype=DOUBLE)[:, None, None]
    eps = noise(3, 12, 2, 2, seed=3)

    def search(rows):
        def jump(x, r, t):  # forgets the state: what is completed is the replayed noise, near the goal
            part = eps[rows]
            return (part if len(x) == part[:, :, 0, 0].numel() else part[:, :4]).flatten(0, 1)

        value = qsteer.value(lambda a, o: -(a - o).square().flatten(1).sum(1), goals[rows])
        sampler = beam(4, 1, 3, eta=0.1, flow_map=jump)
        return qsteer.sample(BASE, value, noise(3, 2, 2)[rows], sampler=sampler)

    whole = search(slice(None))
    for b in range(3):
        torch.testing.assert_close(search(slice(b, b + 1)), whole[b : b + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_a_learnt_map_is_bound_to_the_policys_features_once_an_action(network):
    torch.manual_seed(0)
    config = MapConfig(2, 2, 4, network=network, hidden=(8,), width=8, depth=1, heads=2, harmonics=2)
    flow_map, encoded = FlowMap(config).double(), []
    z, mask = noise(3, 4, seed=2), torch.ones(3, 3).bool()
    context = z if network == "mlp" else (noise(3, 3, 4, seed=2), mask)
    field = qsteer.field(lambda x, t, _: nonlinear(x, t), context)
    encode = flow_map.net.encode
    flow_map.net.encode = lambda features: encoded.append(features) or encode(features)
    torch.manual_seed(1)
    out = qsteer.sample(field, VALUE, noise(3, 2, 2), sampler=beam(flow_map=flow_map, k=2))
    assert len(encoded) == 1
    bound = flow_map.bind(context)
    torch.manual_seed(1)
    assert torch.equal(out, qsteer.sample(BASE, VALUE, noise(3, 2, 2), sampler=beam(flow_map=bound, k=2)))


def test_a_rule_bends_completions_and_not_a_flow_maps_jumps():
    x, rule, field = noise(4, 2, 2), qsteer.Tweedie(0.3), CountingField(nonlinear)
    outs = []
    for method in (None, rule):
        for flow_map in (None, curved):
            torch.manual_seed(0)
            outs.append(qsteer.sample(BASE, VALUE, x, rule=method, sampler=beam(flow_map=flow_map, eta=0.0)))
    assert norms(outs[0] - outs[2]).min() > 1e-3
    assert torch.equal(outs[1], outs[3])
    qsteer.sample(field, VALUE, x, rule=rule, sampler=beam(2, 1, 3))
    assert field.tally.rows == [8] * 10 + [24] * 4 and field.tally.backwards == 9 + 4


# ------------------------------------------------------------------------------------- bounds and fallbacks


@pytest.mark.parametrize("flow_map", [None, curved])
def test_completed_actions_are_clipped_as_the_inner_sampler_clips(flow_map):
    asked = []

    def value(a):
        asked.append(a.detach())
        return bumpy(a)

    sampler = beam(3, 2, 2, eta=0.0, flow_map=flow_map, inner=qsteer.Euler(clip=(-0.5, 0.25)))
    qsteer.sample(BASE, qsteer.value(value), 2 * noise(5, 2, 2), sampler=sampler)
    assert len(asked) == 3
    assert asked[0].min() == -0.5 and asked[0].max() == 0.25
    assert all(a.min() >= -0.5 and a.max() <= 0.25 for a in asked)


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("k", [0, 1])
def test_rows_of_a_spoiled_observation_stay_finite_and_others_do_not_notice(kind, k):
    x, bad, outs = noise(3, 2, 2), torch.tensor([False, True, False]), []
    trace = qsteer.Trace(steps=False)
    for flags in (bad, bad & False):
        value = Ensemble((spoiled(bumpy, kind),), flags)
        torch.manual_seed(0)
        outs.append(qsteer.sample(BASE, value, x, sampler=beam(3, k, 2), trace=trace))
    assert trace.fallbacks >= 1
    assert torch.isfinite(outs[0]).all() and torch.equal(outs[0][~bad], outs[1][~bad])
    if k == 0 and kind != "gradient":
        assert torch.equal(outs[0][bad], qsteer.sample(BASE, None, x)[bad])


@pytest.mark.filterwarnings("ignore:steering met non-finite")
@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_branches_without_a_value_are_not_kept(kind):
    """Spoiled: first entries above 0, where the score would be highest."""
    x = noise(20, 1, 2)
    value = qsteer.value(lambda a: torch.where(a[:, 0, 0] > 0, float(kind), total(a)))
    sampler = beam(4, 2, 8, eta=0.0, snr=0.5, flow_map=lambda x, r, t: x)
    out = qsteer.sample(BASE, value, x, sampler=sampler)
    assert (out[:, 0, 0] <= 0).all()


def test_moves_stay_within_the_entries_which_the_critic_sees():
    mask = torch.tensor([[1, 0], [1, 1]])
    x, value = noise(4, 2, 2), qsteer.value(bumpy, mask=mask)
    before, after = (qsteer.sample(BASE, value, x, sampler=beam(1, 0, eta=eta)) for eta in (0.0, 0.3))
    moved = after - before
    assert (moved[:, ~mask.bool()] == 0).all()
    torch.testing.assert_close(norms(moved), torch.full((4,), 0.3, dtype=DOUBLE), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_beam_search_follows_the_global_seed_and_keeps_the_dtype(dtype):
    x, outs = noise(3, 2, 2, dtype=dtype), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(qsteer.sample(BASE, VALUE, x, sampler=beam()))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert outs[0].dtype == dtype and outs[0].shape == x.shape and not outs[0].requires_grad


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"particles": 0}, "particles, branches, rounds: expected at least 1, 1, 0, got 0, 4, 1"),
        ({"branches": 0}, "got 4, 0, 1"),
        ({"rounds": -1}, "got 4, 4, -1"),
        ({"snr": 0.0}, "snr, eta: expected a positive number and one of at least 0, got 0.0, 0.3"),
        ({"snr": float("inf")}, "snr, eta"),
        ({"snr": float("nan")}, "snr, eta"),
        ({"eta": -0.1}, "snr, eta"),
        ({"eta": float("nan")}, "snr, eta"),
    ],
)
def test_impossible_searches_are_refused(bad, message):
    with as_installed(), pytest.raises(ValueError, match=message):
        qsteer.BeamSearch(**bad)


def test_searching_without_a_value_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"BeamSearch: expected a value.*qsteer\.value\(fn\)"):
        qsteer.sample(BASE, None, noise(1, 2, 2), sampler=beam())


def test_a_learnt_map_without_features_is_refused():
    flow_map = FlowMap(MapConfig(2, 2, 4, hidden=(8,))).double()
    with pytest.raises(ValueError, match="expected features of the observation for a learnt map"):
        qsteer.sample(BASE, VALUE, noise(1, 2, 2), sampler=beam(flow_map=flow_map))


def test_completions_have_steps_and_clip_of_their_own_where_inner_is_no_euler():
    inner, x = qsteer.TrustRegion(inner=qsteer.Euler(4)), noise(1, 2, 2)
    with pytest.raises(TypeError, match=r"completion: expected the steps and the clip.*completion=Euler"):
        qsteer.BeamSearch(2, 2, inner=inner)
    field = CountingField(nonlinear)
    completion = qsteer.Euler(20, clip=(-0.1, 0.1))
    sampler = qsteer.BeamSearch(2, 2, eta=0.0, inner=inner, completion=completion)
    out = qsteer.sample(field, qsteer.value(total), x, sampler=sampler)
    assert field.tally.rows == [2] * 4 + [4] * 8
    assert out.abs().max() <= 0.1


def test_a_flow_map_needs_no_completion_and_no_rule_bends_it():
    flow_map = FlowMap(MapConfig(2, 2, 2, hidden=(8,), residual=True)).double()
    goals = noise(3, 2)
    field = qsteer.field(lambda x, t, o: o[:, None] + torch.sin(x), goals)
    sampler = qsteer.BeamSearch(2, 2, flow_map=flow_map, inner=qsteer.TrustRegion())
    outs = []
    for rule in (None, qsteer.Tweedie(0.5)):
        torch.manual_seed(0)
        outs.append(qsteer.sample(field, qsteer.value(total), noise(3, 2, 2), rule=rule, sampler=sampler))
    assert torch.equal(*outs)


def test_a_flow_map_that_wants_to_be_bound_is_no_plain_function():
    class Own:
        def on(self, field):
            return self

        def __call__(self, x, r, t):
            return x

    with pytest.raises(TypeError, match=r"flow_map: expected a function or .*subclass qsteer.types.Jump"):
        qsteer.BeamSearch(flow_map=Own())
