"""The example that compares cheaper rules with Tweedie."""

import hosts
import pytest
import torch
from hosts import chunk
from torch import nn

import qsteer
from qsteer.steering.handle import steer


@pytest.mark.parametrize("name", ["pi05"])
def test_the_example_compares_on_a_host(policy: nn.Module, capsys: pytest.CaptureFixture[str]):
    import cheaper_tweedie

    rules = cheaper_tweedie.RULES | {"all": qsteer.Tweedie(layers=2), "last": qsteer.Tweedie(layers=1)}
    comparing, base = cheaper_tweedie.Compare(rules), chunk(policy)
    with steer(policy, hosts.Target(), comparing):
        assert torch.equal(chunk(policy), base), "it acts as the host alone"
    rows = {row["rule"]: row for row in comparing.rows}
    assert rows["all"]["cosine"] == pytest.approx([1.0] * 9)
    assert rows["last"]["cosine"][0] < 0.97
    assert [c is None for c in rows["Tweedie, every 2nd step"]["cosine"]] == [False, True] * 4 + [False]
    passes = {name: (row["forwards"], row["forward_rows"], row["backwards"]) for name, row in rows.items()}
    assert passes["Tweedie"] == passes["last"] == (10, 10, 9)
    assert passes["ForwardTweedie"] == (19, 19, 0) and passes["ForwardTweedie, stale"] == (11, 19, 0)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(rules)
