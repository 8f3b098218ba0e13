"""The benchmark: counted work of every method, made-up clocks, roofs by hand. Nothing is timed."""

import json
import sys
from itertools import count as numbers
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qsteer
from qsteer.bench import latency as benchmark
from qsteer.bench import timing
from qsteer.bench.counting import Passes, PassesByRows, WatchedField, count, count_into, saved_tensors
from qsteer.bench.latency import (
    Subject,
    count_method,
    list_methods,
    list_single_passes,
    make_subject,
    measure,
    predict,
    steer_copy,
    time_parts,
)
from qsteer.bench.parts import PARTS, Marks, Timed, TimedCritic, measure_parts
from qsteer.bench.report import as_json, format_report
from qsteer.bench.roofline import Ceilings, Product, Work, counted_work, measure_ceilings
from qsteer.bench.timing import Latency, peak_memory, time_calls
from qsteer.cli import main
from qsteer.evaluation.plots import plot_latency
from qsteer.maps import GlassPosterior
from qsteer.steering.compiled import MismatchError
from qsteer.testing import hosts
from qsteer.testing.lerobot import _shrink

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
torch.set_num_threads(1)
H, A = 3, 2
CPU = torch.device("cpu")
FIELD = qsteer.field(lambda x, t: torch.tanh(x.flip(1)) - x)
VALUE = qsteer.value(lambda a: -(a**2).flatten(1).sum(1))
GLASS = GlassPosterior(steps=4)

# rule, sampler, policy's (forwards, rows, backwards, rows) for one observation, the critic's
COUNTED = [
    (None, qsteer.Euler(), (10, 10, 0, 0), (0, 0, 0, 0)),
    (None, qsteer.Euler(4), (4, 4, 0, 0), (0, 0, 0, 0)),
    (qsteer.Tweedie(), qsteer.Euler(), (10, 10, 9, 9), (9, 9, 9, 9)),
    (qsteer.Tweedie(alpha=0.0), qsteer.Euler(), (10, 10, 0, 0), (0, 0, 0, 0)),
    (qsteer.Tweedie(start=0.5), qsteer.Euler(), (10, 10, 5, 5), (5, 5, 5, 5)),
    (qsteer.Tweedie(alpha="auto"), qsteer.Euler(), (10, 10, 9, 9), (18, 81, 9, 9)),
    (qsteer.Gated(qsteer.Tweedie()), qsteer.Euler(), (10, 10, 9, 9), (18, 27, 9, 9)),
    (qsteer.Negated(qsteer.Tweedie()), qsteer.Euler(), (10, 10, 9, 9), (9, 9, 9, 9)),
    (qsteer.QGF(), qsteer.Euler(), (10, 10, 0, 0), (10, 10, 10, 10)),
    (qsteer.NoisyGradient(), qsteer.Euler(), (10, 10, 0, 0), (9, 9, 9, 9)),
    (qsteer.RandomDirection(), qsteer.Euler(), (10, 10, 0, 0), (0, 0, 0, 0)),
    (qsteer.ThroughTime(), qsteer.Euler(), (1 + 45, 46, 45, 45), (9, 9, 9, 9)),
    (qsteer.Posterior(GLASS, samples=4), qsteer.Euler(), (37, 118, 36, 117), (9, 36, 9, 36)),
    (qsteer.GradientFreePosterior(GLASS, samples=4), qsteer.Euler(), (37, 118, 0, 0), (9, 36, 0, 0)),
    (None, qsteer.BestOfN(8), (10, 80, 0, 0), (1, 8, 0, 0)),
    (None, qsteer.RandomOfN(8), (10, 10, 0, 0), (0, 0, 0, 0)),
    (None, qsteer.TrustRegion(), (10, 10, 0, 0), (1, 1, 1, 1)),
    (None, qsteer.TrustRegion(beta=0.3), (10, 10, 0, 0), (2, 2, 1, 1)),
    (None, qsteer.BeamSearch(4, 4, 1), (14, 104, 0, 0), (3, 24, 1, 4)),
    (None, qsteer.BeamSearch(4, rounds=0), (10, 40, 0, 0), (2, 8, 1, 4)),
    (qsteer.Tweedie(), qsteer.KeepBest(), (20, 20, 9, 9), (11, 11, 9, 9)),
    (qsteer.Tweedie(), qsteer.BestOfN(8), (10, 80, 9, 72), (10, 80, 9, 72)),
]


def tally(passes: Passes) -> tuple[int, int, int, int]:
    return passes.forwards, passes.forward_rows, passes.backwards, passes.backward_rows


class TestCounting:
    @pytest.mark.parametrize(("rule", "sampler", "field", "value"), COUNTED)
    def test_passes_of_every_method(self, rule: Any, sampler: Any, field: tuple, value: tuple) -> None:
        for rows in (1, 2):
            cost = count(FIELD, VALUE, torch.ones(rows, H, A), rule, sampler)
            assert tally(cost.field) == tuple(n * (rows if i % 2 else 1) for i, n in enumerate(field))
            assert tally(cost.value) == tuple(n * (rows if i % 2 else 1) for i, n in enumerate(value))

    def test_passes_by_rows(self) -> None:
        cost = benchmark.Cost(PassesByRows(), PassesByRows())
        sampler = count_into(cost, qsteer.Posterior(GLASS, samples=4), qsteer.Euler())
        qsteer.sample(FIELD, VALUE, torch.ones(1, H, A), sampler=sampler)
        assert cost.field.forwards_of == {1: 10, 4: 27} and cost.field.backwards_of == {1: 9, 4: 27}
        assert cost.value.forwards_of == cost.value.backwards_of == {4: 9}
        assert tally(cost.field) == (37, 118, 36, 117)

    def test_it_says_so_in_words(self) -> None:
        cost = count(FIELD, VALUE, torch.ones(1, H, A), None, qsteer.BestOfN(8))
        assert str(cost) == "policy 10 forward 0 backward, critic 1 forward 0 backward"

    def test_only_gradients_through_the_network_count(self) -> None:
        """A network may return its input; gradients that reach the input by another way are not its own."""
        passes, x = Passes(), torch.ones(1, H, A, requires_grad=True)
        passed = passes.seen(x)
        (x**2).sum().backward()
        assert (passes.forwards, passes.backwards) == (1, 0)
        passed.sum().backward()
        assert (passes.forwards, passes.backwards) == (1, 1)

    def test_counting_changes_nothing(self) -> None:
        """The host's own grid and the critic's mask are seen through the counters."""
        seen: list[float] = []
        clock = qsteer.Clock(noise=1.0, action=0.0, sign=-1, steps=4)
        field = qsteer.field(lambda x, t: seen.append(float(t[0])) or -x, clock=clock)
        mask = torch.tensor([[1.0, 0.0]] * H)
        asked: list[Tensor] = []
        value = qsteer.value(lambda a: asked.append(a.detach()) or a.flatten(1).sum(1), mask=mask)
        noise = torch.ones(1, H, A)
        qsteer.sample(field, value, noise, rule=qsteer.Tweedie(alpha=0.5))
        plain, times, actions = list(asked), list(seen), asked.clear() or seen.clear()
        count(field, value, noise, qsteer.Tweedie(alpha=0.5))
        assert actions is None and times == seen
        assert all(torch.equal(a, b) for a, b in zip(plain, asked, strict=True))
        assert not torch.equal(plain[-1][..., 0], plain[-1][..., 1])  # the mask does something

    def test_a_rule_without_a_value_is_not_left_out(self) -> None:
        with pytest.raises(ValueError, match="expected a value for the rule"):
            count(FIELD, None, torch.ones(1, H, A), qsteer.Tweedie())
        assert count(FIELD, None, torch.ones(1, H, A)).field.forwards == 10

    def test_autograd_keeps_only_what_is_differentiated(self) -> None:
        """Of a linear policy with frozen weights a backward needs the weight, never its input."""
        layer, head = (nn.Linear(H * A, H * A, bias=False).requires_grad_(False) for _ in range(2))
        field = qsteer.field(lambda x, t: layer(x.flatten(1)).view_as(x))
        value = qsteer.value(lambda a: head(a.flatten(1)).sum(1))
        kept = {}
        for rule in (None, qsteer.QGF(), qsteer.Tweedie(clip=None)):
            with saved_tensors() as saved:
                qsteer.sample(field, value, torch.ones(1, H, A), rule=rule)
            kept[type(rule)] = saved
        weight = 4 * (H * A) ** 2
        assert kept[type(None)].tensors == kept[type(None)].bytes == 0
        assert (kept[qsteer.QGF].tensors, kept[qsteer.QGF].bytes) == (10, 10 * weight)
        factors = 9 * 4  # 1 - t of each guided step
        assert kept[qsteer.Tweedie].bytes == 9 * 2 * weight + factors

    @pytest.mark.parametrize(
        ("rule", "most"), [(None, 41), (qsteer.QGF(), 447), (qsteer.Tweedie(), 495)], ids=str
    )
    def test_operators_of_an_action_do_not_grow(self, rule: Any, most: int) -> None:
        """Each is an allocation or two, and on a device a launch."""
        field, value = qsteer.field(lambda x, t: -x), qsteer.value(lambda a: -(a**2).flatten(1).sum(1))
        with counted_work() as work:
            qsteer.sample(field, value, torch.randn(1, 5, 2), rule=rule)
        assert 0 < work.operators <= most


class TestTiming:
    def test_every_round_has_every_call_in_an_order_of_its_own(self) -> None:
        def run(seed: int) -> list[str]:
            order: list[str] = []
            calls = {name: lambda name=name: order.append(name) for name in "abcd"}
            times = time_calls(calls, repeats=8, warmup=2, seed=seed)
            assert {len(t.times) for t in times.values()} == {8} and list(times) == list("abcd")
            return order

        rounds = [run(0)[i : i + 4] for i in range(0, 40, 4)]
        assert all(sorted(one) == list("abcd") for one in rounds)
        assert len({tuple(one) for one in rounds}) > 4
        assert run(0) == run(0) != run(1)

    def test_times_are_the_clocks(self) -> None:
        now = [0.0]
        spent = {"a": 0.25, "b": 0.5}
        calls = {name: lambda s=s: now.__setitem__(0, now[0] + s) for name, s in spent.items()}
        times = time_calls(calls, repeats=5, timer=lambda: now[0])
        for name, seconds in spent.items():
            assert times[name].times.tolist() == times[name].wall.tolist() == [1e3 * seconds] * 5

    def test_quantiles(self) -> None:
        found = Latency(np.arange(101.0))
        assert (found.p50, found.p95, found.p99) == (50, 95, 99)

    def test_ratio_pairs_the_rounds(self) -> None:
        drift = np.array([1.0, 10.0, 2.0])
        assert Latency(3 * drift).ratio(Latency(drift)) == pytest.approx(3)
        assert Latency(3 * drift).against(Latency(drift)) == pytest.approx((3, 3, 3))
        with pytest.raises(ValueError, match="got 2 and 1"):
            Latency(np.ones(2)).ratio(Latency(np.ones(1)))
        with pytest.raises(ValueError, match="repeats"):
            time_calls({"call": lambda: None}, repeats=0)
        with pytest.raises(ValueError, match="level"):
            Latency(drift).against(Latency(drift), level=95.0)

    def test_the_interval_is_that_of_the_median(self) -> None:
        """Of a resample of an odd number, the median's law is known: an order statistic's."""
        from scipy.stats import binom

        ratios = np.arange(1.0, 22.0)
        found = Latency(ratios).against(Latency(np.ones(21)), samples=20_000)
        at_most = binom.sf(10, 21, np.arange(1, 22) / 21)  # P(median of a resample <= k-th of 21)
        assert found.ratio == 11
        assert found.low == 1 + np.searchsorted(at_most, 0.025)
        assert found.high == 1 + np.searchsorted(at_most, 0.975)

    def test_memory_is_counted_on_cuda_alone(self) -> None:
        assert peak_memory(lambda: torch.ones(9), CPU) is None

    @pytest.mark.gpu
    def test_events_and_memory_on_cuda(self) -> None:
        x = torch.ones(2**20, device="cuda")
        found = time_calls({"a": lambda: x + 1, "b": lambda: [x + 1 for _ in range(50)]}, repeats=9)
        assert timing.on_cuda() and (found["a"].times > 0).all()
        assert (found["a"].wall >= 0.9 * found["a"].times).all()
        assert found["b"].p50 > found["a"].p50
        assert peak_memory(lambda: x + 1, x.device) == 4 * 2**20


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


class TestRoofline:
    def test_work_by_hand(self) -> None:
        first, last = nn.Linear(3, 5).requires_grad_(False), nn.Linear(5, 2).requires_grad_(False)
        x = torch.randn(7, 3, requires_grad=True)
        with counted_work() as work:
            y = last(first(x))
            torch.autograd.grad(y, x, torch.ones(7, 2))
        forward = [(2 * 7 * 3 * 5, 7 * 3 + 3 * 5 + 5 + 7 * 5), (2 * 7 * 5 * 2, 7 * 5 + 5 * 2 + 2 + 7 * 2)]
        backward = [(2 * 7 * 2 * 5, 7 * 2 + 2 * 5 + 7 * 5), (2 * 7 * 5 * 3, 7 * 5 + 5 * 3 + 7 * 3)]
        assert [(p.flops, p.bytes) for p in work.products] == [(f, 4 * n) for f, n in forward + backward]
        assert [p.name for p in work.products] == ["addmm", "addmm", "mm", "mm"]
        assert work.flops == 2 * 2 * 7 * (3 * 5 + 5 * 2) and work.dtypes == [torch.float32]

    def test_an_expanded_input_is_there_once(self) -> None:
        x = torch.randn(1, 4, 3).expand(6, 4, 3)
        with counted_work() as work:
            torch.bmm(x, torch.randn(6, 3, 5))
        assert work.bytes == 4 * (4 * 3 + 6 * 3 * 5 + 6 * 4 * 5)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_flops_are_those_of_torchs_counter(self, mode: Any) -> None:
        """On attention, a convolution and products, in inference mode too, where linear stays whole."""
        net, conv = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Conv1d(5, 3, 2)

        def run() -> None:
            net(conv(torch.randn(2, 5, 9)))

        with mode():
            with FlopCounterMode(display=False) as theirs:
                run()
            with counted_work() as ours:
                run()
        attention = [p for p in ours.products if "scaled_dot_product" in p.name]
        extra = sum(p.flops for p in attention if p.name.endswith("for_cpu"))
        assert ours.flops == theirs.get_total_flops() + extra and ours.flops > extra

    def test_the_roof_is_the_slower_of_the_two_of_each_product(self) -> None:
        half = torch.bfloat16
        work = Work([Product("mm", torch.float32, 100, 10), Product("mm", half, 100, 80)])
        ceilings = Ceilings({torch.float32: 50.0, half: 200.0}, 20.0)
        assert ceilings.seconds(work) == 100 / 50 + 80 / 20

    def test_ceilings_are_measured(self) -> None:
        found = measure_ceilings(CPU, [torch.float32], rounds=1)
        assert found.copy > 1e6 and found.matmul[torch.float32] > 1e6
        with pytest.raises(ValueError, match="rounds"):
            measure_ceilings(CPU, [], rounds=0)

    def test_a_backward_of_a_frozen_policy_makes_no_gradient_of_weights(self) -> None:
        """Tweedie's work beyond QGF's is 9 backwards of as many FLOPs as the forwards, not twice as many."""
        found = make_subject("mlp", "tiny", chunk=4)
        counted = {}
        for rule in (None, qsteer.QGF(start=0.05), qsteer.Tweedie()):
            with counted_work() as work:
                steer_copy(found, (rule, qsteer.Euler()))()
            counted[type(rule)] = work
        widths = [20 + 16, 64, 64, 64, 20]
        forward = sum(2 * i * o for i, o in pairwise(widths))
        more = counted[qsteer.Tweedie].flops - counted[qsteer.QGF].flops
        assert more == 9 * forward  # the first layer's gradient is of chunk and time features together
        assert counted[type(None)].flops == 10 * forward + critic_encoding(found) + 2 * 28 * 64


def critic_encoding(found: Subject) -> int:
    """FLOPs of the critic's bind: the state's half of the first layer, of each member."""
    config = found.critic.config
    return 2 * config.members * config.obs_dim * config.hidden[0]


class TestHosts:
    def test_full_sizes_are_lerobots_own(self) -> None:
        """Without memory: on the meta device."""
        half = torch.bfloat16
        for host, millions, dtype in (("pi05", 4143, half), ("pi0", 4028, half), ("smolvla", 450, None)):
            policy = hosts.make(host, "full", cameras=3, chunk=50, device="meta", dtype=dtype)
            assert {p.device.type for p in (*policy.parameters(), *policy.buffers())} == {"meta"}
            assert sum(p.numel() for p in policy.parameters()) // 10**6 == millions
            config = policy.config
            assert (config.chunk_size, config.n_action_steps, config.max_action_dim) == (50, 50, 32)
            assert len(config.image_features) == 3
            if host != "smolvla":
                assert config.image_resolution == (224, 224)
                expert = policy.model.paligemma_with_expert.gemma_expert.model
                assert len(expert.layers) == 18 and expert.layers[0].mlp.up_proj.weight.dtype == half
                assert policy.model.action_in_proj.weight.dtype == torch.float32

    def test_bfloat16_is_where_lerobot_has_it(self) -> None:
        from lerobot.policies.pi05 import modeling_pi05
        from lerobot.policies.pi05.configuration_pi05 import PI05Config

        options = {**hosts.TOY.options(), "image_resolution": (28, 28), "dtype": "bfloat16", "device": "cpu"}
        with _shrink(modeling_pi05, 16, 2):
            theirs = modeling_pi05.PI05Policy(PI05Config(**options))
        ours = hosts.pi05(dtype=torch.bfloat16)
        kinds = [
            {name: t.dtype for name, t in (*p.named_parameters(), *p.named_buffers())} for p in (ours, theirs)
        ]
        assert kinds[0] == kinds[1] and set(kinds[0].values()) >= {torch.bfloat16, torch.float32}
        buffers = dict(theirs.named_buffers())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())
        assert torch.get_default_dtype() == torch.float32

    @pytest.mark.parametrize("host", hosts.HOSTS)
    def test_what_is_asked_for_is_what_is_made(self, host: str) -> None:
        policy = hosts.make(host, "tiny", cameras=2, chunk=7)
        assert not any(p.requires_grad for p in policy.parameters())
        observation = hosts.batch(policy, rows=2)
        assert sum("image" in name for name in observation) == (0 if host == "mlp" else 2)
        assert policy.predict_action_chunk(observation).shape[:2] == (2, 7)

    def test_mistakes(self) -> None:
        for options, says in (
            ({"host": "pi06"}, "expected one of mlp, pi0, pi05, smolvla"),
            ({"host": "pi05", "size": "big"}, "tiny, small, full"),
            ({"host": "pi05", "cameras": 0}, "at least 1 each"),
            ({"host": "smolvla", "dtype": torch.bfloat16}, "for pi0 and pi05"),
        ):
            with pytest.raises(ValueError, match=says):
                hosts.make(**options)
        with pytest.raises(ValueError, match="expected a policy with cameras"):
            make_subject("mlp", "tiny", views=True)

    def test_without_lerobot_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "lerobot.policies.pi05", None)
        with pytest.raises(ModuleNotFoundError, match=r"qsteer\[lerobot\]"):
            hosts.pi05()


class TestBenchmark:
    @pytest.fixture(autouse=True)
    def known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A made-up device, for measuring one takes seconds."""
        ceilings = Ceilings({torch.float32: 1e9, torch.bfloat16: 1e9}, 1e9)
        monkeypatch.setattr(benchmark, "measure_ceilings", lambda *_: ceilings)

    def test_a_twin_is_steered_alone_and_shares_the_weights(self) -> None:
        found = make_subject("pi05", "tiny", cameras=1, chunk=6)
        found.policy.requires_grad_(True)
        torch.manual_seed(0)
        base = found.action()
        call = steer_copy(found, (qsteer.Tweedie(alpha=0.5), qsteer.Euler()))
        torch.manual_seed(0)
        assert not torch.equal(call(), base)
        torch.manual_seed(0)
        assert torch.equal(found.action(), base)
        theirs = call.func.__self__.policy
        pairs = list(zip(found.policy.parameters(), theirs.parameters(), strict=True))
        assert all(p is not q and p.data_ptr() == q.data_ptr() for p, q in pairs)
        assert all(p.requires_grad and not q.requires_grad for p, q in pairs)

    def test_views_are_qpilots_critic(self) -> None:
        found = make_subject("pi05", "tiny", cameras=2, chunk=6, views=True)
        assert found.critic.config.members == 10 and len(found.critic.config.views) == 2
        value = found.open().value
        assert value(torch.zeros(1, 6, 5)).shape == (1,)

    def test_prediction_is_stock_and_the_counted_passes(self) -> None:
        found = make_subject("mlp", "tiny", chunk=4)
        euler = qsteer.Euler()
        stock, tweedie, best = (
            count_method(found, method)[0]
            for method in ((None, euler), (qsteer.Tweedie(), euler), (None, qsteer.BestOfN(3)))
        )
        unit = {
            "('policy', 1, False)": 1.0,
            "('policy', 1, True)": 5.0,
            "('policy', 3, False)": 2.0,
            "('critic', 1, True)": 7.0,
            "('critic', 3, False)": 11.0,
            "bind": 13.0,
        }
        calls = list_single_passes(found, [stock, tweedie, best])
        assert calls.keys() == unit.keys()
        for call in calls.values():
            call()
        times = {name: Latency(np.array([ms])) for name, ms in (unit | {"stock": 100.0}).items()}
        assert predict(tweedie, stock, times) == 100 - 10 + 13 + (1 + 9 * 5) + 9 * 7
        assert predict(best, stock, times) == 100 - 10 + 13 + 10 * 2 + 11

    def test_the_whole_report(self, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        found = make_subject("mlp", "tiny", chunk=4)
        chosen = {name: list_methods(found)[name] for name in ("Tweedie", "Posterior(map), N=4")}
        report = measure(found, chosen, repeats=2, warmup=0)
        told = json.loads(json.dumps(as_json(report)))
        by_name = {method["name"]: method for method in told["methods"]}
        assert torch.get_num_threads() == threads == told["conditions"]["threads"]
        tweedie, stock = by_name["Tweedie"], by_name["stock"]
        assert tweedie["passes"]["policy"]["backwards"] == 9 and stock["passes"]["policy"]["forwards"] == 10
        assert stock["ratio"]["stock"] == [1, 1, 1] and len(tweedie["times_ms"]) == 2
        assert tweedie["predicted_ms"] > 0 and by_name["Posterior(map), N=4"]["predicted_ms"] is None
        assert tweedie["flops"] > stock["flops"] and tweedie["peak_memory_bytes"] is None
        assert tweedie["ratio"]["roofline"] == pytest.approx(tweedie["p50_ms"] / stock["roofline_ms"])
        assert stock["saved_tensors"]["tensors"] == 0 < tweedie["saved_tensors"]["tensors"]
        text = format_report(told)
        assert all(name in text for name in (*by_name, "/ stock", "/ fast", "/ roofline", *PARTS))
        assert "unsteered, static" in by_name and "left out" not in text
        assert by_name["unsteered, static"]["ratio"]["fast"] == [1, 1, 1]
        picture = plot_latency(told, tmp_path / "latency.png")
        assert Image.open(picture).width > 1000
        with pytest.raises(ValueError, match="name arms"):
            plot_latency({"methods": [stock]}, tmp_path / "none.png")

    def test_what_cannot_be_compiled_is_left_out_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[Any] = []

        def steer(
            policy: Any, critic: Any, rule: Any = None, *, sampler: Any = None, compile: Any = None
        ) -> Any:
            asked.append((rule, compile))
            if rule is not None and compile:
                raise failure("capture: refused\nin many words")
            return real(policy, critic, rule, sampler=sampler)

        real, failure = qsteer.steer, MismatchError
        monkeypatch.setattr(qsteer, "steer", steer)
        found = make_subject("mlp", "tiny", chunk=4)
        chosen = {"Tweedie": (qsteer.Tweedie(), qsteer.Euler()), "best": (None, qsteer.BestOfN(2))}
        report = measure(found, chosen, mode="static", repeats=2, warmup=0)
        assert report.left_out == {"Tweedie": "capture: refused"}
        assert [row.name for row in report.rows] == ["best"] and report.fast is not None
        assert (None, "static") in asked and (qsteer.Tweedie(), "static") in asked
        assert as_json(report)["methods"][2]["ratio"]["fast"][0] > 0
        failure = RuntimeError  # of CUDA: torch is in no state to go on
        with pytest.raises(RuntimeError, match="refused"):
            measure(found, chosen, mode="static", repeats=2, warmup=0)

    def test_a_policy_that_fails_is_not_measured(self) -> None:
        policy = qsteer.adapters.PlainPolicy(lambda x, t, obs: x / 0, H, A)
        policy.weight = nn.Parameter(torch.ones(1))
        critic = qsteer.Critic(qsteer.CriticConfig(obs_dim=2, action_dim=A, horizon=H))
        with pytest.raises(ValueError, match="expected finite actions"):
            measure(Subject(policy, critic, {"observation.state": torch.ones(1, 2)}), {})

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        out, plot, threads = tmp_path / "a.json", tmp_path / "a.png", torch.get_num_threads()
        command = ["bench", "latency", "--host", "mlp", "--size", "tiny", "--chunk", "4", "--repeats", "2"]
        options = ["--warmup", "0", "--cpu-time", "--arms", "base", "qgf=0.1", "beam-search-map=0.1"]
        main([*command, *options, "--out", str(out), "--plot", str(plot)])
        told = json.loads(out.read_text())
        assert [method["name"] for method in told["methods"]][-3:] == [
            "base",
            "qgf=0.1",
            "beam-search-map=0.1",
        ]
        assert plot.exists() and "ms per action" in capsys.readouterr().out
        assert torch.get_num_threads() == threads
        with pytest.raises(SystemExit, match="qsteer bench: cameras, chunk: expected at least 1"):
            main([*command[:-4], "--chunk", "0"])

    def test_the_example(self, capsys: pytest.CaptureFixture[str]) -> None:
        import benchmark_latency

        benchmark_latency.main(["--repeats", "2"])
        out = capsys.readouterr().out
        assert all(name in out for name in ("PlainPolicy", "Tweedie", "QGF", "BestOfN(8)"))

    @pytest.mark.gpu
    def test_on_cuda(self) -> None:
        found = make_subject("pi05", "tiny", cameras=2, chunk=6, device="cuda", dtype=torch.bfloat16)
        method = {"Tweedie": (qsteer.Tweedie(), qsteer.Euler())}
        report, graphs = (measure(found, method, mode=m, repeats=3, warmup=1) for m in (None, "graph"))
        (tweedie,) = report.rows
        assert not graphs.left_out and graphs.rows[0].memory > 0
        assert report.stock.memory > 0 and tweedie.memory > 0
        assert report.conditions["precisions"] == ["bfloat16", "float32"]
        assert {torch.bfloat16, torch.float32} <= set(tweedie.work.dtypes)
        assert tweedie.parts["policy backward"].p50 > 0

    def test_a_watched_field_is_still_one(self) -> None:
        assert isinstance(WatchedField(FIELD, Passes().around), qsteer.Field)
