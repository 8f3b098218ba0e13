"""The example that compares cheaper rules with Tweedie."""

import hosts
import pytest
import torch
from hosts import chunk
from torch import nn

import qsteer


@pytest.mark.parametrize("name", ["pi05"])
def test_the_example_compares_on_a_host(policy: nn.Module, capsys: pytest.CaptureFixture[str]):
    import cheaper_tweedie

    rules = cheaper_tweedie.RULES | {"all": qsteer.Tweedie(layers=2), "last": qsteer.Tweedie(layers=1)}
    base = chunk(policy)
    field, value, _ = qsteer.open_action(policy, hosts.observe(policy, 2), hosts.Target())
    assert torch.equal(chunk(policy), base), "the policy acts as before"
    found = cheaper_tweedie.compare(field, value, hosts.draw(policy, 2), rules)
    rows = {row["rule"]: row for row in found}
    assert rows["all"]["cosine"] == pytest.approx([1.0] * 9)
    assert rows["last"]["cosine"][0] < 0.97
    assert [c is None for c in rows["Tweedie, every 2nd step"]["cosine"]] == [False, True] * 4 + [False]
    passes = {name: (row["forwards"], row["forward_rows"], row["backwards"]) for name, row in rows.items()}
    assert passes["Tweedie"] == passes["last"] == (10, 10, 9)
    assert passes["ForwardTweedie"] == (19, 19, 0) and passes["ForwardTweedie, stale"] == (11, 19, 0)
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * len(rules)
