"""The example that predicts how many environments a learner takes: its model, on parts that are known."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import bench_scaling as example

LINES = {
    "send": {"fixed": 1e-3, "actor": 3e-4, "env": 1e-5},
    "receive": {"fixed": 2e-3, "actor": 1e-4, "env": 2e-6},
    "store": {"fixed": 4e-4, "env": 1e-6},
    "act": {"fixed": 2e-2, "env": 3e-4},
    "update": {"fixed": 2e-2},
}


def measured(num_envs: int, actors: int) -> dict[str, object]:
    counts = {"fixed": 1, "actor": actors, "env": num_envs}
    parts = {name: sum(counts[k] * v for k, v in line.items()) for name, line in LINES.items()}
    return {"num_envs": num_envs, "actors": actors, "cpu_seconds": parts}


def test_lines_are_found_again() -> None:
    found = example.fit([measured(n, min(n, 4)) for n in (1, 4, 16, 64, 256)])
    assert found.keys() == LINES.keys()
    for name, line in LINES.items():
        assert found[name] == pytest.approx(line)


def test_the_longer_of_simulators_and_learner_counts() -> None:
    parts = {"act": 5.0, "send": 1.0, "store": 2.0, "simulate": 9.0, "receive": 0.5, "update": 1.0}
    assert example.predict(parts, num_envs=4, updates_per_step=1.0, horizon=5) == 1 + 1 + 2 + 9
    assert example.predict(parts, num_envs=16, updates_per_step=1.0, horizon=5) == 1 + 1 + 2 + 16.5


def test_many_environments_saturate_the_learner() -> None:
    few, many, more = (example.extrapolate(LINES, n, 1.0, 5, 0.02)["rows/s"] for n in (1, 1024, 4096))
    assert few < many < more < 1 / 0.02 and more == pytest.approx(1 / (0.02 + 0.000413 + 6e-5), rel=1e-2)
