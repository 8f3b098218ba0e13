"""Steer any frozen flow-matching robot policy with a critic, at inference time."""

from qsteer.clock import Clock
from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.flow import field, value
from qsteer.rules import (
    QGF,
    Auto,
    ForwardTweedie,
    Gated,
    GradientFreePosterior,
    Negated,
    NoisyGradient,
    Posterior,
    RandomDirection,
    ThroughTime,
    Tweedie,
)
from qsteer.samplers import BeamSearch, BestOfN, Euler, KeepBest, RandomOfN, TrustRegion
from qsteer.sampling import sample
from qsteer.steering.handle import Handle, steer, unsteer
from qsteer.steering.opening import Opened, open_action
from qsteer.trace import Trace
from qsteer.types import Field, Rule, Sampler, Value

__version__ = "0.1.0"

__all__ = [
    "QGF",
    "Auto",
    "BeamSearch",
    "BestOfN",
    "Clock",
    "Critic",
    "CriticConfig",
    "Euler",
    "Field",
    "ForwardTweedie",
    "Gated",
    "GradientFreePosterior",
    "Handle",
    "KeepBest",
    "LiveCritic",
    "Negated",
    "NoisyGradient",
    "Opened",
    "Posterior",
    "RandomDirection",
    "RandomOfN",
    "Rule",
    "Sampler",
    "ThroughTime",
    "Trace",
    "TrustRegion",
    "Tweedie",
    "Value",
    "field",
    "open_action",
    "sample",
    "steer",
    "unsteer",
    "value",
]
