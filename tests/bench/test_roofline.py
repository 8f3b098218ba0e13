"""Work by hand, and roofs of made-up devices."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qsteer
from qsteer.bench.latency import Subject, make_subject, steer_copy
from qsteer.bench.roofline import Ceilings, Product, Work, counted_work, measure_ceilings

torch.set_num_threads(1)
CPU = torch.device("cpu")


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
