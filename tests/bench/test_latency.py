"""The benchmark's subjects, methods, predictions and refusals. Nothing is timed."""

from typing import Any

import numpy as np
import pytest
import torch
from counts import A, H
from torch import nn

import qsteer
from qsteer.bench.latency import (
    Subject,
    count_method,
    list_single_passes,
    make_subject,
    measure,
    predict,
    steer_copy,
)
from qsteer.bench.report import as_json
from qsteer.bench.timing import Latency
from qsteer.compiling.runs import MismatchError

torch.set_num_threads(1)


@pytest.mark.usefixtures("made_up_ceilings")
class TestBenchmark:
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

    def test_views_need_cameras(self) -> None:
        with pytest.raises(ValueError, match="expected a policy with cameras"):
            make_subject("mlp", "tiny", views=True)

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
