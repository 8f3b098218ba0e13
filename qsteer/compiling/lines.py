"""An action as one straight line of operators, gradients included.

:func:`trace` runs an eager action once and writes down every operator that it calls, backward passes too.
Nothing is known of rule, sampler, critic or policy, so all of them are served. What a replay must not keep
enters the line as an input: the buffers, the weights of networks, which may go on learning, and random
numbers, which are drawn as the eager action draws them, from the same generators in the same order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import CodeGen
from torch.fx.graph_module import GraphModule
from torch.fx.node import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qsteer.compiling.kinds import tensors_in
from qsteer.trace import ActionRecord

DRAWS = "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"
"""Operators whose random numbers depend on no other numbers."""
WRITES = "normal_", "uniform_", "random_", "exponential_"
"""The same, which write them into a tensor."""


class Draw(NamedTuple):
    """Random numbers that an action draws: an operator, its arguments, and tensors like those drawn."""

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: Tensor

    def __call__(self) -> Tensor:
        """Draw them."""
        return self.operator(*self.args, **self.kwargs)


class Recorded(TorchDispatchMode):
    """Lists the random numbers that are drawn in the block.

    Raises:
        TypeError: they depend on other numbers, as those of dropout do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note it if it draws."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_random(func):
            if name_of(func) not in DRAWS + WRITES:
                raise TypeError(
                    f"compile: expected random numbers of {', '.join(DRAWS)}, which depend on no other "
                    f"numbers, got {name_of(func)}; draw with those, or leave compile out"
                )
            like = pytree.tree_map_only(Tensor, torch.empty_like, args)
            self.draws.append(Draw(func, like, kwargs, torch.empty_like(result)))
        return result


class Replayed(TorchDispatchMode):
    """Gives the block random numbers that are drawn already, in their order."""

    def __init__(self, drawn: Sequence[Tensor]) -> None:
        super().__init__()
        self._drawn = iter(drawn)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, or return what it would draw."""
        if not is_random(func):
            return func(*args, **(kwargs or {}))
        drawn = next(self._drawn)
        return args[0].copy_(drawn) if name_of(func) in WRITES else drawn


def is_random(func: Any) -> bool:
    """Return whether an operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in func.tags


def name_of(func: Any) -> str:
    """Return an operator's name without its overload."""
    return func.overloadpacket.__name__


class Line(NamedTuple):
    """The operators of an action: a function of buffers, then random numbers, then weights."""

    source: str
    """See :func:`read`."""
    weights: list[Tensor]
    outputs: Any
    """The tree of what it returns: the action, and what is reported of it (``ActionRecord.counted``)."""


def trace(
    act: Callable[[Sequence[Tensor]], tuple[Tensor, ActionRecord]],
    buffers: Sequence[Tensor],
    draws: Sequence[Draw],
) -> Line:
    """Write down the operators of an action. No random number is drawn.

    Args:
        act: makes an action of buffers.
        buffers: like those to come.
        draws: the random numbers that it draws.

    Cost: one eager action, at about a millisecond for each operator.
    """
    outputs: Any = None

    def line(buffers: list[Tensor], drawn: list[Tensor]) -> tuple[Tensor, ...]:
        nonlocal outputs
        with Replayed(drawn):
            action, record = act(buffers)
        outputs = action, *record.counted()
        return tuple(tensors_in(outputs))

    with torch.no_grad():
        graph = make_fx(line)(list(buffers), [torch.zeros_like(draw.like) for draw in draws])
    return Line(*lift(graph), outputs)


def read(source: str) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function that a line is, for it to be run eagerly or traced again."""
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(source, names)

    def line(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(names["forward"](None, *tensors))

    return line


def lift(module: GraphModule) -> tuple[str, list[Tensor]]:
    """Return a graph's source with its constants as inputs, which follow its own, and them."""
    graph = module.graph
    found: dict[int, Node] = {}
    inputs: list[Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op == "get_attr":
            constant: Any = module
            for part in node.target.split("."):
                constant = getattr(constant, part)
            if id(constant) not in found:
                with graph.inserting_after(last):
                    last = found[id(constant)] = graph.placeholder(f"constant_{len(inputs)}")
                inputs.append(constant.detach())
            node.replace_all_uses_with(found[id(constant)])
            graph.erase_node(node)
    graph.set_codegen(CodeGen())  # inputs and outputs one by one, not as trees
    return graph.python_code("self").src, inputs
