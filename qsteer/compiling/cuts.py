"""Cut a line of operators where its steps begin: steps that differ in numbers only are compiled once."""

import math
from collections.abc import Iterator
from itertools import count, groupby
from operator import getitem
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode

STEP = "qsteer_step"
"""Where a node says in which step it was written down."""
aten = torch.ops.aten
REPORTS = 1
"""Parts after the next step that read what a step reports: the last."""
WITH_NUMBER: dict[Any, Any] = {
    aten.mul.Tensor: aten.mul.Tensor,
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
"""Operators whose second argument may be a number, and the same with a tensor."""
EXACT = torch.float32, torch.float64
"""Types in which a number is the same as a tensor of it."""


class Layout(NamedTuple):
    """What a compiler must know of a tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        """Return that of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


class Part(NamedTuple):
    """A function of tensors: its source (:func:`qsteer.compiling.lines.read`), and what it is given."""

    source: str
    inputs: tuple[Layout, ...]


class Number(NamedTuple):
    """A number in an operator, and the type and the device of a scalar in its place."""

    value: float
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, node: Node) -> "Number | None":
        """Return that of an operator; None: it has none that a scalar could replace."""
        if node.target is aten.full.default and isinstance(node.args[1], float):
            made = node.meta["val"]
            return cls(node.args[1], made.dtype, made.device) if made.dtype in EXACT else None
        if node.target not in WITH_NUMBER or node.kwargs or len(node.args) != 2:
            return None
        x, number = node.args
        value = x.meta["val"] if isinstance(x, Node) else None
        if not isinstance(number, float) or not isinstance(value, Tensor) or value.dtype not in EXACT:
            return None
        return cls(number, value.dtype, value.device)


class Piece(NamedTuple):
    """Operators that follow each other, what they are given, and what is read of them elsewhere."""

    nodes: list[Node]
    given: list[Node]
    made: list[Node]

    @classmethod
    def of(cls, nodes: list[Node], results: set[Node]) -> "Piece":
        """Return the piece of these operators, of a graph with these results."""
        mine = set(nodes)
        given = dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in mine)
        made = [node for node in nodes if node in results or not mine.issuperset(node.users)]
        return cls(nodes, list(given), made)


class Cut(NamedTuple):
    """A graph in parts; see :class:`qsteer.compiling.lines.Line`. Numbers come after the graph's inputs."""

    parts: list[Part]
    calls: list[tuple[int, list[int]]]
    numbers: list[Tensor]
    results: list[int]


def mark() -> None:
    """Note that a step begins or ends here; called while operators are written down."""
    mode = get_proxy_mode()
    assert mode is not None
    step, written = 0, []
    for node in reversed(mode.tracer.graph.nodes):
        if STEP in node.meta:
            step = node.meta[STEP] + 1
            break
        written.append(node)
    for node in written:
        node.meta[STEP] = step


def cut(graph: Graph, marks: bool) -> Cut:
    """Return a graph in parts.

    Args:
        graph: of operators; its nodes know what they make (``meta["val"]``).
        marks: cut it at the marks; else it is one part.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    results: list[Node] = list(cast(Any, graph.output_node().args[0]))
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    pieces = [Piece.of(part, set(results)) for part in (split(nodes) if marks else [nodes])]

    found: dict[Part, list[int]] = {}  # pieces that differ in numbers only
    numbers: list[list[Number]] = []
    for i, piece in enumerate(pieces):
        part, its = written(piece, None)
        found.setdefault(part, []).append(i)
        numbers.append(its)
    differing = {
        i: {k for k in range(len(numbers[i])) if any(numbers[j][k] != numbers[i][k] for j in alike)}
        for alike in found.values()
        for i in alike
    }

    parts: dict[Part, int] = {}
    places = {node: i for i, node in enumerate(inputs)}
    tensors: list[Tensor] = []
    calls: list[tuple[int, list[int]]] = []
    total = len(inputs) + sum(map(len, differing.values()))
    for i, piece in enumerate(pieces):
        part, its = written(piece, differing[i])
        given = [places[node] for node in piece.given]
        given += range(len(inputs) + len(tensors), len(inputs) + len(tensors) + len(its))
        tensors += [torch.tensor(x.value, dtype=x.dtype, device=x.device) for x in its]
        calls.append((parts.setdefault(part, len(parts)), given))
        places |= {node: total + k for k, node in enumerate(piece.made)}
        total += len(piece.made)
    return Cut(list(parts), calls, tensors, [places[node] for node in results])


def split(nodes: list[Node]) -> Iterator[list[Node]]:
    """Yield the operators between two marks; before them, those of which several later steps read.

    A step that encodes something for all is the first; without that it is like the others.
    """
    steps = [list(step) for _, step in groupby(nodes, lambda node: node.meta.get(STEP, math.inf))]
    step_of = {node: i for i, step in enumerate(steps) for node in step}
    for i, step in enumerate(steps):
        kept = {node for node in step if len({step_of.get(user) for user in node.users} - {i}) > 1 + REPORTS}
        for node in reversed(step):
            if node in kept:
                kept.update(x for x in node.all_input_nodes if step_of.get(x) == i)
        kept.update(node for node in step if node.target is getitem and node.args[0] in kept)
        if any(len({x in kept for x in readers}) > 1 for readers in read_when_written(step)):
            kept = set()  # who reads before and after a tensor is written matters
        yield from filter(None, ([x for x in step if x in kept], [x for x in step if x not in kept]))


def read_when_written(nodes: list[Node]) -> Iterator[list[Node]]:
    """Yield, for each memory that some of the operators write, those that read or write it."""
    memory: dict[Node, Node] = {}
    readers: dict[Node, list[Node]] = {}
    found = set()
    for node in nodes:
        target = node.target
        writes = isinstance(target, OpOverload) and target._schema.is_mutable
        views = writes or target is getitem or (isinstance(target, OpOverload) and target.is_view)
        given = [memory.get(x, x) for x in node.all_input_nodes]
        memory[node] = given[0] if views and given else node
        for x in {*given, memory[node]}:
            readers.setdefault(x, []).append(node)
        if writes:
            found.add(memory[node])
    yield from (readers[x] for x in found)


def written(piece: Piece, lifted: set[int] | None) -> tuple[Part, list[Number]]:
    """Write a piece down as a part.

    Args:
        piece: of a graph.
        lifted: which of its numbers become inputs, scalars after the others; None: all.

    Returns the part, and these numbers.
    """
    graph, seen = Graph(), count()
    numbers: list[Number] = []
    wanted = (lambda place: True) if lifted is None else lifted.__contains__
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(piece.given)}
    for node in piece.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: copies.get(x, x))
        number = Number.of(node)
        if number is None or not wanted(next(seen)):
            copies[node] = graph.create_node("call_function", node.target, args, kwargs)
            continue
        scalar = graph.placeholder(f"number_{len(numbers)}")
        numbers.append(number)
        if node.target is aten.full.default:
            spread = graph.call_function(aten.expand.default, (scalar, args[0]))
            copies[node] = graph.call_function(aten.clone.default, (spread,))
        else:
            copies[node] = graph.call_function(WITH_NUMBER[node.target], (args[0], scalar))
    graph.output(tuple(as_is(graph, node, copies[node]) for node in piece.made))
    layouts = [layout(node) for node in piece.given] + [Layout((), (), x.dtype, x.device) for x in numbers]
    return Part(graph.python_code("self").src, tuple(layouts)), numbers


def as_is(graph: Graph, node: Node, copy: Node) -> Node:
    """Return what a part returns: from one part to the next, tensors are contiguous."""
    if node.meta["val"].is_contiguous():
        return copy
    return graph.call_function(aten.clone.default, (copy,), {"memory_format": torch.contiguous_format})


def layout(node: Node) -> Layout:
    """Return the layout of what a part is given."""
    value = node.meta["val"]
    return Layout.of(value if node.op == "placeholder" else value.contiguous())
