"""LiveCritic: what a learner publishes reaches the acting copy between actions, whole, and in place."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from threading import Event, Thread

import hosts
import pytest
import torch
from torch import Tensor

import qsteer
from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.evaluation.arms import Arm
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.types import Bindable, Field, Sampler, Value

CONFIG = CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(8, 8), members=3)
PATIENCE = 60.0


def random(seed: int) -> Critic:
    torch.manual_seed(seed)
    critic = Critic(CONFIG)
    critic.fit_normalisation(torch.randn(20, 4) * (seed + 1) + seed)
    return critic


def constant(k: int, critic: Critic | None = None) -> Critic:
    """A critic whose every number is k; its values are k as well, for LayerNorm leaves nothing but biases."""
    critic = critic or Critic(CONFIG)
    with torch.no_grad():
        for tensor in (*critic.parameters(), *critic.buffers()):
            tensor.fill_(k)
    return critic


def numbers(critic: Critic) -> set[float]:
    """All numbers in a critic."""
    return {
        number for x in (*critic.parameters(), *critic.buffers()) for number in x.detach().unique().tolist()
    }


@dataclass(frozen=True)
class Watch(Sampler):
    """Ten steps, at each of which it notes all numbers of the critic, and the value they make."""

    live: LiveCritic
    found: list[set[float]] = field(default_factory=list)

    def __call__(self, field: Field, value: Value | None, noise: Tensor) -> Tensor:
        assert value is not None
        seen: set[float] = set()
        for _ in range(10):
            seen |= numbers(self.live.critic) | set(value(noise).tolist()) | {self.live.version + 1.0}
        self.found.append(seen)
        return qsteer.Euler()(field, value, noise)


@pytest.fixture
def hasty() -> Iterator[None]:
    """Let threads interrupt each other as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def watched(live: LiveCritic, actions: int, swaps: int, actors: int = 1) -> list[Watch]:
    """What actors see while a learner publishes critics of 2, 3, .. until both have done so many."""
    policy = FlowPolicy(FlowPolicyConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(4,)))
    watches, published, error = [Watch(live) for _ in range(actors)], Event(), []

    def actor(watch: Watch) -> None:
        act = Arm("watch", None, watch).agent(policy, live)
        try:
            while len(watch.found) < actions or not published.is_set():
                act(torch.ones(2, 4), torch.ones(2, 4, 3))
        except BaseException as exception:
            error.append(exception)
            raise

    threads = [Thread(target=actor, args=(watch,)) for watch in watches]
    for thread in threads:
        thread.start()
    source = Critic(CONFIG)
    for k in count(2):
        live.publish(constant(k, source))
        if k > swaps:
            published.set()
            if not any(thread.is_alive() for thread in threads):
                break
    assert not error
    return watches


def test_an_action_sees_one_publish_from_beginning_to_end(hasty: None) -> None:
    live = LiveCritic(constant(1))
    (watch,) = watched(live, actions=50, swaps=3000)
    assert all(len(seen) == 1 for seen in watch.found)
    ks = [seen.pop() for seen in watch.found]
    assert ks == sorted(ks) and len(set(ks)) > 25, "newer and newer, and many of them"


class Torn(LiveCritic):
    """Publishes straight into the acting copy."""

    def publish(self, source: Critic) -> None:
        with torch.no_grad():
            torch._foreach_copy_(self._weights, [*source.parameters(), *source.buffers()])


class Unguarded(LiveCritic):
    """Stages, but installs in the middle of an action too."""

    def publish(self, source: Critic) -> None:
        super().publish(source)
        self._install()


@pytest.mark.parametrize("broken", [Torn, Unguarded])
def test_half_published_weights_would_be_seen(broken: type[LiveCritic], hasty: None) -> None:
    (watch,) = watched(broken(constant(1)), actions=20, swaps=500)
    assert any(len(seen) > 1 for seen in watch.found)


def test_two_actors_both_get_on_and_see_whole_critics(hasty: None) -> None:
    for watch in watched(LiveCritic(constant(1)), actions=25, swaps=1000, actors=2):
        assert len(watch.found) >= 25 and all(len(seen) == 1 for seen in watch.found)


def test_what_acts_is_what_was_published() -> None:
    live, obs, a = LiveCritic(random(0)), torch.randn(5, 4), torch.randn(5, 4, 3)
    assert (live.version, live.config, live.device.type) == (0, CONFIG, "cpu")
    for version, seed in enumerate((1, 2, 3), 1):
        source = random(seed)
        live.publish(random(7))
        live.publish(source)  # the last one counts
        with torch.no_grad():
            expected = source.bind(obs)(a)
            constant(1, source)  # the learner goes on: what it published stays as it was
        assert torch.equal(live.bind(obs)(a), expected)
        assert live.version == 2 * version


def test_no_tensor_ever_moves() -> None:
    live = LiveCritic(random(0))
    tensors = [*live.critic.parameters(), *live.critic.buffers()]
    before = [(id(x), x.data_ptr()) for x in tensors]
    for seed in range(1, 4):
        live.publish(random(seed))
        live.bind(torch.zeros(1, 4))
        assert [(id(x), x.data_ptr()) for x in (*live.critic.parameters(), *live.critic.buffers())] == before
    last = random(3)
    expected = [*last.parameters(), *last.buffers()]
    assert all(torch.equal(x, y) for x, y in zip(tensors, expected, strict=True))


def test_the_acting_copy_is_frozen_and_of_its_own() -> None:
    source = random(0)
    source.net.first.weight.grad = torch.ones_like(source.net.first.weight)
    live = LiveCritic(source.train())
    assert not any(p.requires_grad or p.grad is not None for p in live.parameters())
    assert not live.critic.training and source.training and source.net.first.weight.requires_grad
    constant(1, source)
    assert numbers(live.critic) != {1.0}


def test_publishing_neither_waits_for_an_action_nor_changes_it() -> None:
    live = LiveCritic(constant(1))
    with live.acting():
        learner = Thread(target=live.publish, args=(constant(2),))
        learner.start()
        learner.join(PATIENCE)
        assert not learner.is_alive()
        with live.acting():  # a nested one goes on with what there is
            live.bind(torch.zeros(1, 4))
        assert live.version == 0 and numbers(live.critic) == {1.0}
    assert live.version == 0, "installed by the next action"
    with live.acting():
        assert live.version == 1 and numbers(live.critic) == {2.0}


def test_an_action_waits_for_another_only_when_there_is_something_to_install() -> None:
    live, inside, leave = LiveCritic(constant(1)), Event(), Event()

    def second() -> None:
        with live.acting():
            inside.set()
            leave.wait(PATIENCE)

    with live.acting():
        thread = Thread(target=second)
        thread.start()
        assert inside.wait(PATIENCE), "nothing to install: both act"
        leave.set()
        thread.join(PATIENCE)
        live.publish(constant(2))
        inside.clear()
        thread = Thread(target=second)
        thread.start()
        assert not inside.wait(0.2), "the newcomer wants what was published"
        assert live.version == 0
    assert inside.wait(PATIENCE)
    thread.join(PATIENCE)
    assert live.version == 1 and not thread.is_alive()


def test_an_action_that_fails_ends() -> None:
    live = LiveCritic(constant(1))
    with pytest.raises(KeyError), live.acting():
        raise KeyError
    live.publish(constant(2))
    thread = Thread(target=live.bind, args=(torch.zeros(1, 4),))
    thread.start()
    thread.join(PATIENCE)
    assert live.version == 1


def test_another_configuration_is_refused() -> None:
    live = LiveCritic(random(0))
    with pytest.raises(ValueError, match=r"publish: expected a critic of CriticConfig.*swap\(critic="):
        live.publish(Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(8, 8), members=4)))
    assert live.version == 0


@dataclass(frozen=True)
class Interrupted(Sampler):
    """A learner publishes in the middle of every action."""

    live: LiveCritic
    source: Critic

    def __call__(self, field: Field, value: Value | None, noise: Tensor) -> Tensor:
        self.live.publish(self.source)
        self.live.bind(torch.zeros(1, 4))
        return qsteer.Euler()(field, value, noise)


@pytest.mark.parametrize("inference", [False, True])
def test_a_policy_is_steered_by_the_newest_whole_critic(inference: bool) -> None:
    policy, rule, old, new = hosts.build("plain"), qsteer.Tweedie(alpha=0.5), random(0), random(1)
    live = LiveCritic(old)
    assert isinstance(live, Bindable)

    def action(critic: Bindable, sampler: Sampler | None = None) -> Tensor:
        with qsteer.steer(policy, critic, rule, sampler=sampler), torch.inference_mode(inference):
            return policy.predict_action_chunk(hosts.observe(policy, 2), noise=hosts.draw(policy, 2))

    first, second = action(live, Interrupted(live, new)), action(live)
    assert torch.equal(first, action(old))
    assert torch.equal(second, action(new))
    assert not torch.equal(first, second)
    assert not any(x.is_inference() for x in live.critic.state_dict().values())


def test_another_device_and_another_width_are_refused() -> None:
    policy = hosts.build("plain")
    with pytest.raises(ValueError, match="expected it on the policy's device, cpu, got meta"):
        qsteer.steer(policy, LiveCritic(random(0).to("meta")), qsteer.Tweedie())
    wide = LiveCritic(Critic(CriticConfig(obs_dim=4, action_dim=5, horizon=4)))
    with pytest.raises(ValueError, match="got 4 steps and 5 dimensions"):
        qsteer.steer(policy, wide, qsteer.Tweedie())


@pytest.mark.gpu
def test_streams_are_ordered_without_waiting_for_the_device() -> None:
    live, done, seen = LiveCritic(constant(1).cuda()), Event(), []

    def learn() -> None:
        source = Critic(CONFIG).cuda()
        with torch.cuda.stream(torch.cuda.Stream()):
            for k in count(2):
                live.publish(constant(k, source))
                if done.is_set():
                    break

    def actor() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(300):
                with live.acting():
                    reads = [torch.tensor([live.version + 1.0], device="cuda")]
                    for _ in range(3):
                        torch.cuda._sleep(100_000)
                        reads += [x.flatten() for x in (*live.critic.parameters(), *live.critic.buffers())]
                    seen.append(torch.cat(reads).aminmax())

    threads = [Thread(target=target) for target in (learn, actor, actor)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    done.set()
    threads[0].join()
    torch.cuda.synchronize()
    assert len(seen) == 600 and all(low == high for low, high in seen)
    assert len({low.item() for low, _ in seen}) > 10
