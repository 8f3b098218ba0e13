"""Passes, rows and saved tensors of every method, counted."""

from typing import Any

import pytest
import torch
from counts import COUNTED, FIELD, GLASS, VALUE, A, H
from torch import Tensor, nn

import qsteer
from qsteer.bench import latency as benchmark
from qsteer.bench.counting import Passes, PassesByRows, WatchedField, count, count_into, saved_tensors
from qsteer.bench.roofline import counted_work

torch.set_num_threads(1)


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
        assert kept[qsteer.Tweedie].bytes == 9 * 2 * weight

    @pytest.mark.parametrize(
        ("rule", "most"), [(None, 41), (qsteer.QGF(), 447), (qsteer.Tweedie(), 495)], ids=str
    )
    def test_operators_of_an_action_do_not_grow(self, rule: Any, most: int) -> None:
        """Each is an allocation or two, and on a device a launch."""
        field, value = qsteer.field(lambda x, t: -x), qsteer.value(lambda a: -(a**2).flatten(1).sum(1))
        with counted_work() as work:
            qsteer.sample(field, value, torch.randn(1, 5, 2), rule=rule)
        assert 0 < work.operators <= most

    def test_a_watched_field_is_still_one(self) -> None:
        assert isinstance(WatchedField(FIELD, Passes().around), qsteer.Field)
