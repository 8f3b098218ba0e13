"""``python -m qsteer.compiling.compile_line DIRECTORY``: compile an action in a process of its own.

The directory holds ``parts.pt``: the parts of the line (:class:`qsteer.compiling.cuts.Part`), and the number
of threads. ``0.so``, ``1.so``, ... are written beside it.
"""

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # before Inductor, which imports parts of it in another order
from torch import Tensor
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from qsteer.compiling.lines import read


def compiled(source: str, examples: tuple[Tensor, ...]) -> str:
    """Compile a part; return where its library is."""
    part = read(source)
    graph = make_fx(lambda *tensors: part(tensors))(*examples)
    graph = GraphModule(graph, fx_graph_cse(graph.graph))  # what each step computes anew, once
    for node in graph.graph.nodes:
        node.meta.clear()  # of other fake tensors than the compiler's
    return str(torch._inductor.aot_compile(graph, examples))


def main(directory: Path) -> None:
    """Compile the parts."""
    os.nice(10)  # what acts comes first
    parts, threads = torch.load(directory / "parts.pt", weights_only=False)
    torch.set_num_threads(threads)
    for i, (source, inputs) in enumerate(parts):
        examples = tuple(
            torch.empty_strided(size, stride, dtype=dtype, device=device).zero_()
            for size, stride, dtype, device in inputs
        )
        with torch.no_grad():
            os.replace(compiled(source, examples), directory / f"{i}.so")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
