"""Steer any frozen flow-matching robot policy with a critic, at inference time."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # at run time each on its first use: the command's help must not wait for torch
    from qsteer.auditing import Audit, audit
    from qsteer.clock import Clock
    from qsteer.critics import Critic, CriticConfig, LiveCritic
    from qsteer.flow import field, value
    from qsteer.particles import FeynmanKac
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
        Randomized,
        ThroughTime,
        Tweedie,
    )
    from qsteer.samplers import BeamSearch, BestOfN, Euler, KeepBest, RandomOfN, TrustRegion
    from qsteer.sampling import sample
    from qsteer.steering.handle import Handle, steer, unsteer
    from qsteer.steering.loading import load
    from qsteer.steering.opening import Opened, open_action
    from qsteer.trace import Trace
    from qsteer.types import Field, Rule, Sampler, Value

__version__ = "0.1.0"

__all__ = [
    "QGF",
    "Audit",
    "Auto",
    "BeamSearch",
    "BestOfN",
    "Clock",
    "Critic",
    "CriticConfig",
    "Euler",
    "FeynmanKac",
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
    "Randomized",
    "Rule",
    "Sampler",
    "ThroughTime",
    "Trace",
    "TrustRegion",
    "Tweedie",
    "Value",
    "audit",
    "field",
    "load",
    "open_action",
    "sample",
    "steer",
    "unsteer",
    "value",
]

_HOMES = {
    "qsteer.auditing": ("Audit", "audit"),
    "qsteer.clock": ("Clock",),
    "qsteer.critics": ("Critic", "CriticConfig", "LiveCritic"),
    "qsteer.flow": ("field", "value"),
    "qsteer.particles": ("FeynmanKac",),
    "qsteer.rules": (
        "QGF",
        "Auto",
        "ForwardTweedie",
        "Gated",
        "GradientFreePosterior",
        "Negated",
        "NoisyGradient",
        "Posterior",
        "RandomDirection",
        "Randomized",
        "ThroughTime",
        "Tweedie",
    ),
    "qsteer.samplers": ("BeamSearch", "BestOfN", "Euler", "KeepBest", "RandomOfN", "TrustRegion"),
    "qsteer.sampling": ("sample",),
    "qsteer.steering.handle": ("Handle", "steer", "unsteer"),
    "qsteer.steering.loading": ("load",),
    "qsteer.steering.opening": ("Opened", "open_action"),
    "qsteer.trace": ("Trace",),
    "qsteer.types": ("Field", "Rule", "Sampler", "Value"),
}
"""Where the names above come from."""


def __getattr__(name: str) -> Any:
    """Import a name, or a module of the package, on its first use."""
    for home, names in _HOMES.items():
        if name in names:
            found = getattr(import_module(home), name)
            globals()[name] = found
            return found
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
