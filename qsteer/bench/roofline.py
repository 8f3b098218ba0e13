"""The least time that an action's arithmetic and memory traffic could take on a device.

Only matrix products, attention and convolutions are counted: each takes at least its FLOPs at the rate of the
device's best matrix product in that precision, and at least its bytes at the rate of the device's best copy.
Everything elementwise is taken to be fused into them at no cost, and each of them to read its inputs from
memory: so this is a bound for kernels run one after another, not for ones fused across.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_FLOPS = {  # torch's own formulas, and the CPU's attention, which they lack
    **flop_counter.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
}


@dataclass(frozen=True)
class Product:
    """One matrix product, attention or convolution.

    Attributes:
        name: of the operator.
        dtype: of its first input.
        flops: two per multiply-add.
        bytes: of its inputs and outputs; an input that is expanded counts once.
    """

    name: str
    dtype: torch.dtype
    flops: int
    bytes: int


@dataclass
class Work:
    """What was computed: the products, and the number of all operators but views."""

    products: list[Product] = field(default_factory=list)
    operators: int = 0

    @property
    def flops(self) -> int:
        """FLOPs of the products."""
        return sum(product.flops for product in self.products)

    @property
    def bytes(self) -> int:
        """Bytes of the products."""
        return sum(product.bytes for product in self.products)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The precisions in which products were computed."""
        return sorted({product.dtype for product in self.products}, key=str)


class _Recorder(TorchDispatchMode):
    """Records what passes the dispatcher; composite operators are taken apart, as in inference mode."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet not in _FLOPS and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if packet in _FLOPS:
            inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            outputs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
            flops = _FLOPS[packet](*args, **kwargs, out_val=out)
            traffic = sum(map(_count_bytes, [*inputs, *outputs]))
            self.work.products.append(Product(packet.__name__, inputs[0].dtype, flops, traffic))
        self.work.operators += not func.is_view
        return out


def _count_bytes(tensor: Tensor) -> int:
    """Return the size of what a tensor covers in memory: an axis of stride 0 is there once."""
    covered = prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return covered * tensor.element_size() if tensor.numel() else 0


@contextmanager
def counted_work() -> Iterator[Work]:
    """Count the work of the block, backwards included; not what a captured graph or compiled code does."""
    work = Work()
    with _Recorder(work):
        yield work


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do at its best.

    Attributes:
        matmul: FLOP per second of a large matrix product, by precision.
        copy: bytes per second of a large copy, read and written.
    """

    matmul: Mapping[torch.dtype, float]
    copy: float

    def seconds(self, work: Work) -> float:
        """Return the roofline's time: for each product, that of its FLOPs or that of its bytes.

        Raises:
            KeyError: a product's precision was not measured.
        """
        return sum(
            max(product.flops / self.matmul[product.dtype], product.bytes / self.copy)
            for product in work.products
        )


def measure_ceilings(device: torch.device, dtypes: Sequence[torch.dtype], *, rounds: int = 20) -> Ceilings:
    """Measure a device's rates: the best of some rounds each.

    Products of 4096 x 4096 on 4096 x 4096 and a copy of 256 MB on CUDA; of 1024 and of 64 MB elsewhere. Their
    rates depend on torch's threads and on ``torch.set_float32_matmul_precision``.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    n, size = (4096, 2**28) if device.type == "cuda" else (1024, 2**26)
    matmul = {}
    for dtype in dtypes:
        a, b, out = (torch.rand(n, n, device=device).to(dtype) for _ in range(3))
        matmul[dtype] = 2 * n**3 / _time_best(partial(torch.mm, a, b, out=out), device, rounds)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(matmul, 2 * size / _time_best(partial(target.copy_, source), device, rounds))


def _time_best(call: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the fewest seconds of a call, after two that do not count."""
    seconds = []
    for _ in range(rounds + 2):
        if device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            for _ in range(10):  # back to back, without the launch
                call()
            last.record()
            last.synchronize()
            seconds.append(1e-4 * first.elapsed_time(last))
        else:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return min(seconds[2:])
