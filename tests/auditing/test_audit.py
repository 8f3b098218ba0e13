"""An audit on policies and critics of closed form: Gaussian actions, quadratic values."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from fields import as_installed
from torch import Tensor, nn

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.clock import MIRRORED, PAPER
from qsteer.data import Episodes
from qsteer.types import Value

SPREAD = 0.3
FEW = {"alphas": (0.1, 0.3), "samples": 6}


class Gaussian(nn.Module):
    """The velocity of actions N(obs, SPREAD^2), with u = 1 noise, pointing to the noise."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, u: Tensor, obs: Tensor) -> Tensor:
        t, mean = 1 - u[:, None, None], self.scale * obs[:, None]
        spread = (1 - t) ** 2 + (SPREAD * t) ** 2
        return -(mean + (SPREAD**2 * t - (1 - t)) / spread * (x - t * mean))


@dataclass(frozen=True)
class Quadratic(Value):
    """Members ``-sum (a - goal_j)^2`` about goals (J, B, A), times ``factor``, plus a value of the state."""

    goals: Tensor
    state: Tensor
    factor: float

    def __call__(self, a: Tensor) -> Tensor:
        return self.members(a).mean(0)

    def members(self, a: Tensor) -> Tensor:
        return self.state - self.factor * (a - self.goals[:, :, None]).square().sum((2, 3))

    def repeat(self, k: int) -> "Quadratic":
        return replace(self, goals=self.goals.repeat_interleave(k, 1), state=self.state.repeat_interleave(k))


@dataclass(frozen=True)
class Towards:
    """A critic whose members' goals lie ``shifts`` (J, A) from the policy's mean action."""

    shifts: Tensor
    factor: float = 1.0

    def bind(self, obs: Tensor) -> Value:
        return Quadratic(obs + self.shifts[:, None], 3 * obs[:, 0], self.factor)


def policy(clock: qsteer.Clock = MIRRORED, velocity: nn.Module | None = None) -> PlainPolicy:
    return PlainPolicy(velocity or Gaussian(), horizon=2, action_dim=2, clock=clock)


def states(rows: int = 48, seed: int = 0) -> Tensor:
    return 0.8 * torch.rand(rows, 2, generator=torch.Generator().manual_seed(seed)) - 0.4


GOOD = Towards(torch.tensor([[0.3, 0.1], [0.28, 0.12], [0.32, 0.08], [0.3, 0.1]]))


def test_a_good_critic_steers():
    found = qsteer.audit(policy(), GOOD, [states(24), states(24, 1)], alphas=(0.1, 0.3, 0.5), samples=8)
    assert (found.verdict, found.status) == ("steer", 0)
    assert {c.verdict for c in found.checks} <= {"pass", "not known"}, str(found)
    assert found.recommended[0] <= found.alpha <= found.recommended[1]
    assert "STEER: alpha" in str(found)
    assert found["gradients"].figures["members"][0] > 0.9
    assert found["push"].figures["gain"][-1][0] > found["push"].figures["random"][-1][0] + 0.5


@pytest.mark.parametrize(
    "turned",
    [
        pytest.param(lambda net: policy(PAPER, net), id="time and sign"),
        pytest.param(lambda net: policy(replace(MIRRORED, sign=1), net), id="sign"),
        pytest.param(lambda net: policy(replace(PAPER, sign=-1), net), id="time"),
    ],
)
def test_a_clock_that_is_turned_around_fails(turned):
    net = Gaussian()
    assert qsteer.audit(policy(MIRRORED, net), GOOD, [states()], **FEW)["clock"].verdict == "pass"
    found = qsteer.audit(turned(net), GOOD, [states()], **FEW)
    assert found["clock"].verdict == "fail" and found.status == 1
    assert "turned around" in str(found)


def test_the_clock_is_judged_by_the_exact_response():
    """At t = 0 the denoised action is the mean; half way it follows x by 2 s^2 / (1 + s^2)."""
    follow = qsteer.audit(policy(), GOOD, [states()], **FEW)["clock"].figures["follow"]
    assert follow == pytest.approx([0.0, 2 * SPREAD**2 / (1 + SPREAD**2)], abs=1e-5)


def test_a_critic_of_states_alone_fails():
    """What data in which all succeed make of a critic."""
    found = qsteer.audit(policy(), Towards(GOOD.shifts, factor=1e-4), [states()], **FEW)
    assert found["awake"].verdict == "fail" and found.verdict == "do not steer"


def test_members_that_share_nothing_fail():
    shifts = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = qsteer.audit(policy(), Towards(5 * shifts), [states()], **FEW)
    assert found["gradients"].verdict == found["push"].verdict == "fail"
    assert found.recommended is None and found.status == 1


def test_a_critic_that_prefers_noise_fails():
    found = qsteer.audit(policy(), Towards(GOOD.shifts, factor=-1.0), [states()], **FEW)
    assert found["rank"].verdict == "fail"
    assert found["rank"].figures["noise"][2] < 0.5


def test_one_member_is_not_known_and_another_critic_judges_it():
    one = Towards(GOOD.shifts[:1])
    alone = qsteer.audit(policy(), one, [states()], **FEW)
    assert alone["push"].verdict == alone["gradients"].verdict == "not known"
    assert (alone.verdict, alone.status) == ("not known", 1)
    judged = qsteer.audit(policy(), one, [states()], other=Towards(GOOD.shifts[1:2]), **FEW)
    assert judged.verdict == "steer"
    opposed = qsteer.audit(policy(), one, [states()], other=Towards(-5 * GOOD.shifts[1:2]), **FEW)
    assert opposed["push"].verdict == "fail" and opposed["gradients"].figures["other"][0] < 0


def test_displacement_is_that_from_the_unsteered_twin():
    found = qsteer.audit(policy(), GOOD, [states()], alphas=(0.25,), samples=6, seed=3)
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(6, 48, 2, 2, generator=draw)[0]
    field, value, _ = qsteer.open_action(policy(), states(), GOOD)
    twin = qsteer.sample(field, None, noise)
    moved = (
        (qsteer.sample(field, value, noise, rule=qsteer.Tweedie(0.25)) - twin).square().mean((1, 2)).sqrt()
    )
    figures = found["strength"].figures
    assert figures["displacement"] == pytest.approx(
        moved.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist(), abs=1e-5
    )
    assert figures["strength"] == pytest.approx([0.25] * 3, abs=1e-4)


def test_nothing_is_touched_and_the_seed_decides():
    steered, before = policy(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in steered.state_dict().items()}
    attributes, grads = set(vars(steered)), [p.requires_grad for p in steered.parameters()]
    first, again, other = (qsteer.audit(steered, GOOD, [states()], seed=s, **FEW) for s in (0, 0, 1))
    assert first.checks == again.checks and first.checks != other.checks
    assert torch.equal(before, torch.get_rng_state())
    assert set(vars(steered)) == attributes and [p.requires_grad for p in steered.parameters()] == grads
    assert all(torch.equal(value, steered.state_dict()[name]) for name, value in weights.items())


def test_actions_beyond_the_bounds_fail_unless_nothing_is_clipped():
    wide = policy(velocity=Gaussian(3.0))
    assert qsteer.audit(wide, GOOD, [states()], **FEW)["bounds"].verdict == "fail"
    unclipped = qsteer.audit(wide, GOOD, [states()], rule=qsteer.Tweedie(clip=None), **FEW)
    assert unclipped["bounds"].verdict == "pass"


def test_values_that_are_not_finite_fail_and_nothing_else_is_asked(tmp_path):
    found = qsteer.audit(policy(), Towards(torch.full((2, 2), torch.nan)), [states()], **FEW)
    assert found["numbers"].verdict == "fail" and found.verdict == "do not steer"
    found.save(tmp_path / "audit.json")
    found.plot(tmp_path / "audit.png")


def test_json_and_picture(tmp_path):
    found = qsteer.audit(policy(), GOOD, [states()], **FEW)
    read = json.loads(found.save(tmp_path / "audit.json").read_text())
    assert read["verdict"] == "steer" and read["checks"][0]["name"] == "contract"
    assert found.plot(tmp_path / "audit.png").stat().st_size > 1000


def play(rows: int = 3000) -> Episodes:
    """One step each: the reward is what GOOD says of the action."""
    draw = torch.Generator().manual_seed(0)
    obs = states(rows)
    actions = (obs + SPREAD * torch.randn(rows, 2, generator=draw)).clamp(-1, 1)
    rewards = 3 * obs[:, 0] - 2 * (actions - obs - GOOD.shifts[0]).square().sum(1)
    every = torch.ones(rows, dtype=torch.bool)
    return Episodes(obs, obs, actions, rewards, every, every)


def test_values_are_compared_with_returns():
    """A chunk of 2 repeats the only action of its episode: GOOD is the return itself."""
    found = qsteer.audit(policy(), GOOD, [states()], play(), **FEW)["rank"]
    assert found.figures["returns"][0] > 0.95 and found.verdict == "pass"
    assert found.figures["foresight"][0] > 0.6  # V is of four draws, and noisy
    turned = qsteer.audit(policy(), Turned(GOOD), [states()], play(), **FEW)["rank"]
    assert turned.figures["returns"][0] < -0.95 and turned.verdict == "fail"


def test_an_action_axis_that_is_turned_around_has_no_foresight():
    """Its values and their order over states are all right: only what came of actions tells."""
    shift = torch.tensor([[0.6, 0.0], [0.58, 0.0], [0.62, 0.0]])
    data = play()
    rewards = -2 * (data.actions - data.observations - shift[0]).square().sum(1)
    data = replace(data, rewards=rewards)
    right = qsteer.audit(policy(), Towards(shift), [states()], data, **FEW)
    turned = qsteer.audit(policy(), Towards(shift * torch.tensor([-1.0, 1.0])), [states()], data, **FEW)
    assert right["rank"].figures["foresight"][0] > 0.6 and right.verdict == "steer"
    assert turned["rank"].verdict == "fail" and turned.status == 1
    assert turned["rank"].figures["foresight"][0] < 0


@dataclass(frozen=True)
class Turned:
    """The critic, upside down."""

    critic: Towards

    def bind(self, obs: Tensor) -> Value:
        value = self.critic.bind(obs)
        return Quadratic(value.goals, -value.state, -value.factor)


def test_a_flow_policy_and_a_critic_of_ours_with_data(tmp_path):
    from qsteer.policies import FlowPolicy, FlowPolicyConfig

    torch.manual_seed(0)
    flow = FlowPolicy(FlowPolicyConfig(obs_dim=2, action_dim=2, horizon=2, hidden=(16,)))
    critic = qsteer.Critic(qsteer.CriticConfig(obs_dim=2, action_dim=2, horizon=2, hidden=(16,)))
    found = qsteer.audit(flow, critic, [states()], play(), **FEW)
    assert "data_over_policy" in found["rank"].figures and found.status == 1
    assert found["clock"].verdict == "fail"  # no trained velocity


def test_a_critic_of_another_contract_fails_and_nothing_else_is_asked():
    from qsteer.contract import Contract

    config = qsteer.CriticConfig(obs_dim=2, action_dim=2, horizon=2, hidden=(16,))
    critics = [
        qsteer.Critic(replace(config, contract=Contract(horizon=horizon, action_dim=2))) for horizon in (2, 5)
    ]
    right, wrong = (qsteer.audit(policy(), critic, [states()], **FEW) for critic in critics)
    assert right["contract"].verdict == "pass" and len(right.checks) == 9
    assert wrong["contract"].verdict == "fail" and wrong.status == 1 and len(wrong.checks) == 1
    assert "horizon: expected 2, got 5" in str(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": states()}, r"several of what the policy takes, got one Tensor; pass \[batch\]"),
        ({"batches": []}, "at least one, got none"),
        ({"batches": [states(4)]}, "at least 8 states in all, got 4"),
        ({"rule": qsteer.QGF(0.02)}, "expected scaling 'match_norm', got 'raw'"),
        ({"rule": qsteer.BestOfN(2)}, "expected guidance such as"),
        ({"alphas": (0.2, 0.1)}, "increasing strengths above 0"),
        ({"samples": 2}, "at least 4, got 2"),
        ({"data": 3}, "expected Episodes or the path"),
        ({"critic": 3}, "object with bind"),
    ],
)
def test_misuse(change, message):
    given = {"policy": policy(), "critic": GOOD, "batches": [states()]} | change
    with as_installed(), pytest.raises((TypeError, ValueError), match=message):
        qsteer.audit(**given)
