"""CUDA rehearsed without CUDA: actions on the meta device, where no CPU tensor and no host read passes.

It sees, on any machine and in forward and backward passes, a CPU tensor in a device's computation, a read of
the device by the host, an upload in what a CUDA graph captures, and an action of another number format than
its noise.

It cannot see numbers, hence no wrong one; random generators, which on CUDA must stand on the device and be
registered with the graph (the CPU's stand in for them); autocast; streams and their order; the capture, its
memory and its replay; the policy's prefix, which is encoded on the CPU and then moved; branches for
``cuda`` alone; and what an operator does inside, such as a kernel that CUDA lacks, or that waits.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import hosts
import numpy as np
import pytest
import torch
from compiled_cases import critic
from fields import total
from product_cases import FORMATS, RULES, SAMPLERS, draw, host
from rehearsal import META, RehearsalError, check_like, on_meta, rehearse, rehearsed
from small_maps import NETWORKS, features, single, small
from torch import Tensor, nn

import qsteer
from qsteer.adapters import host_of
from qsteer.critics import Critic, CriticConfig
from qsteer.critics.networks import EnsembleMLP
from qsteer.maps import MetaFlowMap, MetaMapConfig
from qsteer.types import Field, Rule, Sampler, Value


def bent(x: Tensor, t: Tensor, context: Any = None) -> Tensor:
    """A velocity that depends on all it is given, in the format of x."""
    return torch.tanh(x.roll(1, -1)) + t[:, None, None].to(x.dtype)


def cases() -> list[Any]:
    """All combinations, on the host's own step and on the prepared one; those that add the least are slow."""
    steps = [(name, dtype, way) for name in FORMATS for dtype in FORMATS[name] for way in WAYS[name]]
    rules = [rule for examples in RULES.values() for rule in examples]
    return [
        pytest.param(
            *step,
            rule,
            sampler,
            id="-".join((step[0], str(step[1]), step[2], str(rule), type(sampler).__name__)),
            marks=() if quick(*step, rule, sampler) else pytest.mark.slow,
        )
        for step, rule, sampler in product(steps, rules, SAMPLERS.values())
    ]


WAYS = {name: ("captured",) if name == "plain" else ("eager", "captured") for name in FORMATS}
"""The graph takes the prepared step; that of a plain policy is its own."""


def quick(name: str, dtype: torch.dtype, way: str, rule: Rule | None, sampler: Sampler) -> bool:
    euler, tweedie = type(sampler) is qsteer.Euler, rule == qsteer.Tweedie(alpha=0.3)
    if (name, dtype) == ("plain", torch.bfloat16):
        return euler or tweedie or type(sampler) is qsteer.BeamSearch
    if (name, dtype, way) == ("pi05", torch.bfloat16, "captured"):
        kinds = qsteer.Tweedie, qsteer.Posterior
        return (euler and isinstance(rule, kinds)) or (tweedie and type(sampler) is qsteer.BestOfN)
    return euler and tweedie


@cache
def opened(name: str, dtype: torch.dtype, way: str) -> tuple[Field, Value, Tensor]:
    """An action of two observations, on meta."""
    policy = host(name, dtype)
    field, value, _ = qsteer.open_action(policy, hosts.observe(policy, 2), critic(policy))
    field, value, noise = on_meta((field, value, draw(policy, name, dtype, 0, 1)))
    if way == "captured" and name != "plain":
        with torch.no_grad(), rehearsed(captured=False):
            field = host_of(policy).prepare(field.policy)(field)
    return field, value, noise


@pytest.mark.parametrize(("name", "dtype", "way", "rule", "sampler"), cases())
def test_any_rule_with_any_sampler(
    name: str, dtype: torch.dtype, way: str, rule: Rule | None, sampler: Sampler
) -> None:
    """Nothing is captured of a host's own step: lerobot uploads masks in it.

    Nor of a kind's first action, in which pi0.5's prepared step tabulates what it knows of the times.
    """
    action = opened(name, dtype, way)
    if name != "plain":
        rehearse(*action, rule, sampler, captured=False)
    if way == "captured":
        rehearse(*action, rule, sampler)


# -------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("residual", [True, False])
def test_learnt_maps(network: str, residual: bool) -> None:
    meta = small(network, MetaFlowMap, MetaMapConfig, residual=residual).float()
    jump = small(network).float()
    field, value, noise = on_meta(
        (qsteer.field(bent, single(features(network))), qsteer.value(total), torch.randn(3, 2, 2))
    )
    meta, jump = on_meta((meta, jump))
    for posterior in (qsteer.Posterior, qsteer.GradientFreePosterior):
        rehearse(field, value, noise, posterior(meta, samples=2), qsteer.Euler(steps=2))
    rehearse(field, value, noise, None, qsteer.BeamSearch(2, 2, 1, flow_map=jump))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_critic_of_all_inputs(dtype: torch.dtype) -> None:
    """Images are bytes: of the first ones in floating point the range is read, which no capture includes."""
    config = CriticConfig(4, 3, 4, (16,), views=("image",), features=5)
    obs = {"image": torch.zeros(2, 3, 70, 70, dtype=torch.uint8), "policy.features": torch.zeros(2, 5)}
    obs |= {"observation.state": torch.zeros(2, 4)}
    made, obs, a = on_meta((Critic(config).to(dtype), obs, torch.zeros(2, 4, 3, dtype=dtype)))
    with rehearsed(captured=False):
        made.encode(obs, augment=torch.Generator())  # which draws on the CPU here
    with rehearsed():
        z = made.encode(obs)
        check_like(made.members(z, a), torch.empty(4, 2, dtype=dtype, device=META))
        value = made.bind(obs).repeat(3)
        rows = a.repeat_interleave(3, 0).requires_grad_()
        check_like(torch.autograd.grad(value(rows).sum(), rows)[0], rows)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_ensemble(groups: int) -> None:
    net, context, x = on_meta((EnsembleMLP(3, 4, 5, (8,), groups), torch.zeros(4, 4), torch.zeros(4, 5)))
    with rehearsed():
        out = net(net.encode(context), x)
        check_like(out, torch.empty(3, 4, device=META))
        out.sum().backward()


# ----------------------------------------------------------------------------------------------------- faults


class Behind(nn.Module):
    """Keeps a tensor that ``to`` does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.target = torch.zeros(2)

    def forward(self, a: Tensor) -> Tensor:
        return -(a - self.target).square().flatten(1).sum(1)


def fault(aside: Callable[[Tensor], Any], captured: bool = True) -> None:
    """An action of a policy whose velocity does something on the side."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        aside(x)
        return bent(x, t)

    noise = torch.randn(2, 3, 2, device=META)
    rehearse(qsteer.field(velocity), qsteer.value(total), noise, qsteer.QGF(), qsteer.Euler(), captured)


def pulled_back(x: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor whose backward pass does something on the side."""
    x = 1.0 * x
    if x.requires_grad:
        x.register_hook(spoil)
    return x


STRANGERS: dict[str, Callable[[Tensor], Any]] = {
    "sum": lambda x: x + torch.zeros(2),
    "matmul": lambda x: x @ torch.eye(2),
    "index": lambda x: x[torch.tensor([0, 1])],
    "stacked number": lambda x: torch.stack([x[0, 0, 0], torch.tensor(1.0)]).sum(),
    "numpy": lambda x: x + torch.from_numpy(np.zeros(2, np.float32)),
}
READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x.sum()),
    "list": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu().sum().item(),
    "copy": lambda x: torch.zeros(x.shape).copy_(x).sum().item(),
    "numpy": lambda x: x.detach().numpy().sum(),
    "nonzero": lambda x: x.nonzero().sum(),
    "mask": lambda x: x[x > 0].sum(),
    "masked write": lambda x: x.clone().index_put_((x > 0,), x.new_zeros(12)),
    "unique": lambda x: x.unique().sum(),
    "equal": lambda x: torch.equal(x, x),
}
UPLOADS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor(1.0, device=x.device),
    "asarray": lambda x: torch.asarray([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "to": lambda x: torch.zeros(2).to(x.device),
    "like": lambda x: torch.zeros(2).to(x),
    "copy": lambda x: torch.empty_like(x).copy_(torch.tensor(1.0)),
    "index": lambda x: x[:, [0, 1]].sum(),
}
HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda x: x * 2.0,
    "CPU number": lambda x: x * torch.tensor(2.0) + x.clamp(torch.tensor(0.0)),
    "filled with a CPU number": lambda x: torch.empty_like(x).fill_(torch.tensor(1.0)),
    "made on the device": lambda x: torch.full_like(x, 2.0) + torch.arange(2, device=x.device),
    "device's index": lambda x: x[:, torch.arange(3, device=x.device)],
    "copied on the device": lambda x: torch.as_tensor(x).to(torch.float64).sum().to(x.dtype),
}


@pytest.mark.parametrize("aside", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("captured", [True, False])
def test_a_cpu_tensor_is_refused(aside: Callable[[Tensor], Any], captured: bool) -> None:
    with pytest.raises(RehearsalError, match="got a CPU tensor"):
        fault(aside, captured)


@pytest.mark.parametrize("aside", READS.values(), ids=READS)
def test_a_host_read_is_refused(aside: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RehearsalError, match="expected no host read"):
        fault(aside)


@pytest.mark.parametrize("aside", UPLOADS.values(), ids=UPLOADS)
def test_an_upload_is_refused_in_a_capture_only(aside: Callable[[Tensor], Any]) -> None:
    fault(aside, captured=False)
    with pytest.raises(RehearsalError, match="expected no upload"):
        fault(aside)


@pytest.mark.parametrize("aside", HARMLESS.values(), ids=HARMLESS)
def test_what_cuda_captures_passes(aside: Callable[[Tensor], Any]) -> None:
    fault(aside)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda g: g * torch.ones(2), "a CPU tensor"),
        (lambda g: g * g.sum().item(), "no host read"),
        (lambda g: g * torch.tensor([1.0, 2.0], device=g.device), "no upload"),
    ],
)
def test_a_backward_pass_is_looked_at(spoil: Callable[[Tensor], Tensor], words: str) -> None:
    field = qsteer.field(lambda x, t: pulled_back(x, spoil))
    noise = torch.randn(2, 3, 2, device=META)
    with pytest.raises(RehearsalError, match=words):
        rehearse(field, qsteer.value(total), noise, qsteer.Tweedie(), qsteer.Euler())


def test_a_network_s_tensor_that_does_not_move_with_it_stays_behind() -> None:
    field, value, noise = on_meta((qsteer.field(bent), qsteer.value(Behind()), torch.randn(2, 3, 2)))
    with pytest.raises(RehearsalError, match="got a CPU tensor"):
        rehearse(field, value, noise, qsteer.Tweedie(), qsteer.Euler())


@pytest.mark.parametrize(
    ("fine", "wrong"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)], ids=str
)
def test_an_action_of_another_format_is_refused(fine: torch.dtype, wrong: torch.dtype) -> None:
    noise = torch.randn(2, 3, 2, device=META, dtype=fine)
    for dtype, refused in ((fine, False), (wrong, True)):
        field = qsteer.field(lambda x, t, dtype=dtype: bent(x, t).to(dtype))
        try:
            rehearse(field, qsteer.value(total), noise, None, qsteer.Euler())
        except RehearsalError as error:
            assert refused and "expected shape, dtype and device" in str(error)
        else:
            assert not refused
