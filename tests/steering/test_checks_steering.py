"""Arguments of steer, checked before anything is changed."""

from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from hosts import STRONG
from torch import nn

import qsteer
from qsteer.adapters import host_of
from qsteer.critics import Critic, CriticConfig
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def wrong(policy: nn.Module, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
    before = vars(policy).copy()
    with as_installed(), pytest.raises(error, match=match):
        steer(policy, *args, **kwargs)
    assert vars(policy) == before, "a steering that fails leaves no trace"


def test_wrong_arguments(policy: nn.Module):
    critic, rule = hosts.Target(), qsteer.Tweedie()
    wrong(policy, TypeError, r"critic: expected an object with bind.*got <function", lambda a: a, rule)
    wrong(policy, TypeError, r"critic: expected an object with bind.*got <class", Critic, rule)
    wrong(policy, TypeError, r"rule: expected a Rule such as qsteer.Tweedie.*got 0.3", critic, 0.3)
    wrong(policy, TypeError, r"sampler: expected a sampler, got the rule Tweedie", critic, sampler=rule)
    wrong(policy, TypeError, r"sampler: expected a Sampler such as .*got 8", critic, rule, sampler=8)
    two = {"sampler": qsteer.BestOfN(2)}
    wrong(policy, TypeError, r"sampler: expected one, got Euler.*nest", critic, qsteer.Euler(), **two)
    with torch.inference_mode():
        wrong(policy, TypeError, r"ordinary parameters.*outside of it", hosts.Target(), rule)
    wrong(policy, ValueError, r"device, cpu, got meta", hosts.Target().to("meta"), rule)
    long = Critic(CriticConfig(obs_dim=4, action_dim=3, horizon=5))
    wrong(policy, ValueError, r"at most the 4 executed steps.*got 5 steps", long, rule)
    padded = Critic(CriticConfig(obs_dim=4, action_dim=5, horizon=4))
    wrong(policy, ValueError, r"all 3 dimensions.*got 4 steps and 5 dimensions", padded, rule)


def test_another_tools_patch_is_not_overwritten(policy: nn.Module):
    name = host_of(policy).batch
    setattr(policy, name, lambda batch: None)
    try:
        wrong(policy, TypeError, r"expected the class's own method, got <function", hosts.Target(), STRONG)
    finally:
        delattr(policy, name)
