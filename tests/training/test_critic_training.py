"""Critic training: what is saved, and that each learner finds what its formula says."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from play_data import A, H, S, episodes
from safetensors.torch import load_file
from torch import Tensor
from training_runs import CRITIC, act, train

from qsteer.critics import Critic, CriticConfig, monte_carlo_target
from qsteer.data import Chunks, Episodes
from qsteer.data.episodes import Need
from qsteer.training import CriticTraining, train_critic
from qsteer.training.critic import ACTING, FQL, IQL, LEARNERS, CriticLearner, Sarsa


def test_what_is_saved_is_the_target_critic(tmp_path: Path) -> None:
    critic = train("td", episodes(), tmp_path)
    checkpoint = load_file(tmp_path / "checkpoint.safetensors")
    again = Critic.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, checkpoint[f"learner.target.{name}"])
        assert torch.equal(tensor, critic.state_dict()[name])
    assert not torch.equal(again.net.first.weight, checkpoint["learner.critic.net.first.weight"])
    assert not any(p.requires_grad for p in critic.parameters())
    torch.testing.assert_close(again.normalizer.mean, episodes().observations.mean(0))


def chunks(target: str) -> Chunks:
    return Chunks(episodes(), H, CRITIC.gamma, LEARNERS[target].need)


def test_the_target_critic_is_the_moving_average() -> None:
    learner = Sarsa(
        Critic(CriticConfig(S, A, H, (8,))), chunks("sarsa"), replace(CRITIC, target="sarsa", ema=0.25)
    )
    before = learner.target.net.first.weight.clone()
    with torch.no_grad():
        learner.critic.net.first.weight += 1.0
    learner.after_step()
    torch.testing.assert_close(learner.target.net.first.weight, before + 0.25)
    learner.after_step()
    torch.testing.assert_close(learner.target.net.first.weight, before + 0.25 + 0.75 * 0.25)


def chain(length: int = 6, copies: int = 4) -> Episodes:
    """A corridor: state k leads to state k + 1, each step costs 1, the last one ends the task for nothing."""
    step = torch.arange(length).repeat(copies)
    eye = torch.eye(length + 1)
    return Episodes(
        observations=eye[step],
        next_observations=eye[step + 1],
        actions=torch.zeros(len(step), 1),
        rewards=-(step < length - 1).float(),
        terminals=step == length - 1,
        ends=step == length - 1,
    )


@pytest.mark.parametrize("target", LEARNERS)
def test_every_target_finds_the_value_of_the_only_behaviour(target: str, tmp_path: Path) -> None:
    """Where the data hold one behaviour, SARSA, TD, Monte Carlo and IQL have one fixed point: its return."""
    data = chain()
    settings = CriticTraining(
        target=target,
        steps=500,
        batch_size=32,
        learning_rate=1e-2,
        horizon=2,
        gamma=0.9,
        ema=0.1,
        members=2,
        rho=0.0,
        hidden=(32,),
    )
    stay = (lambda critic, obs, noise: torch.zeros_like(noise)) if target in ACTING else None
    critic = train_critic(data, tmp_path, settings, act=stay, progress=False)
    expected = monte_carlo_target(data.rewards, data.terminals, data.ends, 0.9)[:6]
    found = critic.bind(data.observations[:6])(torch.zeros(6, 2, 1))
    torch.testing.assert_close(found, expected, atol=0.15, rtol=0)


@pytest.mark.parametrize("target", ["sarsa", "td"])
def test_a_target_evaluates_the_next_action_in_the_next_state(target: str) -> None:
    settings = replace(CRITIC, target=target)
    source = chunks(target)
    learner = LEARNERS[target](Critic(CriticConfig(S, A, H, (8,))), source, settings, act)
    learner.q_target = lambda obs, a: obs.sum(1) + a.sum((1, 2))
    batch = source.gather(source.starts)
    if target == "sarsa":
        a = batch.next_actions
    else:
        noise = torch.randn(batch.actions.shape, generator=torch.Generator().manual_seed(3))
        a = act(learner.target, batch.next_observations, noise)
    following = batch.next_observations.sum(1) + a.sum((1, 2))
    y = learner.y(batch, torch.Generator().manual_seed(3))
    torch.testing.assert_close(y, batch.rewards + CRITIC.gamma**H * batch.masks * following)


@pytest.mark.parametrize("target", LEARNERS)
def test_chunks_for_another_need_are_refused(target: str) -> None:
    kind = LEARNERS[target]
    other = next(need for need in get_args(Need.__value__) if need != kind.need)
    source = Chunks(episodes(), H, CRITIC.gamma, other)
    with pytest.raises(ValueError, match=f"{kind.__name__}: .*need='{kind.need}', got need='{other}'; build"):
        kind(Critic(CriticConfig(S, A, H, (8,))), source, replace(CRITIC, target=target), act)


@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (-0.3, 0.2), None])
def test_fqls_student_acts_within_the_policys_bounds(bounds: tuple[float, float] | None) -> None:
    settings = replace(CRITIC, target="fql", bounds=bounds)
    learner = FQL(Critic(CriticConfig(S, A, H, (8,))), chunks("fql"), settings, act)
    batch = learner.source.sample(64, torch.Generator().manual_seed(0))
    a = learner.next_actions(batch, torch.Generator().manual_seed(1))
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    free = learner.mu(batch.next_observations, noise)
    low, high = bounds or (-torch.inf, torch.inf)
    assert free.amax() > 1 and torch.equal(a, free.clamp(low, high))


def test_td_asks_the_given_actor_with_the_target_critic(tmp_path: Path) -> None:
    seen: list[tuple[Critic, torch.Size]] = []

    class Actor(torch.nn.Linear):  # its weights are not the learner's
        def forward(self, critic: Critic, obs: Tensor, noise: Tensor) -> Tensor:
            seen.append((critic, noise.shape))
            return torch.tanh(super().forward(noise))

    actor = Actor(A, A)
    critic = train_critic(episodes(), tmp_path, replace(CRITIC, target="td"), act=actor, progress=False)
    assert len(seen) == CRITIC.steps
    assert all(c is critic and shape == (8, H, A) for c, shape in seen)
    checkpoint = load_file(tmp_path / "checkpoint.safetensors")
    assert {name.split(".")[1] for name in checkpoint if name.startswith("learner.")} == {"critic", "target"}


def test_an_actor_is_for_td_and_for_td_alone(tmp_path: Path) -> None:
    for settings, actor in ((replace(CRITIC, target="td"), None), (CRITIC, act)):
        with pytest.raises(ValueError, match="expected act="):
            train_critic(episodes(), tmp_path, settings, act=actor, progress=False)


def test_iql_trains_its_value_on_the_expectile_of_the_target_critic() -> None:
    source = chunks("iql")
    learner = IQL(Critic(CriticConfig(S, A, H, (8,))), source, CRITIC)
    batch = source.gather(source.starts)
    total, info = learner.batch_loss(batch, torch.Generator())
    q, _ = CriticLearner.batch_loss(learner, batch, torch.Generator())
    u = learner.q_target(batch.observations, batch.actions) - learner.v(batch.observations)
    weight = torch.where(u > 0, CRITIC.expectile, 1 - CRITIC.expectile)
    torch.testing.assert_close(total - q, (weight * u**2).mean())
    total.backward()
    assert all(p.grad is None for p in learner.target.parameters())
    assert info["v"].requires_grad is False


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"gamma": 0.0},
        {"ema": 1.5},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(changes))}: expected"):
        replace(CRITIC, **changes)


def test_pessimism_of_two_members_is_warned_of_in_the_targets_too() -> None:
    few = Critic(CriticConfig(S, A, H, hidden=(8,), members=2))
    with pytest.warns(UserWarning, match="expected 3 or more members for a pessimism of rho = 0.5, got 2"):
        Sarsa(few, chunks("sarsa"), CriticTraining(target="sarsa", horizon=H, members=2, rho=0.5))
