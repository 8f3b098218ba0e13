"""A run whose loss or weights are no longer finite stops, says what is known, and saves none of that."""

from pathlib import Path

import pytest
import torch
from play_data import episodes
from safetensors.torch import load_file
from training_runs import train

from qsteer.training.critic import LEARNERS


@pytest.mark.parametrize(("at", "saved"), [(3, None), (7, 5), (12, 10)])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_run_that_is_not_finite_stops(
    kind: str, at: int, saved: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, count = LEARNERS["sarsa"], 0
    loss = learner.loss

    def poisoned(self: object, generator: torch.Generator) -> object:
        nonlocal count
        count += 1
        value, info = loss(self, generator)
        if count == at:
            zero = next(self.critic.parameters()).flatten()[0] * 0
            value = value * torch.nan if kind == "loss" else value + zero.abs().sqrt()  # its slope is NaN
        return value, info

    monkeypatch.setattr(learner, "loss", poisoned)
    kept = f"last checkpoint is of step {saved}" if saved else "there is no checkpoint"
    step = at if kind == "loss" else min(at + 1, 12)
    with pytest.raises(RuntimeError, match=rf"infinity in step {step} \(loss=.*q=.*{kept}"):
        train("sarsa", episodes(), tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    if saved:
        state = load_file(tmp_path / "checkpoint.safetensors")
        assert all(t.isfinite().all() for t in state.values() if t.is_floating_point())
        monkeypatch.setattr(learner, "loss", loss)
        train("sarsa", episodes(), tmp_path)  # goes on
    else:
        assert not (tmp_path / "checkpoint.safetensors").exists()
