"""Hosts: noise, times and steps are theirs, and so are the rows of a repeated field."""

from dataclasses import replace
from typing import Any

import hosts
import pytest
import torch
from hosts import STRONG, chunk
from torch import Tensor, nn

import qsteer
from qsteer.adapters import Host, host_of
from qsteer.clock import MIRRORED, PAPER
from qsteer.flow import expand_time
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_velocity_depends_on_all_that_it_should(policy: nn.Module, name: str):
    batch, noise = hosts.observe(policy, 2), hosts.draw(policy, 2)
    base = policy.predict_action_chunk(batch, noise=noise)
    assert not torch.equal(base, policy.predict_action_chunk(batch, noise=2 * noise))
    idle = {"observation.state"} if name == "pi05" else set()  # pi0.5 reads the state as text
    for key in batch.keys() - {"observation.language.attention_mask"}:
        other = batch | {key: batch[key].flip(0)}
        assert torch.equal(policy.predict_action_chunk(other, noise=noise), base) == (key in idle), key


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


def test_a_record_that_does_not_fit_says_so():
    host = replace(host_of(hosts.shared("plain")), entry="generate")

    class Newer(nn.Module):
        __qsteer_host__ = host

    with pytest.raises(
        AttributeError, match=r"expected 'generate' on the policy, got Newer.*correct the Host record"
    ):
        steer(Newer(), hosts.Target(), STRONG)
