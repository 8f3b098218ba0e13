"""Losses of flow maps and meta flow maps, each as short as its formula.

``u(x, r, t)`` is an average velocity: the jump ``X_{r,t}(x) = x + (t - r) u(x, r, t)`` leads from time r to
time t, and ``u(x, t, t)`` is the velocity. Times have shape (B,); every loss is a sum of squares over the
action entries, one number per sample. Derivatives in time are forward-mode (``torch.func.jvp``).
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsteer.flow import factor, interpolate, nonzero, norm, spread, times

type AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def jump(
    u: AverageVelocity, x: Float[Tensor, "B H A"], r: Float[Tensor, "B"], t: Float[Tensor, "B"]
) -> Float[Tensor, "B H A"]:
    """Return ``X_{r,t}(x) = x + (t - r) u(x, r, t)``."""
    return x + factor(t - r, x) * u(x, r, t)


def diagonal_loss(
    u: AverageVelocity,
    x0: Float[Tensor, "B H A"],
    x1: Float[Tensor, "B H A"],
    t: Float[Tensor, "B"],
    velocity: Float[Tensor, "B H A"] | None = None,
) -> Float[Tensor, "B"]:
    """Flow matching: ``|| u_{t,t}(x_t) - (x1 - x0) ||^2`` with ``x_t = (1 - t) x0 + t x1``.

    Args:
        u: average velocity.
        x0: noise.
        x1: clean actions.
        t: times.
        velocity: a teacher's velocity at x_t, in place of ``x1 - x0``.
    """
    return _squares(u(interpolate(x0, x1, t), t, t) - (x1 - x0 if velocity is None else velocity.detach()))


def direct_loss(
    u: AverageVelocity,
    x: Float[Tensor, "B H A"],
    r: Float[Tensor, "B"],
    t: Float[Tensor, "B"],
    velocity: Callable[[Tensor, Tensor], Tensor],
    steps: int,
) -> Float[Tensor, "B"]:
    """Regression onto the teacher's own integration: ``|| u_{r,t}(x) - mean_k v(x_k, r_k) ||^2``.

    The x_k are ``steps`` Euler steps of the teacher from r to t, which from 0 to 1 are its chain. The loss is
    weighted by ``t - r``: the longer the jump, the more its velocity counts.

    Args:
        u: average velocity.
        x: states at time r.
        r: first time.
        t: last time.
        velocity: the teacher's.
        steps: of the teacher.
    """
    stride = (t - r) / steps
    end, total = x, torch.zeros_like(x)
    with torch.no_grad():
        for k in range(steps):
            v = velocity(end, r + k * stride)
            end, total = end + factor(stride, x) * v, total + v
    return (t - r) * _squares(u(x, r, t) - total / steps)


def lagrangian_loss(
    u: AverageVelocity, x: Float[Tensor, "B H A"], r: Float[Tensor, "B"], t: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Lagrangian self-distillation: ``|| d/dt X_{r,t}(x) - sg[u_{t,t}(X_{r,t}(x))] ||^2`` (FMQ eq. 4)."""
    end, slope = _derivative(lambda t: jump(u, x, r, t), (t,), (torch.ones_like(t),))
    with torch.no_grad():
        teacher = u(end.detach(), t, t)
    return _squares(slope - teacher)


def eulerian_loss(
    u: AverageVelocity,
    x: Float[Tensor, "B H A"],
    r: Float[Tensor, "B"],
    t: Float[Tensor, "B"],
    velocity: Float[Tensor, "B H A"] | None = None,
    stop: Literal["target", "velocity"] = "target",
) -> Float[Tensor, "B"]:
    """Eulerian self-distillation: ``|| d/dr X_{r,t}(x) + grad X_{r,t}(x) u_{r,r}(x) ||^2`` (FMQ eq. 5).

    The residual is ``-u + u_{r,r} + (t - r) du/dr``, the last a total derivative along the flow. With the
    data velocity ``x1 - x0`` in place of ``u_{r,r}`` it is mean-flow training (FMQ appendix A.2).

    Args:
        u: average velocity.
        x: states at time r.
        r: first time.
        t: second time, not before r.
        velocity: in place of ``u_{r,r}(x)``.
        stop: what is not differentiated: everything but the leading ``u`` (``target``, as mean flows do), or
            only ``u_{r,r}`` (``velocity``: convex in the map).
    """
    if velocity is None:
        with torch.no_grad():
            velocity = u(x, r, r)
    average, slope = _derivative(lambda x, r: u(x, r, t), (x, r), (velocity, torch.ones_like(r)))
    target = velocity + factor(t - r, x) * slope
    return _squares(average - (target.detach() if stop == "target" else target))


def progressive_loss(
    u: AverageVelocity,
    x: Float[Tensor, "B H A"],
    r: Float[Tensor, "B"],
    t: Float[Tensor, "B"],
    w: Float[Tensor, "B"],
) -> Float[Tensor, "B"]:
    """Progressive self-distillation: one jump from r to t against two with a stop at w (FMQ eq. 6).

    ``|| u_{r,t}(x) - sg[g u_{r,w}(x) + (1 - g) u_{w,t}(X_{r,w}(x))] ||^2`` with ``w = r + g (t - r)``: each
    leg counts for its share of the time. The teacher is the two jumps (Boffi et al. 2025; the paper's
    equation has it the other way round).
    """
    with torch.no_grad():
        first = u(x, r, w)
        second = u(x + factor(w - r, x) * first, w, t)
        g = factor(torch.where(t > r, (w - r) / (t - r), 0.0), x)
        teacher = g * first + (1 - g) * second
    return _squares(u(x, r, t) - teacher)


def semigroup_loss(
    u: AverageVelocity,
    x: Float[Tensor, "B H A"],
    r: Float[Tensor, "B"],
    t: Float[Tensor, "B"],
    w: Float[Tensor, "B"],
    target: AverageVelocity | None = None,
) -> Float[Tensor, "B"]:
    """Consistency: ``|| X_{r,t}(x) - sg[X'_{w,t}(X'_{r,w}(x))] ||^2`` for r <= w <= t (QPILOTS appendix B).

    Args:
        u: average velocity.
        x: states at time r.
        r: first time.
        t: last time.
        w: time between.
        target: average velocity of the moving average X'; None: ``u`` itself.
    """
    with torch.no_grad():
        target = u if target is None else target
        teacher = jump(target, jump(target, x, r, w), w, t)
    return _squares(jump(u, x, r, t) - teacher)


def adaptive(loss: Float[Tensor, "B"], power: float, c: float = 0.01) -> Float[Tensor, "B"]:
    """Weigh each sample's loss by ``sg[(loss + c)^-power]``: large errors count less (Geng et al. 2025)."""
    return loss * (loss.detach() + c) ** -power


def fmq_target(
    u_ref: Float[Tensor, "B H A"],
    grad: Float[Tensor, "B H A"],
    eta: float | Float[Tensor, "B"],
    kappa: float = 1e-8,
) -> Float[Tensor, "B H A"]:
    """Return FMQ's optimal average velocity ``u_ref + eta grad / (||grad|| + kappa)`` (eq. 11).

    It maximises the critic, linearised at ``a1 = x_r + (1 - r) u_ref``, within ``||u - u_ref|| <= eta``.

    Args:
        u_ref: average velocity of the offline map from r to 1.
        grad: gradient of the critic at a1.
        eta: radius; one, or one per sample (:func:`trust_radius`).
        kappa: keeps a vanishing gradient finite; with 0 a gradient of exactly 0 moves nothing, any other as
            far.
    """
    length = nonzero(norm(grad) + kappa)
    eta = eta.to(length) if isinstance(eta, Tensor) else torch.full_like(length, eta)
    return u_ref + times(eta / length, grad)


def trust_radius(
    eta: float, q_members: Float[Tensor, "J B"], beta: float, typical: float | None = None
) -> Float[Tensor, "B"]:
    """Return the trust region's radius ``eta / (1 + beta * delta)`` (FMQ, Algorithm 1).

    delta is the ensemble's disagreement over a typical one; the disagreement is ``sqrt(2)`` times the
    population std, which is FMQ's ``|Q1 - Q2| / sqrt(2)`` for two members.

    Args:
        eta: the largest radius.
        q_members: what each member says of each action.
        beta: shrinkage.
        typical: disagreement that counts as 1; None: the batch's mean, as in the paper, where a batch of one
            always shrinks to ``eta / (1 + beta)``.
    """
    disagreement = 2**0.5 * spread(q_members)
    unit = disagreement.nanmean() if typical is None else typical
    return eta / (1 + beta * disagreement / nonzero(torch.as_tensor(unit)))


def _derivative(
    fn: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return the value and the directional derivative; fused attention kernels have no forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(fn, at, along)[:2]


def _squares(residual: Float[Tensor, "B H A"]) -> Float[Tensor, "B"]:
    return residual.square().flatten(1).sum(1)
