"""Every rule with every sampler on every host, in every number format, eagerly and on the fast path.

The rules and samplers are those of qsteer's public names: a new one without an example here is a failure.
"""

import inspect
from copy import deepcopy
from typing import Any

import hosts
import pytest
import torch
from compiled_cases import critic
from product_cases import FORMATS, RULES, SAMPLERS, draw, host
from torch import Tensor, nn

import qsteer
from qsteer.steering.handle import steer
from qsteer.types import Rule, Sampler

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 1e-2}
"""Largest relative difference between actions that differ in the order of sums."""
SELECTING = qsteer.BestOfN, qsteer.BeamSearch, qsteer.FeynmanKac, qsteer.KeepBest
"""A choice between candidates of about one value falls by rounding."""


def of(kind: type) -> set[type]:
    """The classes of a kind among qsteer's public names, less the contract itself."""
    public = (getattr(qsteer, name) for name in qsteer.__all__)
    return {c for c in public if isinstance(c, type) and issubclass(c, kind) and not inspect.isabstract(c)}


def product() -> list[Any]:
    """All combinations; those that take long, or add the least, are slow."""
    cases = []
    for name, formats in FORMATS.items():
        for dtype in formats:
            for rule in (rule for examples in RULES.values() for rule in examples):
                for sampler in SAMPLERS.values():
                    central = type(rule) is qsteer.Tweedie or type(sampler) is qsteer.Euler
                    euler = type(sampler) is qsteer.Euler
                    quick = dtype == torch.float32 and (name == "plain" or (euler and name == "pi05"))
                    quick = quick or (name == "plain" and central)
                    words = name, str(dtype).removeprefix("torch."), str(rule), type(sampler).__name__
                    marks = () if quick else pytest.mark.slow
                    case = name, dtype, rule, sampler
                    cases.append(pytest.param(*case, id="-".join(words), marks=marks))
    return cases


def observe(policy: nn.Module, *seeds: int) -> dict[str, Tensor]:
    """One observation for each seed."""
    rows = [hosts.observe(policy, 1, seed) for seed in seeds]
    return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}


def off(a: Tensor, b: Tensor) -> float:
    """The relative difference."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize(
    ("kind", "examples"), [(Rule, RULES), (Sampler, SAMPLERS)], ids=["rules", "samplers"]
)
def test_every_public_one_has_an_example(kind: type, examples: dict[Any, Any]) -> None:
    assert of(kind) == set(examples) - {None}


@pytest.mark.parametrize(("name", "dtype", "rule", "sampler"), product())
@pytest.mark.filterwarnings("ignore:.*noise:UserWarning")
def test_any_rule_with_any_sampler(
    name: str, dtype: torch.dtype, rule: Rule | None, sampler: Sampler
) -> None:
    policy = host(name, dtype)
    steering = critic(policy)
    base = policy.predict_action_chunk(observe(policy, 0, 1), noise=draw(policy, name, dtype, 0, 1))

    def act(*seeds: int, mode: Any = None) -> tuple[Tensor, bool]:
        """The action, and whether it drew random numbers of its own."""
        torch.manual_seed(5)
        state, bent = torch.get_rng_state(), deepcopy(rule)
        with steer(policy, steering, bent, sampler=sampler, compile=mode) as handle:
            a = policy.predict_action_chunk(observe(policy, *seeds), noise=draw(policy, name, dtype, *seeds))
        assert handle.trace.fallbacks == 0
        drew = bent is not None and bool(bent.generators(a.device))
        return a, drew or not torch.equal(torch.get_rng_state(), state)

    action, drew = act(0, 1)
    assert (action.shape, action.dtype) == (base.shape, base.dtype)
    assert torch.isfinite(action).all()
    assert torch.equal(act(0, 2)[0][0], action[0]), "a row depends on no other one"
    if not drew and not (isinstance(sampler, SELECTING) and dtype != torch.float32):
        alone = torch.cat([act(seed)[0] for seed in (0, 1)])
        assert off(action, alone) <= ROUNDING[dtype], "a batch is its rows"
    static, _ = act(0, 1, mode="static")
    assert (static.shape, static.dtype) == (base.shape, base.dtype)
    if name == "plain":
        assert torch.equal(static, action)
    elif not (isinstance(sampler, SELECTING) and dtype != torch.float32):
        assert off(static, action) <= ROUNDING[dtype]
    assert torch.isfinite(static).all()
    again = policy.predict_action_chunk(observe(policy, 0, 1), noise=draw(policy, name, dtype, 0, 1))
    assert torch.equal(again, base), "the removed policy is the host, bit for bit"
