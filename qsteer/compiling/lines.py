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
from torch.fx.graph_module import GraphModule
from torch.fx.node import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qsteer.compiling.cuts import Part, cut, mark
from qsteer.compiling.kinds import rebuilt, tensors_in
from qsteer.trace import ActionRecord

DRAWS = "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like"
"""Operators whose random numbers depend on no other numbers."""
WRITES = "normal_", "uniform_", "random_", "exponential_"
"""The same, which write them into a tensor."""
MANY = 500
"""Operators from which on a line is cut where its steps begin: compiled are those that differ."""


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
    """Lists the random numbers that are drawn in the block, and how.

    Raises:
        TypeError: they depend on other numbers, as those of dropout do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Draw] = []
        self.drawn: list[Tensor] = []

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
            self.drawn.append(result.clone())
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
    """The operators of an action: a function of buffers, then random numbers.

    Attributes:
        parts: what it is made of; steps that differ in numbers only are one part.
        calls: of the parts, in order: which, and the places of what it is given among the line's inputs, the
            weights, and all that the calls before have returned.
        weights: networks' weights, which may go on learning, and the numbers in which steps differ.
        results: places of what it returns.
        outputs: the tree that this is: the action, and what is reported of it (``ActionRecord.counted``).
    """

    parts: list[Part]
    calls: list[tuple[int, list[int]]]
    weights: list[Tensor]
    results: list[int]
    outputs: Any

    def run(self, parts: Sequence[Callable[[list[Tensor]], Sequence[Tensor]]], inputs: list[Tensor]) -> Any:
        """Return the tree of what the line makes of its inputs.

        Args:
            parts: the functions that the parts are.
            inputs: buffers, then random numbers.
        """
        known = [*inputs, *self.weights]
        for part, given in self.calls:
            known += parts[part]([known[place] for place in given])
        return rebuilt(self.outputs, iter([known[place] for place in self.results]))


def trace(
    act: Callable[[Sequence[Tensor], Callable[[], None]], tuple[Tensor, ActionRecord]],
    buffers: Sequence[Tensor],
    draws: Sequence[Draw],
) -> Line:
    """Write down the operators of an action. No random number is drawn.

    Args:
        act: makes an action of buffers, and calls a function at each step.
        buffers: like those to come.
        draws: the random numbers that it draws.

    Cost: one eager action, at about a millisecond for each operator.
    """

    def action(buffers: Sequence[Tensor]) -> Any:
        action, record = act(buffers, mark)
        return action, *record.counted()

    with torch.no_grad():
        return write(action, buffers, [torch.zeros_like(draw.like) for draw in draws])


def write(
    function: Callable[[Sequence[Tensor]], Any], tensors: Sequence[Tensor], drawn: Sequence[Tensor]
) -> Line:
    """Write down the operators of a function of tensors that returns a tree of them.

    Args:
        function: may draw random numbers.
        tensors: like those that it will be given.
        drawn: like those that it draws, in order.
    """
    outputs: Any = None

    def line(tensors: list[Tensor], drawn: list[Tensor]) -> tuple[Tensor, ...]:
        nonlocal outputs
        with Replayed(drawn):
            outputs = function(tensors)
        return tuple(tensors_in(outputs))

    module = make_fx(line)(list(tensors), list(drawn))
    weights = lift(module)
    module.graph.eliminate_dead_code()
    parts, calls, numbers, results = cut(module.graph, marks=len(module.graph.nodes) > MANY)
    return Line(parts, calls, weights + numbers, results, outputs)


def read(source: str) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...]]:
    """Return the function that a part is, for it to be run eagerly or traced again."""
    names: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
    exec(source, names)

    def part(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(names["forward"](None, *tensors))

    return part


def lift(module: GraphModule) -> list[Tensor]:
    """Make the constants of a graph inputs, which follow its own; return them."""
    graph = module.graph
    found: dict[int, Node] = {}
    inputs: list[Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.op == "get_attr":
            constant: Any = module
            for name in node.target.split("."):
                constant = getattr(constant, name)
            if id(constant) not in found:
                with graph.inserting_after(last):
                    last = found[id(constant)] = graph.placeholder(f"constant_{len(inputs)}")
                last.meta["val"] = constant.detach()
                inputs.append(constant.detach())
            node.replace_all_uses_with(found[id(constant)])
            graph.erase_node(node)
    return inputs
