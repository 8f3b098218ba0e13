"""One training loop: seeded, resumable to the bit, with atomic checkpoints and a metrics stream.

A run directory holds ``checkpoint.safetensors`` (weights, optimiser state, generator state; step and identity
of the run as JSON in its header) and ``metrics.jsonl``. A run that was killed and started again gives the
weights and the metrics of a run that was not.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT, METRICS = "checkpoint.safetensors", "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how to optimise.

    Attributes:
        steps: gradient steps.
        batch_size: transitions per step.
        learning_rate: of Adam.
        gradient_clip: largest global gradient norm; ``None`` does not clip.
        seed: of initial weights, batches and noise.
        log_every: steps between lines of metrics, and between synchronisations with an accelerator.
        checkpoint_every: steps between checkpoints.
        evaluate_every: steps between held-out evaluations, for learners that have one; a multiple of
            ``log_every``.
        warmup: steps in which the learning rate grows from zero.
    """

    steps: int
    batch_size: int = 256
    learning_rate: float = 3e-4
    gradient_clip: float | None = 1.0
    seed: int = 0
    log_every: int = 500
    checkpoint_every: int = 5000
    evaluate_every: int = 5000
    warmup: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected more than 0, got {value}")

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(parameters, self.learning_rate, fused=True)


class Learner(nn.Module, ABC):
    """What the loop optimises (its trainable parameters) and what a checkpoint keeps (its state dict)."""

    @abstractmethod
    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch and return the loss and what to log; all randomness comes from ``generator``."""

    def after_step(self) -> None:
        """Run after every optimiser step: move averages."""

    def evaluate(self) -> dict[str, float]:
        """Return held-out metrics; drawn from a generator of its own, or training would depend on it."""
        return {}


def fit(
    learner: Learner, out: Path, training: Training, identity: Mapping[str, Any], *, progress: bool
) -> None:
    """Train ``learner`` in ``out`` until ``training.steps``, from the checkpoint there if there is one.

    Args:
        learner: freshly built, on its device.
        out: run directory.
        training: how long and how to optimise.
        identity: JSON-able description of everything the result depends on; a checkpoint of another run is
            refused.
        progress: show a progress bar.

    Raises:
        ValueError: ``out`` holds a checkpoint of a run with another identity.
    """
    out.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = training.optimizer(parameters)
    generator = torch.Generator(parameters[0].device).manual_seed(training.seed)
    start = _resume(out, learner, optimizer, generator, identity)
    _truncate(out / METRICS, start)

    bar = tqdm(
        range(start + 1, training.steps + 1),
        desc=out.name,
        total=training.steps,
        initial=start,
        mininterval=1.0,
        disable=not progress,
    )
    with open(out / METRICS, "a") as metrics:
        for step in bar:
            loss, info = learner.loss(generator)
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * min(1.0, step / max(1, training.warmup))
            loss.backward()
            if training.gradient_clip is not None:
                nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
            optimizer.step()
            learner.after_step()
            if step % training.log_every == 0 or step == training.steps:
                values = {"loss": loss.item()} | {name: value.item() for name, value in info.items()}
                if step % training.evaluate_every == 0 or step == training.steps:
                    values |= learner.evaluate()
                metrics.write(json.dumps({"step": step} | values) + "\n")
                metrics.flush()
                bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            if step % training.checkpoint_every == 0 or step == training.steps:
                _save(out, learner, optimizer, generator, step, identity)


def _save(
    out: Path,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    step: int,
    identity: Mapping[str, Any],
) -> None:
    """Write a checkpoint so that there is always a whole one: a temporary file, then a rename."""
    tensors = {f"learner.{name}": tensor for name, tensor in learner.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": tensor for name, tensor in state.items()}
    tensors["generator"] = generator.get_state()
    temporary = out / (CHECKPOINT + ".tmp")
    save_file(tensors, temporary, metadata={"step": str(step), "identity": json.dumps(identity)})
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, out / CHECKPOINT)


def _resume(
    out: Path,
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    identity: Mapping[str, Any],
) -> int:
    """Restore the checkpoint in ``out``, if any, and return its step (0: none)."""
    if not (out / CHECKPOINT).exists():
        return 0
    with safe_open(out / CHECKPOINT, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    found, expected = json.loads(header["identity"]), json.loads(json.dumps(identity))
    if found != expected:
        names = sorted(name for name in found | expected if found.get(name) != expected.get(name))
        raise ValueError(
            f"{out}: expected a run with {', '.join(f'{n}={expected.get(n)!r}' for n in names)}, got a "
            f"checkpoint of one with {', '.join(f'{n}={found.get(n)!r}' for n in names)}; use another "
            "directory, go back to the former settings, or delete this one"
        )
    learner.load_state_dict(_under(tensors, "learner."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, "optimizer.").items():
        i, key = name.split(".")
        state.setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    generator.set_state(tensors["generator"])
    return int(header["step"])


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _truncate(path: Path, step: int) -> None:
    """Drop metrics after ``step``, and a line that was cut in the middle."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line for line in kept if json.loads(line)["step"] <= step))
    os.replace(temporary, path)
