"""What a critic was trained on, in the words of the policy that it is to steer, and how two such differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any, Literal, get_args

from qsteer.checks import check_choice

type Normalisation = Literal["identity", "min_max", "mean_std", "quantiles", "quantile10"]

RANGE_SLACK = 0.5
"""How far trained actions may lie outside of the policy's range, in half-widths of it."""

FILL = 0.05
"""Least share of the policy's range that trained actions take up, in the median over dimensions."""

SHIFT = 20.0
"""Largest distance between two means of an observation's entry, in the larger of its two deviations."""

SCALE = 20.0
"""Largest ratio of two deviations, in the median over an observation's entries."""

UNCHECKED = "critic.config = dataclasses.replace(critic.config, contract=None)"
"""How one steers without the comparison."""

VECTORS = ("observation_mean", "observation_std", "action_low", "action_high")


@dataclass(frozen=True)
class Contract:
    """What the observations and actions of a critic or a policy are; None: not known, and not compared.

    Sizes of the critic itself (its horizon, dimensions and pessimism) are in its configuration.

    Attributes:
        observations: key and shape of what was seen, without the batch axis.
        observation_normalisation: fingerprint of the statistics by which the batch was normalised before the
            policy or critic got it; "identity": by none.
        observation_mean: of each entry of the state as it came in a batch.
        observation_std: its standard deviation.
        horizon: executed steps of a chunk.
        action_dim: size of one action, unpadded.
        action_normalisation: how a robot's actions become the policy's.
        action_statistics: fingerprint of the numbers by which they do.
        action_low: of a critic: the least of each dimension of the actions that it was trained on; of a
            policy: the least that it may give. Model space, as the velocity.
        action_high: the greatest.
        discount: per step, of the critic's returns.
        target: what the critic regressed on.
    """

    observations: Sequence[Any] | None = None  # pairs
    observation_normalisation: str | None = None
    observation_mean: Sequence[float] | None = None
    observation_std: Sequence[float] | None = None
    horizon: int | None = None
    action_dim: int | None = None
    action_normalisation: Normalisation | None = None
    action_statistics: str | None = None
    action_low: Sequence[float] | None = None
    action_high: Sequence[float] | None = None
    discount: float | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        """Check the values; lists read from JSON become tuples."""
        if self.observations is not None:
            pairs = tuple((str(key), tuple(shape)) for key, shape in self.observations)
            object.__setattr__(self, "observations", tuple(sorted(pairs)))
        for name in VECTORS:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(float(number) for number in given))
        for low, high in (VECTORS[:2], VECTORS[2:]):
            sizes = [None if (v := getattr(self, name)) is None else len(v) for name in (low, high)]
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"Contract.{low}, {high}: expected as many numbers in both, got {sizes}; give both"
                )
        if self.observation_std is not None and not min(self.observation_std, default=1.0) > 0:
            raise ValueError(
                f"Contract.observation_std: expected numbers above 0, got {self.observation_std}; give what "
                "hardly varies 0.01, as qsteer's normalisation does"
            )
        if self.action_normalisation is not None:
            check_choice(self, "action_normalisation", get_args(Normalisation.__value__))

    def __or__(self, other: "Contract") -> "Contract":
        """Return the entries of ``other``, and where it knows none, one's own."""
        known = {name: value for name, value in vars(other).items() if value is not None}
        return replace(self, **known)


def agreed(contracts: Sequence[Contract]) -> Contract:
    """Return the entries in which all contracts agree; the others are None."""
    first, *others = contracts
    kept = {
        f.name: getattr(first, f.name)
        for f in fields(Contract)
        if all(getattr(other, f.name) == getattr(first, f.name) for other in others)
    }
    return Contract(**kept)


def differences(critic: Contract, policy: Contract) -> list[str]:
    """Return why a critic trained under one contract cannot steer a policy of another; empty: nothing known.

    A line for each entry: its name, what was expected (the policy's), got (the critic's), and the remedy.
    Observation means and deviations are estimates, and need only be of one scale (:data:`SHIFT`,
    :data:`SCALE`); trained actions may exceed the policy's range by :data:`RANGE_SLACK`, and must take up
    :data:`FILL` of it. The policy has no discount and no target.
    """
    found = []
    seen, offered = critic.observations, policy.observations
    if seen is not None and offered is not None:
        known: Mapping[str, Any] = dict(offered)
        missing = [key for key, _ in seen if key not in known]
        reshaped = [(key, shape) for key, shape in seen if key in known and known[key] != shape]
        if missing or reshaped:
            found.append(
                f"observations: expected some of {dict(offered)}, got {dict(seen)}; train the critic on the "
                "observations that the policy gets"
            )
    exact = {
        "observation_normalisation": "normalise the critic's observations with the policy's statistics",
        "horizon": "let the policy execute as many steps as the critic was trained with, or train another",
        "action_dim": "train the critic on the policy's actions",
        "action_normalisation": "train the critic on actions normalised as the policy's are",
        "action_statistics": "train the critic on actions normalised with the policy's statistics",
    }
    for name, remedy in exact.items():
        expected, got = getattr(policy, name), getattr(critic, name)
        if expected is not None and got is not None and expected != got:
            found.append(f"{name}: expected {expected!r}, got {got!r}; {remedy}")
    return [*found, *_compare_states(critic, policy), *_compare_ranges(critic, policy)]


def check_contract(critic: Contract | None, policy: Contract) -> None:
    """Raise unless a critic of one contract can steer a policy of another.

    Raises:
        ValueError: it cannot; every difference is named.
    """
    if critic is not None and (found := differences(critic, policy)):
        raise ValueError(
            f"critic: expected one trained for this policy's contract, got one of another: {'. '.join(found)}"
            f". To steer all the same: {UNCHECKED}"
        )


def _compare_states(critic: Contract, policy: Contract) -> list[str]:
    """Compare the scale of the states that both were trained on."""
    mean, std = critic.observation_mean, critic.observation_std
    its_mean, its_std = policy.observation_mean, policy.observation_std
    if mean is None or std is None or its_mean is None or its_std is None:
        return []
    if len(mean) != len(its_mean):
        return [
            f"observation_mean: expected {len(its_mean)} entries, got {len(mean)}; train the critic on the "
            "policy's observations"
        ]
    rows = list(zip(mean, std, its_mean, its_std, strict=True))
    far = [i for i, (m, s, n, r) in enumerate(rows) if abs(m - n) > SHIFT * max(s, r)]
    ratio = median(s / r for _, s, _, r in rows)
    remedy = "give the critic the observations that the policy gets, in the same units and normalised alike"
    found = []
    if far:
        i = far[0]
        found.append(
            f"observation_mean: expected about {its_mean[i]:.4g} in entry {i}, the first of {len(far)} that "
            f"differ, got {mean[i]:.4g}; {remedy}"
        )
    if not 1 / SCALE <= ratio <= SCALE:
        found.append(
            f"observation_std: expected the policy's scale, got {ratio:.4g} times it in the median; {remedy}"
        )
    return found


def _compare_ranges(critic: Contract, policy: Contract) -> list[str]:
    """Compare the actions that a critic was trained on with those that the policy may give."""
    low, high, least, most = critic.action_low, critic.action_high, policy.action_low, policy.action_high
    if low is None or high is None or least is None or most is None or len(low) != len(least):
        return []  # of another size: action_dim says it
    rows = list(zip(low, high, least, most, strict=True))
    remedy = "train the critic on the policy's normalised actions, not on the robot's"
    for i, (a, b, bottom, top) in enumerate(rows):
        slack = RANGE_SLACK * (top - bottom) / 2
        if a < bottom - slack or b > top + slack:
            return [
                f"action range: expected trained actions within [{bottom:.4g}, {top:.4g}] in dimension {i}, "
                f"got [{a:.4g}, {b:.4g}]; {remedy}"
            ]
    filled = median((b - a) / (top - bottom) for a, b, bottom, top in rows)
    if filled < FILL:
        return [
            f"action range: expected trained actions to take up at least {FILL:.0%} of the policy's range, "
            f"got {filled:.2%} in the median dimension; {remedy}"
        ]
    return []
