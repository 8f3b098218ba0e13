"""Ensembles of quadratic values."""

from fields import Ensemble, noise

SLOPES, GOAL, CURVATURE = noise(4, 2, 2, seed=3), 0.3 * noise(1, 2, 2, seed=4), 2.0


def members(slopes=SLOPES, goal=GOAL, curvature=CURVATURE, offsets=(0.0,), **kwargs) -> Ensemble:
    """Quadratic members that differ in their slopes and offsets."""

    def member(w, b):
        return lambda a: (w * a - 0.5 * curvature * (a - goal) ** 2).flatten(1).sum(1) + b

    offsets = offsets if len(offsets) == len(slopes) else [0.0] * len(slopes)
    return Ensemble(tuple(member(w, b) for w, b in zip(slopes, offsets, strict=True)), **kwargs)
