"""Distilling maps from a frozen policy: meta flow maps (QPILOTS) and flow maps (FMQ section 3.1)."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from qsteer.flow import clip_actions, denoise, interpolate, read_features
from qsteer.maps.flow_maps import FlowMap
from qsteer.maps.glass import Glass, GlassPosterior, glass
from qsteer.maps.losses import (
    adaptive,
    diagonal_loss,
    direct_loss,
    eulerian_loss,
    lagrangian_loss,
    progressive_loss,
    semigroup_loss,
)
from qsteer.maps.meta import MetaFlowMap
from qsteer.maps.networks import ChunkMLP
from qsteer.samplers import Euler
from qsteer.training.loop import WHOLE, Learner, Share, Training, fit, processes
from qsteer.training.teachers import Teacher
from qsteer.types import Field


@dataclass(frozen=True, kw_only=True)
class MetaTraining(Training):
    """How to distil a :class:`~qsteer.maps.MetaFlowMap` (QPILOTS appendix B).

    Attributes:
        target: of the diagonal loss: the teacher's GLASS velocity, or the data's ``x1 - x0'``.
        semigroup: weight of the consistency loss; the diagonal loss has weight 1.
        time_power: outer times are ``U^time_power``, denser near the noise.
        zero_share: share of the batch with outer time exactly 0.
        ema: step of the target map's moving average; 1e-4 for the paper's long distillation of a VLA.
    """

    steps: int = 40_000
    learning_rate: float = 1e-4
    gradient_clip: float | None = 1.5
    target: Literal["glass", "data"] = "glass"
    semigroup: float = 0.5
    time_power: float = 2.0
    zero_share: float = 0.1
    ema: float = 0.005
    warmup: int = 2000

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the paper's optimiser."""
        return torch.optim.RAdam(parameters, self.learning_rate)


class MetaDistillation(Learner):
    """Diagonal and semigroup losses of a meta flow map.

    A residual map adds to the teacher's GLASS velocity, whatever it is compared with. On CUDA the map's
    network runs in bfloat16 (autocast); teacher, losses, weights and their average keep their precision.

    Cost per step: one batch of the teacher, 3 velocity forwards, 5 forwards of the map, 2 of them with a
    backward.
    """

    def __init__(
        self,
        meta: MetaFlowMap,
        teacher: Teacher,
        settings: MetaTraining,
        held_out: "PosteriorError | None" = None,
    ) -> None:
        """Learn ``meta`` from ``teacher``, and judge it by ``held_out``."""
        super().__init__()
        self.held_out = held_out
        self.meta, self.target = meta, deepcopy(meta).requires_grad_(False)
        self.teacher, self.settings = teacher, settings
        self._average = get_ema_multi_avg_fn(1 - settings.ema)
        self._averaged = list(self.target.parameters()), list(self.meta.parameters())

    def sample(self, generator: torch.Generator) -> tuple[Field, Tensor]:
        """Draw observations, as the teacher's field on them, and clean actions."""
        return self.teacher.batch(self.settings.batch_size, generator, self.share)

    def batch_loss(
        self, batch: tuple[Field, Tensor], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of both losses."""
        s, (field, x1) = self.settings, batch
        uniform, normal = make_draws(x1, generator, self.share)
        features = read_features(field)

        t = uniform() ** s.time_power
        t = torch.where(uniform() < s.zero_share, 0.0, t)
        x = interpolate(normal(), x1, t)

        @cache
        def exact(xbar: Tensor, u: Tensor) -> Glass:
            with torch.no_grad():
                return glass(field, x, t, xbar, u)

        def average_velocity(meta: MetaFlowMap) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            def velocity(xbar: Tensor, u: Tensor, w: Tensor) -> Tensor:
                base = exact(xbar, u) if meta.config.residual else None
                with reduced():
                    return meta.velocity(z, xbar, u, w, x, t, base)

            with reduced():
                z = meta.net.encode(features)
            return velocity

        def reduced() -> torch.autocast:
            return torch.autocast(x1.device.type, torch.bfloat16, enabled=x1.is_cuda)

        v, u, noise = average_velocity(self.meta), uniform(), normal()
        xbar = interpolate(noise, x1, u)
        diagonal = diagonal_loss(v, noise, x1, u, exact(xbar, u).velocity if s.target == "glass" else None)

        u, w = torch.stack([uniform(), uniform()]).sort(0).values
        middle = u + uniform() * (w - u)
        xbar = interpolate(normal(), x1, u)
        with torch.no_grad():
            target = average_velocity(self.target)
        semigroup = semigroup_loss(v, xbar, u, w, middle, target)

        loss = adaptive(diagonal, 0.5) + s.semigroup * adaptive(semigroup, 1.0)
        return loss.mean(), {"diagonal": diagonal.detach().mean(), "semigroup": semigroup.detach().mean()}

    def after_step(self) -> None:
        """Move the target map."""
        self._average(*self._averaged, 0)

    def evaluate(self) -> dict[str, float]:
        """Return the posterior error on held-out observations."""
        return {} if self.held_out is None else self.held_out(self.meta)


class PosteriorError:
    """How far a map's posterior samples are from GLASS on held-out states: sliced Wasserstein distance.

    The distance is that between the two sets of samples along random directions of the chunk, in units of one
    action entry, averaged over states and outer times. ``floor`` is the distance between two sets of GLASS
    samples, ``tweedie`` that of the denoised action alone.

    Cost: once, ``2 * len(times) * steps`` velocity forwards on ``observations * samples`` rows, which for a
    vision-language-action model are as many copies of the prefix; then ``len(times)`` forwards of the map on
    these rows per call.

    Args:
        teacher: a policy on held-out observations.
        observations: how many.
        samples: posterior samples per state.
        steps: inner Euler steps of GLASS.
        times: outer times.
        seed: of the states, the samples and the directions.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        observations: int = 32,
        samples: int = 64,
        steps: int = 32,
        times: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(teacher.device).manual_seed(seed)
        field, x1 = teacher.batch(observations, generator)
        self.field = field.repeat(1)  # field itself remembers the rows that GLASS repeats
        _, normal = make_draws(x1, generator)
        exact = GlassPosterior(field, steps)
        self.directions = torch.randn(x1[0].numel(), 128, generator=generator, device=x1.device)
        self.directions /= self.directions.square().mean(0).sqrt()
        self.states: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.constants = {"floor": 0.0, "tweedie": 0.0}
        with torch.no_grad():
            for time in times:
                t = x1.new_full((observations,), time)
                x = interpolate(normal(), x1, t)
                eps, again = (torch.stack([normal() for _ in range(samples)]) for _ in range(2))
                reference = exact(again, x, t)
                self.states.append((eps, x, t, reference))
                mean = denoise(x, field(x, t), t).expand_as(eps)
                for name, other in ("floor", exact(eps, x, t)), ("tweedie", mean):
                    self.constants[name] += self.distance(other, reference) / len(times)

    @torch.no_grad()
    def __call__(self, meta: MetaFlowMap) -> dict[str, float]:
        """Return ``posterior_error`` and what to compare it with."""
        posterior = meta.on(self.field)
        errors = [self.distance(posterior(eps, x, t), reference) for eps, x, t, reference in self.states]
        return {"posterior_error": sum(errors) / len(errors)} | self.constants

    def distance(self, a: Float[Tensor, "N B H A"], b: Float[Tensor, "N B H A"]) -> float:
        """Return the sliced Wasserstein distance between two sets of samples, averaged over states."""
        a, b = ((s.flatten(2) @ self.directions).sort(0).values for s in (a, b))
        return float(((a - b).square().mean((0, 2)) / len(self.directions)).sqrt().mean())


@dataclass(frozen=True, kw_only=True)
class FlowMapTraining(Training):
    """How to train a :class:`~qsteer.maps.FlowMap`.

    ``direct`` is regression onto the frozen policy's own integration. The others are FMQ's self-distillations
    (section 3.1), which need no integration and many more steps: after 8,000 a jump from noise was off by .1
    an entry with ``lagrangian``, and by .03 with ``direct`` (docs/results/maps.md).

    Attributes:
        distillation: ``direct``, or the off-diagonal loss on top of the diagonal one.
        weight: of that loss.
        diagonal_steps: steps with the diagonal loss alone; not of ``direct``.
        anneal_steps: steps after them in which intervals grow to the full range; not of ``direct``.
        zero_share: share of the intervals that start at the noise, where a one-step policy does.
        one_share: share of the intervals that end at the action.
    """

    steps: int = 60_000
    distillation: Literal["direct", "eulerian", "lagrangian", "progressive"] = "direct"
    weight: float = 1.0
    diagonal_steps: int = 5_000
    anneal_steps: int = 50_000
    zero_share: float = 0.5
    one_share: float = 0.5


class FlowMapDistillation(Learner):
    """Distillation of a flow map under a frozen teacher's velocity: direct, or diagonal and self-distilled.

    All in float32: derivatives in time, which the losses take, are more than bfloat16 can carry.

    Cost per step: one batch of the teacher; ``direct``: its own number of velocity forwards, and of the map 1
    forward and backward; else 1 velocity forward (2 for ``eulerian``), and of the map 1 forward with a
    backward for the diagonal and 1 to 3 more with one backward for the other loss. A residual map asks for
    one more velocity in each of its forwards.
    """

    step: Tensor

    def __init__(
        self,
        flow_map: FlowMap,
        teacher: Teacher,
        settings: FlowMapTraining,
        held_out: "JumpError | None" = None,
    ) -> None:
        """Learn ``flow_map`` from ``teacher``, and judge it by ``held_out``."""
        super().__init__()
        self.held_out = held_out
        self.flow_map, self.teacher, self.settings = flow_map, teacher, settings
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def sample(self, generator: torch.Generator) -> tuple[Field, Tensor, Tensor | None]:
        """Draw observations, as the teacher's field on them, and clean actions; add the intervals' reach.

        That is a share of the full range, or None while there is the diagonal alone.
        """
        s = self.settings
        if s.distillation == "direct":
            return *self.teacher.batch(s.batch_size, generator, self.share), torch.ones_like(self.step)
        reach = ((self.step - s.diagonal_steps) / s.anneal_steps).clamp(0.0, 1.0)
        return *self.teacher.batch(s.batch_size, generator, self.share), reach if reach else None

    def batch_loss(
        self, batch: tuple[Field, Tensor, Tensor | None], generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of both losses."""
        s, (field, x1, reach) = self.settings, batch
        uniform, normal = make_draws(x1, generator, self.share)
        velocity = torch.no_grad()(field)
        z = self.flow_map.net.encode(read_features(field))

        def u(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
            return self.flow_map.average_velocity(z, x, r, t, field)

        loss, info = x1.new_zeros(()), {}
        if s.distillation != "direct":
            t, x0 = uniform(), normal()
            loss = diagonal_loss(u, x0, x1, t, velocity(interpolate(x0, x1, t), t)).mean()
            info["diagonal"] = loss.detach()
        if reach is None:
            return loss, info

        r, t = torch.stack([uniform(), uniform()]).sort(0).values
        if s.zero_share:
            starts = uniform() < s.zero_share
            r, t = torch.where(starts, 0.0, r), torch.where(starts, uniform(), t)
        if s.one_share:
            t = torch.where(uniform() < s.one_share, 1.0, t)
        t = r + reach * (t - r)
        x = interpolate(normal(), x1, r)
        match s.distillation:
            case "direct":
                off = direct_loss(u, x, r, t, velocity, field.clock.steps)
            case "eulerian":
                off = eulerian_loss(u, x, r, t, velocity(x, r))
            case "lagrangian":
                off = lagrangian_loss(u, x, r, t)
            case "progressive":
                off = progressive_loss(u, x, r, t, r + uniform() * (t - r))
        return loss + s.weight * off.mean(), info | {s.distillation: off.detach().mean()}

    def after_step(self) -> None:
        """Count the steps of the curriculum."""
        self.step += 1

    def evaluate(self) -> dict[str, float]:
        """Return the error of the jump from noise on held-out observations."""
        return {} if self.held_out is None else self.held_out(self.flow_map)


class JumpError:
    """How far a map's action in one jump from noise is from the policy's, on held-out states.

    Root mean square over the entries of a chunk, clipped to the policy's bounds. ``chain`` is how far one of
    ``fine`` times the policy's own steps is from its own chain, ``one_step`` how far a single Euler step is.

    Cost: once, ``fine + 1`` chains of the policy; then one forward of the map per call.

    Args:
        teacher: a policy on held-out observations.
        observations: how many.
        fine: how much finer the finer chain is.
        seed: of the states and the noise.
    """

    @torch.no_grad()
    def __init__(self, teacher: Teacher, *, observations: int = 1024, fine: int = 10, seed: int = 0) -> None:
        generator = torch.Generator(teacher.device).manual_seed(seed)
        self.field, x1 = teacher.batch(observations, generator)
        self.noise = make_draws(x1, generator)[1]()
        steps = self.field.clock.steps
        self.chain, finer, one = (
            Euler(n, clip="policy")(self.field, None, self.noise) for n in (steps, fine * steps, 1)
        )
        self.constants = {"chain": self.distance(finer), "one_step": self.distance(one)}

    @torch.no_grad()
    def __call__(self, flow_map: FlowMap) -> dict[str, float]:
        """Return ``jump_error`` and what to compare it with."""
        zero = self.noise.new_zeros(len(self.noise))
        a = flow_map.on(self.field)(self.noise, zero, zero + 1)
        return {"jump_error": self.distance(clip_actions(a, self.field.bounds))} | self.constants

    def distance(self, a: Float[Tensor, "B H A"]) -> float:
        """Return how far actions are from the chain's."""
        return float((a - self.chain).square().mean().sqrt())


def distil(
    meta: MetaFlowMap,
    teacher: Teacher,
    out: str | Path,
    training: MetaTraining | None = None,
    *,
    held_out: "Teacher | PosteriorError | None" = None,
    progress: bool = True,
) -> MetaFlowMap:
    """Distil a meta flow map; ``MetaFlowMap.from_pretrained`` reads the result in ``out``.

    A run that was interrupted goes on from its last checkpoint; a finished run is returned as it is. Under
    ``accelerate launch`` the processes share each batch, see :mod:`qsteer.training.loop`.

    Args:
        meta: the untrained map, on its device.
        teacher: the frozen policy with the data to distil it on.
        out: run directory.
        training: how to train; defaults to ``MetaTraining()``.
        held_out: the same policy on other data, to judge the map by, or such a :class:`PosteriorError` of
            another size than the default.
        progress: show a progress bar.

    Raises:
        ValueError: ``out`` holds a run with other settings, or another teacher.
    """
    out, training = Path(out), training or MetaTraining()
    judges = processes(teacher.device).is_main_process
    if isinstance(held_out, Teacher):
        held_out = PosteriorError(held_out) if judges else None
    _fit_normalisation(meta, teacher)
    learner = MetaDistillation(meta, teacher, training, held_out)
    fit(learner, out, training, _describe(meta, teacher, training), progress=progress)
    return _finish(meta, out)


def distil_flow_map(
    flow_map: FlowMap,
    teacher: Teacher,
    out: str | Path,
    training: FlowMapTraining | None = None,
    *,
    held_out: Teacher | JumpError | None = None,
    progress: bool = True,
) -> FlowMap:
    """Distil a flow map; ``FlowMap.from_pretrained`` reads the result in ``out``. As :func:`distil`.

    Here ``held_out`` may be a :class:`JumpError` of another size than the default.
    """
    out, training = Path(out), training or FlowMapTraining()
    judges = processes(teacher.device).is_main_process
    if isinstance(held_out, Teacher):
        held_out = JumpError(held_out) if judges else None
    _fit_normalisation(flow_map, teacher)
    learner = FlowMapDistillation(flow_map, teacher, training, held_out)
    fit(learner, out, training, _describe(flow_map, teacher, training), progress=progress)
    return _finish(flow_map, out)


def _fit_normalisation(model: MetaFlowMap | FlowMap, teacher: Teacher, size: int = 4096) -> None:
    if isinstance(model.net, ChunkMLP):
        device = model.net.last.weight.device
        field, _ = teacher.batch(size, torch.Generator(device).manual_seed(0))
        model.net.fit_normalisation(read_features(field))


def _finish[M: (MetaFlowMap, FlowMap)](model: M, out: Path) -> M:
    """Freeze the map; the main process writes it."""
    state = processes(model.net.last.weight.device)
    model.requires_grad_(False).eval()
    if state.is_main_process:
        model.save_pretrained(out)
    state.wait_for_everyone()
    return model


def _describe(model: MetaFlowMap | FlowMap, teacher: Teacher, training: Training) -> dict[str, object]:
    return training.describe() | {"map": asdict(model.config), "teacher": teacher.fingerprint()}


def make_draws(
    like: Float[Tensor, "B H A"], generator: torch.Generator, share: Share = WHOLE
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return functions that draw uniform times (B,) and standard normal chunks (B, H, A).

    They draw for the whole batch, of which ``like`` is the ``share``.
    """
    n = len(like) * share.count
    return (
        lambda: share.of(torch.rand(n, generator=generator, device=like.device)),
        lambda: share.of(torch.randn(n, *like.shape[1:], generator=generator, device=like.device)),
    )
