"""What critic and policy say of each other: what is recorded, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import bandit
import hosts
import online_runs
import pytest
import torch
from play_data import A, H, S, episodes
from torch import Tensor, nn
from training_runs import CRITIC

import qsteer
from qsteer.adapters import PlainPolicy, contract_of
from qsteer.contract import Contract, agreed, differences
from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.data import Chunks, Episodes
from qsteer.evaluation.arms import parse
from qsteer.evaluation.compare import compare
from qsteer.online.run import train_online
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.testing.lerobot import processors
from qsteer.training import train_critic

RULE = qsteer.QGF(weight=0.1)


def velocity(x: Tensor, t: Tensor, obs: Tensor) -> Tensor:
    return -x


def scaled(factor: float) -> Episodes:
    """The same episodes, their actions in other units."""
    data = episodes()
    return replace(data, actions=data.actions * factor)


def flow_policy(data: Episodes | None = None, **changes: int) -> FlowPolicy:
    shape = {"obs_dim": S, "action_dim": A, "horizon": H} | changes
    policy = FlowPolicy(FlowPolicyConfig(**shape, hidden=(8,)))
    if data is not None:
        policy.normalizer.fit(data.observations)
    return policy


def plain(**entries: object) -> PlainPolicy:
    return PlainPolicy(velocity, H, A, contract=flow_policy(episodes()).contract | Contract(**entries))


def critic_of(contract: Contract | None) -> Critic:
    return Critic(CriticConfig(S, A, H, (8,), contract=contract))


def refused(policy: nn.Module, critic: Critic | LiveCritic, match: str) -> None:
    """``steer``, ``swap`` and ``open_action`` refuse the critic, and leave nothing behind."""
    before = vars(policy).copy()
    with pytest.raises(ValueError, match=match):
        qsteer.steer(policy, critic, RULE)
    with pytest.raises(ValueError, match=match):
        qsteer.open_action(policy, torch.zeros(1, S), critic=critic)
    assert vars(policy) == before
    with (
        qsteer.steer(policy, critic_of(None), RULE) as handle,
        pytest.raises(ValueError, match=match),
    ):
        handle.swap(critic=critic)


def test_a_critic_of_raw_actions_is_refused(tmp_path: Path):
    critic = train_critic(scaled(265.0), tmp_path, CRITIC, progress=False)
    low, high = critic.config.contract.action_low, critic.config.contract.action_high
    assert min(low) < -200 and max(high) > 200
    refused(
        plain(), critic, r"action range: expected trained actions within \[-1, 1\].*got \[-2\d\d.*robot's"
    )
    with pytest.raises(ValueError, match="action range"):
        flow_policy().check_critic(critic.config)
    critic.config = replace(critic.config, contract=None)  # as the error says
    with qsteer.steer(plain(), critic, RULE):
        pass


def test_a_critic_of_actions_in_metres_is_refused(tmp_path: Path):
    critic = train_critic(scaled(0.02), tmp_path, CRITIC, progress=False)
    refused(plain(), critic, r"action range: expected trained actions to take up at least 5% .*robot's")
    still = replace(episodes(), actions=episodes().actions * torch.tensor([1.0] + [0.0] * (A - 1)))
    assert A == 2 and not differences(still.contract, plain().contract), "a gripper that stays closed"


def test_raw_actions_are_refused_before_a_critic_is_trained_on_them(tmp_path: Path):
    with pytest.raises(ValueError, match="action range"):
        train_critic(scaled(265.0), tmp_path / "run", CRITIC, contract=plain().contract, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_trained_critic_carries_its_contract_to_the_policy_that_it_fits(tmp_path: Path):
    policy, data = plain(), episodes()
    critic = train_critic(data, tmp_path, CRITIC, contract=contract_of(policy), progress=False)
    found = Critic.from_pretrained(tmp_path).config.contract
    assert found == critic.config.contract == LiveCritic(critic).config.contract
    assert found.observations == (("observation.state", (S,)),)
    assert (found.horizon, found.action_dim, found.discount, found.target) == (H, A, CRITIC.gamma, "iql")
    assert found.observation_mean == pytest.approx(data.observations.mean(0).tolist(), abs=1e-6)
    assert found.action_high == pytest.approx(data.actions.amax(0).tolist())
    assert found.observation_normalisation == found.action_normalisation == "identity"
    with qsteer.steer(policy, critic, RULE):
        pass
    policy.contract |= Contract(observation_normalisation="mean_std 1234")
    refused(policy, LiveCritic(critic), "observation_normalisation: expected 'mean_std 1234', got 'identity'")


MISMATCHES = {
    "observation_normalisation": "mean_std 12ab",
    "horizon": H + 1,
    "action_dim": A + 1,
    "action_normalisation": "mean_std",
    "action_statistics": "12ab",
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_each_entry_that_differs_is_named(name: str):
    policy = plain(action_statistics="34cd")
    mine = contract_of(policy)
    other = replace(mine, **{name: MISMATCHES[name]})
    expected, got = getattr(mine, name), MISMATCHES[name]
    refused(policy, critic_of(other), f"{name}: expected {expected!r}, got {got!r}; .*contract=None")
    assert not differences(replace(other, **{name: None}), mine), "what is not known is not compared"
    assert not differences(other, replace(mine, **{name: None}))


def test_all_differences_are_told_at_once():
    mine = contract_of(plain())
    found = differences(replace(mine, horizon=9, action_normalisation="min_max"), mine)
    assert [line.partition(":")[0] for line in found] == ["horizon", "action_normalisation"]


def test_a_policy_has_no_discount_and_no_target():
    mine = contract_of(plain())
    assert not differences(replace(mine, discount=0.5, target="sarsa"), mine)


def test_a_run_is_not_resumed_with_another_discount(tmp_path: Path):
    train_critic(episodes(), tmp_path, CRITIC, progress=False)
    with pytest.raises(ValueError, match=r"gamma=0\.5"):
        train_critic(episodes(), tmp_path, replace(CRITIC, gamma=0.5), progress=False)


def test_observations_under_other_keys_and_of_other_shapes():
    mine = contract_of(plain(observations=[("observation.state", (S,)), ("observation.goal", (1,))]))
    assert not differences(replace(mine, observations=[("observation.goal", (1,))]), mine)
    for wrong in (("state", (S,)), ("observation.state", (S + 1,))):
        (line,) = differences(replace(mine, observations=[wrong]), mine)
        assert line.startswith("observations: expected some of") and str(wrong[0]) in line


def test_a_critics_own_inputs_are_not_the_policys():
    policy = plain(observations=[("observation.state", (S,))])
    critic = critic_of(Contract(observations=[("mine", (S,))]))
    refused(policy, critic, "observations: expected some of")
    with qsteer.steer(policy, critic, RULE, critic_inputs=lambda batch: {"mine": batch}) as handle:
        handle.swap(critic=critic)
        with pytest.raises(ValueError, match="observations"):
            handle.swap(critic=critic, critic_inputs=None)


def test_states_of_another_scale_are_refused_and_of_another_data_set_are_not():
    data, other = episodes(0), episodes(1)
    mine = flow_policy(data).contract
    assert not differences(other.contract, mine), "two estimates of one scale"
    millimetres = replace(data, observations=data.observations * 1000)
    (line,) = differences(millimetres.contract, mine)
    assert line.startswith("observation_std: expected the policy's scale, got 1000 times it")
    offset = replace(data, observations=data.observations + torch.tensor([0.0, 99.0, 0.0]))
    (line,) = differences(offset.contract, mine)
    assert line.startswith("observation_mean: expected about") and "in entry 1" in line
    assert flow_policy().contract.observation_mean is None, "not fitted: not known"


def test_a_critic_from_before_loads_and_steers(tmp_path: Path):
    critic_of(None).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("contract") is None
    (tmp_path / "config.json").write_text(json.dumps(stored))
    critic = Critic.from_pretrained(tmp_path)
    assert critic.config.contract is None
    with qsteer.steer(plain(), critic, RULE):
        pass


def test_the_committed_critic_steers_the_committed_policy():
    folder = Path(__file__).parents[1] / "examples" / "checkpoints" / "cube-single"
    policy, critic = FlowPolicy.from_pretrained(folder / "policy"), Critic.from_pretrained(folder / "critic")
    policy.check_critic(critic.config)


def test_what_was_changed_after_the_constructor_is_saved(tmp_path: Path):
    critic = critic_of(None)
    critic.config = replace(critic.config, rho=0.125, contract=Contract(horizon=H))
    critic.save_pretrained(tmp_path)
    assert Critic.from_pretrained(tmp_path).config == critic.config


def test_a_broken_contract_is_named(tmp_path: Path):
    critic_of(Contract(horizon=H)).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["contract"] |= {"colour": "red"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"config.json: expected .*colour"):
        Critic.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected as many numbers in both"):
        Contract(action_low=[1.0])


def test_what_several_agree_in():
    both = agreed([Contract(horizon=1, discount=0.9), Contract(horizon=2, discount=0.9)])
    assert both == Contract(discount=0.9)


def test_an_arm_is_not_compared_under_a_critic_of_other_sizes():
    def never() -> None:
        raise AssertionError("no simulator is started")

    for change in ({"obs_dim": S + 1}, {"action_dim": A + 1}, {"horizon": H + 1}):
        with pytest.raises(ValueError, match=f"critic: expected the policy's .*{next(iter(change))}"):
            compare(never, flow_policy(**change), critic_of(None), [parse("base")], episodes=1)


def test_online_critics_carry_it(tmp_path: Path):
    training = replace(online_runs.TRAINING, env_steps=40, warmup=10, evaluate_every=0, checkpoint_every=20)
    critic = online_runs.run(tmp_path, training)
    last = Critic.from_pretrained(tmp_path / "last").config.contract
    assert last == critic.config.contract
    assert (last.horizon, last.action_dim, last.discount, last.target) == (1, 1, 0.9, "sarsa")
    assert last.action_normalisation == "identity"

    actor, live = online_runs.parts()
    live.critic.config = replace(live.config, contract=replace(last, discount=0.5))
    with pytest.raises(ValueError, match=r"discount gamma = 0.9 of its further training, got 0.5"):
        train_online(bandit.ThreeSteps, actor, live, tmp_path / "b", training, progress=False)
    live.critic.config = replace(live.config, contract=replace(last, horizon=7))
    with pytest.raises(ValueError, match="horizon: expected 1, got 7"):
        train_online(bandit.ThreeSteps, actor, live, tmp_path / "c", training, progress=False)


def test_offline_data_of_raw_actions_are_not_mixed_in(tmp_path: Path):
    actor, live = online_runs.parts()
    n = 4
    raw = Episodes(
        torch.zeros(n, 2), torch.zeros(n, 2), torch.full((n, 1), 265.0), torch.zeros(n),
        torch.zeros(n), torch.tensor([0, 1, 0, 1]),
    )  # fmt: skip
    chunks = Chunks(raw, 1, 0.9, "next_actions")
    with pytest.raises(ValueError, match="action range"):
        train_online(
            bandit.ThreeSteps,
            actor,
            live,
            tmp_path,
            online_runs.TRAINING,
            offline=chunks,
            progress=False,
        )


@pytest.mark.parametrize("name", ["pi05", "smolvla"])
def test_lerobots_policies_say_what_their_configuration_and_processors_say(
    policy: nn.Module, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    mode = {"pi05": "quantiles", "smolvla": "mean_std"}[name]
    found = contract_of(policy)
    config = policy.config
    assert found.horizon == config.n_action_steps and found.action_dim == config.action_feature.shape[0]
    assert dict(found.observations)["observation.state"] == config.input_features["observation.state"].shape
    assert found.action_normalisation == mode and found.action_statistics is None

    monkeypatch.setattr(config, "pretrained_path", str(tmp_path))
    assert contract_of(policy) == found, "no processors there"
    before, _ = processors(policy)
    before.save_pretrained(tmp_path, config_filename="policy_preprocessor.json")
    saved = contract_of(policy)
    assert saved.action_statistics and saved.observation_normalisation
    for key, entry in (("action", "action_statistics"), ("observation.state", "observation_normalisation")):
        step = next(s for s in before.steps if hasattr(s, "norm_map"))
        for number in step._tensor_stats[key].values():
            number += 1
        before.save_pretrained(tmp_path, config_filename="policy_preprocessor.json")
        assert getattr(contract_of(policy), entry) != getattr(saved, entry), "other statistics"

    shape = {"obs_dim": 4, "action_dim": found.action_dim, "horizon": found.horizon, "hidden": (8,)}
    raw = Contract(action_low=(-265.0,) * found.action_dim, action_high=(265.0,) * found.action_dim)
    for wrong, match in (
        (raw, "action range"),
        (replace(saved, action_statistics="12ab"), "action_statistics"),
    ):
        with pytest.raises(ValueError, match=match):
            qsteer.steer(policy, Critic(CriticConfig(**shape, contract=wrong)), hosts.STRONG)
