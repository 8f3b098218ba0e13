"""Policies that go on cloning: the loss by hand, the moving average, seeds apart, a kill, and misuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bandit import ThreeSteps
from online_runs import CRITIC, GOAL, RULE, TRAINING, metrics, offline, parts, policy, run
from safetensors.torch import load_file

from qsteer.critics import LiveCritic
from qsteer.data import Chunks
from qsteer.flow import interpolate
from qsteer.online.actors import StateActor
from qsteer.online.cloning import OnlineCloning
from qsteer.online.run import train_online
from qsteer.policies import FlowPolicy
from qsteer.training import train_critic
from qsteer.training.critic import IQL, CriticTraining, fresh_critic
from qsteer.training.policy import PolicyTraining, flow_matching_loss

CLONING = PolicyTraining(horizon=1, batch_size=64, learning_rate=3e-3, layer_norm=False)
FIRST = "first.weight"
SHORT = replace(TRAINING, env_steps=80, warmup=40, evaluate_every=0, checkpoint_every=40)


def chunks() -> Chunks:
    return Chunks(offline(), 1, 0.9, "next_actions")


def cloning_run(out: Path, training=SHORT, seeds: int = 1, **options):  # type: ignore[no-untyped-def]
    live = LiveCritic(fresh_critic(training.critic.critic_config(2, 1), range(seeds)))
    actor = StateActor([policy(seed) for seed in range(seeds)], live)
    options = {"cloning": CLONING, "rule": RULE} | options
    critic = train_online(ThreeSteps, actor, live, out, training, progress=False, **options)
    return actor.policies, critic


def test_each_policy_learns_from_its_own_rows() -> None:
    both = OnlineCloning([policy(0), policy(1)], chunks(), CLONING, ema=0.1)
    batch = both.sample(torch.Generator().manual_seed(1))
    loss, _ = both.batch_loss(batch, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    apart = [
        flow_matching_loss(policy(seed), batch.observations[rows], batch.actions[rows], generator)
        for seed, rows in ((0, slice(0, 64)), (1, slice(64, 128)))
    ]
    torch.testing.assert_close(loss, apart[0] + apart[1])


def test_steps_after_a_terminal_are_not_cloned() -> None:
    cloning = OnlineCloning([policy(horizon=2)], Chunks(offline(), 2, 0.9, "next_state"), CLONING, ema=0.1)
    batch = cloning.sample(torch.Generator().manual_seed(1))
    cut = ~batch.valid[:, 1]
    assert 0 < int(cut.sum()) < len(cut)
    loss, _ = cloning.batch_loss(batch, torch.Generator().manual_seed(2))
    x1, generator = batch.actions, torch.Generator().manual_seed(2)
    x0 = torch.randn(x1.shape, generator=generator)
    t = torch.rand(len(x1), generator=generator)
    v = cloning.learning[0](batch.observations, interpolate(x0, x1, t), t)
    torch.testing.assert_close(loss, (v - (x1 - x0))[batch.valid].square().mean())


def test_each_policy_is_clipped_by_itself() -> None:
    clipped = replace(CLONING, gradient_clip=1e-3)
    both = OnlineCloning([policy(0), policy(1)], chunks(), clipped, ema=0.1)
    both.step(1, torch.Generator().manual_seed(0))
    norms = [torch.cat([p.grad.flatten() for p in each.parameters()]).norm() for each in both.learning]
    torch.testing.assert_close(torch.stack(norms), torch.full((2,), 1e-3), rtol=1e-2, atol=0)


def test_what_acts_is_the_moving_average() -> None:
    acting = policy()
    cloning = OnlineCloning([acting], chunks(), CLONING, ema=0.25)
    before = [p.clone() for p in acting.parameters()]
    generator = torch.Generator().manual_seed(0)
    cloning.step(1, generator)
    moved = 0.0
    for old, new, learnt in zip(before, acting.parameters(), cloning.learning.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25 * (learnt - old))
        moved += float((learnt - old).detach().abs().sum())
    assert moved > 0.01
    after = [p.clone() for p in acting.parameters()]
    cloning.step(1, generator)  # made before a kill
    assert all(torch.equal(p, q) for p, q in zip(after, acting.parameters(), strict=True))


def test_the_unsteered_policy_comes_to_act_as_the_steered_one_did(tmp_path: Path) -> None:
    """The reward is for actions near the goal: steered ones gather there, and the clone follows."""
    (learnt,), critic = cloning_run(tmp_path, replace(TRAINING, env_steps=240, evaluate_every=0))
    noise, obs = torch.randn(500, 1, 1, generator=torch.Generator().manual_seed(3)), torch.zeros(500, 2)

    def miss(acting: FlowPolicy) -> float:
        return float((StateActor([acting], critic).act(obs, noise).actions - GOAL).square().mean())

    assert miss(learnt) < 0.9 * miss(policy())
    stored = FlowPolicy.from_pretrained(tmp_path / "policy")
    assert all(torch.equal(p, q) for p, q in zip(stored.parameters(), learnt.parameters(), strict=True))


def test_seeds_clone_apart_and_a_finished_run_is_read(tmp_path: Path) -> None:
    policies, _ = cloning_run(tmp_path, seeds=2)
    assert metrics(tmp_path / "seed1")[-1]["step"] == 80
    assert not torch.equal(*(next(each.parameters()) for each in policies))
    again, _ = cloning_run(tmp_path, seeds=2)
    for first, second in zip(policies, again, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"cloning.learning_rate"):
        cloning_run(tmp_path, seeds=2, cloning=replace(CLONING, learning_rate=1e-4))


def test_a_policy_without_cloning_stays_as_it_is(tmp_path: Path) -> None:
    (frozen,), _ = cloning_run(tmp_path, cloning=None)
    assert all(torch.equal(p, q) for p, q in zip(frozen.parameters(), policy().parameters(), strict=True))
    assert not (tmp_path / "policy").exists()


def test_a_policy_that_is_no_number_any_more_is_not_kept(tmp_path: Path) -> None:
    cloning = OnlineCloning([policy()], chunks(), replace(CLONING, learning_rate=1e38), ema=0.1)
    for update in range(1, 4):
        cloning.step(update, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"finite weights.*goes on cloning by update 3"):
        cloning.save(tmp_path / "cloning", {}, [tmp_path])
    assert not list(tmp_path.iterdir())


def test_actors_that_cannot_clone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"policy for each of 2 seeds, got a StateActor of 1 policies"):
        run(tmp_path, SHORT, seeds=2, cloning=CLONING)
    _, live = parts()
    compiled = StateActor([policy()], live, compile="inductor")
    with pytest.raises(ValueError, match=r"eager StateActor.*1 policies, compiled"):
        train_online(ThreeSteps, compiled, live, tmp_path, SHORT, rule=RULE, cloning=CLONING, progress=False)


class TestStart:
    """A run goes on where an offline one ended, V included."""

    settings: CriticTraining = replace(CRITIC, target="iql", steps=20)

    def test_v_goes_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        critic = train_critic(offline(), tmp_path / "offline", self.settings, progress=False)
        seen = []
        step = IQL.batch_loss
        monkeypatch.setattr(
            IQL,
            "batch_loss",
            lambda self, *a: (seen.append(self.value.get_parameter(FIRST).clone()), step(self, *a))[1],
        )
        training = replace(SHORT, critic=self.settings)
        for name, start in ("fresh", None), ("on", tmp_path / "offline"):
            live = LiveCritic(critic)
            actor = StateActor([policy()], live)
            train_online(
                ThreeSteps, actor, live, tmp_path / name, training, rule=RULE, start=start, progress=False
            )
        stored = load_file(tmp_path / "offline" / "checkpoint.safetensors")[f"learner.value.{FIRST}"]
        assert [torch.equal(v, stored) for v in (seen[0], seen[len(seen) // 2])] == [False, True]

    def test_other_runs_are_refused(self, tmp_path: Path) -> None:
        critic = train_critic(offline(), tmp_path / "offline", self.settings, progress=False)
        actor = StateActor([policy()], live := LiveCritic(critic))
        with pytest.raises(FileNotFoundError, match=r"start: expected a run directory"):
            train_online(ThreeSteps, actor, live, tmp_path / "a", SHORT, start=tmp_path, progress=False)
        with pytest.raises(
            ValueError, match=r"start: expected a run with target='sarsa', got one with target='iql'"
        ):
            train_online(
                ThreeSteps, actor, live, tmp_path / "b", SHORT, start=tmp_path / "offline", progress=False
            )
