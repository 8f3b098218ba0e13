"""Arms: ways of turning one frozen policy and one critic into actions, and their short names."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qsteer.critics.critic import Critic
from qsteer.rules import QGF, Negated, NoisyGradient, RandomDirection, ThroughTime, Tweedie
from qsteer.samplers import BestOfN, Euler, KeepBest, RandomOfN, TrustRegion
from qsteer.sampling import sample
from qsteer.trace import Trace
from qsteer.training.policy import FlowPolicy
from qsteer.types import Rule, Sampler

RULES: dict[str, Callable[[float], Rule]] = {
    "tweedie": lambda s: Tweedie(alpha=s),
    "tweedie-raw": lambda s: Tweedie(alpha=s, scaling="raw"),
    "qgf": lambda s: QGF(weight=s),
    "qgf-matched": lambda s: QGF(weight=s, scaling="match_norm"),
    "noisy-gradient": lambda s: NoisyGradient(alpha=s),
    "through-time": lambda s: ThroughTime(alpha=s),
    "random-direction": lambda s: RandomDirection(alpha=s),
    "negated": lambda s: Negated(Tweedie(alpha=s)),
}
SAMPLERS: dict[str, Callable[[float, Sampler], Sampler]] = {
    "best-of": lambda n, inner: BestOfN(int(n), inner),
    "random-of": lambda n, inner: RandomOfN(int(n), inner),
    "trust-region": lambda eta, inner: TrustRegion(eta, inner=inner),
    "keep-best": lambda _, inner: KeepBest(inner),
}
CONTROLS = ("base", "random-direction", "random-of", "negated")


@dataclass(frozen=True)
class Arm:
    """One way of acting.

    Attributes:
        spec: what :func:`parse` was given.
        rule: how the critic bends the policy's field; None: not at all.
        sampler: how the field becomes an action.
    """

    spec: str
    rule: Rule | None
    sampler: Sampler

    @property
    def name(self) -> str:
        """The spec without its strengths: ``tweedie`` for ``tweedie=0.2``."""
        return "+".join(part.partition("=")[0] for part in self.spec.split("+"))

    @property
    def kind(self) -> str:
        """``base``, ``control`` or ``steered``."""
        if self.spec == "base":
            return "base"
        return "control" if self.name.startswith(CONTROLS) else "steered"

    def agent(
        self, policy: FlowPolicy, critic: Critic, trace: Trace | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return ``act(obs: (B, O), noise: (B, H, A)) -> (B, H, A)``."""

        def act(obs: Tensor, noise: Tensor) -> Tensor:
            field, value = policy.field(obs), critic.bind(obs)
            return sample(field, value, noise, rule=self.rule, sampler=self.sampler, trace=trace)

        return act


def parse(spec: str) -> Arm:
    """Make an arm of a short name.

    ``base`` is the frozen policy alone. A rule has a strength: ``tweedie=0.2`` and ``qgf=0.06`` in their
    papers' scalings (matched norm, raw), ``tweedie-raw=0.06`` and ``qgf-matched=0.2`` in the other's,
    ``noisy-gradient=0.2``, ``through-time=0.2``, ``random-direction=0.2``, ``negated=0.2`` (Tweedie
    downhill). A sampler follows it or stands alone: ``best-of-8``, ``random-of-8``, ``trust-region=0.3``,
    ``keep-best``; each goes around what precedes it: ``tweedie=0.2+best-of-8+keep-best``. Actions are clipped
    to [-1, 1].

    Raises:
        ValueError: the name is not of that form.
    """
    rule: Rule | None = None
    sampler: Sampler = Euler(clip=(-1.0, 1.0))
    for part in () if spec == "base" else spec.split("+"):
        name, _, number = part.partition("=")
        if not number and name.startswith(("best-of-", "random-of-")):
            name, _, number = part.rpartition("-")
        try:
            if name in RULES and rule is None:
                rule = RULES[name](float(number))
            else:
                sampler = SAMPLERS[name](float(number or "nan"), sampler)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"arm: expected 'base', or at most one of {', '.join(RULES)} with =STRENGTH and any "
                f"of best-of-N, random-of-N, trust-region=ETA, keep-best, joined by '+'; got "
                f"{part!r} in {spec!r}"
            ) from error
    return Arm(spec, rule, sampler)
