"""What a resumed run compares rules and samplers by."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import qsteer
from qsteer.checks import list_differences
from qsteer.fingerprints import OPAQUE, describe, warn_unknown


@dataclass(frozen=True)
class Own:
    scale: float
    net: Any = None


class Plain:
    pass


def named() -> None: ...


def test_fields_networks_and_named_functions_are_compared() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    one = {"rule": describe(Own(1.0, net))}
    assert one == {"rule": describe(Own(1.0, net))} and "0x" not in str(one)
    assert list_differences(one, {"rule": describe(Own(2.0, net))}) == ("rule.scale=1.0", "rule.scale=2.0")
    assert one != {"rule": describe(Own(1.0, torch.nn.Linear(2, 2)))}
    assert describe(named) == f"{__name__}.named" and describe(partial(named, 1))["args"] == [1]
    drawn = qsteer.RandomDirection()
    before = describe(drawn)
    drawn.generators(torch.device("cpu"))[0].seed()
    assert describe(drawn) == before and OPAQUE not in str(before)


def test_what_cannot_be_compared_is_said() -> None:
    for opaque in (Plain(), lambda: None):
        assert OPAQUE in describe(opaque) and "0x" not in describe(opaque)
        with pytest.warns(RuntimeWarning, match="here: expected a rule that can be compared"):
            warn_unknown("here", {"rule": describe(opaque), "sampler": None})
