"""A batch is decided row by row: alone or in company, steered or not, small policies and lerobot's own."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import hosts
import numpy as np
import pytest
import torch
from robots import STATE, requests_of, same
from torch import Tensor, nn

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.sampling import sample
from qsteer.serving import Input, Interface, Served, ServedHost, ServedStates
from qsteer.serving.opening import serve_lerobot
from qsteer.serving.served import Planned
from qsteer.testing import hosts as random_hosts

STRONG = qsteer.Tweedie(alpha=0.3, clip=None)
ROWS = 5
STEERED: list[nn.Module] = []


@pytest.fixture(autouse=True)
def unsteered() -> Iterator[None]:
    """Shared hosts are left as they were found."""
    yield
    while STEERED:
        qsteer.unsteer(STEERED.pop())


def seeded_critic(obs: int, horizon: int) -> Critic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Critic(CriticConfig(obs, 3, horizon, (16,))).eval()


def small_policy() -> FlowPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FlowPolicy(FlowPolicyConfig(6, 3, 4, (33, 33))).eval()


def states(
    rule: qsteer.Rule | None = STRONG,
    sampler: qsteer.Sampler = qsteer.Euler(clip="policy"),  # noqa: B008
    exact: int | None = None,
    displacement: bool = True,
) -> ServedStates:
    interface = Interface({STATE: Input("numbers", (6,))}, {}, 4, 3)
    return ServedStates(
        small_policy(), seeded_critic(6, 4), rule, sampler, interface, exact=exact, displacement=displacement
    )


def host(
    rule: qsteer.Rule | None = STRONG,
    sampler: qsteer.Sampler | None = None,
    exact: int | None = None,
    name: str = "smolvla",
) -> ServedHost:
    policy = hosts.shared(name)
    qsteer.unsteer(policy)
    STEERED.append(policy)
    handle = qsteer.steer(policy, seeded_critic(4, 4), rule, sampler=sampler)
    return serve_lerobot(handle, *random_hosts.processors(policy), instruction="put the bowl", exact=exact)


@pytest.fixture(params=[states, host], ids=["states", "smolvla"])
def make(request: pytest.FixtureRequest) -> Callable[..., Served]:
    return request.param


METHODS = [
    (None, qsteer.Euler()),
    (STRONG, qsteer.Euler()),
    (STRONG, qsteer.BestOfN(3)),
    (qsteer.RandomDirection(), qsteer.RandomOfN(3)),
]


@pytest.mark.parametrize("rule, sampler", METHODS, ids=str)
def test_a_reply_does_not_depend_on_who_shares_the_call(make, rule, sampler) -> None:
    served = make(rule, sampler)
    requests = requests_of(served, ROWS, twin=True)
    together = served.act(requests)
    for request, found in zip(requests, together, strict=True):
        same(served.act([request])[0], found, bits=False)
    for request, found in zip(reversed(requests), served.act(requests[::-1]), strict=True):
        same(found, together[requests.index(request)], bits=False)


@pytest.mark.parametrize("rule, sampler", METHODS[1:3], ids=str)
def test_exact_is_to_the_bit(make, rule, sampler) -> None:
    served = make(rule, sampler, exact=ROWS)
    served.warm_up()
    requests = requests_of(served, ROWS, twin=True)
    together = served.act(requests)
    for request, found in zip(requests, together, strict=True):
        same(served.act([request])[0], found, bits=True)
    for request, found in zip(requests[1:4], served.act(requests[1:4]), strict=True):
        same(found, together[requests.index(request)], bits=True)


def test_exact_refuses_where_rows_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    served = states(exact=4)
    plan = served._plan

    def shifted(*args: object) -> Planned:
        planned = plan(*args)
        return planned._replace(executed=planned.executed + np.arange(4)[:, None, None] * 1e-7)

    monkeypatch.setattr(served, "_plan", shifted)
    with pytest.raises(RuntimeError, match="exact: expected a row to be the same"):
        served.warm_up()


def test_replies_say_what_steering_did(make) -> None:
    steered = make()
    requests = requests_of(steered, 3, twin=True)
    twins = steered.act(requests)
    for found in twins:
        assert found.strength == pytest.approx(0.3, rel=1e-3) and found.displacement > 0.001
        assert found.disagreement > 0 and np.isfinite(found.value)
        assert not np.array_equal(found.actions, found.unsteered_actions)
    plain = steered.act([replace(requests[0], unsteered_twin=False)])[0]
    assert plain.unsteered_actions is None and "unsteered_actions" not in plain.message()
    for mine, twin in zip(make(None).act(requests), twins, strict=True):
        assert np.array_equal(mine.actions, mine.unsteered_actions)
        assert np.array_equal(mine.actions, twin.unsteered_actions)
        assert mine.strength == mine.displacement == 0


def test_value_and_displacement_are_those_of_the_actions() -> None:
    served = states()
    (request,) = requests_of(served, 1, twin=True)
    (found,) = served.act([request])
    value = served.critic.bind(torch.tensor(request.observation[STATE])[None])
    actions = torch.tensor(found.actions)[None]
    assert found.value == pytest.approx(value(actions).item(), abs=1e-5)
    assert found.disagreement == pytest.approx(value.members(actions).std(0, correction=0).item(), abs=1e-5)
    moved = np.sqrt(((found.actions - found.unsteered_actions) ** 2).mean())
    assert found.displacement == pytest.approx(moved, abs=1e-5)
    assert states(displacement=False).act([request])[0].displacement is None


def test_a_small_policys_action_is_that_of_sample() -> None:
    served = states()
    (request,) = requests_of(served, 1)
    obs = torch.tensor(request.observation[STATE])[None]
    noise = torch.randn(1, 1, 4, 3, generator=torch.Generator().manual_seed(request.seed))[:, 0]
    policy = served.policy
    own = sample(policy.field(obs), served.critic.bind(obs), noise, rule=STRONG, sampler=served.sampler)
    assert np.array_equal(served.act([request])[0].actions, own[0].numpy())


@pytest.mark.parametrize("name", ["smolvla", pytest.param("pi05", marks=pytest.mark.slow)])
def test_the_unsteered_reply_is_the_bare_host_bit_for_bit(name: str) -> None:
    served, bare = host(None, name=name), hosts.build(name)
    requests = requests_of(served, 2)
    found = served.act(requests)
    pre, post = random_hosts.processors(bare)
    raw: dict[str, object] = {
        key: torch.stack([torch.tensor(each.observation[key]) for each in requests])
        for key in requests[0].observation
        if key != "task"
    }
    raw = {key: value.float() / 255 if value.dtype == torch.uint8 else value for key, value in raw.items()}
    draws = [torch.Generator().manual_seed(each.seed) for each in requests]
    noise = torch.cat([torch.randn(1, 1, 6, 5, generator=draw)[:, 0] for draw in draws])
    with torch.no_grad():
        chunk = bare.predict_action_chunk(pre(raw | {"task": ["put the bowl"] * 2}), noise=noise)
    own = torch.stack([post(step) for step in chunk[:, :4].unbind(1)], 1)
    for decision, actions in zip(found, own, strict=True):
        assert np.array_equal(decision.actions, actions.numpy())


def test_prompts_of_other_lengths_share_a_call() -> None:
    served = host()
    one, two = (
        replace(each, observation={**each.observation, "task": text})
        for each, text in zip(requests_of(served, 2), ("push", "put the bowl on the plate"), strict=True)
    )
    for request, found in zip((one, two), served.act([one, two]), strict=True):
        same(served.act([request])[0], found, bits=False)


class Chunks(nn.Module):
    """A policy without a velocity, which draws its chunks by torch's generator."""

    name = "chunks"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    @property
    def __qsteer_host__(self):
        from qsteer.clock import PAPER
        from qsteer.hosts import Host

        path = "predict_action_chunk"
        return Host("Chunks", path, None, path, PAPER, 1, executed="steps", action_shape="dim")

    steps, dim = 4, 3

    def predict_action_chunk(self, batch: dict[str, Tensor]) -> Tensor:
        state = batch[STATE]
        return state[:, :1, None] + torch.randn(len(state), 4, 3)


def test_a_policy_without_a_velocity_acts_row_by_row() -> None:
    handle = qsteer.steer(Chunks(), seeded_critic(6, 4), qsteer.BestOfN(4))
    interface = Interface({STATE: Input("numbers", (6,))}, {}, 4, 3)
    served = ServedHost(handle, interface, lambda batch: batch, lambda step: step)
    requests = requests_of(served, 3, twin=True)
    together = served.act(requests)
    for request, found in zip(requests, together, strict=True):
        same(served.act([request])[0], found, bits=True)
    assert len({found.value for found in together}) == 3
    assert handle.sampler == qsteer.BestOfN(4)


def test_a_row_that_is_not_finite_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    served = states()
    plan = served._plan

    def broken(*args: object) -> Planned:
        planned = plan(*args)
        planned.executed[1] = np.nan
        return planned

    monkeypatch.setattr(served, "_plan", broken)
    found = served.act(requests_of(served, 3))
    assert isinstance(found[1], FloatingPointError)
    assert not isinstance(found[0], Exception) and not isinstance(found[2], Exception)


def test_what_mixes_rows_is_refused() -> None:
    for sampler in (qsteer.TrustRegion(beta=0.3), qsteer.BestOfN(2, inner=qsteer.TrustRegion(beta=0.3))):
        with pytest.raises(ValueError, match="treats each robot alone, got TrustRegion"):
            states(None, sampler)
    states(None, qsteer.TrustRegion(beta=0.3, typical=1.0))


def test_what_keeps_a_history_or_is_compiled_is_refused() -> None:
    policy = hosts.build("smolvla")
    handle = qsteer.steer(policy, seeded_critic(4, 4), compile="static")
    processors = random_hosts.processors(policy)
    with pytest.raises(ValueError, match="acts eagerly, got compile='static'"):
        serve_lerobot(handle, *processors)
    handle.remove()
    policy.config.n_obs_steps = 2
    with qsteer.steer(policy, seeded_critic(4, 4)) as handle:
        with pytest.raises(ValueError, match="n_obs_steps=2"):
            serve_lerobot(handle, *processors)


def test_a_critic_of_another_policy_is_refused() -> None:
    interface = Interface({STATE: Input("numbers", (6,))}, {}, 4, 3)
    with pytest.raises(ValueError, match="critic: expected the policy's"):
        ServedStates(small_policy(), seeded_critic(5, 4), STRONG, qsteer.Euler(), interface)


def test_a_served_handle_keeps_its_method() -> None:
    served = host()
    rule, sampler, trace = served.handle.rule, served.handle.sampler, served.handle.trace
    served.act(requests_of(served, 2, twin=True))
    assert (served.handle.rule, served.handle.sampler, served.handle.trace) == (rule, sampler, trace)
