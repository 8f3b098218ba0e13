"""Which policies are served."""

import hosts
import pytest
import torch
from fields import as_installed
from hosts import STRONG, chunk
from torch import nn

from qsteer.adapters import HOSTS
from qsteer.steering.handle import steer


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_subclass_is_served(policy: nn.Module, name: str):
    base, kind = chunk(policy), type(policy)
    policy.__class__ = type("Mine", (kind,), {"config_class": object, "name": "mine"})
    try:
        with steer(policy, hosts.Target(), STRONG) as handle:
            assert not torch.equal(chunk(policy), base)
            assert (handle.host in HOSTS) == (name != "plain"), "a plain policy says itself where its loop is"
    finally:
        policy.__class__ = kind


def test_unknown_policies():
    match = r"expected one of PI0Policy, PI05Policy, SmolVLAPolicy.*got Linear.*PlainPolicy.*__qsteer_host__"
    with as_installed(), pytest.raises(TypeError, match=match):
        steer(nn.Linear(1, 1), hosts.Target(), STRONG)
