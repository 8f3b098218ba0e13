"""What makes a kind of action, told from the tensors that change from one action to the next."""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

DEPTH = 4
"""How far networks are looked for behind a function: its object's attributes, their attributes, ..."""


def signature(tree: Any, tensors: list[Tensor], leaf: Callable[[Any], Hashable] | None = None) -> Hashable:
    """Append all tensors of a tree to ``tensors``; return everything else about it.

    A tree is made of tuples, lists, dicts and frozen dataclasses. Anything else is told apart by ``leaf``: by
    default by equality, or by identity if it has no hash. A network, or one behind a function, is told apart
    also by where its weights are and in which mode it is, for a graph knows no other place or mode.
    """
    match tree:
        case Tensor():
            tensors.append(tree)
            return tree.shape, tree.dtype, tree.device
        case nn.Module():
            return tree, places(tree)
        case dict():
            return tuple((key, signature(part, tensors, leaf)) for key, part in tree.items())
        case tuple() | list():
            return type(tree), *(signature(part, tensors, leaf) for part in tree)
    if is_dataclass(tree) and not isinstance(tree, type):
        return type(tree), *(signature(getattr(tree, f.name), tensors, leaf) for f in fields(tree) if f.init)
    return exact(tree) if leaf is None else leaf(tree)


def exact(leaf: Any) -> Hashable:
    """Tell two leaves apart; 1, 1.0 and True are equal, and different kinds."""
    networks = tuple(places(each) for each in modules_behind(leaf)) if callable(leaf) else ()
    return type(leaf), (leaf if isinstance(leaf, Hashable) else id(leaf)), networks


def alike(leaf: Any) -> Hashable:
    """Take functions of one name, and numbers of one type, for the same."""
    return getattr(leaf, "__qualname__", type(leaf).__qualname__)


def places(module: nn.Module) -> Hashable:
    """Return where the weights of a module are, and the mode of each part."""
    weights = (weight.data_ptr() for weight in (*module.parameters(), *module.buffers()))
    return *weights, *(part.training for part in module.modules())


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
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: rebuilt(getattr(tree, f.name), tensors) for f in fields(tree) if f.init}
        return replace(tree, **changed)
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


def modules_behind(thing: Any) -> list[nn.Module]:
    """Return the networks of :func:`behind`, each once."""
    return list(dict.fromkeys(part for part in behind(thing) if isinstance(part, nn.Module)))


def state_of(module: Any) -> Hashable:
    """Return what a change of a policy shows in: its parts, modes, hooks, adapters, and weights.

    A weight changes its count when it is written in place, its address or type when it is replaced. Torch
    does not count writes through ``weight.data``: they go unseen.

    Cost: about a microsecond for each part and weight.
    """
    state: list[Hashable] = []
    waiting = [module] if isinstance(module, nn.Module) else []
    while waiting:
        part = waiting.pop()
        own = vars(part)
        adapters = own.get("_disable_adapters"), str(own.get("_active_adapter"))  # PEFT's
        hooks = *part._forward_hooks, None, *part._forward_pre_hooks
        state.append((id(part), part.training, hooks, adapters))
        weights = (*part._parameters.values(), *part._buffers.values())
        state.extend((w.data_ptr(), w._version, w.dtype) for w in weights if w is not None)
        waiting.extend(child for child in part._modules.values() if child is not None)
    return tuple(state)
