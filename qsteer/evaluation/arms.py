"""Arms: ways of turning one frozen policy and one critic into actions, and their short names."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor

from qsteer.compiling.kept import Mode
from qsteer.critics import Critic, LiveCritic
from qsteer.maps.flow_maps import FlowMap
from qsteer.maps.glass import GlassPosterior
from qsteer.maps.meta import MetaFlowMap
from qsteer.particles import FeynmanKac
from qsteer.policies import FlowPolicy
from qsteer.rules import (
    QGF,
    ForwardTweedie,
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
from qsteer.sampling import FastSampling, acting, sample
from qsteer.trace import Trace
from qsteer.types import Clip, Rule, Sampler


@dataclass(frozen=True)
class Maps:
    """The learnt maps of a policy that arms may ask for.

    Attributes:
        meta: meta flow map.
        flow: flow map.
        fmq: flow map adapted to the critic.
    """

    meta: MetaFlowMap | None = None
    flow: FlowMap | None = None
    fmq: FlowMap | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "Maps":
        """Load those maps which have a directory of their name under ``directory``."""
        kinds: dict[str, Any] = {"meta": MetaFlowMap, "flow": FlowMap, "fmq": FlowMap}
        return cls(
            **{
                name: kind.from_pretrained(Path(directory) / name).requires_grad_(False).eval()
                for name, kind in kinds.items()
                if (Path(directory) / name / "config.json").exists()
            }
        )

    def to(self, device: str) -> "Maps":
        """Move the maps to a device; return these."""
        for network in (self.meta, self.flow, self.fmq):
            if network is not None:
                network.to(device)
        return self

    def need(self, name: str) -> Any:
        """Return a map.

        Raises:
            FileNotFoundError: it was not loaded.
        """
        if (found := getattr(self, name)) is None:
            raise FileNotFoundError(
                f"arm: expected a trained {name!r} map, got none; train it with qsteer distill (fmq: qsteer "
                "adapt) and pass the directory that holds it as --maps"
            )
        return found


def _read_number(text: str) -> float:
    """Read the finite number in an arm's name."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"expected a finite number, got {text}")
    return number


def _whole(number: float) -> int:
    """Return how many an arm's name asks for."""
    if number != int(number):
        raise ValueError(f"expected a whole number, got {number}")
    return int(number)


def _numberless(number: float, inner: Sampler) -> Sampler:
    """Return the inner sampler of one whose name takes no number."""
    if not math.isnan(number):
        raise ValueError(f"expected no number, got {number:g}")
    return inner


RULES: dict[str, Callable[[Any, Maps], Rule]] = {
    "tweedie": lambda s, _: Tweedie(alpha=s),
    "tweedie-raw": lambda s, _: Tweedie(alpha=s, scaling="raw"),
    "forward-tweedie": lambda s, _: ForwardTweedie(alpha=s),
    "forward-tweedie-stale": lambda s, _: ForwardTweedie(alpha=s, stale=True),
    "posterior": lambda s, maps: Posterior(maps.need("meta"), alpha=s),
    "posterior-raw": lambda s, maps: Posterior(maps.need("meta"), alpha=s, scaling="raw", standardize=False),
    "posterior-glass": lambda s, _: Posterior(GlassPosterior(), alpha=s),
    "gradient-free": lambda s, maps: GradientFreePosterior(maps.need("meta"), alpha=s),
    "gradient-free-glass": lambda s, _: GradientFreePosterior(GlassPosterior(), alpha=s),
    "qgf": lambda s, _: QGF(weight=s),
    "qgf-matched": lambda s, _: QGF(weight=s, scaling="match_norm"),
    "noisy-gradient": lambda s, _: NoisyGradient(alpha=s),
    "through-time": lambda s, _: ThroughTime(alpha=s),
    "random-direction": lambda s, _: RandomDirection(alpha=s),
    "negated": lambda s, _: Negated(Tweedie(alpha=s)),
}
SAMPLERS: dict[str, Callable[[float, Any, Maps], Sampler]] = {
    "best-of": lambda n, inner, _: BestOfN(_whole(n), inner),
    "random-of": lambda n, inner, _: RandomOfN(_whole(n), inner),
    "feynman-kac": lambda strength, inner, _: FeynmanKac(8, strength, inner),
    "trust-region": lambda eta, inner, _: TrustRegion(eta, inner=inner),
    "trust-region-adaptive": lambda eta, inner, _: TrustRegion(eta, beta=0.3, inner=inner),
    "keep-best": lambda number, inner, _: KeepBest(_numberless(number, inner)),
    "beam-search": lambda eta, inner, _: BeamSearch(eta=eta, inner=inner),
    "beam-search-map": lambda eta, inner, maps: BeamSearch(eta=eta, flow_map=maps.need("flow"), inner=inner),
    "beam-search-fmq": lambda eta, inner, maps: BeamSearch(eta=eta, flow_map=maps.need("fmq"), inner=inner),
    "map-best-of": lambda n, inner, maps: best_of_map(_whole(n), maps.need("flow"), inner),
    "fmq-best-of": lambda n, inner, maps: best_of_map(_whole(n), maps.need("fmq"), inner),
}
VARIANTS: dict[str, tuple[str, Callable[[str], float]]] = {
    "every": ("every", int),
    "from": ("start", float),
    "to": ("stop", float),
    "last": ("layers", int),
}
"""What a rule's name may end in, with a number: the rule's attribute, and the number's kind."""
WORDS = {
    "base": "frozen policy",
    "tweedie": "Tweedie, strength {}",
    "tweedie-raw": "Tweedie, raw weight {}",
    "forward-tweedie": "forward Tweedie, strength {}",
    "forward-tweedie-stale": "forward Tweedie with the last step's direction, strength {}",
    "posterior": "posterior on a learnt map, strength {}",
    "posterior-raw": "posterior on a learnt map, raw weight {}",
    "posterior-glass": "posterior by GLASS, strength {}",
    "gradient-free": "gradient-free posterior on a learnt map, strength {}",
    "gradient-free-glass": "gradient-free posterior by GLASS, strength {}",
    "qgf": "QGF, raw weight {}",
    "qgf-matched": "QGF, strength {}",
    "noisy-gradient": "gradient at the noisy action, strength {}",
    "through-time": "gradient through time, strength {}",
    "random-direction": "random direction, strength {}",
    "negated": "Tweedie downhill, strength {}",
    "best-of": "best of {}",
    "random-of": "random one of {}",
    "feynman-kac": "particles, strength {}",
    "trust-region": "trust region, radius {}",
    "trust-region-adaptive": "adaptive trust region, radius {}",
    "keep-best": "the frozen policy's if better",
    "beam-search": "beam search, radius {}",
    "beam-search-map": "beam search on the flow map, radius {}",
    "beam-search-fmq": "beam search on the adapted flow map, radius {}",
    "map-best-of": "best of {} of the flow map",
    "fmq-best-of": "best of {} of the adapted flow map",
}
"""What a rule or a sampler is called in a picture, with its number."""
VARIANT_WORDS = {
    "every": "every {} steps",
    "from": "from t = {}",
    "to": "up to t = {}",
    "last": "last layers: {}",
}
VARIANT = re.compile(rf"(.+)-({'|'.join(VARIANTS)})([\d.]+)")
COUNTED = ("best-of-", "random-of-", "map-best-of-", "fmq-best-of-")
CONTROLS = ("base", "random-", "negated")
UNSTEERED = ("map-best-of-1", "feynman-kac=0")
"""Treatments with the number that leaves the critic out: controls."""
RANDOM = "random-"
"""Before a rule's name: its control, :class:`qsteer.Randomized`."""


def describe_arm(spec: str) -> str:
    """Return an arm in words, for pictures: ``tweedie=0.2`` is "Tweedie, strength 0.2".

    What is not an arm's short name comes back as it is.
    """
    words = []
    for part in spec.split("+"):
        name, number = split_part(part)
        variants: list[str] = []
        while name not in WORDS and (match := VARIANT.fullmatch(name)):
            name = match[1]
            variants.insert(0, VARIANT_WORDS[match[2]].format(match[3]))
        if name not in WORDS and name.startswith(RANDOM):
            name = name.removeprefix(RANDOM)
            variants.append("in random directions")
        if name not in WORDS:
            return spec
        text = WORDS[name].format("automatic" if number == "auto" else number)
        words.append(", ".join([text if number else text.partition(", ")[0], *variants]))
    return " + ".join(words)


def split_part(part: str) -> tuple[str, str]:
    """Return name and number of one part of a spec: of ``tweedie=0.2``, of ``best-of-8``; "" without one."""
    name, _, number = part.partition("=")
    if not number and name.startswith(COUNTED):
        name, _, number = part.rpartition("-")
    return name, number


def best_of_map(n: int, flow_map: FlowMap, inner: Sampler) -> BeamSearch:
    """Return best-of-n over a flow map's one-step actions: a beam search without a round or a move."""
    return BeamSearch(particles=n, rounds=0, eta=0.0, flow_map=flow_map, inner=inner)


def make_rule(name: str, number: str, maps: Maps) -> Rule:
    """Make a rule of its short name, which variants may follow, and its strength.

    Raises:
        KeyError, TypeError, ValueError: there is no such rule, or no such variant of it.
    """
    changes = {}
    while name not in RULES and (match := VARIANT.fullmatch(name)):
        name, (attribute, kind) = match[1], VARIANTS[match[2]]
        changes[attribute] = kind(match[3])
    control = name not in RULES and name.startswith(RANDOM)
    name = name.removeprefix(RANDOM) if control else name
    rule: Any = RULES[name](number if number == "auto" else _read_number(number), maps)
    rule = replace(rule, **changes)
    return Randomized(rule) if control else rule


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
        return "control" if self.name.startswith(CONTROLS) or self.spec in UNSTEERED else "steered"

    def agent(
        self,
        policy: FlowPolicy,
        critic: Critic | LiveCritic,
        trace: Trace | None = None,
        *,
        compile: Mode | None = None,
        rows: int | None = None,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return ``act(obs: (B, O), noise: (B, H, A)) -> (B, H, A)``.

        Args:
            policy: acts.
            critic: steers it.
            trace: records what the rule did.
            compile: as for :func:`qsteer.sample`; the first action waits for the compiler.
            rows: compile actions of so many rows, and let others run eagerly; None: all.
        """
        fast = None if compile is None else FastSampling(compile, wait=True)

        def act(obs: Tensor, noise: Tensor) -> Tensor:
            with acting(critic):
                field, value = policy.field(obs), critic.bind(obs)
                return sample(
                    field,
                    value,
                    noise,
                    rule=self.rule,
                    sampler=self.sampler,
                    trace=trace,
                    compile=fast if rows in (None, len(obs)) else None,
                )

        return act


def _suggest(name: str, error: Exception) -> str:
    """Say what may have been meant by a part that is no arm."""
    if isinstance(error, KeyError):
        near = get_close_matches(name, WORDS, n=1, cutoff=0.5)
        return f"; the nearest name is {near[0]!r}" if near else ""
    return f" ({error})"


def parse(spec: str, maps: Maps | None = None, *, clip: Clip = "policy") -> Arm:
    """Make an arm of a short name.

    ``base`` is the frozen policy alone. A rule has a strength, a number or, in the matched norm, ``auto``
    (:class:`qsteer.Auto`): ``tweedie=0.2`` and ``qgf=0.06`` in their papers' scalings (matched norm, raw),
    ``tweedie-raw=0.06`` and ``qgf-matched=0.2`` in the other's, ``posterior=0.2`` and ``gradient-free=0.2``
    with a meta flow map (``-glass``: without training), ``noisy-gradient=0.2``, ``through-time=0.2``,
    ``random-direction=0.2``, ``negated=0.2`` (Tweedie downhill). ``random-`` before any guidance rule is its
    control, which pushes as far in random directions: ``random-qgf=0.06``. Cheaper than Tweedie:
    ``forward-tweedie=0.2`` (``-stale``: the last step's direction), and any guidance rule guided less:
    ``tweedie-every2=0.2``, ``tweedie-from0.3-to0.6=0.2``; ``tweedie-last4=0.2`` goes back through the last 4
    layers of a policy that has layers. A sampler follows it or stands alone: ``best-of-8``, ``random-of-8``,
    ``feynman-kac=1`` (8 particles), ``trust-region=0.3``, ``beam-search=0.3`` (``-map``: on the flow map,
    ``-fmq``: on the adapted one), ``map-best-of-8``, ``fmq-best-of-8``, ``keep-best``; each goes around what
    precedes it: ``tweedie=0.2+best-of-8+keep-best``.

    Args:
        spec: the name.
        maps: what the arms which need a learnt map use.
        clip: of finished actions, see :class:`qsteer.Euler`; None: what :func:`qsteer.steer` does.

    Raises:
        ValueError: the name is not of that form.
        FileNotFoundError: it needs a map which was not loaded.
    """
    rule: Rule | None = None
    sampler: Sampler = Euler(clip=clip)
    maps = maps or Maps()
    for part in () if spec == "base" else spec.split("+"):
        name, number = split_part(part)
        try:
            if rule is None and name not in SAMPLERS:
                rule = make_rule(name, number, maps)
            else:
                sampler = SAMPLERS[name](_read_number(number) if number else math.nan, sampler, maps)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"arm: expected 'base', or at most one of {', '.join(RULES)} with =STRENGTH (before it "
                "-everyN, -fromT, -toT if it is guidance, -lastN if it is Tweedie, random- for its control) "
                f"and any of {', '.join(SAMPLERS)} with =ETA or -N, joined by '+'; got {part!r} in {spec!r}"
                f"{_suggest(name, error)}"
            ) from error
    return Arm(spec, rule, sampler)
