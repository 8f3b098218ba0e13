"""Rules and samplers as JSON: by the name of a class of qsteer's, and its fields."""

import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import qsteer.maps
import qsteer.particles
import qsteer.rules
import qsteer.samplers
from qsteer.hub import HubModule
from qsteer.types import Field, Rule, Sampler

MODULES = {kind.__name__: kind for kind in (qsteer.maps.FlowMap, qsteer.maps.MetaFlowMap)}
"""Networks that a rule or a sampler carries."""


@cache
def known() -> dict[str, type]:
    """Return the classes that a file may name: qsteer's own rules, samplers and what they are made of."""
    homes = (qsteer.rules, qsteer.samplers, qsteer.particles)
    found = {
        name: kind
        for home in homes
        for name, kind in vars(home).items()
        if isinstance(kind, type) and issubclass(kind, Rule | Sampler) and not name.startswith("_")
    }
    return found | {kind.__name__: kind for kind in (qsteer.rules.Auto, qsteer.maps.GlassPosterior)}


def encode(part: Any, keep: Callable[[HubModule], str]) -> Any:
    """Return what JSON can hold of a rule or a sampler.

    Args:
        part: the rule, the sampler, or a field of one.
        keep: saves a learnt map, and returns the name under which :func:`decode` is to ask for it.

    Raises:
        TypeError: it holds something that is not qsteer's data: a class or a function of the user's own.
    """
    if part is None or isinstance(part, bool | int | str):
        return part
    if isinstance(part, float):
        return part if math.isfinite(part) else {"float": str(part)}
    if isinstance(part, tuple | list):
        return [encode(each, keep) for each in part]
    name = type(part).__name__
    if isinstance(part, HubModule) and MODULES.get(name) is type(part):
        return {"module": name, "at": keep(part)}
    if is_dataclass(part) and known().get(name) is type(part):
        values = {f.name: getattr(part, f.name) for f in fields(part) if f.init}
        if any(isinstance(value, Field) for value in values.values()):
            raise TypeError(f"{name}: expected one that is not bound to a policy yet, got one with a field")
        return {"class": name} | {key: encode(value, keep) for key, value in values.items()}
    raise TypeError(
        f"save: expected rules, samplers and learnt maps of qsteer's own, got {part!r} in one; a class or a "
        "function of yours cannot be saved: steer with it in code"
    )


def decode(found: Any, fetch: Callable[[type[HubModule], str], HubModule]) -> Any:
    """Return what :func:`encode` was given.

    Args:
        found: read from JSON.
        fetch: loads a learnt map of a class by the name that was kept.

    Raises:
        ValueError: a class or a field is unknown, or a value is out of its range.
    """
    if isinstance(found, list):
        return tuple(decode(each, fetch) for each in found)
    if not isinstance(found, dict):
        return found
    if found.keys() == {"float"}:
        return float(found["float"])
    if found.keys() == {"module", "at"} and found["module"] in MODULES:
        return fetch(MODULES[found["module"]], found["at"])
    values = {key: decode(value, fetch) for key, value in found.items() if key != "class"}
    kind = known().get(found.get("class", ""))
    if kind is None or (unknown := values.keys() - {f.name for f in fields(kind) if f.init}):
        what = f"the class {found.get('class')!r}" if kind is None else f"{kind.__name__}'s {sorted(unknown)}"
        raise ValueError(
            f"steering: expected rules and samplers that this version of qsteer knows, got {what}; load it "
            "with the version that saved it, or a later one"
        )
    return kind(**values)
