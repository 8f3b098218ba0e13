"""Training: exact resumption, what is saved, and that each learner finds what its formula says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from play_data import A, H, S, episodes
from safetensors.torch import load_file
from torch import Tensor

from qsteer.critics import Critic, CriticConfig, monte_carlo_target
from qsteer.data import Chunks, Episodes
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training import CriticTraining, PolicyTraining, train_critic, train_policy
from qsteer.training.critic import ACTING, IQL, LEARNERS, CriticLearner, Sarsa
from qsteer.training.policy import FlowMatching
from qsteer.types import Field

POLICY = PolicyTraining(steps=12, batch_size=8, horizon=H, hidden=(8,), log_every=2, checkpoint_every=5)
CRITIC = CriticTraining(
    steps=12, batch_size=8, horizon=H, hidden=(8,), log_every=2, checkpoint_every=5, members=3, ema=0.1
)


def act(critic: Critic, obs: Tensor, noise: Tensor) -> Tensor:
    return noise.clamp(-1, 1)


def train(what: str, data: Episodes, out: Path) -> FlowPolicy | Critic:
    if what == "policy":
        return train_policy(data, out, POLICY, progress=False)
    settings = replace(CRITIC, target=what)
    return train_critic(data, out, settings, act=act if what in ACTING else None, progress=False)


def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Make the learner's ``calls + 1``-th loss raise, as a signal would."""
    learner, count = FlowMatching if what == "policy" else LEARNERS[what], 0
    loss = learner.loss

    def counted(self: object, generator: torch.Generator) -> object:
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return loss(self, generator)

    monkeypatch.setattr(learner, "loss", counted)


@pytest.mark.parametrize("what", ["policy", *LEARNERS])
@pytest.mark.parametrize("calls", [3, 9])  # before the first checkpoint, and past metrics after it
def test_a_killed_run_resumes_to_the_bit(
    what: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = episodes()
    train(what, data, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(calls, patch, what)
        train(what, data, tmp_path / "parts")
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # cut in the middle of a line
    torch.manual_seed(1234)  # the global generator has no say
    train(what, data, tmp_path / "parts")
    for name in ("model.safetensors", "metrics.jsonl", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    parts, whole = (load_file(tmp_path / run / "checkpoint.safetensors") for run in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in parts)  # optimiser and generator too
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").open()]
    assert steps == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("what", ["policy", "iql"])
def test_a_finished_run_is_returned_without_training(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(what, episodes(), tmp_path)
    killed_after(0, monkeypatch, what)
    again = train(what, episodes(), tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_seed_decides(tmp_path: Path) -> None:
    data = episodes()
    weights = [
        train_policy(data, tmp_path / str(i), replace(POLICY, seed=seed), progress=False).first.weight
        for i, seed in enumerate((0, 1))
    ]
    assert not torch.equal(*weights)
    state = torch.get_rng_state()
    train_policy(data, tmp_path / "2", POLICY, progress=False)
    assert torch.equal(state, torch.get_rng_state())


def test_another_configuration_or_other_data_is_refused(tmp_path: Path) -> None:
    data = episodes()
    train_critic(data, tmp_path, CRITIC, progress=False)
    with pytest.raises(ValueError, match=r"hidden=\[4\].*hidden=\[8\].*another directory"):
        train_critic(data, tmp_path, replace(CRITIC, hidden=(4,)), progress=False)
    with pytest.raises(ValueError, match="data="):
        train_critic(episodes(1), tmp_path, CRITIC, progress=False)


def test_a_crash_while_writing_leaves_the_former_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = episodes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(5, patch, "policy")
        train("policy", data, tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(before[:100])
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("qsteer.training.loop.save_file", half)
        train("policy", data, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    train("policy", data, tmp_path)


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


class Exact(FlowPolicy):
    """The velocity of a policy that always does ``action``."""

    def __init__(self, action: float, sign: float) -> None:
        super().__init__(FlowPolicyConfig(S, A, H))
        self.action, self.sign = action, sign

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.sign * (self.action - x) / (1 - t)[:, None, None]


def test_flow_matching_is_solved_by_the_velocity_from_noise_to_action() -> None:
    data = replace(episodes(), actions=torch.full((40, A), 0.3))
    chunks = Chunks(data, H, 1.0, "actions")
    losses = [
        FlowMatching(Exact(0.3, sign), chunks, 64).loss(torch.Generator().manual_seed(0))[0]
        for sign in (1.0, -1.0)
    ]
    assert losses[0].item() < 1e-6
    assert losses[1].item() > 1


def test_a_policys_field_is_its_velocity_with_the_observation_encoded_once() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy(FlowPolicyConfig(S, A, H, (8, 8)))
    policy.normalizer.fit(torch.randn(20, S) * 2 + 1)
    obs, x, t = torch.randn(4, S), torch.randn(8, H, A), torch.rand(8)
    field = policy.field(obs)
    assert isinstance(field, Field)
    policy.encode = lambda obs: pytest.fail("encoded again")  # type: ignore[method-assign]
    v = field.repeat(2)(x, t)
    del policy.encode
    torch.testing.assert_close(v, policy(obs.repeat_interleave(2, dim=0), x, t))
    assert (policy(obs, x[:4], t[:4]) - policy(obs, x[:4], t[:4] / 2)).abs().max() > 1e-4  # sees the time


def test_a_policys_first_layer_is_linear_in_observation_action_and_time() -> None:
    torch.manual_seed(0)
    policy = FlowPolicy(FlowPolicyConfig(S, A, H, (8,), harmonics=2))
    obs, x, t = torch.randn(4, S), torch.randn(4, H, A), torch.rand(4)
    angles = torch.pi * t[:, None] * torch.tensor([1.0, 2.0])
    inputs = torch.cat([obs, x.flatten(1), angles.sin(), angles.cos()], dim=1)
    expected = policy.rest[0](torch.nn.functional.gelu(policy.first(inputs)))
    torch.testing.assert_close(policy(obs, x, t).flatten(1), expected)


def test_a_policy_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    policy = train("policy", episodes(), tmp_path)
    again = FlowPolicy.from_pretrained(tmp_path)
    assert again.config == policy.config == FlowPolicyConfig(S, A, H, (8,))
    obs, x, t = torch.randn(4, S), torch.randn(4, H, A), torch.rand(4)
    assert torch.equal(again(obs, x, t), policy(obs, x, t))
    with pytest.raises(ValueError, match=r"\(B, 3\), got \(4, 5\)"):
        policy.field(torch.zeros(4, 5))


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
    with pytest.raises(ValueError, match="harmonics: expected"):
        FlowPolicyConfig(S, A, H, harmonics=0)


@pytest.mark.gpu
def test_training_on_the_gpu_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = episodes()
    whole = train_critic(data, tmp_path / "whole", CRITIC, device="cuda", progress=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_after(9, patch, "iql")
        train_critic(data, tmp_path / "parts", CRITIC, device="cuda", progress=False)
    parts = train_critic(data, tmp_path / "parts", CRITIC, device="cuda", progress=False)
    assert torch.equal(whole.net.first.weight, parts.net.first.weight)
