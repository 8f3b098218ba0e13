"""FMQ: adapting a one-step flow map to a critic that goes on learning (arXiv:2605.12416, Algorithm 1)."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast, override

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qsteer.checks import check_at_least
from qsteer.critics.critic import Critic
from qsteer.data.episodes import Chunks, Episodes, Source, Transitions
from qsteer.data.layout import Layout
from qsteer.data.mixed import Mixed
from qsteer.data.replay import Replay
from qsteer.fingerprints import fingerprint
from qsteer.flow import clip_actions, denoise, interpolate, norm, read_features
from qsteer.maps.flow_maps import FlowMap
from qsteer.maps.losses import fmq_target, trust_radius
from qsteer.online.actors import Decision
from qsteer.policies import FlowPolicy
from qsteer.samplers import take
from qsteer.training.critic import TD, CriticTraining
from qsteer.training.loop import Learner, Training, fit
from qsteer.training.maps import make_draws
from qsteer.types import Bounds, Field

if TYPE_CHECKING:  # needs gymnasium
    from qsteer.online.collect import Collector


type Acting = Callable[[Tensor, torch.Generator], Tensor]
"""Observations (B, O) to what is done there, (B, H, A)."""


@dataclass(frozen=True, kw_only=True)
class FMQTraining(Training):
    """How to adapt a :class:`~qsteer.maps.FlowMap` to a critic.

    Attributes:
        steps: gradient steps.
        env_steps: environment steps, spread evenly over the gradient steps; 0: offline, on the data alone.
        num_envs: environments at once.
        eta: radius of the trust region, in the norm of the whole chunk.
        beta: shrinks the radius where the critic's members disagree.
        gamma: discount per step.
        ema: step of the target critic's moving average.
        candidates: of the map's actions, the target critic's best of so many acts, in the environments and
            in y. 1: Algorithm 1. With more and ``eta=0`` the map stays as it is: selection alone, as by MVP.
        learn_critic: whether the critic learns too, or stays as it is.
    """

    steps: int = 8_000
    gradient_clip: float | None = None
    log_every: int = 100
    checkpoint_every: int = 2_000
    evaluate_every: int = 100
    env_steps: int = 8_000
    num_envs: int = 8
    eta: float = 0.3
    beta: float = 0.3
    gamma: float = 0.99
    ema: float = 0.005
    candidates: int = 1
    learn_critic: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_at_least(self, 0, "env_steps", "eta", "beta")
        check_at_least(self, 1, "num_envs", "candidates")
        if self.candidates > 1 and not (self.learn_critic or self.env_steps):
            raise ValueError(
                f"candidates: expected 1 where no critic learns and no environment is acted in, got "
                f"{self.candidates}; they are of what acts, not of what the map learns"
            )


class ClippedTD(TD):
    """``y = R + gamma^H min_j Q'_j(s', a')`` (FMQ eq. 8): clipped double Q when there are two members."""

    def __init__(self, critic: Critic, source: Source, settings: CriticTraining, acting: Acting) -> None:
        super().__init__(critic, source, settings)
        self.acting = acting

    @override
    def next_actions(self, batch: Transitions, generator: torch.Generator) -> Float[Tensor, "B H A"]:
        return self.acting(batch.next_observations, generator)

    @override
    def q_target(self, obs: Float[Tensor, "B O"], a: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
        return self.target.members(self.target.encode(obs), a).amin(0)


class Improvement(NamedTuple):
    """How the critic would improve the offline map at some states.

    Attributes:
        offline: average velocity ``u_off`` from r to 1.
        target: ``u_off + eta_eff g / ||g||``.
        radius: ``eta_eff``.
    """

    offline: Float[Tensor, "B H A"]
    target: Float[Tensor, "B H A"]
    radius: Float[Tensor, "B"]


class FMQ(Learner):
    """``|| u_{r,1}(x_r) - sg[u_off + eta_eff g / ||g||] ||^2`` (FMQ eq. 12), and the critic's ``(Q - y)^2``.

    ``x_r = (1 - r) x0 + r a`` with a stored chunk a, noise x0 and r ~ U[0, 1); g is the gradient of the
    members' mean at the offline map's action ``a1 = x_r + (1 - r) u_off``, clipped to what can be executed.
    The map that learns is not clipped; its actions in the environment and in y are.

    Args:
        flow_map: the offline map; it is copied, and stays as it is.
        critic: where the critic starts; it is copied too.
        policy: encodes observations for the map.
        episodes: the offline data.
        settings: how to adapt.

    Attributes:
        collector: environments to act in; None: offline.
        replay: what they do.
        chunks: the offline data.
        source: of batches: the data, and the replay if there is one.

    Raises:
        ValueError: the critic is of another contract than the policy's.
    """

    step: Tensor

    def __init__(
        self,
        flow_map: FlowMap,
        critic: Critic,
        policy: FlowPolicy,
        episodes: Episodes,
        settings: FMQTraining,
    ) -> None:
        super().__init__()
        policy.check_critic(critic.config)
        self.settings = settings
        self.collector: Collector | None = None
        self.replay: Replay | None = None
        self.frozen = (policy, flow_map)  # in a tuple: no part of what is learnt and stored
        self.flow_map = deepcopy(flow_map).requires_grad_(True)
        chunks = Chunks(episodes, critic.config.horizon, settings.gamma, ClippedTD.need)
        self.q = ClippedTD(
            deepcopy(critic).requires_grad_(settings.learn_critic),
            chunks,
            CriticTraining(
                target="td", horizon=critic.config.horizon, gamma=settings.gamma, ema=settings.ema, rho=0.0
            ),
            self.act,
        )
        self.chunks = chunks
        self.source: Source = chunks
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

        own = torch.Generator(episodes.actions.device).manual_seed(settings.seed)
        probe = chunks.sample(settings.batch_size, own)
        self.probe = probe.observations, torch.randn(probe.actions.shape, generator=own, device=own.device)

    @property
    def bounds(self) -> Bounds:
        """The policy's."""
        return cast(Bounds, self.frozen[0].config.bounds)

    @torch.no_grad()
    def act(self, obs: Float[Tensor, "B O"], generator: torch.Generator) -> Float[Tensor, "B H A"]:
        """Return the adapted map's one-step action from fresh noise, clipped to the policy's bounds.

        Of several candidates, the one that the target critic's mean prefers.
        """
        n, shape = self.settings.candidates, self.flow_map.config
        rows = obs.repeat_interleave(n, 0)
        size = len(rows), shape.horizon, shape.action_dim
        noise = torch.randn(size, generator=generator, device=generator.device)
        zero = noise.new_zeros(len(rows))
        adapted = self.flow_map.on(self.frozen[0].field(rows))
        a = clip_actions(adapted(noise, zero, zero + 1), self.bounds)
        if n == 1:
            return a
        q = self.q.target.members(self.q.target.encode(rows), a).mean(0).unflatten(0, (-1, n))
        return take(a.unflatten(0, q.shape), q.argmax(1))

    def improvement(
        self, obs: Float[Tensor, "B O"], x: Float[Tensor, "B H A"], r: Float[Tensor, "B"]
    ) -> Improvement:
        """Return the offline map's velocity, where the critic's gradient moves it, and how far at most.

        Cost: 1 forward of the offline map, 1 forward and backward of the critic.
        """
        s, critic, field = self.settings, self.q.critic, self.frozen[0].field(obs)
        with torch.no_grad():
            offline = average_velocity(self.frozen[1], field, x, r)
            z = critic.encode(obs)
        a1 = clip_actions(denoise(x, offline, r), self.bounds).requires_grad_()
        members = critic.members(z, a1)
        (g,) = torch.autograd.grad(members.mean(0).sum(), a1)
        radius = trust_radius(s.eta, members.detach(), s.beta)
        return Improvement(offline, fmq_target(offline, g, radius), radius)

    @override
    def sample(self, generator: torch.Generator) -> Transitions:
        self.collect(generator)
        return self.source.sample(self.settings.batch_size, generator)

    @override
    def batch_loss(self, batch: Transitions, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        s = self.settings
        uniform, normal = make_draws(batch.actions, generator)
        r = uniform()
        x = interpolate(normal(), batch.actions, r)
        offline, target, radius = self.improvement(batch.observations, x, r)
        u = average_velocity(self.flow_map, self.frozen[0].field(batch.observations), x, r)
        loss = (u - target).square().flatten(1).sum(1).mean()

        displacement = norm(u.detach() - offline)
        info = {
            "actor_loss": loss.detach(),
            "displacement": displacement.mean(),
            "radius": radius.mean(),
            "ratio": (displacement / radius).mean(),
        }
        if s.learn_critic:
            critic_loss, values = self.q.batch_loss(batch, generator)
            loss, info = loss + critic_loss, info | {"critic_loss": critic_loss.detach()} | values
        return loss, info

    def collect(self, generator: torch.Generator) -> None:
        """Let the environments catch up with the gradient steps."""
        if self.collector is None or self.replay is None:
            return
        s = self.settings

        def act(obs: Tensor, _: object) -> Decision:
            obs = obs.to(generator.device)
            actions = self.act(obs, generator)
            return Decision(actions, actions, obs)

        due = (int(self.step) + 1) * s.env_steps / s.steps
        while self.replay.added < due:
            self.replay.add(self.collector.step(act, generator))

    @override
    def after_step(self) -> None:
        self.step += 1
        if self.settings.learn_critic:
            self.q.after_step()

    @override
    def evaluate(self) -> dict[str, float]:
        """Compare the adapted with the offline map from the noise on, and sum up the latest episodes.

        ``start_displacement``, ``start_radius``, ``start_ratio`` and ``start_cosine`` (with the critic's
        gradient) are those of ``u_{0,1}(x0)``, ``q_gain`` is what the critic gives for the one-step action
        over the offline map's, in the mean over a fixed batch; ``success`` and ``return`` are of the
        ``episodes`` that ended since the last time.
        """
        obs, x0 = self.probe
        zero, critic = x0.new_zeros(len(x0)), self.q.critic
        offline, target, radius = self.improvement(obs, x0, zero)
        with torch.no_grad():
            step = average_velocity(self.flow_map, self.frozen[0].field(obs), x0, zero) - offline
            z = critic.encode(obs)
            before, after = (
                critic.members(z, clip_actions(x0 + offline + move, self.bounds)).mean()
                for move in (0 * step, step)
            )
        cosine = torch.cosine_similarity(step.flatten(1), (target - offline).flatten(1))
        values = {
            "start_displacement": norm(step).mean(),
            "start_radius": radius.mean(),
            "start_ratio": (norm(step) / radius).mean(),
            "start_cosine": cosine.mean(),
            "q_gain": after - before,
        }
        metrics = {name: value.item() for name, value in values.items()}
        if self.collector is not None and (finished := self.collector.finished):
            _, successes, returns, _ = zip(*finished, strict=True)
            n = len(finished)
            metrics |= {"episodes": n, "success": sum(successes) / n, "return": sum(returns) / n}
            finished.clear()
        return metrics


def adapt(
    flow_map: FlowMap,
    critic: Critic,
    policy: FlowPolicy,
    episodes: Episodes,
    out: str | Path,
    training: FMQTraining | None = None,
    *,
    make_env: Callable[[], Any] | None = None,
    progress: bool = True,
) -> tuple[FlowMap, Critic]:
    """Adapt a flow map to a critic; ``FlowMap.from_pretrained`` reads the result in ``out``.

    The adapted (target) critic goes to ``out/critic``. A run that was interrupted goes on from its last
    checkpoint, offline to the bit. Online the checkpoint has what was collected, but simulators cannot be
    stored: a resumed run begins new episodes. A finished run is returned as it is.

    Args:
        flow_map: the offline map, on its device; neither it nor the critic is changed.
        critic: a trained one, on the same device.
        policy: the frozen policy which the map was distilled from.
        episodes: the offline data.
        out: run directory.
        training: how to adapt; defaults to ``FMQTraining()``.
        make_env: makes one environment; for ``env_steps > 0``, which starts processes: a script calls this
            under ``if __name__ == "__main__":``.
        progress: show a progress bar.

    Raises:
        ValueError: ``make_env`` is missing or superfluous, map and critic have chunks of other shapes, or
            ``out`` holds a run with other settings, data or networks.
    """
    out, training = Path(out), training or FMQTraining()
    if (make_env is None) == bool(training.env_steps):
        raise ValueError(
            f"adapt: expected make_env= when env_steps > 0 and only then, got make_env={make_env} with "
            f"env_steps={training.env_steps}; env_steps=0 adapts on the data alone"
        )
    chunks = [(c.horizon, c.action_dim) for c in (flow_map.config, critic.config)]
    if chunks[0] != chunks[1]:
        raise ValueError(
            f"adapt: expected a map and a critic of the same chunks (H, A), got {chunks[0]} and {chunks[1]}; "
            "train the critic with the policy's horizon"
        )
    device = next(flow_map.parameters()).device
    learner = FMQ(flow_map, critic, policy, episodes.to(device), training).to(device)
    networks: dict[str, nn.Module] = {"map": flow_map, "critic": critic, "policy": policy}
    identity = training.describe() | {
        name: fingerprint(network.state_dict().values()) for name, network in networks.items()
    }
    identity["data"] = episodes.fingerprint()
    if make_env is None:
        fit(learner, out, training, identity, progress=progress)
    else:
        from qsteer.online.collect import Collector

        horizon, lanes = flow_map.config.horizon, training.num_envs
        layout = Layout(
            observations=critic.config.obs_dim,
            action_dim=critic.config.action_dim,
            horizon=horizon,
            gamma=training.gamma,
            need=ClippedTD.need,
            lanes=lanes,
            capacity=2 * training.env_steps // lanes + 2 * horizon,
        )
        learner.replay = Replay(layout, directory=out / "replay", device=device)
        learner.source = Mixed(learner.chunks, learner.replay)
        with Collector(make_env, horizon=horizon, num_envs=lanes) as collector:
            learner.collector = collector
            fit(learner, out, training, identity, progress=progress)
    adapted, target = learner.flow_map.requires_grad_(False).eval(), learner.q.target.eval()
    adapted.save_pretrained(out)
    target.save_pretrained(out / "critic")
    return adapted, target


def average_velocity(
    flow_map: FlowMap, field: Field, x: Float[Tensor, "B H A"], r: Float[Tensor, "B"]
) -> Float[Tensor, "B H A"]:
    """Return ``u_{r,1}(x)``."""
    z = flow_map.net.encode(read_features(field))
    return flow_map.average_velocity(z, x, r, torch.ones_like(r), field)
