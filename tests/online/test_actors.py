"""Actors: the policy's own actions unsteered, qsteer's steered, and what the critic saw, computed once."""

from collections.abc import Iterator

import hosts
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qsteer
from qsteer.critics import FEATURES, Critic, CriticConfig, LiveCritic, pooled
from qsteer.online.actors import Actor, HostActor, StateActor
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.steering.handle import unsteer
from qsteer.testing import hosts as random_hosts
from qsteer.trace import Trace

VIEW = "observation.images.top"
INSTRUCTION = "put the bowl"
STRONG = qsteer.Tweedie(alpha=0.3, clip=None)


@pytest.fixture(params=hosts.LEROBOT)
def policy(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    policy = hosts.shared(request.param)
    yield policy
    unsteer(policy)


def observe(rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (rows, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return {VIEW: image, "observation.state": torch.rand(rows, 4, generator=draw)}


def prepared(policy: nn.Module, obs: dict[str, Tensor]) -> dict[str, Tensor]:
    pre, _ = random_hosts.processors(policy)
    return pre(obs | {VIEW: obs[VIEW] / 255, "task": [INSTRUCTION] * len(obs[VIEW])})


def make_critic(views: bool = False, features: int = 0, horizon: int = 4, seed: int = 0) -> Critic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        seen = (VIEW,) if views else ()
        encoder = {"view_size": 16, "strides": (2, 2), "channels": 4, "latent": 8}
        config = CriticConfig(4, 3, horizon, (16,), views=seen, features=features, **encoder)
        return Critic(config).eval()


def make_actor(policy: nn.Module, critic: Critic | LiveCritic) -> HostActor:
    return HostActor(policy, critic, *random_hosts.processors(policy), INSTRUCTION)


def feature_size(policy: nn.Module) -> int:
    spy = hosts.Spy([])
    with qsteer.steer(policy, make_critic(), sampler=spy):
        policy.predict_action_chunk(prepared(policy, observe()))
    return pooled(spy.seen[0][0].features).shape[1]


# HostActor


def test_unsteered_it_is_the_policy_bit_for_bit(policy: nn.Module):
    noise = hosts.draw(policy, 2)
    base = policy.predict_action_chunk(prepared(policy, observe()), noise=noise)
    actor = make_actor(policy, make_critic(views=True))
    assert isinstance(actor, Actor)
    assert actor.noise_shape == noise.shape[1:]
    decision = actor.act(observe(), noise)
    assert torch.equal(decision.actions, base[:, :4])
    actor.steer(STRONG, None)
    assert not torch.equal(actor.act(observe(), noise).actions, base[:, :4])
    actor.steer(None, None)
    assert torch.equal(actor.act(observe(), noise).actions, base[:, :4])
    actor.handle.remove()
    assert torch.equal(policy.predict_action_chunk(prepared(policy, observe()), noise=noise), base)


def test_the_environment_gets_what_lerobots_postprocessor_makes_of_the_chunk(policy: nn.Module):
    decision = make_actor(policy, make_critic()).act(observe(), hosts.draw(policy, 2))
    scale = 1.0 if type(policy).__name__ == "PI05Policy" else 0.5  # of the quantiles, or the deviation
    torch.testing.assert_close(decision.executed, 0.1 + scale * decision.actions)


def test_a_critic_of_fewer_steps_has_fewer_executed(policy: nn.Module):
    noise = hosts.draw(policy, 2)
    base = policy.predict_action_chunk(prepared(policy, observe()), noise=noise)
    decision = make_actor(policy, make_critic(horizon=2)).act(observe(), noise)
    assert torch.equal(decision.actions, base[:, :2])
    assert decision.executed.shape == (2, 2, 3)


def test_steered_it_is_qsteer_by_hand(policy: nn.Module):
    critic, noise = make_critic(views=True), hosts.draw(policy, 2)

    def stored(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        view = F.avg_pool2d(batch[VIEW], 2)
        return {"observation.state": batch["observation.state"], VIEW: (255 * view).round().byte()}

    batch = prepared(policy, observe())
    with qsteer.steer(policy, critic, STRONG, critic_inputs=stored):
        by_hand = policy.predict_action_chunk(batch, noise=noise)
    with qsteer.steer(policy, critic, STRONG):
        deployed = policy.predict_action_chunk(batch, noise=noise)
    actor = make_actor(policy, critic)
    actor.steer(STRONG, None)
    decision = actor.act(observe(), noise)
    assert torch.equal(decision.actions, by_hand[:, :4])
    torch.testing.assert_close(decision.actions, deployed[:, :4], atol=0.01, rtol=0)  # rounding of the view
    seen = stored(batch)
    assert decision.observations.keys() == seen.keys()
    assert all(torch.equal(decision.observations[key], seen[key]) for key in seen)
    assert decision.observations[VIEW].dtype == torch.uint8


def test_the_prefix_is_encoded_once_and_what_the_critic_saw_of_it_is_recorded(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    spy, encoded = hosts.Spy([]), []
    actor = make_actor(policy, make_critic(views=True, features=feature_size(policy)))
    actor.steer(STRONG, spy)
    loop = hosts.loop(policy)
    own = loop.embed_prefix
    monkeypatch.setattr(
        loop, "embed_prefix", lambda *a, **k: encoded.append(1) or own(*a, **k), raising=False
    )
    noise = hosts.draw(policy, 2)
    decision = actor.act(observe(), noise)
    assert len(encoded) == 1
    field, value, _ = spy.seen[0]
    assert torch.equal(decision.observations[FEATURES], pooled(field.features))
    recorded = actor.handle.critic.bind(decision.observations)
    assert torch.equal(recorded(noise[:, :4, :3]), value(noise))


def test_newly_published_weights_steer_the_next_action(policy: nn.Module):
    live, noise = LiveCritic(make_critic()), hosts.draw(policy, 2)
    actor = make_actor(policy, live)
    actor.steer(STRONG, None)
    before = actor.act(observe(), noise).actions
    live.publish(make_critic(seed=1))
    after = actor.act(observe(), noise).actions
    assert live.version == 1
    assert not torch.equal(before, after)
    actor.handle.remove()
    other = make_actor(policy, make_critic(seed=1))
    other.steer(STRONG, None)
    assert torch.equal(other.act(observe(), noise).actions, after)


def test_guided_steps_go_to_the_trace_of_the_day(policy: nn.Module):
    actor = make_actor(policy, make_critic())
    actor.steer(STRONG, None)
    actor.trace = first = Trace(keep=1)
    actor.act(observe(), hosts.draw(policy, 2))
    actor.trace = second = Trace(keep=1)
    actor.act(observe(), hosts.draw(policy, 2))
    assert len(first.actions) == len(second.actions) == 1
    assert second.arrays()["strength"] == pytest.approx(0.3, abs=1e-5)


def test_views_that_the_policy_does_not_have_are_named():
    policy = hosts.shared("smolvla")
    critic = Critic(CriticConfig(4, 3, 4, (8,), views=("observation.images.wrist",)))
    actor = make_actor(policy, critic)
    try:
        with pytest.raises(
            KeyError, match=r"got no \['observation.images.wrist'\].*views as the policy does"
        ):
            actor.act(observe(), hosts.draw(policy, 2))
    finally:
        unsteer(policy)


def test_a_stack_of_critics_is_refused_before_the_policy_is_touched():
    policy = hosts.shared("smolvla")
    with pytest.raises(ValueError, match="expected one, got a stack of 2"):
        make_actor(policy, Critic(CriticConfig(4, 3, 4, (8,), stack=2)))
    with qsteer.steer(policy, make_critic()):
        pass


# Shapes of LIBERO


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_the_tiny_policies_for_libero_act_on_its_observations(name: str):
    policy = getattr(random_hosts, name)(shape=random_hosts.LIBERO)
    views = "observation.images.image", "observation.images.image2"
    config = CriticConfig(8, 7, 10, (8,), views=views, view_size=16, strides=(2, 2), channels=4, latent=8)
    actor = HostActor(policy, Critic(config), *random_hosts.processors(policy), INSTRUCTION)
    image = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    obs = dict.fromkeys(views, image) | {"observation.state": torch.zeros(1, 8)}
    noise = torch.randn(1, *actor.noise_shape, generator=torch.Generator().manual_seed(0))
    first = actor.act(obs, noise).executed
    assert first.shape == (1, 10, 7)
    for key in views:  # both are looked at
        assert not torch.equal(actor.act(obs | {key: image + 200}, noise).executed, first)
    assert not torch.equal(actor.act(obs | {"observation.state": torch.ones(1, 8)}, noise).executed, first)


# StateActor


def make_policy(seed: int) -> FlowPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FlowPolicy(FlowPolicyConfig(3, 2, 4, (16,))).requires_grad_(False)


def make_state_critic(seed: int) -> Critic:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Critic(CriticConfig(3, 2, 4, (16,))).eval()


RULES: list[tuple[qsteer.types.Rule | None, qsteer.types.Sampler | None]] = [
    (None, None),
    (qsteer.Tweedie(alpha=0.3), None),
    (qsteer.QGF(weight=0.1), qsteer.TrustRegion()),
]


@pytest.mark.parametrize(("rule", "sampler"), RULES)
def test_states_it_is_qsteer_by_hand(rule, sampler):
    policy, critic = make_policy(0), make_state_critic(0)
    obs, noise = torch.randn(6, 3), torch.randn(6, 4, 2)
    actor = StateActor([policy], LiveCritic(critic))
    actor.steer(rule, sampler)
    decision = actor.act(obs, noise)
    by_hand = qsteer.sample(
        policy.field(obs),
        critic.bind(obs),
        noise,
        rule=rule,
        sampler=sampler or qsteer.Euler(clip=(-1.0, 1.0)),
    )
    assert torch.equal(decision.executed, by_hand)
    assert torch.equal(decision.actions, by_hand)
    assert torch.equal(decision.observations, obs)


@pytest.mark.parametrize("shared", [False, True], ids=["policy each", "one policy"])
@pytest.mark.parametrize(("rule", "sampler"), [*RULES, (None, qsteer.RandomOfN(1))])
def test_seeds_side_by_side_are_seeds_apart(rule, sampler, shared: bool):
    policies = [make_policy(0)] if shared else [make_policy(0), make_policy(1)]
    critics = [make_state_critic(0), make_state_critic(1)]
    obs, noise = torch.randn(6, 3), torch.randn(6, 4, 2)
    actor = StateActor(policies, LiveCritic(Critic.stacked(critics)))
    actor.steer(rule, sampler)
    together = actor.act(obs, noise).actions
    parts = zip(actor.unstacked(), obs.chunk(2), noise.chunk(2), strict=True)
    unstacked = torch.cat([one.act(*part).actions for one, *part in parts])
    apart = []
    for s, (o, x) in enumerate(zip(obs.chunk(2), noise.chunk(2), strict=True)):
        one = StateActor([policies[s % len(policies)]], critics[s])
        one.steer(rule, sampler)
        apart.append(one.act(o, x).actions)
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(unstacked, torch.cat(apart), atol=1e-5, rtol=1e-4)
    if rule is not None:
        wrong = StateActor(policies, LiveCritic(Critic.stacked(critics[::-1])))
        wrong.steer(rule, sampler)
        assert not torch.allclose(wrong.act(obs, noise).actions, together, atol=1e-3)
