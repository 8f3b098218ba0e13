"""Several processes do what one does: they share batches, and average gradients."""

import json
from pathlib import Path

import distilling
import pytest
import torch
from distilling import make_learner, run_python, weights
from torch import Tensor

from qsteer.training.loop import Learner, Share


def gradient(learner: Learner, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient, and the generator's state after the step."""
    learner.share = share
    learner.zero_grad()
    generator = torch.Generator().manual_seed(5)
    loss, _ = learner.loss(generator)
    loss.backward()
    grads = [p.grad.flatten() for p in learner.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(grads), generator.get_state()


@pytest.mark.parametrize(("kind", "residual"), [("meta", True), ("meta", False), ("flow", True)])
def test_shares_of_a_batch_average_to_the_whole(kind: str, residual: bool) -> None:
    model = make_learner(kind, residual)
    whole, g, state = gradient(model, Share())
    parts = [gradient(model, Share(i, 4)) for i in range(4)]
    torch.testing.assert_close(sum(part[0] for part in parts) / 4, whole)
    torch.testing.assert_close(sum(part[1] for part in parts) / 4, g, rtol=1e-5, atol=1e-6)
    assert (parts[0][1] - g).norm() > 0.1 * g.norm()  # a part is not the whole
    assert all(torch.equal(part[2], state) for part in parts)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    run_python(
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        distilling.__file__,
        tmp_path / "two",
    )
    assert {path.name for path in (tmp_path / "two").glob("process*")} == {"process 0 of 2", "process 1 of 2"}
    for kind in distilling.KINDS:
        distilling.train(kind, tmp_path / "one" / kind)
        one, two = (weights(tmp_path / n / kind) for n in ("one", "two"))
        assert all(torch.allclose(one[n], two[n], rtol=0, atol=1e-6) for n in one if n != "generator")
        assert torch.equal(one["generator"], two["generator"])
        lines = [
            [json.loads(x) for x in (tmp_path / n / kind / "metrics.jsonl").open()] for n in ("one", "two")
        ]
        for a, b in zip(*lines, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_batch_that_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three:
        num_processes, process_index, is_main_process = 3, 0, True

    monkeypatch.setattr("qsteer.training.loop.processes", lambda device: Three())
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 8"):
        distilling.train("flow", tmp_path)
