"""Real-time chunking of lerobot's policies, steered: what is held is lerobot's, what is free is bent."""

import hosts
import pytest
import torch
from hosts import STRONG
from torch import Tensor, nn

import qsteer
from qsteer.adapters import host_of
from qsteer.chunking import Held, prefix_weights
from qsteer.steering.handle import steer

pytest.importorskip("lerobot")
from lerobot.configs import RTCAttentionSchedule
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.policies.rtc.modeling_rtc import RTCProcessor

SCHEDULES = list(RTCAttentionSchedule)


@pytest.fixture(params=hosts.LEROBOT)
def policy(request: pytest.FixtureRequest):
    policy = hosts.shared(request.param)
    yield policy
    enable(policy, None)


def enable(policy: nn.Module, config: RTCConfig | None) -> None:
    """As ``lerobot-rollout`` does, after loading."""
    policy.config.rtc_config = config
    policy.init_rtc_processor()


def left(rows: int = 2, steps: int = 5, dim: int = 3) -> Tensor:
    return torch.randn(rows, steps, dim, generator=torch.Generator().manual_seed(7))


def chunk(policy: nn.Module, rows: int = 2, **chunking: object) -> Tensor:
    batch, noise = hosts.observe(policy, rows), hosts.draw(policy, rows)
    act = getattr(policy, host_of(policy).batch)
    return act(batch, noise=noise, **chunking)


@pytest.mark.parametrize(
    ("schedule", "delay"),
    [*((RTCAttentionSchedule.LINEAR, delay) for delay in range(5)), *((each, 2) for each in SCHEDULES)],
)
def test_without_a_push_it_is_lerobots_own_bit_for_bit(policy, schedule, delay):
    free = chunk(policy)
    enable(policy, RTCConfig(prefix_attention_schedule=schedule, execution_horizon=4))
    given = {"inference_delay": delay, "prev_chunk_left_over": left()}
    own = chunk(policy, **given)
    assert torch.equal(own, free) == (delay == 0 and schedule is RTCAttentionSchedule.ZEROS)
    for method in (qsteer.Tweedie(0.0), qsteer.Euler(), qsteer.BestOfN(1)):
        with steer(policy, hosts.Target(), method):
            assert torch.equal(chunk(policy, **given), own)
    assert torch.equal(chunk(policy, **given), own)


@pytest.mark.parametrize(
    "chunking",
    [
        {"prev_chunk_left_over": left(steps=6, dim=5)},
        {"prev_chunk_left_over": left(steps=2)},
        {"prev_chunk_left_over": left()[0]},
        {"prev_chunk_left_over": left(), "execution_horizon": 1},
    ],
    ids=["whole", "short", "two-dimensional", "horizon"],
)
def test_other_forms_of_what_is_left_are_lerobots_too(policy, chunking):
    given = {"inference_delay": 1} | chunking
    enable(policy, RTCConfig(execution_horizon=4))
    rows = 1 if given["prev_chunk_left_over"].ndim == 2 else 2
    own = chunk(policy, rows, **given)
    with steer(policy, hosts.Target(), qsteer.Euler()):
        assert torch.equal(chunk(policy, rows, **given), own)


def test_it_is_switched_on_and_off_while_steered(policy):
    given = {"inference_delay": 2, "prev_chunk_left_over": left()}
    with steer(policy, hosts.Target(), STRONG):
        steered = chunk(policy)
        enable(policy, RTCConfig())
        held = chunk(policy, **given)
        assert not torch.allclose(held, steered)
        enable(policy, None)
        assert torch.equal(chunk(policy), steered)


@pytest.mark.parametrize("rule", [STRONG, qsteer.QGF(0.5), qsteer.RandomDirection(0.5)], ids=str)
def test_the_push_acts_where_the_chunk_is_free(policy, rule):
    """With the schedule of zeros the first steps are lerobot's alone, at every Euler step."""
    enable(policy, RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.ZEROS))
    given = {"inference_delay": 2, "prev_chunk_left_over": left()}
    with steer(policy, hosts.Target(), rule) as handle:
        seen: list[tuple] = []
        handle.swap(rule=None, sampler=hosts.Spy(seen))
        own = chunk(policy, **given)
        ((field, value, noise),) = seen
        assert isinstance(field, Held)
        bent = rule(field, value)(noise, 0.5) - field(noise, 0.5)
        assert torch.equal(bent[:, :2], torch.zeros_like(bent[:, :2]))
        assert bent[:, 2:4, :3].abs().min() > 0
        assert torch.equal(bent[:, 4:], torch.zeros_like(bent[:, 4:])), "not executed"
        handle.swap(rule=rule, sampler=None)
        assert not torch.allclose(chunk(policy, **given)[:, 2:4], own[:, 2:4])


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_the_critic_judges_what_will_be_executed(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its push is the finite difference of Q(W Y + (1 - W) D(x)), times 1 - W; all in double precision."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    policy, seen = hosts.build(name).double(), []
    enable(policy, RTCConfig(execution_horizon=5))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in hosts.observe(policy).items()}
    with steer(policy, hosts.Target().double(), sampler=hosts.Spy(seen)):
        act = getattr(policy, host_of(policy).batch)
        given = {"inference_delay": 1, "prev_chunk_left_over": left(1).double()}
        act(batch, noise=hosts.draw(policy).double(), **given)
    field, value, x = seen[0]
    inner, weights = value.value, field.weights
    assert 0 < weights[3] < weights[1] < weights[0] == 1
    tweedie = qsteer.Tweedie(1.0, scaling="raw", clip=None)
    push = tweedie(field, value)(x, 0.5) - field(x, 0.5)
    for i, j in ((0, 0), (1, 1), (3, 2)):
        nudge = torch.zeros_like(x)
        nudge[0, i, j] = 1e-5
        ends = [qsteer.flow.denoise(y, field.free(y, 0.5), 0.5) for y in (x + nudge, x - nudge)]
        up, down = (inner(weights * field.previous + (1 - weights) * end) for end in ends)
        torch.testing.assert_close(
            push[0, i, j], (1 - weights[i, 0]) * (up - down)[0] / 2e-5, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize(
    "sampler",
    [qsteer.BestOfN(3), qsteer.BeamSearch(2, 2), qsteer.TrustRegion(0.3), qsteer.KeepBest()],
    ids=lambda sampler: type(sampler).__name__,
)
def test_every_sampler_keeps_what_is_held(policy, sampler):
    """The steps that will have been executed come as close to the former chunk as lerobot's own do."""
    enable(policy, RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.ZEROS))
    given = {"inference_delay": 3, "prev_chunk_left_over": left()}
    free, own = chunk(policy, prev_chunk_left_over=None), chunk(policy, **given)
    far, near = ((a[:, :3, :3] - left()[:, :3]).norm() for a in (free, own))
    with steer(policy, hosts.Target(), STRONG, sampler=sampler):
        action = chunk(policy, **given)
    assert (action[:, :3, :3] - left()[:, :3]).norm() < 0.5 * (near + far)


def test_candidates_share_what_is_left(policy):
    enable(policy, RTCConfig())
    given = {"inference_delay": 2, "prev_chunk_left_over": left()}
    seen: list[tuple] = []
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        chunk(policy, **given)
    ((field, _, noise),) = seen
    many = field.repeat(2)(noise.repeat_interleave(2, 0), 0.5)
    torch.testing.assert_close(many, field(noise, 0.5).repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", [0.0, 0.1, 0.5, 0.9])
def test_our_own_is_lerobots(schedule, time):
    processor = RTCProcessor(RTCConfig(prefix_attention_schedule=schedule, execution_horizon=5))
    x, v, former = torch.randn(3, 2, 6, 3).unbind()
    theirs = -processor.denoise_step(x, former[:, :5], 2, 1 - time, lambda _: -v, None)
    mask = prefix_weights(schedule.value.lower(), 2, 5, 6)
    torch.testing.assert_close(mask, processor.get_prefix_weights(2, 5, 6))
    held = Held(
        qsteer.field(lambda x, t: v), torch.cat([former[:, :5], torch.zeros(2, 1, 3)], 1), mask[:, None]
    )
    torch.testing.assert_close(held(x, time), theirs)
    torch.testing.assert_close(held(x, torch.full((2,), time)), theirs)


def test_the_fast_path_refuses_a_held_chunk(policy):
    enable(policy, RTCConfig())
    with steer(policy, hosts.Target(), STRONG, compile="static"):
        with pytest.raises(RuntimeError, match=r"compile: expected real-time chunking to be off"):
            chunk(policy, inference_delay=1, prev_chunk_left_over=left())
