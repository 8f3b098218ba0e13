"""A steered policy: what its methods do, at what cost, and that calls and threads are apart."""

import gc
import pickle
import weakref
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from hosts import STRONG, chunk
from torch import Tensor, nn

import qsteer
from qsteer.adapters import Host, PlainPolicy
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_best_of_n_is_the_best_of_n_runs(policy: nn.Module):
    critic = hosts.Target()
    batch, noise = hosts.observe(policy, 2), hosts.draw(policy, 2)
    torch.manual_seed(3)
    three = torch.cat([noise[:, None], torch.randn(2, 2, *noise.shape[1:])], dim=1)
    runs = torch.stack([policy.predict_action_chunk(batch, noise=three[:, i]) for i in range(3)], dim=1)
    scores = torch.stack([critic.bind(batch)(runs[:, i, :4, :3]) for i in range(3)], dim=1)
    with steer(policy, critic, qsteer.BestOfN(3)):
        torch.manual_seed(3)
        best = policy.predict_action_chunk(batch, noise=noise)
    expected = runs[torch.arange(2), scores.argmax(1)]
    torch.testing.assert_close(best, expected, rtol=0, atol=2e-6)
    assert (scores.argmax(1) > 0).any(), "choosing matters"


def test_guidance_raises_the_value(policy: nn.Module):
    critic, batch = hosts.Target(), hosts.observe(policy, 4)
    value = critic.bind(batch)
    scores = {}
    for method in (qsteer.Euler(), STRONG, qsteer.Negated(STRONG)):
        with steer(policy, critic, method):
            scores[method] = value(chunk(policy, rows=4)[:, :4, :3])
    assert (scores[STRONG] > scores[qsteer.Euler()]).all()
    assert (scores[qsteer.Negated(STRONG)] < scores[qsteer.Euler()]).all()


COSTS = {
    "Euler": ((qsteer.Euler(),), 10),
    "Tweedie": ((qsteer.Tweedie(),), 10),
    "Tweedie, every 3rd step": ((qsteer.Tweedie(every=3),), 10),
    "Tweedie, last layer": ((qsteer.Tweedie(layers=1),), 10),
    "ForwardTweedie": ((qsteer.ForwardTweedie(),), 10 + 9),
    "ForwardTweedie, stale": ((qsteer.ForwardTweedie(stale=True),), 10 + 1),
    "QGF": ((qsteer.QGF(),), 10),
    "NoisyGradient": ((qsteer.NoisyGradient(),), 10),
    "RandomDirection": ((qsteer.RandomDirection(),), 10),
    "ThroughTime": ((qsteer.ThroughTime(),), 1 + sum(range(1, 10))),
    "BestOfN": ((qsteer.BestOfN(3),), 10),
    "BestOfN of Tweedie": ((qsteer.Tweedie(), qsteer.BestOfN(3)), 10),
    "KeepBest of Tweedie": ((qsteer.Tweedie(), qsteer.KeepBest()), 20),
    "TrustRegion": ((qsteer.TrustRegion(),), 10),
}


@pytest.mark.parametrize("method", COSTS)
@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_cost_in_host_calls(policy: nn.Module, method: str, monkeypatch: pytest.MonkeyPatch):
    """One prefix per action whatever the method, and as many steps as its docstring says."""
    model, calls = type(hosts.loop(policy)), []
    for part in ("embed_prefix", "denoise_step"):
        monkeypatch.setattr(model, part, counted(getattr(model, part), part, calls))
    (rule, *sampler), steps = COSTS[method]
    with steer(policy, hosts.Target(), rule, sampler=sampler[0] if sampler else None):
        chunk(policy)
    assert (calls.count("embed_prefix"), calls.count("denoise_step")) == (1, steps)


def counted(method: Any, name: str, calls: list[str]) -> Any:
    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return method(self, *args, **kwargs)

    counting.__wrapped__ = method  # for inspect.signature
    return counting


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_select_action_is_steered(policy: nn.Module, name: str):
    chunks = {}
    for method in (qsteer.Euler(), STRONG):
        with steer(policy, hosts.Target(), method):
            torch.manual_seed(0)
            chunks[method] = policy.predict_action_chunk(hosts.observe(policy))
            torch.manual_seed(0)
            policy.reset()
            executed = [policy.select_action(hosts.observe(policy)) for _ in range(4)]
            assert torch.equal(torch.stack(executed, 1), chunks[method][:, :4])
    policy.reset()
    assert not torch.equal(*chunks.values())


class Meeting(dict):
    """A batch at whose first reading both robots wait for each other: by then both have been called."""

    def __init__(self, batch: dict[str, Tensor], barrier: Barrier) -> None:
        super().__init__(batch)
        self.waits = [barrier.wait]

    def __getitem__(self, key: str) -> Tensor:
        while self.waits:
            self.waits.pop()(timeout=60)
        return super().__getitem__(key)


def test_threads_do_not_share_a_call(policy: nn.Module):
    """Two robots on one policy: each thread has its own batch, prefix and interruption."""
    with steer(policy, hosts.Target(), STRONG):
        alone = [chunk(policy, seed=seed) for seed in range(2)]
        together: list[list[Tensor]] = [[], []]
        barrier = Barrier(2)

        def robot(seed: int) -> None:
            for _ in range(3):
                batch = Meeting(hosts.observe(policy, 2, seed), barrier)
                noise = hosts.draw(policy, 2, seed)
                together[seed].append(policy.predict_action_chunk(batch, noise=noise))

        threads = [Thread(target=robot, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in range(2):
        assert len(together[seed]) == 3
        assert all(torch.equal(a, alone[seed]) for a in together[seed])


def test_swap_and_trace(policy: nn.Module):
    base = chunk(policy)
    with steer(policy, hosts.Target(), qsteer.Tweedie(alpha=0.25, clip=None), trace=True) as handle:
        chunk(policy)
        arrays = handle.trace.arrays()
        assert arrays["strength"].shape == (2, 9), "one row per observation, one column per guided step"
        assert arrays["strength"] == pytest.approx(0.25, rel=1e-4)
        handle.swap(rule=None)
        assert torch.equal(chunk(policy), base)
        handle.swap(sampler=qsteer.TrustRegion(eta=0.5))
        moved = chunk(policy) - base
        assert moved.flatten(1).norm(dim=1) == pytest.approx(0.5, rel=1e-3)
        handle.swap(sampler=None, critic=hosts.Target())
        assert torch.equal(chunk(policy), base)
        critic = handle.critic
        with as_installed(), pytest.raises(TypeError, match=r"rule: expected a rule, got the sampler Euler"):
            handle.swap(rule=qsteer.Euler(), critic=hosts.Target())
        assert handle.critic is critic, "a swap that fails changes nothing"
    assert repr(handle).endswith("removed)")


def test_a_steered_policy_can_be_forgotten(name: str):
    """Nothing global holds on to it."""
    policy = hosts.build(name)
    steer(policy, hosts.Target(), STRONG)
    chunk(policy)
    gone = weakref.ref(policy)
    del policy
    gc.collect()
    assert gone() is None


def test_the_entry_alone_has_no_batch(policy: nn.Module, name: str):
    with steer(policy, hosts.Target(), STRONG):
        with pytest.raises(RuntimeError, match=r"expected a call by .*action_chunk.*direct one"):
            hosts.loop(policy).sample_actions(None)
        assert chunk(policy).isfinite().all()
        if name == "plain":
            t, noise = torch.zeros(1), hosts.draw(policy)
            step = policy.denoise_step(noise, t, hosts.observe(policy))
            assert step.shape == noise.shape, "at any other time the step is the host's own"


# Shapes that policies come in


class Whole(PlainPolicy):
    """One method is given the batch and integrates."""

    @property
    def __qsteer_host__(self) -> Host:
        return replace(super().__qsteer_host__, entry="get_action", batch="get_action")

    def get_action(self, obs: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return PlainPolicy.sample_actions(self, obs, noise)


class Bound(PlainPolicy):
    """Bound its entry when it was made, as openpi's policies do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sample = self.sample_actions

    def predict_action_chunk(self, obs: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return self._sample(obs, noise=noise)


class Copied(Bound):
    """Keeps a function that nothing finds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        method = self._sample
        self._sample = lambda *args, **kwargs: method(*args, **kwargs)


class Up:
    def bind(self, obs: Any) -> qsteer.Value:
        return qsteer.value(lambda a: a.flatten(1).sum(1))


def tiny(kind: type[PlainPolicy]) -> PlainPolicy:
    return kind(lambda x, t, obs: torch.sin(x) + obs[:, None], horizon=3, action_dim=2)


@pytest.mark.parametrize("kind", [Whole, Bound])
def test_an_entry_that_is_the_batch_method_or_was_bound_before_is_steered_and_given_back(kind):
    policy, plain = tiny(kind), tiny(PlainPolicy)
    name = "get_action" if kind is Whole else "predict_action_chunk"
    obs, noise, before = torch.ones(1, 2), torch.randn(1, 3, 2), dict(vars(policy))
    base = getattr(policy, name)(obs, noise=noise)
    with qsteer.steer(policy, Up(), STRONG), qsteer.steer(plain, Up(), STRONG):
        act = getattr(policy, name)
        assert torch.equal(act(obs, noise=noise), plain.predict_action_chunk(obs, noise=noise))
        assert not torch.equal(act(obs, noise=noise), base)
    assert vars(policy) == before
    assert torch.equal(getattr(policy, name)(obs, noise=noise), base)


def test_a_result_that_nothing_has_steered_is_an_error():
    policy = tiny(Copied)
    with qsteer.steer(policy, Up(), STRONG):
        with pytest.raises(RuntimeError, match=r"predict_action_chunk: expected it to call sample_actions"):
            policy.predict_action_chunk(torch.ones(1, 2))
    assert policy.predict_action_chunk(torch.ones(1, 2)).shape == (1, 3, 2)


def test_a_batch_may_be_given_by_its_name():
    policy, noise = tiny(PlainPolicy), torch.randn(1, 3, 2)
    with qsteer.steer(policy, Up(), STRONG):
        by_name = policy.predict_action_chunk(obs=torch.ones(1, 2), noise=noise)
        assert torch.equal(by_name, policy.predict_action_chunk(torch.ones(1, 2), noise))


def test_policies_that_share_a_module_are_frozen_until_both_are_removed():
    shared = nn.Linear(2, 2)
    first, second = (PlainPolicy(shared, horizon=3, action_dim=2) for _ in range(2))
    handles = [qsteer.steer(policy, Up(), STRONG) for policy in (first, second)]
    handles[0].remove()
    assert not shared.weight.requires_grad
    handles[1].remove()
    assert shared.weight.requires_grad


def test_a_steered_plain_policy_can_be_pickled():
    policy = PlainPolicy(nn.Linear(2, 2), horizon=3, action_dim=2)
    with qsteer.steer(policy, hosts.Target(), STRONG):
        other = pickle.loads(pickle.dumps(policy))
    assert torch.equal(other.velocity.weight, policy.velocity.weight)


def test_dropout_in_training_mode_is_warned_of():
    policy = PlainPolicy(nn.Dropout(0.5), horizon=3, action_dim=2)
    with pytest.warns(RuntimeWarning, match=r"expected one in eval mode.*policy.eval\(\)"):
        qsteer.steer(policy, Up()).remove()
    policy.eval()
    qsteer.steer(policy, Up()).remove()


def test_swap_takes_critic_inputs():
    policy, seen = tiny(PlainPolicy), []

    class Seeing(Up):
        def bind(self, obs: Any) -> qsteer.Value:
            seen.append(obs)
            return super().bind(obs)

    with qsteer.steer(policy, Seeing(), STRONG) as handle:
        handle.swap(critic_inputs=lambda obs: "translated")
        policy.predict_action_chunk(torch.ones(1, 2))
        handle.swap(critic_inputs=None)
        policy.predict_action_chunk(torch.ones(1, 2))
    assert seen[0] == "translated" and torch.equal(seen[1], torch.ones(1, 2))
