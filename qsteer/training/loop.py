"""One training loop: seeded, resumable to the bit, with atomic checkpoints and a metrics stream.

A run directory holds ``checkpoint.safetensors`` (weights, optimiser state, generator states; step and
identity of the run as JSON in its header), ``metrics.jsonl`` and, apart from them because no two runs agree
on it, the wall time in ``speed.jsonl``. A run that was killed and started again gives the weights and the
metrics of a run that was not.

Under ``accelerate launch`` (on CPUs: ``torchrun``) each of P processes draws the same whole batch and
computes 1/P of its rows (:class:`Share`); gradients are averaged. So P changes neither the random stream nor,
up to rounding, the result, and may change when a run is resumed.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from qsteer.checks import check_at_least, check_positive
from qsteer.files import append_json_line, locked_run, trim_json_lines
from qsteer.training.checkpoints import CHECKPOINT, resume, save
from qsteer.training.generators import list_generators, seeded

METRICS, SPEED = "metrics.jsonl", "speed.jsonl"


@dataclass(frozen=True)
class Share:
    """A process's rows of every batch.

    Attributes:
        index: of the process.
        count: of processes.
    """

    index: int = 0
    count: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """Return this process's rows of a whole batch."""
        return batch.chunk(self.count)[self.index]


WHOLE = Share()
"""The share of a single process."""


def processes(device: torch.device | str) -> PartialState:
    """Join the other processes of ``accelerate launch``; there are none without it.

    Call it before anything is put on ``"cuda"``, which is this process's own GPU from then on.
    """
    return PartialState(cpu=torch.device(device).type == "cpu")


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
        decay: steps, from the first on, in which it falls along a cosine to a tenth; 0: it does not.
        compile: compile loss and gradients (:mod:`qsteer.training.compiled`); the first step waits for it, up
            to some minutes. Needs a C++ compiler; without one a warning says that nothing is compiled.
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
    decay: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        check_at_least(self, 1, "steps", "batch_size", "log_every", "checkpoint_every", "evaluate_every")
        check_positive(self, "learning_rate", "gradient_clip")

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimiser."""
        return torch.optim.Adam(parameters, self.learning_rate, fused=True)

    @property
    def compiles(self) -> bool:
        """Whether loss and gradients are compiled: if they are to be, and there is a compiler."""
        if not self.compile:
            return False
        from qsteer.training.compiled import has_compiler

        return has_compiler()

    def describe(self) -> dict[str, Any]:
        """Return what a run's identity has of the settings; those of eager runs do not name ``compile``."""
        described = asdict(self)
        del described["compile"]
        return described | ({"compile": True} if self.compiles else {})

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        grown = min(1.0, step / max(1, self.warmup))
        progress = min(1.0, step / self.decay) if self.decay else 0.0
        return self.learning_rate * grown * (0.55 + 0.45 * math.cos(math.pi * progress))


class Learner(nn.Module, ABC):
    """What the loop optimises (its trainable parameters) and what a checkpoint keeps (its state dict).

    Attributes:
        share: the rows of a batch that :meth:`loss` computes; set by :func:`fit`. A learner that uses it is
            faster with more processes, and must draw random numbers for the whole batch all the same.
        stack: independent models side by side, as equal groups of the first axis of every parameter.
    """

    share = WHOLE
    stack = 1

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch and return the mean loss and what to log.

        Randomness comes from ``generator``; what cannot take one may draw from torch's global generators, or
        from :meth:`generators`.
        """
        return self.batch_loss(self.sample(generator), generator)

    @abstractmethod
    def sample(self, generator: torch.Generator) -> Any:
        """Draw a batch: tensors in tuples, dicts and frozen dataclasses."""

    @abstractmethod
    def batch_loss(self, batch: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a batch and what to log.

        It may be compiled: it computes with the batch, weights and buffers, and decides nothing by numbers.
        """

    def generators(self, device: torch.device) -> list[torch.Generator]:
        """Return further generators on a device from which the loss draws; a checkpoint keeps them, too."""
        return []

    def after_step(self) -> None:
        """Run after every optimiser step: move averages."""

    def evaluate(self) -> dict[str, float]:
        """Return held-out metrics, drawn from a generator of its own: training must not depend on it."""
        return {}


def fit(
    learner: Learner, out: Path, training: Training, identity: Mapping[str, Any], *, progress: bool
) -> None:
    """Train ``learner`` in ``out`` until ``training.steps``, from the checkpoint there if there is one.

    Only the main process writes, evaluates and shows progress. Torch's global generators are seeded for
    the run and restored after it.

    Args:
        learner: freshly built, on its device.
        out: run directory, seen by all processes.
        training: how long and how to optimise.
        identity: JSON-able description of everything the result depends on; a checkpoint of another run is
            refused.
        progress: show a progress bar.

    Raises:
        RuntimeError: the loss or a weight is no longer finite; no checkpoint of that is written. Or ``out``
            holds such a checkpoint, or another run has it open.
        ValueError: ``out`` holds a checkpoint of a run with another identity, or a broken one; or the
            processes cannot share a batch evenly.
    """
    device = next(p.device for p in learner.parameters() if p.requires_grad)
    state = processes(device)
    if training.batch_size % state.num_processes:
        raise ValueError(
            f"batch_size: expected a multiple of the {state.num_processes} processes, got "
            f"{training.batch_size}; change either"
        )
    learner.share = Share(state.process_index, state.num_processes)
    out.mkdir(parents=True, exist_ok=True)
    with locked_run(out) if state.is_main_process else nullcontext(), seeded(training.seed, device):
        _fit(learner, out, training, identity, device, state, progress)


def _fit(
    learner: Learner,
    out: Path,
    training: Training,
    identity: Mapping[str, Any],
    device: torch.device,
    state: PartialState,
    progress: bool,
) -> None:
    """Do what :func:`fit` says, in a directory and with generators of its own."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optimizer = training.optimizer(parameters)
    generators = list_generators(training.seed, device, learner.generators(device))
    generator, differentiate = generators[0], differentiator(learner, optimizer, training)
    start = saved = resume(out, learner, optimizer, generators, identity)
    if broken := _list_broken(learner):
        raise RuntimeError(
            f"{out / CHECKPOINT}: expected finite weights, got NaN or infinity in {broken}; delete the "
            "directory and train again"
        )
    if state.num_processes > 1:
        for tensor in learner.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
    main = state.is_main_process
    if main:
        trim_json_lines(out / METRICS, start)
        trim_json_lines(out / SPEED, start)

    bar = tqdm(
        range(start + 1, training.steps + 1),
        desc=out.name,
        total=training.steps,
        initial=start,
        mininterval=1.0,
        disable=not (progress and main),
    )
    since, clock = start, time.perf_counter()
    # The first step whose loss is not finite; found without waiting for the device.
    ill = torch.full((), training.steps + 1, device=device)
    for step in bar:
        loss, info = differentiate(generator)
        ill = torch.where(loss.isfinite(), ill, ill.clamp(max=step))
        descend(learner, optimizer, training, step)
        if step % training.log_every == 0 or step == training.steps:
            shown = {"loss": loss} | info
            if state.num_processes > 1:
                _average(list(shown.values()))
            values = {name: value.item() for name, value in shown.items()}
            if not math.isfinite(values["loss"]):
                _stop(out, min(step, int(ill)), values, saved)
            speed = {"samples/s": (step - since) * training.batch_size / (time.perf_counter() - clock)}
            if main:
                if step % training.evaluate_every == 0 or step == training.steps:
                    values |= learner.evaluate()
                append_json_line(out / METRICS, {"step": step} | values)
                append_json_line(out / SPEED, {"step": step} | speed)
                bar.set_postfix({name: f"{value:.4g}" for name, value in (values | speed).items()})
        if main and (step % training.checkpoint_every == 0 or step == training.steps):
            if int(ill) <= step or _list_broken(learner):
                _stop(out, min(step, int(ill)), {"loss": loss.item()} | _to_numbers(info), saved)
            save(out, learner, optimizer, generators, step, identity)
            saved = step
        if step % training.log_every == 0:
            since, clock = step, time.perf_counter()
    state.wait_for_everyone()


def _list_broken(learner: Learner) -> list[str]:
    """Return the names of the learner's tensors that hold NaN or infinity."""
    state = learner.state_dict()
    return [n for n, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]


def _to_numbers(info: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in info.items()}


def _stop(out: Path, step: int, values: Mapping[str, float], saved: int) -> NoReturn:
    """End a run that is not finite any more, with what is known of it."""
    shown = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
    kept = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint"
    raise RuntimeError(
        f"{out}: expected a finite loss and finite weights, got NaN or infinity in step {step} ({shown}); "
        f"{kept}. Look for outliers in the data, or lower learning_rate or gradient_clip"
    )


def differentiator(
    learner: Learner, optimizer: torch.optim.Optimizer, training: Training
) -> Callable[[torch.Generator], tuple[Tensor, dict[str, Tensor]]]:
    """Return what draws a batch, leaves gradients in the parameters, and returns loss and what to log.

    It is compiled if ``training`` says so, and eager else.
    """
    if training.compiles:
        from qsteer.training.compiled import CompiledLoss

        return CompiledLoss(learner, optimizer.param_groups[0]["params"])

    def eager(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss, info = learner.loss(generator)
        optimizer.zero_grad()
        loss.backward()
        return loss.detach(), info

    return eager


def descend(learner: Learner, optimizer: torch.optim.Optimizer, training: Training, step: int) -> None:
    """Take one optimiser step along the gradients in the parameters, the same in all processes.

    The gradients of models in a stack are clipped one by one.
    """
    parameters = optimizer.param_groups[0]["params"]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if PartialState().num_processes > 1:
        _average(gradients)
    if training.gradient_clip is not None and learner.stack > 1:
        groups = [gradient.view(learner.stack, -1) for gradient in gradients]
        norm = torch.cat(groups, 1).norm(dim=1, keepdim=True)
        factor = (training.gradient_clip / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        for group in groups:
            group *= factor
    elif training.gradient_clip is not None:
        nn.utils.clip_grad_norm_(parameters, training.gradient_clip)
    for options in optimizer.param_groups:
        options["lr"] = training.rate(step)
    optimizer.step()
    learner.after_step()


def _average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over the processes, in one exchange."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
