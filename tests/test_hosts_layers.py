"""A host's velocity with the gradient through its last layers only."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from threading import Barrier, Thread
from typing import Any

import hosts
import pytest
import torch
from hosts import STRONG, chunk
from torch import Tensor, nn
from truncation import bound, gradient_of, hooks, layers_of

from qsteer.flow import denoise
from qsteer.hosts import cut
from qsteer.steering.handle import steer

DEPTH = {"pi0": 2, "pi05": 2, "smolvla": 4, "eo1": 2}


@pytest.fixture(params=DEPTH)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_record_names_the_layers(policy: nn.Module, name: str):
    with bound(policy) as (field, *_):
        layers = layers_of(field)
        assert len(layers) == DEPTH[name]
        assert all(
            isinstance(getattr(layer, part), nn.Module) for layer in layers for part in field.host.reads
        )


def test_all_layers_are_the_whole_gradient_to_the_bit(policy: nn.Module, name: str):
    with bound(policy) as (field, value, x, t):
        whole = field.truncated(DEPTH[name])
        assert torch.equal(gradient_of(whole, value, x, t), gradient_of(field, value, x, t))
    actions = []
    for rule in (STRONG, replace(STRONG, layers=DEPTH[name])):
        with steer(policy, hosts.Target(), rule):
            actions.append(chunk(policy))
    assert torch.equal(*actions)


def test_the_velocity_is_the_same_to_the_bit_and_the_gradient_is_not(policy: nn.Module, name: str):
    with bound(policy) as (field, value, x, t):
        with torch.no_grad():
            assert torch.equal(field.truncated(1)(x, t), field(x, t))
        found = [gradient_of(field.truncated(n), value, x, t) for n in range(1, DEPTH[name] + 1)]
        assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in pairwise(found))


@contextmanager
def constant_branches(layers: Any) -> Iterator[None]:
    """What the layers' attention and feed-forward add at the first call, they add at every call."""
    kept: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return kept.setdefault(module, output.clone()).clone()

    added = [module.register_forward_hook(keep) for la in layers for module in (la.self_attn.o_proj, la.mlp)]
    try:
        yield
    finally:
        for hook in added:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "last"), [("pi0", 1), ("pi05", 1), ("smolvla", 1), ("smolvla", 3), ("eo1", 1)]
)
def test_it_is_the_derivative_with_constant_branches_in_the_early_layers(
    policy: nn.Module, name: str, last: int
):
    """By central differences of the host whose early layers add the constants they added at x."""
    with bound(policy, rows=1) as (field, value, x, t):
        g = gradient_of(field.truncated(last), value, x, t)
        full = gradient_of(field, value, x, t)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad(), constant_branches(layers_of(field)[:-last]):
            field(x, t)  # is kept

            def q(z: Tensor) -> Tensor:
                return value(denoise(z, field(z, t), t)).double()

            for _ in range(5):
                dx = torch.randn(x.shape, generator=draw)
                slope = (q(x + 3e-3 * dx) - q(x - 3e-3 * dx)) / 6e-3
                assert (g * dx).sum().item() == pytest.approx(
                    slope.item(), rel=0.02, abs=0.02 * float(g.norm())
                )
        assert (g - full).norm() > 0.03 * full.norm(), "not what the whole gradient would do too"


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_it_is_the_definition_e_plus_detached_difference(policy: nn.Module, name: str):
    """On pi0 and pi0.5 every layer is a module that is called with the stream."""
    with bound(policy) as (field, value, x, t):
        layers, embedded = layers_of(field), []

        def remember(module: nn.Module, args: tuple) -> None:
            embedded[:] = [args[0]]

        def skip(module: nn.Module, args: tuple) -> tuple:
            return (embedded[0] + (args[0] - embedded[0]).detach(), *args[1:])

        added = [layers[0].register_forward_pre_hook(remember), layers[-1].register_forward_pre_hook(skip)]
        expected = gradient_of(field, value, x, t)
        for hook in added:
            hook.remove()
        torch.testing.assert_close(gradient_of(field.truncated(1), value, x, t), expected)


def test_early_layers_keep_no_graph(policy: nn.Module, name: str):
    """Their attention and feed-forward are computed without one: no backward, nothing saved."""
    with bound(policy) as (field, _, x, t):
        grads: dict[int, list[bool]] = {}
        layers = list(layers_of(field))
        added = [
            part.register_forward_hook(
                lambda m, args, out, i=i: grads.setdefault(i, []).append(out.requires_grad)
            )
            for i, layer in enumerate(layers)
            for part in (layer.self_attn.o_proj, layer.mlp)
        ]
        with torch.enable_grad():
            field.truncated(1)(x.clone().requires_grad_(), t)
        for hook in added:
            hook.remove()
        last = len(layers) - 1
        assert grads == {i: [i == last] * 2 for i in range(len(layers))}


def test_nothing_is_left_behind(policy: nn.Module):
    base, before = chunk(policy), hooks(policy)
    with steer(policy, hosts.Target(), replace(STRONG, layers=1)):
        assert not torch.equal(chunk(policy), base)
        assert hooks(policy) == before
    assert torch.equal(chunk(policy), base)
    with bound(policy) as (field, _, x, t):
        with pytest.raises(RuntimeError), torch.no_grad():
            field.truncated(1)(x[:, :, :2], t)  # a step that fails
        assert hooks(policy) == before


def test_repeated_rows_are_truncated_too(policy: nn.Module):
    with bound(policy) as (field, value, x, t):
        alone = gradient_of(field.truncated(1), value, x, t)
        rows = x.repeat_interleave(2, 0), t
        for many in (field.truncated(1).repeat(2), field.repeat(2).truncated(1)):
            together = gradient_of(many, value.repeat(2), *rows)
            torch.testing.assert_close(together, alone.repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)


def test_another_thread_keeps_its_whole_gradient(policy: nn.Module):
    """The hooks are on modules which both threads run; each thread is in the other's block."""
    with bound(policy) as (field, value, x, t):
        expected = {n: gradient_of(field.truncated(n), value, x, t) for n in (1, len(layers_of(field)))}
        barrier, found = Barrier(2), {n: [] for n in expected}
        first = layers_of(field)[0].input_layernorm

        def wait(*_: Any) -> None:
            barrier.wait(timeout=60)

        meeting = first.register_forward_pre_hook(wait)  # from here on, hooks of both are in place

        def robot(n: int) -> None:
            for _ in range(3):
                found[n].append(gradient_of(field.truncated(n), value, x, t))

        threads = [Thread(target=robot, args=(n,)) for n in expected]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        meeting.remove()
        for n, gradients in found.items():
            assert len(gradients) == 3
            assert all(torch.equal(g, expected[n]) for g in gradients)


def test_parameters_that_require_grad_get_none(policy: nn.Module):
    with bound(policy) as (field, value, x, t):
        expected = gradient_of(field.truncated(1), value, x, t)
        parameters = list(layers_of(field).parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        got = gradient_of(field.truncated(1), value, x, t)
        for parameter in parameters:
            parameter.requires_grad_(False)
        torch.testing.assert_close(got, expected)
        assert all(parameter.grad is None for parameter in parameters)


def test_cutting_is_undone_after_an_exception_and_does_not_leak():
    layer, x = nn.Linear(2, 2), torch.randn(1, 2, requires_grad=True)
    with pytest.raises(KeyError), cut([layer]):
        raise KeyError
    assert not layer._forward_pre_hooks
    with cut([layer]):
        inside = layer(x)
    assert torch.equal(inside, layer(x))
    assert torch.autograd.grad(layer(x).sum(), x)[0].abs().sum() > 0
    assert torch.autograd.grad(inside.sum(), x, allow_unused=True)[0] is None
