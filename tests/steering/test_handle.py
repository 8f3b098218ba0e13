"""Hosts: what reaches rule, sampler and critic, at what cost, and what is said to those who get it wrong."""

import gc
import weakref
from dataclasses import replace
from threading import Barrier, Thread
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from hosts import chunk
from torch import Tensor, nn

import qsteer
from qsteer.adapters import HOSTS, Host, PlainPolicy, host_of
from qsteer.clock import MIRRORED, PAPER
from qsteer.critics import Critic, CriticConfig
from qsteer.flow import expand_time
from qsteer.steering.handle import steer

STRONG = qsteer.Tweedie(alpha=0.3, clip=None)


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# The tiny hosts are worth testing on


def test_the_velocity_depends_on_all_that_it_should(policy: nn.Module, name: str):
    batch, noise = hosts.observe(policy, 2), hosts.draw(policy, 2)
    base = policy.predict_action_chunk(batch, noise=noise)
    assert not torch.equal(base, policy.predict_action_chunk(batch, noise=2 * noise))
    idle = {"observation.state"} if name == "pi05" else set()  # pi0.5 reads the state as text
    for key in batch.keys() - {"observation.language.attention_mask"}:
        other = batch | {key: batch[key].flip(0)}
        assert torch.equal(policy.predict_action_chunk(other, noise=noise), base) == (key in idle), key


def test_a_subclass_is_served(policy: nn.Module, name: str):
    base, kind = chunk(policy), type(policy)
    policy.__class__ = type("Mine", (kind,), {"config_class": object, "name": "mine"})
    try:
        with steer(policy, hosts.Target(), STRONG) as handle:
            assert not torch.equal(chunk(policy), base)
            assert (handle.host in HOSTS) == (name != "plain"), "a plain policy says itself where its loop is"
    finally:
        policy.__class__ = kind


# What rules and samplers are given


def test_the_first_step_is_the_hosts_noise_at_the_hosts_time(policy: nn.Module):
    host, seen, calls = host_of(policy), [], []
    owner, name = hosts.loop(policy), host.step.rpartition(".")[2]
    own = getattr(owner, name)

    def watch(**arguments: Any) -> Tensor:
        calls.append((arguments[host.x], arguments[host.t]))
        return own(**arguments)

    setattr(owner, name, watch)
    noise = hosts.draw(policy)
    base = policy.predict_action_chunk(hosts.observe(policy), noise=noise)
    delattr(owner, name)
    assert torch.equal(calls[0][0], noise)
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        assert torch.equal(policy.predict_action_chunk(hosts.observe(policy), noise=noise), base)
    field, _, start = seen[0]
    assert torch.equal(start, noise)
    times = [expand_time(field.clock.to_host(t), start, torch.float32) for t, _ in field.clock.grid()]
    assert all(torch.equal(mine, its) for mine, (_, its) in zip(times, calls, strict=True))


def test_steps_are_the_hosts_or_the_callers(policy: nn.Module, name: str):
    seen: list = []
    batch, noise = hosts.observe(policy), hosts.draw(policy)
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        hosts.set_steps(policy, 7)
        policy.predict_action_chunk(batch, noise=noise)
        policy.predict_action_chunk(batch, noise=noise, num_steps=3)
    assert [field.clock.steps for field, _, _ in seen] == [7, 7 if name == "smolvla" else 3]
    assert seen[0][0].clock == replace(MIRRORED, steps=7)
    base = policy.predict_action_chunk(batch, noise=noise, num_steps=3)
    with steer(policy, hosts.Target(), qsteer.Tweedie(alpha=0.0)):
        assert torch.equal(policy.predict_action_chunk(batch, noise=noise, num_steps=3), base)


def test_three_branches_are_three_runs(policy: nn.Module):
    """Rows b*k .. b*k+k-1 of a repeated field belong to observation b, and no branch changes another."""
    seen: list = []
    with steer(policy, hosts.Target(), STRONG, sampler=hosts.Spy(seen)):
        chunk(policy)
        field, _, noise = seen[0]
        three = hosts.draw(policy, 6, seed=1)
        with torch.no_grad():
            together = qsteer.Euler()(field.repeat(3), None, three).unflatten(0, (2, 3))
            for i in range(3):
                alone = qsteer.Euler()(field, None, three[i::3])
                torch.testing.assert_close(together[:, i], alone, rtol=0, atol=2e-6)
                assert not torch.allclose(together[0, i], together[1, i])
            again = qsteer.Euler()(field, None, noise)
    with steer(policy, hosts.Target(), STRONG):
        assert torch.equal(chunk(policy), cropped(policy, again)), "branching leaves the prefix as it was"


def cropped(policy: nn.Module, a: Tensor) -> Tensor:
    return a[..., : host_of(policy).read(policy, host_of(policy).action_shape)[-1]]


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


# Critics


def test_a_critic_of_qsteers(policy: nn.Module):
    torch.manual_seed(0)
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(32, 32)))
    base = chunk(policy)
    value = critic.bind(hosts.observe(policy, 2))
    with steer(policy, critic, STRONG) as handle:
        assert (value(chunk(policy)[:, :4]) > value(base[:, :4])).all()
        handle.swap(rule=None, sampler=qsteer.BestOfN(4))
        assert (value(chunk(policy)[:, :4]) >= value(base[:, :4]) - 1e-5).all()


def test_a_critic_that_sees_fewer_steps(policy: nn.Module):
    seen: list = []
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=2, hidden=(32,)))
    with steer(policy, critic, STRONG, sampler=hosts.Spy(seen)):
        chunk(policy)
    mask = seen[0][1].mask
    assert mask.sum() == 2 * 3
    assert mask[:2, :3].all()


def test_a_mask_of_the_values_own_is_kept(policy: nn.Module):
    seen: list = []

    class Gripper(hosts.Target):
        def bind(self, obs: Any) -> qsteer.Value:
            return replace(super().bind(obs), mask=torch.tensor([[0.0, 0.0, 1.0]]).expand(4, 3))

    with steer(policy, Gripper(), STRONG, sampler=hosts.Spy(seen)):
        chunk(policy)
    assert seen[0][1].mask.nonzero().tolist() == [[h, 2] for h in range(4)]


def test_critic_inputs_translate_the_batch(policy: nn.Module):
    critic = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, observation_key="mine"))
    with steer(policy, critic, STRONG), pytest.raises(KeyError, match="mine") as error:
        chunk(policy)
    assert "critic_inputs" in error.value.__notes__[0]
    assert "observation.state" in error.value.__notes__[0]
    with steer(policy, critic, STRONG, critic_inputs=lambda batch: {"mine": batch["observation.state"]}):
        translated = chunk(policy)
    with steer(policy, Critic(replace(critic.config, observation_key="observation.state")), STRONG) as handle:
        handle.critic.load_state_dict(critic.state_dict())
        assert torch.equal(chunk(policy), translated)


# What goes wrong, said


def wrong(policy: nn.Module, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    before = vars(policy).copy()
    with as_installed(), pytest.raises(error, match=match):
        steer(policy, *args, **kwargs)
    assert vars(policy) == before, "a steering that fails leaves no trace"


def test_wrong_arguments(policy: nn.Module):
    critic, rule = hosts.Target(), qsteer.Tweedie()
    wrong(policy, TypeError, r"critic: expected an object with bind.*got <function", lambda a: a, rule)
    wrong(policy, TypeError, r"critic: expected an object with bind.*got <class", Critic, rule)
    wrong(policy, TypeError, r"rule: expected a Rule such as qsteer.Tweedie.*got 0.3", critic, 0.3)
    wrong(policy, TypeError, r"sampler: expected a sampler, got the rule Tweedie", critic, sampler=rule)
    wrong(policy, TypeError, r"sampler: expected a Sampler such as .*got 8", critic, rule, sampler=8)
    two = {"sampler": qsteer.BestOfN(2)}
    wrong(policy, TypeError, r"sampler: expected one, got Euler.*nest", critic, qsteer.Euler(), **two)
    with torch.inference_mode():
        wrong(policy, TypeError, r"ordinary parameters.*outside of it", hosts.Target(), rule)
    wrong(policy, ValueError, r"device, cpu, got meta", hosts.Target().to("meta"), rule)
    long = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=5))
    wrong(policy, ValueError, r"at most the 4 executed steps.*got 5 steps", long, rule)
    padded = Critic(CriticConfig(obs_dim=4, action_dim=5, horizon=4))
    wrong(policy, ValueError, r"all 3 dimensions.*got 4 steps and 5 dimensions", padded, rule)


def test_unknown_policies():
    match = r"expected one of PI0Policy, PI05Policy, SmolVLAPolicy.*got Linear.*PlainPolicy.*__qsteer_host__"
    with as_installed(), pytest.raises(TypeError, match=match):
        steer(nn.Linear(1, 1), hosts.Target(), STRONG)


def test_a_bind_that_returns_no_value(policy: nn.Module):
    class Scorer:
        def bind(self, obs: Any) -> Any:
            return lambda a: a.flatten(1).sum(1)

    with as_installed(), steer(policy, Scorer(), STRONG):
        with pytest.raises(TypeError, match=r"critic.bind: expected a Value, got function.*qsteer.value"):
            chunk(policy)


def test_the_entry_alone_has_no_batch(policy: nn.Module, name: str):
    with steer(policy, hosts.Target(), STRONG):
        with pytest.raises(RuntimeError, match=r"expected a call by .*action_chunk.*direct one"):
            hosts.loop(policy).sample_actions(None)
        assert chunk(policy).isfinite().all()
        if name == "plain":
            t, noise = torch.zeros(1), hosts.draw(policy)
            step = policy.denoise_step(noise, t, hosts.observe(policy))
            assert step.shape == noise.shape, "at any other time the step is the host's own"


def test_another_tools_patch_is_not_overwritten(policy: nn.Module):
    name = host_of(policy).batch
    setattr(policy, name, lambda batch: None)
    try:
        wrong(policy, TypeError, r"expected the class's own method, got <function", hosts.Target(), STRONG)
    finally:
        delattr(policy, name)


def test_a_record_that_does_not_fit_says_so():
    host = replace(host_of(hosts.shared("plain")), entry="generate")

    class Newer(nn.Module):
        __qsteer_host__ = host

    with pytest.raises(
        AttributeError, match=r"expected 'generate' on the policy, got Newer.*correct the Host record"
    ):
        steer(Newer(), hosts.Target(), STRONG)


# The plain adapter


def test_a_policy_of_ones_own_by_a_host_record():
    """Any class, its loop and its words: the record is all that is needed."""

    class Mine:
        chunk = (5, 3)

        def act(self, observation: Tensor, noise: Tensor) -> Tensor:
            return self.integrate(noise, condition=observation)

        def integrate(self, z: Tensor, *, condition: Tensor) -> Tensor:
            for i in range(4):
                z = z + self.net(z, torch.full((len(z),), i / 4), condition) / 4
            return z

        def net(self, z: Tensor, s: Tensor, condition: Tensor) -> Tensor:
            return torch.tanh(condition[:, None, :3]) - s[:, None, None] * z.sin()

        __qsteer_host__ = Host(
            serves="Mine", entry="integrate", step="net", batch="act", clock=PAPER, steps="K", executed="K",
            action_shape="chunk", x="z", t="s",
        )  # fmt: skip
        K = 4

    class Ones(hosts.Target):
        def bind(self, obs: Tensor) -> qsteer.Value:
            return super().bind({"observation.state": obs})

    mine, noise, obs = Mine(), torch.randn(2, 5, 3), torch.randn(2, 4)
    base = mine.act(obs, noise)
    with steer(mine, Ones(), qsteer.Tweedie(alpha=0.0)) as handle:
        assert torch.equal(mine.act(obs, noise), base)
        handle.swap(rule=STRONG)
        value = Ones().bind(obs)
        assert (value(mine.act(obs, noise)[:, :4]) > value(base[:, :4])).all()
    assert torch.equal(mine.act(obs, noise), base)
    assert not vars(mine)


def test_one_field_in_both_conventions_acts_alike():
    """A field written as noise - action in u = 1 - t is steered to the same actions."""
    net = nn.Sequential(nn.Linear(6 + 1 + 4, 16), nn.Tanh(), nn.Linear(16, 6)).double()

    def paper(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
        return net(torch.cat([x.flatten(1), t[:, None].to(x), obs], 1)).view_as(x)

    def mirrored(x: Tensor, u: Tensor, obs: Tensor) -> Tensor:
        return -paper(x, 1 - u, obs)

    noise, obs = torch.randn(2, 3, 2, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)

    class Pull:
        def bind(self, obs: Tensor) -> qsteer.Value:
            return qsteer.value(lambda a, s: -(a - s[:, None, :2]).square().flatten(1).sum(1), obs)

    here = PlainPolicy(paper, horizon=3, action_dim=2, steps=8)
    there = PlainPolicy(mirrored, horizon=3, action_dim=2, steps=8, clock=MIRRORED)
    x = noise
    for i in range(8):
        x = x + paper(x, torch.full((2,), i / 8), obs) / 8
    assert torch.equal(here.predict_action_chunk(obs, noise=noise), x), "Euler's method, no more"
    for method in (
        qsteer.Euler(),
        STRONG,
        qsteer.QGF(weight=0.1),
        qsteer.ThroughTime(),
        qsteer.TrustRegion(),
    ):
        actions = []
        for policy in (here, there):
            with steer(policy, Pull(), method):
                actions.append(policy.predict_action_chunk(obs, noise=noise))
        torch.testing.assert_close(actions[0], actions[1], rtol=1e-12, atol=1e-12)
        assert torch.equal(actions[0], x) == (method == qsteer.Euler())


def test_a_plain_policy_draws_its_own_noise():
    policy, batch = hosts.build("plain"), {"observation.state": torch.randn(3, 4)}
    torch.manual_seed(0)
    drawn = policy.predict_action_chunk(batch)
    torch.manual_seed(0)
    assert torch.equal(drawn, policy.predict_action_chunk(batch, noise=torch.randn(3, 5, 3)))


def test_plain_sizes_are_checked():
    with pytest.raises(ValueError, match="executed=6, horizon=5"):
        PlainPolicy(torch.nn.Identity(), horizon=5, action_dim=2, executed=6)
    with pytest.raises(ValueError, match="steps=0"):
        PlainPolicy(torch.nn.Identity(), horizon=5, action_dim=2, steps=0)


def test_the_example_runs_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]):
    import wrap_pretrained

    wrap_pretrained.main([])
    out = capsys.readouterr().out
    assert "1 actions, 0 fallbacks" in out
    assert out.endswith("to the last bit: True\n")
