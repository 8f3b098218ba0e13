"""The parts of an action, under a timer that only networks move."""

from itertools import count as numbers
from typing import Any

import pytest
import torch
from counts import COUNTED, A, H
from torch import Tensor, nn

import qsteer
from qsteer.bench import latency as benchmark
from qsteer.bench.latency import make_subject, steer_copy, time_parts
from qsteer.bench.parts import PARTS, Marks, Timed, TimedCritic, measure_parts
from qsteer.bench.timing import time_calls

torch.set_num_threads(1)
CPU = torch.device("cpu")


class Ticking:
    """A clock that stands still but for what networks take, and a network that takes some of it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, forward: float, backward: float) -> Any:
        clock = self

        class Taking(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                clock.now += forward
                return 0.5 * x

            @staticmethod
            def backward(ctx: Any, g: Tensor) -> Any:
                clock.now += backward
                return 0.5 * g

        return Taking.apply


class Slow(nn.Module):
    """A critic whose encoder and network take known times."""

    def __init__(self, clock: Ticking) -> None:
        super().__init__()
        self.clock, self.net = clock, clock.takes(4.0, 8.0)

    def bind(self, obs: Tensor) -> Any:
        self.clock.now += 16.0
        return qsteer.value(lambda a: self.net(a).flatten(1).sum(1))


class TestParts:
    @pytest.mark.parametrize(("rule", "sampler", "field", "value"), COUNTED)
    def test_each_part_gets_what_its_passes_take(
        self, rule: Any, sampler: Any, field: tuple, value: tuple
    ) -> None:
        clock = Ticking()
        velocity, critic = clock.takes(1.0, 2.0), Slow(clock)
        observed = qsteer.adapters.PlainPolicy(lambda x, t, obs: velocity(x), H, A)

        def action(marks: Marks) -> Any:
            timed = Timed.of(rule, sampler, marks)
            qsteer.steer(observed, TimedCritic(critic, marks), timed)

            def call() -> Tensor:
                clock.now += 32.0  # the prefix
                chunk = observed.predict_action_chunk(torch.ones(1))
                clock.now += 64.0  # the host's own, afterwards
                return chunk

            return call

        found = measure_parts(action, device=CPU, repeats=2, warmup=1, timer=clock)
        assert tuple(found) == (*PARTS, "whole")
        spent = {part: times.times.tolist() for part, times in found.items()}
        expected = {
            "prefix": 32.0,
            "denoising": field[0] * 1.0,
            "policy backward": field[2] * 2.0,
            "critic": 16.0 + value[0] * 4.0 + value[2] * 8.0,
            "map": 0.0,
            "guidance": 64.0,
        }
        assert spent == {
            **{part: [1e3 * seconds] * 2 for part, seconds in expected.items()},
            "whole": [1e3 * sum(expected.values())] * 2,
        }

    def test_maps_are_a_part_of_their_own(self) -> None:
        """Every reading of the clock is a tick later: with n of them, the parts add up to n - 1 ticks."""
        found = make_subject("mlp", "tiny", chunk=4)
        meta, flow = benchmark.make_maps(found)
        ticks = numbers()
        for rule, sampler in (
            (qsteer.Posterior(meta, samples=2), qsteer.Euler()),
            (None, qsteer.BeamSearch(2, 2, 1, flow_map=flow)),
        ):
            started = next(ticks)
            parts = time_parts(found, (rule, sampler), repeats=1, warmup=0, timer=lambda: float(next(ticks)))
            assert parts["map"].p50 > 0
            assert (parts["policy backward"].p50 > 0) == (rule is not None)
            read = next(ticks) - started - 1
            assert parts["whole"].p50 == pytest.approx(1e3 * (read - 1))

    def test_timing_changes_no_action(self) -> None:
        found = make_subject("mlp", "tiny", chunk=4)
        method = (qsteer.Tweedie(), qsteer.BestOfN(2))
        marks = Marks(lambda: 0.0)
        timed = steer_copy(found, (None, Timed.of(*method, marks)), critic=TimedCritic(found.critic, marks))
        torch.manual_seed(0)
        plain = steer_copy(found, method)()
        torch.manual_seed(0)
        with marks.part("prefix"):
            assert torch.equal(timed(), plain)
        assert not marks.open

    @pytest.mark.gpu
    def test_on_cuda_parts_are_of_the_whole(self) -> None:
        found = make_subject("mlp", "small", device="cuda")
        parts = time_parts(found, (qsteer.Tweedie(), qsteer.Euler()), repeats=5)
        assert all(parts[part].p50 > 0 for part in PARTS if part != "map")
        whole = time_calls({"a": steer_copy(found, (qsteer.Tweedie(), qsteer.Euler()))}, repeats=5)["a"]
        assert 0.5 * whole.p50 < parts["whole"].p50 < 4 * whole.p50
