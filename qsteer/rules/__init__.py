"""Guidance rules: how a value bends a velocity field.

Every rule is one estimate of the gradient of the log-tilt potential
``V_t(x) = log E[exp Q(x1) | x_t = x]`` (its ``ascent``), one scaling of it, and one choice of guided steps;
the three are independent, and the sampler knows nothing of them.

Notation: ``D(x, t) = x + (1 - t) v(x, t)`` is the denoised action. Costs are per guided step and row.
"""

from qsteer.rules.controls import NoisyGradient, RandomDirection, Randomized, ThroughTime
from qsteer.rules.guidance import Ascent, Guidance, Steered
from qsteer.rules.posterior import GradientFreePosterior, Posterior, PosteriorGuidance
from qsteer.rules.qgf import QGF
from qsteer.rules.strength import Auto, Scaling, Strength
from qsteer.rules.tweedie import ForwardTweedie, Tweedie
from qsteer.rules.wrappers import Gated, Negated

__all__ = [
    "QGF",
    "Ascent",
    "Auto",
    "ForwardTweedie",
    "Gated",
    "GradientFreePosterior",
    "Guidance",
    "Negated",
    "NoisyGradient",
    "Posterior",
    "PosteriorGuidance",
    "RandomDirection",
    "Randomized",
    "Scaling",
    "Steered",
    "Strength",
    "ThroughTime",
    "Tweedie",
]
