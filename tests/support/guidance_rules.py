"""The guidance rules that laws are tested on, and their words in test ids."""

from dataclasses import KW_ONLY, dataclass

import qsteer

RAW = {"scaling": "raw", "clip": None}


@dataclass(frozen=True)
class ForwardTweedie(qsteer.ForwardTweedie):
    """With a perturbation that does not depend on the dtype, and amplifies rounding by no more than 1000."""

    _: KW_ONLY
    eps: float | None = 1e-3


ALL = [
    qsteer.Tweedie,
    ForwardTweedie,
    qsteer.QGF,
    qsteer.NoisyGradient,
    qsteer.ThroughTime,
    qsteer.RandomDirection,
]
BY_VALUE = ALL[:-1]
"""Those that follow the value."""
POSTERIORS = [qsteer.Posterior, qsteer.GradientFreePosterior]
by_name = {"ids": lambda rule: rule.__name__}
