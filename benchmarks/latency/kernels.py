"""Kernels of one guided Euler step: the host's own step, the prepared one, and the compiled line.

python benchmarks/latency/kernels.py OUT [HOST ...]

Operators that launch a kernel are counted, views are not; of the compiled line, the loops that Inductor
writes and the products that it leaves to libraries. Policies are of small width and few layers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch._inductor import metrics

import qsteer
from qsteer.adapters import host_of
from qsteer.bench.latency import make_subject
from qsteer.bench.roofline import counted_work
from qsteer.compiling.compile_line import compiled
from qsteer.compiling.cuts import Part
from qsteer.compiling.hidden import FAR, known
from qsteer.compiling.kinds import behind
from qsteer.compiling.lines import trace
from qsteer.compiling.runs import Kind, Run
from qsteer.files import write_json
from qsteer.sampling import steered_action

RULES = {"unsteered": None, "QGF": qsteer.QGF(weight=0.06), "Tweedie": qsteer.Tweedie(0.2)}
STEPS = 6
"""Of two chains, whose difference in kernels is that of two steps."""


def launches(field: Any, value: Any, noise: torch.Tensor, rule: Any) -> int:
    """Return how many operators of a step launch a kernel."""
    found = []
    for steps in (STEPS, STEPS + 2):
        with counted_work() as work:
            steered_action(field, value, noise, rule, qsteer.Euler(steps=steps))
        found.append(work.operators)
    return (found[1] - found[0]) // 2


def kernels(part: Part) -> int:
    """Return how many kernels Inductor makes of a part of a line."""
    metrics.reset()
    examples = tuple(
        torch.empty_strided(x.size, x.stride, dtype=x.dtype, device=x.device).zero_() for x in part.inputs
    )
    with torch.no_grad():
        compiled(part.source, examples)
    products = sum(map(part.source.count, ("mm.default(", "scaled_dot_product")))
    return metrics.generated_kernel_count + products


def main() -> None:
    """Count for each host and rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("hosts", nargs="*", default=["mlp", "pi05", "smolvla"])
    args = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__}
    for host in args.hosts:
        subject = make_subject(host, "tiny")
        field, value, noise = subject.open()
        make = host_of(subject.policy).prepare
        assert make is not None and value is not None
        prepare = make(subject.policy)
        prepared = prepare(field)
        for name, rule in RULES.items():
            row = found[f"{host}, {name}"] = {
                "own": launches(field, value, noise, rule),
                "prepared": launches(prepared, value, noise, rule),
            }

            def act(inputs: Any, rule: Any = rule) -> torch.Tensor:
                return steered_action(*inputs, rule=rule, sampler=qsteer.Euler())

            inputs = prepared, value, noise
            tables = [part for part in behind(prepare, FAR) if isinstance(part, torch.Tensor)]
            weights = tables + known(subject.policy, subject.critic, prepare, *inputs)
            run = Run(Kind(act, inputs, rule, (False, False), weights, noise.device))
            line = trace(run.act, run.buffers, [])
            step = line.calls[len(line.calls) // 2][0]
            row["compiled"] = kernels(line.parts[step])
            print(host, name, row, flush=True)
    write_json(found, args.out)


if __name__ == "__main__":
    main()
