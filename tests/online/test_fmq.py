"""FMQ against critics with known gradients, its replay by hand, and a toy task that it learns online."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bandit import Bandit
from torch import Tensor, nn

from qsteer.contract import Contract
from qsteer.critics import Critic, CriticConfig
from qsteer.data import Chunks, Episodes
from qsteer.evaluation.plots import plot_adaptation
from qsteer.maps import FlowMap, MapConfig
from qsteer.online.fmq import FMQ, ClippedTD, FMQTraining, adapt
from qsteer.policies import FlowPolicy, FlowPolicyConfig

S, H, A = 2, 2, 1
ETA = 0.3
OFFLINE = FMQTraining(
    steps=12, env_steps=0, batch_size=8, log_every=2, checkpoint_every=5, evaluate_every=4, seed=3
)


def data(rows: int = 60, length: int = 10, seed: int = 0, spread: float = 0.5) -> Episodes:
    g = torch.Generator().manual_seed(seed)
    ends = torch.arange(rows) % length == length - 1
    return Episodes(
        observations=torch.randn(rows, S, generator=g),
        next_observations=torch.randn(rows, S, generator=g),
        actions=(torch.rand(rows, A, generator=g) * 2 - 1) * spread,
        rewards=-torch.rand(rows, generator=g),
        terminals=ends & (torch.rand(rows, generator=g) < 0.5),
        ends=ends,
    )


def policy(obs: int = S, horizon: int = H) -> FlowPolicy:
    torch.manual_seed(0)
    return FlowPolicy(FlowPolicyConfig(obs, A, horizon, (8,))).requires_grad_(False)


def flow_map(horizon: int = H, zero: bool = False, hidden: tuple[int, ...] = (32, 32)) -> FlowMap:
    torch.manual_seed(1)
    made = FlowMap(MapConfig(horizon, A, 8, hidden=hidden, harmonics=2))
    if zero:
        made.net.start_at_zero()
    return made.requires_grad_(False).eval()


def critic(members: int = 2, obs: int = S, horizon: int = H) -> Critic:
    torch.manual_seed(2)
    return Critic(CriticConfig(obs, A, horizon, (16,), members, rho=0.0)).requires_grad_(False)


class Uphill(Critic):
    """``Q_j(s, a) = c_j + <w, a>`` with member 1 off by ``|s_0|``: its gradient is w everywhere."""

    direction = torch.tensor([[3.0], [-4.0]])

    def encode(self, obs: Tensor) -> Tensor:
        return obs[:, 0].abs()[None, :, None]

    def members(self, z: Tensor, a: Tensor) -> Tensor:
        q = (a * self.direction).flatten(1).sum(1)
        return torch.stack([q, q + z[0, :, 0]])


def uphill() -> Critic:
    return Uphill(CriticConfig(S, A, H, (4,), 2, rho=0.0))


def learnt(learner: FMQ, steps: int, lr: float = 3e-3) -> list[dict[str, float]]:
    """Train by hand; return the metrics of every 50th step."""
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr)
    generator = torch.Generator().manual_seed(0)
    logs = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss, info = learner.loss(generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.after_step()
        if step % 50 == 49:
            logs.append({k: v.item() for k, v in info.items()} | learner.evaluate())
    return logs


FIXED = FMQTraining(steps=800, env_steps=0, batch_size=64, eta=ETA, beta=0.0, learn_critic=False)


@pytest.mark.parametrize("zero", [True, False], ids=["zero map", "any map"])
def test_the_map_reaches_the_radius_in_the_gradients_direction(zero: bool) -> None:
    offline = flow_map(zero=zero)
    before = [p.clone() for p in offline.parameters()]
    learner = FMQ(offline, uphill(), policy(), data(spread=0.2), FIXED)
    start = learner.evaluate()
    assert start["start_displacement"] == 0.0 and start["start_radius"] == pytest.approx(ETA)
    logs = learnt(learner, 500)
    assert logs[-1]["start_displacement"] == pytest.approx(ETA, abs=0.03)
    assert logs[-1]["displacement"] == pytest.approx(ETA, abs=0.03)
    assert logs[-1]["start_cosine"] > 0.99
    assert max(log["start_displacement"] for log in logs) < ETA * 1.15
    obs, x0 = learner.probe
    zeros = torch.zeros(len(x0))
    features = policy().field(obs).features
    move = learner.flow_map.average_velocity(learner.flow_map.net.encode(features), x0, zeros, zeros + 1)
    move = move - offline.average_velocity(offline.net.encode(features), x0, zeros, zeros + 1)
    expected = ETA * Uphill.direction / 5  # eta w / |w|
    assert (move.detach().mean(0) - expected).abs().max() < 0.03
    assert all(torch.equal(p, q) for p, q in zip(offline.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in offline.parameters())


def test_the_gradient_of_a_quadratic_critic_points_at_its_top() -> None:
    class Bowl(Uphill):
        def members(self, z: Tensor, a: Tensor) -> Tensor:
            return -(a - 0.5).square().flatten(1).sum(1).expand(2, -1)

    offline = flow_map(zero=True)
    learner = FMQ(offline, Bowl(CriticConfig(S, A, H, (4,), 2, rho=0.0)), policy(), data(), FIXED)
    x = torch.tensor([[[0.1], [0.2]], [[-0.3], [0.5]], [[0.0], [-3.0]]])
    found = learner.improvement(torch.zeros(3, S), x, torch.full((3,), 0.25))
    inside = 0.5 - x.clamp(-1, 1)  # the offline velocity is 0, so a1 = x; outside [-1, 1] at the bound
    expected = ETA * inside / inside.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(found.target, expected)
    torch.testing.assert_close(found.offline, torch.zeros(3, H, A))


@pytest.mark.parametrize("bounds", [(-0.3, 0.2), None])
def test_actions_are_clipped_to_the_policys_bounds(bounds: tuple[float, float] | None) -> None:
    """The critic's gradient is taken at what can be executed, and nothing else is executed."""
    mine = policy()
    mine.config = replace(mine.config, bounds=bounds)
    learner = FMQ(flow_map(), uphill(), mine, data(), FIXED)
    asked: list[Tensor] = []
    members = learner.q.critic.members
    learner.q.critic.members = lambda z, a: (asked.append(a.detach()), members(z, a))[1]
    obs, noise = torch.zeros(64, S), torch.randn(64, H, A, generator=torch.Generator().manual_seed(0))
    learner.improvement(obs, noise, torch.full((64,), 0.25))
    asked.append(learner.act(obs, torch.Generator().manual_seed(0)))
    assert len(asked) == 2
    for a in asked:
        if bounds is None:
            assert a.amax() > 0.9
        else:
            assert (a.amin(), a.amax()) == pytest.approx(bounds)


def test_a_critic_of_another_contract_is_refused() -> None:
    other = critic()
    other.config = replace(other.config, contract=Contract(action_low=[-265.0], action_high=[265.0]))
    with pytest.raises(ValueError, match="action range"):
        FMQ(flow_map(), other, policy(), data(), FIXED)


def test_disagreement_shrinks_the_radius_and_the_displacement() -> None:
    """The members differ by |s_0|, hence delta = |s_0| / sqrt(2), and eta / (1 + beta |s_0| / mean |s_0|)."""
    settings = replace(FIXED, beta=2.0)
    learner = FMQ(flow_map(zero=True), uphill(), policy(), data(spread=0.2), settings)
    obs, x0 = learner.probe
    gap = obs[:, 0].abs()
    expected = ETA / (1 + 2.0 * gap / gap.mean())
    zeros = torch.zeros(len(x0))
    torch.testing.assert_close(learner.improvement(obs, x0, zeros).radius, expected)
    learnt(learner, 500)
    z = learner.flow_map.net.encode(policy().field(obs).features)
    distance = learner.flow_map.average_velocity(z, x0, zeros, zeros + 1).flatten(1).norm(dim=1).detach()
    sure, unsure = gap < gap.median(), gap >= gap.median()
    assert distance[sure].mean() > 1.3 * distance[unsure].mean()
    assert distance.mean() == pytest.approx(expected.mean().item(), abs=0.04)


def test_under_a_moving_critic_the_displacement_stays_in_the_region() -> None:
    settings = replace(FIXED, beta=0.3, learn_critic=True, ema=0.05)
    learner = FMQ(flow_map(), critic(), policy(), data(), settings)
    before = learner.q.critic.net.first.weight.detach().clone()
    logs = learnt(learner, 500)
    assert not torch.equal(before, learner.q.critic.net.first.weight)
    assert all(log["start_displacement"] <= 1.1 * log["start_radius"] for log in logs)
    assert all(log["displacement"] <= 1.1 * log["radius"] for log in logs)
    assert logs[-1]["start_displacement"] > 0.3 * ETA
    assert logs[-1]["start_cosine"] > 0.5 and logs[-1]["q_gain"] > 0


def test_the_critics_target_is_the_least_member_at_the_adapted_maps_action() -> None:
    learner = FMQ(flow_map(), critic(3), policy(), data(), replace(FIXED, learn_critic=True))
    with torch.no_grad():
        learner.flow_map.net.last.bias += 0.3  # not the offline map any more
    batch = learner.source.sample(32, torch.Generator().manual_seed(0))
    assert 0 < batch.masks.mean() < 1
    y = learner.q.y(batch, torch.Generator().manual_seed(7))
    x0 = torch.randn(32, H, A, generator=torch.Generator().manual_seed(7))
    zeros, obs = torch.zeros(32), batch.next_observations
    a = learner.flow_map.bind(policy().field(obs).features)(x0, zeros, zeros + 1).clamp(-1, 1)
    target = learner.q.target
    least = target.members(target.encode(obs), a).min(0).values
    torch.testing.assert_close(y, batch.rewards + 0.99**H * batch.masks * least)


def test_of_several_candidates_the_critics_best_acts_in_y_and_in_the_environment() -> None:
    settings = replace(FIXED, candidates=16, learn_critic=True)
    learner, one = (FMQ(flow_map(), uphill(), policy(), data(), s) for s in (settings, FIXED))
    obs = torch.zeros(8, S)
    a = learner.act(obs, torch.Generator().manual_seed(3))
    pool = one.act(obs.repeat_interleave(16, 0), torch.Generator().manual_seed(3))
    q = (pool * Uphill.direction).flatten(1).sum(1).unflatten(0, (8, 16))
    torch.testing.assert_close((a * Uphill.direction).flatten(1).sum(1), q.amax(1))
    batch = learner.source.sample(32, torch.Generator().manual_seed(0))
    y, least = (each.q.y(batch, torch.Generator().manual_seed(7)) for each in (learner, one))
    assert (y - least)[batch.masks > 0].mean() > 1


def test_candidates_that_nothing_would_choose_among_are_refused() -> None:
    with pytest.raises(ValueError, match="candidates: expected 1 where no critic learns"):
        replace(FIXED, candidates=2)


def test_without_a_radius_the_map_stays_the_offline_map() -> None:
    offline = flow_map()
    learner = FMQ(offline, critic(2), policy(), data(), replace(FIXED, eta=0.0, learn_critic=True))
    logs = learnt(learner, 50)
    assert logs[-1]["start_displacement"] < 1e-6


@pytest.mark.parametrize("calls", [3, 9])
def test_a_killed_offline_run_resumes_to_the_bit(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: str) -> None:
        networks = flow_map(hidden=(8,)), critic(), policy()
        adapt(*networks, data(), tmp_path / out, OFFLINE, progress=False)

    run("whole")
    loss, count = FMQ.loss, 0

    def counted(self: FMQ, generator: torch.Generator) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return loss(self, generator)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FMQ, "loss", counted)
        run("parts")
    torch.manual_seed(1234)
    run("parts")
    for name in ("model.safetensors", "metrics.jsonl", "config.json", "critic/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_what_is_saved_is_what_is_returned(tmp_path: Path) -> None:
    offline, start = flow_map(hidden=(8,)), critic()
    adapted, target = adapt(offline, start, policy(), data(), tmp_path, OFFLINE, progress=False)
    loaded = FlowMap.from_pretrained(tmp_path), Critic.from_pretrained(tmp_path / "critic")
    for kept, found in zip((adapted, target), loaded, strict=True):
        assert same(kept, found)
    assert not same(adapted, offline) and not same(target, start)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert {"critic_loss", "q", "actor_loss", "displacement", "radius", "ratio"} <= lines[0].keys()
    assert [line["step"] for line in lines if "start_displacement" in line] == [4, 8, 12]
    picture = plot_adaptation(tmp_path / "metrics.jsonl", tmp_path / "a.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="critic"):  # of another run
        adapt(offline, critic(3), policy(), data(), tmp_path, OFFLINE, progress=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_a_fixed_critic_stays(tmp_path: Path) -> None:
    start = critic()
    _, target = adapt(
        flow_map(hidden=(8,)),
        start,
        policy(),
        data(),
        tmp_path,
        replace(OFFLINE, learn_critic=False),
        progress=False,
    )
    assert same(start, target)


def test_usage_errors(tmp_path: Path) -> None:
    networks = flow_map(hidden=(8,)), critic(), policy()
    with pytest.raises(ValueError, match="make_env"):
        adapt(*networks, data(), tmp_path, replace(OFFLINE, env_steps=4), progress=False)
    with pytest.raises(ValueError, match="make_env"):
        adapt(*networks, data(), tmp_path, OFFLINE, make_env=Bandit, progress=False)
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(3, 1\)"):
        adapt(networks[0], critic(horizon=3), policy(), data(), tmp_path, OFFLINE, progress=False)
    with pytest.raises(ValueError, match="eta"):
        FMQTraining(eta=-1.0)


def bandit_data(rows: int = 200) -> Episodes:
    """What a policy around 0 does there."""
    g = torch.Generator().manual_seed(0)
    place, clock = torch.randn(rows // 2, generator=g).repeat_interleave(2), torch.arange(rows) % 2
    actions = 0.3 * torch.randn(rows, A, generator=g)
    over = clock == 1
    return Episodes(
        observations=torch.stack([place, clock.float()], 1),
        next_observations=torch.stack([place, clock + 1.0], 1),
        actions=actions.clamp(-1, 1),
        rewards=-(actions[:, 0].clamp(-1, 1) - 0.6).square(),
        terminals=over,
        ends=over,
    )


class TestOnline:
    SETTINGS = FMQTraining(
        steps=300, env_steps=150, num_envs=3, batch_size=64, learning_rate=2e-3, eta=0.6, beta=0.0, ema=0.05,
        log_every=50, evaluate_every=50, checkpoint_every=100,
    )  # fmt: skip

    def test_the_return_improves_and_a_killed_run_keeps_its_replay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        torch.manual_seed(0)
        offline = flow_map(
            1, zero=True, hidden=(32, 32)
        )  # its action is the noise: return about -3 in two steps
        offline.net.last.bias.fill_(-0.3)
        networks = offline, critic(horizon=1), policy(horizon=1)
        after_step, learners = FMQ.after_step, []

        def killed(self: FMQ) -> None:
            after_step(self)
            learners.append(self)
            if int(self.step) == 150:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(FMQ, "after_step", killed)
            adapt(*networks, bandit_data(), tmp_path, self.SETTINGS, make_env=Bandit, progress=False)
        first = learners[-1].replay
        kept, added, starts = first.gather(first.starts), first.added, first.starts.clone()
        learners.clear()
        del first  # with its lock on the directory
        gc.collect()
        with monkeypatch.context() as patch:
            patch.setattr(FMQ, "after_step", lambda self: (after_step(self), learners.append(self))[0])
            adapt(*networks, bandit_data(), tmp_path, self.SETTINGS, make_env=Bandit, progress=False)
        replay = learners[-1].replay
        assert replay.added == 150 and added == 75
        again = replay.gather(starts)
        for name in ("observations", "actions", "rewards", "masks"):
            assert torch.equal(getattr(again, name), getattr(kept, name))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
        returns = [line["return"] for line in lines if "return" in line]
        assert sum(returns[-3:]) / 3 > returns[0] + 0.3
        assert lines[-1]["start_cosine"] > 0.8
        assert sum(line.get("episodes", 0) for line in lines) == 3 * (17 // 2 + 25 // 2)


def test_clipped_double_q_is_the_least_of_two() -> None:
    learner = ClippedTD(
        critic(), Chunks(data(), H, 0.9, "next_state"), FMQ(*untrained()).q.settings, lambda q, s, x: x
    )
    obs, a = torch.randn(5, S), torch.rand(5, H, A)
    members = learner.target.members(learner.target.encode(obs), a)
    torch.testing.assert_close(learner.q_target(obs, a), torch.minimum(*members))


def untrained() -> tuple[FlowMap, Critic, FlowPolicy, Episodes, FMQTraining]:
    return flow_map(hidden=(8,)), critic(), policy(), data(), OFFLINE
