"""A critic that contradicts the rows it learns from is found out by them alone."""

import torch

import qsteer
from qsteer.auditing.stored import check_stored
from qsteer.critics import Critic, CriticConfig

GENERATOR = torch.Generator().manual_seed(0)
STATES = torch.randn(200, 2, generator=GENERATOR)
ACTIONS = 0.5 * torch.tanh(STATES)[:, None] + 0.05 * torch.randn(200, 1, 2, generator=GENERATOR)


class Judge:
    """Likes actions near what the state asks for; its return is that of the state."""

    def __init__(self, sign: float = 1.0, height: float = 1.0) -> None:
        self.sign, self.height = sign, height

    def bind(self, obs: torch.Tensor) -> qsteer.types.Value:
        def judge(a: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            far = (a - 0.5 * torch.tanh(context)[:, None]).square().sum((1, 2))
            return self.height * context[:, 0] - self.sign * 5 * far

        return qsteer.value(judge, context=obs)


def test_a_critic_that_agrees_passes() -> None:
    found = check_stored(Judge(), STATES, ACTIONS, STATES[:, 0])
    assert found.verdict == "pass", found.finding
    assert found.figures["noise"][0] > 0.9 and found.figures["returns"][0] > 0.9


def test_a_critic_whose_values_fall_with_returns_fails() -> None:
    found = check_stored(Judge(height=-1.0), STATES, ACTIONS, STATES[:, 0])
    assert found.verdict == "fail" and "fails: returns" in found.finding


def test_a_critic_that_prefers_noise_is_warned_of() -> None:
    found = check_stored(Judge(sign=-1.0), STATES, ACTIONS, STATES[:, 0])
    assert found.verdict == "warn" and found.figures["noise"][0] < 0.1 > found.figures["other_states"][0]


def test_members_that_do_not_agree_fail() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Critic(CriticConfig(2, 2, 1, (64, 64), members=4))
    found = check_stored(fresh, STATES, ACTIONS, STATES[:, 0])
    assert found.verdict == "fail" and "gradients" in found.finding


def test_numbers_that_are_none_fail() -> None:
    critic = Judge(height=float("inf"))
    assert check_stored(critic, STATES, ACTIONS, STATES[:, 0]).verdict == "fail"
