"""The fast path refuses what a replay would keep from the first action: tensors that are no inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import hosts
import pytest
import torch
from compiled_cases import critic
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.compiling.hidden import Watch
from qsteer.steering.handle import steer

STATE = "observation.state"


def towards(target: Tensor, a: Tensor) -> Tensor:
    return -(a - target[:, None, :3]).square().flatten(1).sum(1)


@dataclass(frozen=True)
class Remembering(qsteer.Value):
    """A frozen dataclass whose observation lies in no field of its own."""

    of: Any

    def __call__(self, a: Tensor) -> Tensor:
        return towards(self.of.obs, a)

    def repeat(self, k: int) -> "Remembering":
        return self


class Hiding:
    """Keeps the observation where the fast path cannot see it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        self.obs = obs[STATE]
        return {
            "closure": lambda: qsteer.value(lambda a: towards(obs[STATE], a)),
            "method": lambda: qsteer.value(self.score),
            "partial": lambda: qsteer.value(partial(towards, self.obs)),
            "attribute": lambda: Remembering(self),
            "gradient": lambda: qsteer.value(lambda a: (a * self.obs[:, None, :3]).flatten(1).sum(1)),
        }[self.how]()

    def score(self, a: Tensor) -> Tensor:
        return towards(self.obs, a)


@pytest.mark.parametrize("how", ["closure", "method", "partial", "attribute", "gradient"])
@pytest.mark.parametrize("name", ["plain", "pi05"])
def test_a_hidden_observation_is_refused_by_shape_and_dtype(name: str, how: str) -> None:
    policy = hosts.shared(name)
    hosts.set_steps(policy, 3)
    with steer(policy, Hiding(how), qsteer.QGF(), compile="static") as handle:
        with pytest.raises(TypeError, match=r"got 1 other tensor.*: \(2, 4\) of float32; .*context=obs"):
            policy.predict_action_chunk(hosts.observe(policy, 2))
        assert not handle._compiled.runs
        handle.swap(critic=hosts.Target())
        policy.predict_action_chunk(hosts.observe(policy, 2))


def test_a_policy_that_hides_it_is_refused() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        seen[:] = seen or [obs.clone()]
        return seen[0][:, None, :3] - x

    policy = PlainPolicy(velocity, horizon=5, action_dim=3, executed=4, steps=3)
    observations = torch.randn(2, 4)
    policy.predict_action_chunk(observations)
    value = critic(policy)
    with (
        steer(policy, value, qsteer.Tweedie(), critic_inputs=lambda obs: obs, compile="static"),
        pytest.raises(TypeError, match=r"\(2, 4\) of float32"),
    ):
        policy.predict_action_chunk(observations)


class Scaled(nn.Module):
    """A critic with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, a: Tensor, obs: Tensor) -> Tensor:
        return towards(obs, self.weight * a + self.offset)


class Holder:
    """No module, but has one, behind a function."""

    def __init__(self, how: str) -> None:
        self.net = net = Scaled()
        self.fn: Callable[..., Tensor] = {
            "attribute": self.score,
            "closure": lambda a, obs: net(a, obs),
            "partial": partial(Scaled.forward, net),
            "module": net,
            "method": net.forward,
            "constants": self.numbers,
        }[how]

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        return qsteer.value(self.fn, obs[STATE])

    def score(self, a: Tensor, obs: Tensor) -> Tensor:
        return self.net(a, obs)

    def numbers(self, a: Tensor, obs: Tensor) -> Tensor:
        scale = torch.tensor([1.0, 2.0, 3.0]) * torch.linspace(0, 1, 3) + torch.as_tensor(0.5)
        a = torch.where(a > 0, a, 0.5) * scale + 2.0**a
        a[:, 0] = a[:, 0] + 1.0
        return towards(obs, a) / 3


@pytest.mark.parametrize("how", ["attribute", "closure", "partial", "module", "method", "constants"])
def test_weights_buffers_and_numbers_are_not_refused(how: str) -> None:
    policy, actions = hosts.shared("plain"), []
    for mode in (None, "static"):
        with steer(policy, Holder(how), qsteer.Tweedie(), compile=mode):
            torch.manual_seed(0)
            actions.append(policy.predict_action_chunk(hosts.observe(policy, 2)))
    assert torch.equal(*actions)


def test_the_random_stream_is_that_of_the_eager_path() -> None:
    """Looking costs a run, which must draw nothing that the user sees."""
    policy, states = hosts.shared("plain"), []
    for mode in (None, "static"):
        torch.manual_seed(0)
        with steer(policy, critic(policy), sampler=qsteer.BestOfN(3), compile=mode):
            policy.predict_action_chunk(hosts.observe(policy))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_views_and_results_are_known() -> None:
    x, other = torch.randn(3, 4, requires_grad=True), torch.randn(4)
    with Watch([x]) as watch:
        y = (x[1:].mT.reshape(-1) * 2).sum()
        torch.autograd.grad(y, x)
    assert not watch.hidden
    with Watch([x]) as watch:
        (x[0] * other[1:2]).sum() + other.sum()
    assert [tensor.shape for tensor in watch.hidden] == [other.shape], "the memory, once"


# ------------------------------------------------------------------------------------- kinds without an end


class Fresh:
    """Binds to something new each time, the observation where it belongs."""

    def __init__(self, how: str) -> None:
        self.how, self.count = how, 0

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        self.count += 1
        if self.how == "function":
            return qsteer.value(lambda a, obs: towards(obs, a), obs[STATE])
        return qsteer.value(self.score, (obs[STATE], float(self.count)))

    def score(self, a: Tensor, context: tuple[Tensor, float]) -> Tensor:
        return context[1] * towards(context[0], a)


@pytest.mark.parametrize("how", ["function", "number"])
def test_a_kind_for_each_action_is_said_once_and_they_are_bounded(how: str) -> None:
    policy = hosts.shared("plain")
    hosts.set_steps(policy, 3)
    with steer(policy, Fresh(how), qsteer.QGF(), compile="static") as handle:
        for _ in range(2):
            policy.predict_action_chunk(hosts.observe(policy))
        with pytest.warns(RuntimeWarning, match=r"same function and numbers each time.* with one fn") as said:
            for _ in range(6):
                policy.predict_action_chunk(hosts.observe(policy))
        assert len(said) == 1
        assert len(handle._compiled.runs) == 4


def test_other_shapes_rules_and_critics_are_no_such_kinds() -> None:
    policy = hosts.shared("plain")
    hosts.set_steps(policy, 3)
    with steer(policy, hosts.Target(), qsteer.QGF(), compile="static") as handle:
        for rows in (1, 2, 3, 4):
            handle.swap(rule=qsteer.Tweedie(), critic=(hosts.Target, partial(critic, policy))[rows % 2]())
            policy.predict_action_chunk(hosts.observe(policy, rows))


# ----------------------------------------------------------------------------------------- calls of itself


def test_a_value_that_calls_its_own_policy_is_refused() -> None:
    class Asking(hosts.Target):
        def score(self, a: Tensor, state: Tensor) -> Tensor:
            policy.predict_action_chunk({STATE: state})
            return super().score(a, state)

    policy = hosts.shared("plain")
    with steer(policy, Asking(), qsteer.QGF(), compile="static") as handle:
        with pytest.raises(RuntimeError, match=r"call of the steered policy inside its own action; .* copy"):
            policy.predict_action_chunk(hosts.observe(policy))
        handle.swap(critic=hosts.Target())
        policy.predict_action_chunk(hosts.observe(policy))
