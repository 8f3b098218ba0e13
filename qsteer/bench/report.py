"""The benchmark's report as JSON and as text."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qsteer.bench.counting import Passes
from qsteer.bench.latency import Report, Row
from qsteer.bench.parts import PARTS
from qsteer.bench.timing import Latency


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as JSON: times in milliseconds, of every round too, FLOPs, bytes, ratios.

    ``ratio`` has each of the three denominators: ``[ratio, low, high]`` beside the stock host and our own
    unsteered path (95 % bootstrap interval over rounds), and a number beside the roofline of the unsteered
    action. ``roofline_ms`` is that of the method's own work.
    """
    ceilings = report.ceilings
    measured = [report.stock, *([report.fast] if report.fast else []), *report.rows]
    return {
        "conditions": report.conditions,
        "ceilings": {
            "matmul_flop_per_s": {str(d).removeprefix("torch."): r for d, r in ceilings.matmul.items()},
            "copy_byte_per_s": ceilings.copy,
        },
        "left_out": report.left_out,
        "methods": [_report_row(report, row) for row in measured],
    }


def _report_row(report: Report, row: Row) -> dict[str, Any]:
    unsteered = 1e3 * report.ceilings.seconds(report.stock.work)
    fast = report.fast
    return {
        "name": row.name,
        **_list_quantiles(row.latency),
        "times_ms": [round(float(t), 4) for t in row.latency.times],
        "wall_p50_ms": None if row.latency.wall is None else Latency(row.latency.wall).p50,
        "ratio": {
            "stock": list(row.latency.against(report.stock.latency)),
            "fast": None if fast is None else list(row.latency.against(fast.latency)),
            "roofline": row.latency.p50 / unsteered if unsteered else None,
        },
        "predicted_ms": row.predicted,
        "roofline_ms": 1e3 * report.ceilings.seconds(row.work),
        "flops": row.work.flops,
        "bytes": row.work.bytes,
        "operators": row.work.operators,
        "saved_tensors": asdict(row.saved),
        "peak_memory_bytes": row.memory,
        "passes": {
            "policy": _list_passes(row.cost.field),
            "critic": _list_passes(row.cost.value),
            "map": _list_passes(row.cost.map),
        },
        "parts": {part: _list_quantiles(spent) for part, spent in row.parts.items()},
    }


def _list_quantiles(latency: Latency) -> dict[str, float]:
    return {"p50_ms": latency.p50, "p95_ms": latency.p95, "p99_ms": latency.p99}


def _list_passes(passes: Passes) -> dict[str, int]:
    names = ("forwards", "forward_rows", "backwards", "backward_rows")
    return {name: getattr(passes, name) for name in names}


def format_report(report: Mapping[str, Any]) -> str:
    """Return a report, as :func:`as_json` makes it, as text: the whole action, its work, and its parts.

    Work and parts are those of the methods without compilation, and were measured apart: the parts' times
    include the marks between them.
    """
    methods = report["methods"]
    steered = [method for method in methods if method["parts"]]
    return "\n\n".join(
        [
            _format_conditions(report),
            _format_block("ms per action", _WHOLE, methods),
            _format_block("counted, per action", _WORK, [methods[0], *steered]),
            _format_block("parts, ms, p50", _PARTS, steered),
            *(f"left out: {name}: {reason}" for name, reason in report["left_out"].items()),
        ]
    )


def _format_conditions(report: Mapping[str, Any]) -> str:
    c, rates = report["conditions"], report["ceilings"]
    matmul = ", ".join(
        f"{dtype} products {rate / 1e12:.3g} TFLOP/s" for dtype, rate in rates["matmul_flop_per_s"].items()
    )
    return (
        f"{c['policy']}, {c['parameters'] / 1e6:.4g} M parameters in {' and '.join(c['precisions'])}, "
        f"{len(c['images'])} cameras, noise {tuple(c['noise'])}\n"
        f"{c['device']}, {c['threads']} threads, torch {c['torch']}, compile={c['compile']}, "
        f"{c['repeats']} rounds\n"
        f"measured best: {matmul}, copy {rates['copy_byte_per_s'] / 1e9:.3g} GB/s"
    )


type _Columns = Mapping[str, tuple[int, Any]]


def _format_block(title: str, columns: _Columns, methods: list[Any]) -> str:
    """Return one line per method below the columns' names; a column has a width and ``method -> text``."""
    head = f"{title:<26}" + "".join(f"{name:>{width}}" for name, (width, _) in columns.items())
    lines = [
        f"{method['name']:<26}" + "".join(f"{cell(method):>{width}}" for width, cell in columns.values())
        for method in methods
    ]
    return "\n".join([head, *lines])


def _format_number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _format_interval(ratio: list[float] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})"


def _format_excess(method: Mapping[str, Any]) -> str:
    predicted = method["predicted_ms"]
    return "" if predicted is None else f"{method['p50_ms'] / predicted:.2f}"


def _read_passes(network: str, direction: str) -> Any:
    return lambda m: f"{m['passes'][network][direction + 's']} ({m['passes'][network][direction + '_rows']})"


_WHOLE: _Columns = {
    "p50": (9, lambda m: _format_number(m["p50_ms"])),
    "p95": (9, lambda m: _format_number(m["p95_ms"])),
    "p99": (9, lambda m: _format_number(m["p99_ms"])),
    "wall p50": (10, lambda m: _format_number(m["wall_p50_ms"])),
    "/ stock (95 %)": (24, lambda m: _format_interval(m["ratio"]["stock"])),
    "/ fast (95 %)": (24, lambda m: _format_interval(m["ratio"]["fast"])),
    "/ roofline": (11, lambda m: _format_number(m["ratio"]["roofline"], 1)),
    "predicted": (11, lambda m: _format_number(m["predicted_ms"])),
    "p50 / it": (9, _format_excess),
    "MB": (8, lambda m: _format_number(None if (b := m["peak_memory_bytes"]) is None else b / 1e6, 0)),
}
"""Wall: by the host's clock; the others are the device's, where it has events. Predicted: what the counted
passes take by themselves. MB: on the device, beyond policy and critic."""

_WORK: _Columns = {
    "policy fwd": (12, _read_passes("policy", "forward")),
    "bwd": (10, _read_passes("policy", "backward")),
    "critic fwd": (12, _read_passes("critic", "forward")),
    "bwd ": (10, _read_passes("critic", "backward")),
    "map fwd": (10, _read_passes("map", "forward")),
    "bwd  ": (10, _read_passes("map", "backward")),
    "GFLOP": (10, lambda m: _format_number(m["flops"] / 1e9, 3)),
    "GB": (8, lambda m: _format_number(m["bytes"] / 1e9, 3)),
    "roofline": (10, lambda m: _format_number(m["roofline_ms"])),
    "operators": (11, lambda m: str(m["operators"])),
    "saved MB": (10, lambda m: _format_number(m["saved_tensors"]["bytes"] / 1e6, 1)),
}
"""Passes, and rows in brackets; roofline in ms."""

_PARTS: _Columns = {
    part: (max(10, len(part) + 2), lambda m, part=part: _format_number(m["parts"][part]["p50_ms"]))
    for part in (*PARTS, "whole")
}
