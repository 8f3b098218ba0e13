"""A distillation that is killed with SIGKILL goes on as if it had not been; broken files are refused."""

import json
from pathlib import Path

import distilling
import pytest
import torch
from distilling import run_python, weights


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    run_python(distilling.__file__, tmp_path / "parts", "kill")
    for kind in distilling.KINDS:
        parts, whole = tmp_path / "parts" / kind, tmp_path / "whole" / kind
        assert not (parts / "model.safetensors").exists()
        assert json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 12
        torch.manual_seed(1234)  # the global generator has no say
        for out in parts, whole:
            distilling.train(kind, out)
        assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
        assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        a, b = weights(parts), weights(whole)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_broken_checkpoint_is_refused(tmp_path: Path) -> None:
    distilling.train("flow", tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"expected a whole checkpoint.*delete it"):
        distilling.train("flow", tmp_path)


def test_throughput_is_kept_apart_from_the_metrics(tmp_path: Path) -> None:
    distilling.train("flow", tmp_path)
    speed, metrics = (
        [json.loads(line) for line in (tmp_path / name).open()] for name in ("speed.jsonl", "metrics.jsonl")
    )
    assert [line["step"] for line in speed] == [line["step"] for line in metrics] == [2, 4, 6, 8, 10, 12, 14]
    assert all(line["samples/s"] > 0 for line in speed)
    assert not any("samples/s" in line for line in metrics)


@pytest.fixture(params=["pi05", "smolvla"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param
