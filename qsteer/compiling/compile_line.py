"""``python -m qsteer.compiling.compile_line DIRECTORY``: compile an action in a process of its own.

The directory holds ``line.pt``: the source of the line (:class:`qsteer.compiling.lines.Line`), its inputs as
(size, stride, dtype, device), and the number of threads. ``line.so`` is written beside it.
"""

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # before Inductor, which imports parts of it in another order
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from qsteer.compiling.lines import read


def main(directory: Path) -> None:
    """Compile the line."""
    os.nice(10)  # what acts comes first
    source, inputs, threads = torch.load(directory / "line.pt", weights_only=False)
    torch.set_num_threads(threads)
    examples = tuple(
        torch.empty_strided(size, stride, dtype=dtype, device=device).zero_()
        for size, stride, dtype, device in inputs
    )
    with torch.no_grad():
        graph = make_fx(read(source))(*examples)
        graph = GraphModule(graph, fx_graph_cse(graph.graph))  # what each step computes anew, once
        for node in graph.graph.nodes:
            node.meta.clear()  # of other fake tensors than the compiler's
        made = torch._inductor.aot_compile(graph, examples)
    os.replace(str(made), directory / "line.so")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
