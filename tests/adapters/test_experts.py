"""The prepared step of pi0, pi0.5 and SmolVLA is the host's."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import hosts
import pytest
import torch
from compiled_cases import PREPARED
from prepared import fields, prepare, pulled
from torch import Tensor, nn

from qsteer.adapters import host_of
from qsteer.rules import Tweedie
from qsteer.steering.handle import steer


@pytest.fixture(params=PREPARED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("each", [1, 3])
def test_the_prepared_step_is_the_hosts(policy: nn.Module, each: int) -> None:
    own, prepared = fields(policy)
    draw = torch.Generator().manual_seed(1)
    for time in (0.0, 0.3, 0.9):
        x = torch.randn(2 * each, 6, 5, generator=draw)
        t = torch.full((2 * each,), time, dtype=torch.float64)
        expected, got = pulled(own.repeat(each), x, t), pulled(prepared.repeat(each), x, t)
        for ours, its in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5 * float(its.abs().max()))


def test_it_depends_on_the_prefix_the_state_and_the_time(policy: nn.Module) -> None:
    x, t = torch.randn(2, 6, 5), torch.full((2,), 0.3, dtype=torch.float64)
    _, prepared = fields(policy)
    v = prepared(x, t)
    assert not torch.allclose(v, prepared(x, t + 0.2), atol=1e-4)
    other = replace(prepared, values=tuple(-values for values in prepared.values))
    assert not torch.allclose(v, other(x, t), atol=1e-4)
    if getattr(prepared, "state", None) is not None:
        assert not torch.allclose(v, replace(prepared, state=-prepared.state)(x, t), atol=1e-4)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_gradient_through_the_last_layers_is_the_hosts(policy: nn.Module, all_of_them: bool) -> None:
    depth = len(host_of(policy).read(policy, host_of(policy).layers))
    own, prepared = (field.truncated(depth if all_of_them else 1) for field in fields(policy))
    x, t = torch.randn(2, 6, 5), torch.full((2,), 0.3, dtype=torch.float64)
    for ours, its in zip(pulled(prepared, x, t), pulled(own, x, t), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)
    whole = pulled(fields(policy)[1], x, t)[1]
    assert torch.allclose(pulled(prepared, x, t)[1], whole, atol=1e-5) == all_of_them
    with pytest.raises(ValueError, match=f"expected 1 to {depth}"):
        prepared.truncated(depth + 1)


def test_absent_tokens_of_the_prefix_are_not_seen(policy: nn.Module) -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    own, prepared = fields(policy, **{"observation.language.attention_mask": mask})
    assert not prepared.present.all()
    x, t = torch.randn(4, 6, 5), torch.full((4,), 0.5, dtype=torch.float64)
    for ours, its in zip(pulled(prepared.repeat(2), x, t), pulled(own.repeat(2), x, t), strict=True):
        torch.testing.assert_close(ours, its, rtol=1e-5, atol=1e-5)


def test_rows_may_have_times_of_their_own(policy: nn.Module) -> None:
    own, prepared = fields(policy)
    x, t = torch.randn(2, 6, 5), torch.tensor([0.2, 0.7], dtype=torch.float64)
    torch.testing.assert_close(prepared(x, t), own(x, t), rtol=1e-5, atol=1e-5)


def test_its_features_are_the_hosts(policy: nn.Module) -> None:
    own, prepared = fields(policy)
    for ours, its in zip(prepared.repeat(2).features, own.repeat(2).features, strict=True):
        assert torch.equal(ours, its)


def pi05_in_bfloat16() -> nn.Module:
    return hosts.random_hosts.pi05(64, 6, dtype=torch.bfloat16)


def smolvla_in_bfloat16() -> nn.Module:
    policy = hosts.random_hosts.smolvla(64, 6)
    policy.model.vlm_with_expert.bfloat16()  # as lerobot loads it: the layers around it stay single
    return policy


@pytest.mark.parametrize("build", [pi05_in_bfloat16, smolvla_in_bfloat16])
def test_in_bfloat16_it_is_as_close_to_float32_as_the_host(build: Callable[[], nn.Module]) -> None:
    """Rounding is not ours to remove, but not ours to add either."""
    policy = build()
    own, prepared = fields(policy.requires_grad_(False))
    assert prepared.dtype == torch.bfloat16
    exact = deepcopy(policy).float()
    wide = {name: tuple(part.float() for part in getattr(prepared, name)) for name in ("keys", "values")}
    truth = replace(prepared, expert=prepare(exact), **wide)
    x, t = torch.randn(2, 6, 5), torch.full((2,), 0.3, dtype=torch.float64)
    for ours, its, true in zip(*(pulled(field, x, t) for field in (prepared, own, truth)), strict=True):
        assert 1e-4 < (its - true).norm() / true.norm() < 0.08
        assert (ours - true).norm() < 1.5 * (its - true).norm()


def test_what_depends_on_the_time_alone_is_evaluated_once(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []
    expert = host_of(policy).prepare
    evaluate = expert.evaluate

    def counted(self: Any, u: Tensor) -> Any:
        calls.append(float(u[0]))
        return evaluate(self, u)

    monkeypatch.setattr(expert, "evaluate", counted)
    with steer(policy, hosts.Target(), Tweedie(), compile="static"):
        for seed in range(3):
            policy.predict_action_chunk(hosts.observe(policy, 1, seed))
    assert len(calls) == len(set(calls)) == 10


def test_candidates_share_one_prefix(policy: nn.Module) -> None:
    _, prepared = fields(policy)
    many = prepared.repeat(2).repeat(10)
    assert many.each == 20
    assert all(a is b for a, b in zip(many.keys, prepared.keys, strict=True))


@pytest.mark.parametrize("first", [False, True])
def test_what_is_known_of_a_time_is_that_of_the_switches(policy: nn.Module, first: bool) -> None:
    """An action with autocast, then one without, or the other way round."""
    _, prepared = fields(policy)
    x, results = torch.randn(2, 6, 5), {}
    for enabled in (first, not first):
        for name, expert in (("used", prepared.expert), ("new", prepare(policy))):
            with torch.autocast("cpu", torch.bfloat16, enabled), torch.no_grad():
                results[name] = replace(prepared, expert=expert)(x, 0.3)
        assert torch.equal(results["used"], results["new"])
