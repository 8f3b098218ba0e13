"""What makes a kind of action, told from the tensors that change from one action to the next."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset((int, float, bool, str, type(None)))
"""Types of leaves that are told apart by equality alone."""
DEPTH = 4
"""How far networks are looked for behind a function: its object's attributes, their attributes, ..."""


def signature(tree: Any, tensors: list[Tensor], leaf: Callable[[Any], Hashable] | None = None) -> Hashable:
    """Append all tensors of a tree to ``tensors``; return everything else about it.

    A tree is made of tuples, lists, dicts and frozen dataclasses. Anything else is told apart by ``leaf``: by
    default by equality, or by identity if it has no hash. A network, or one behind a function, is told apart
    also by its state (:func:`state_of`), but for what its weights are: a graph knows no other place or mode.
    """
    told: set[int] = set()

    def place(network: nn.Module) -> Hashable:
        if id(network) in told:
            return id(network)
        told.add(id(network))
        return state_of(network, versions=False)

    def walk(tree: Any) -> Hashable:
        if leaf is None and type(tree) in PLAIN:
            return type(tree), tree
        match tree:
            case Tensor():
                tensors.append(tree)
                return tree.shape, tree.dtype, tree.device
            case nn.Module():
                return place(tree)
            case dict():
                return tuple((key, walk(part)) for key, part in tree.items())
            case tuple() | list():
                return type(tree), *(walk(part) for part in tree)
        if names := names_in(tree.__class__):
            return type(tree), *(walk(getattr(tree, name)) for name in names)
        return exact(tree, place) if leaf is None else leaf(tree)

    return walk(tree)


@cache
def names_in(kind: Hashable) -> tuple[str, ...]:
    """Return what a dataclass is made of; nothing else has any."""
    return tuple(f.name for f in fields(kind) if f.init) if is_dataclass(kind) else ()


def exact(leaf: Any, place: Callable[[nn.Module], Hashable]) -> Hashable:
    """Tell two leaves apart; 1, 1.0 and True are equal, and different kinds."""
    networks = tuple(place(each) for each in modules_behind(leaf)) if callable(leaf) else ()
    return type(leaf), (leaf if isinstance(leaf, Hashable) else id(leaf)), networks


def alike(leaf: Any) -> Hashable:
    """Take functions of one name, and numbers of one type, for the same."""
    return getattr(leaf, "__qualname__", type(leaf).__qualname__)


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors of a tree, see :func:`signature`."""
    tensors: list[Tensor] = []
    signature(tree, tensors)
    return tensors


def rebuilt(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """Return the tree with other tensors, in the order in which :func:`signature` lists them."""
    match tree:
        case Tensor():
            return next(tensors)
        case dict():
            other = copy(tree)  # of its own type
            other.update([(key, rebuilt(part, tensors)) for key, part in tree.items()])
            return other
        case tuple() | list():
            parts = [rebuilt(part, tensors) for part in tree]
            return tree._make(parts) if hasattr(tree, "_make") else type(tree)(parts)  # a named tuple
    if names := names_in(tree.__class__):
        return replace(tree, **{name: rebuilt(getattr(tree, name), tensors) for name in names})
    return tree


def behind(thing: Any, depth: int = DEPTH) -> Iterator[Tensor | nn.Module]:
    """Find networks and tensors behind a function, an object or a collection of them.

    That is in closures, defaults, the globals that a function names, the object of a method, and attributes.
    """
    if isinstance(thing, Tensor | nn.Module):
        yield thing
        return
    match thing:
        case dict():
            parts: Iterable[Any] = thing.values()
        case tuple() | list() | set():
            parts = thing
        case partial():
            parts = thing.func, thing.args, thing.keywords
        case MethodType():
            parts = thing.__self__, thing.__func__
        case FunctionType():
            known = inspect.getclosurevars(thing)
            named = (part for part in known.globals.values() if isinstance(part, nn.Module))
            parts = *known.nonlocals.values(), *named, thing.__defaults__, thing.__kwdefaults__
        case type() | ModuleType():
            parts = ()
        case _:
            parts = getattr(thing, "__dict__", {}).values()
    if depth:
        for part in parts:
            yield from behind(part, depth - 1)


def modules_behind(thing: Any, depth: int = DEPTH) -> list[nn.Module]:
    """Return the networks of :func:`behind`, each once."""
    return list(dict.fromkeys(part for part in behind(thing, depth) if isinstance(part, nn.Module)))


def state_of(module: Any, versions: bool = True) -> Hashable:
    """Return what a change of a network shows in: parts, settings, modes, hooks, adapters, and weights.

    Settings are public attributes that are numbers, words or dataclasses, such as a configuration.

    A weight changes its count when it is written in place, its address or type when it is replaced. Torch
    does not count writes through ``weight.data``: they go unseen.

    Args:
        module: a network; anything else has no state.
        versions: tell weights apart that were written in place.

    Cost: about a microsecond for each part and weight.
    """
    state: list[Hashable] = []
    waiting = [module] if isinstance(module, nn.Module) else []
    while waiting:
        part = waiting.pop()
        own = vars(part)
        state += id(part), own.get("_disable_adapters")
        state += [settings_of(value) for name, value in own.items() if name[0] != "_"]
        if adapters := own.get("_active_adapter"):  # PEFT's
            state.append(str(adapters))
        state += *own["_forward_hooks"], None, *own["_forward_pre_hooks"]
        for weight in (*own["_parameters"].values(), *own["_buffers"].values()):
            if weight is not None:
                state += weight.data_ptr(), weight.dtype
                if versions:
                    state.append(weight._version)
        waiting += [child for child in own["_modules"].values() if child is not None]
    return tuple(state)


def settings_of(value: Any) -> Hashable:
    """Return what tells settings apart; attributes of other kinds are none."""
    if type(value) in PLAIN:
        return type(value), value
    if not names_in(value.__class__):
        return None
    try:
        hash(value)
    except TypeError:  # it may change in place
        return signature(value, [])
    return value


def autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    """Return whether autocast is on for a device, and to which dtype."""
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def numerics(device: torch.device) -> Hashable:
    """Return torch's switches by which the same code computes other numbers on a device."""
    products = (getattr(torch.backends, name).matmul.fp32_precision for name in ("cuda", "mkldnn"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    return autocast(device), torch.get_default_dtype(), deterministic, *products
