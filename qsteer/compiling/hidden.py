"""Tensors that enter an action and are none of its inputs: a replay would keep the first action's.

An action may read its buffers, the weights and constants of networks, what was prepared of the policy, and
what it has made itself. A value that keeps the observation in ``self`` or in a closure reads something else.
All tensors that the operations of one eager run read are looked at, backward passes included.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qsteer.compiling.kinds import modules_behind

FAR = 8
"""How far networks are looked for."""


class Watch(TorchDispatchMode):
    """Collects the tensors that operations read and that are neither known nor made inside the block.

    Parameters of networks are known.

    Args:
        known: all others that may be read.

    Attributes:
        hidden: what was found, each memory once.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self._known = {memory_of(tensor) for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the inputs of an operation, and know its outputs from now on."""
        kwargs = kwargs or {}
        if func is not torch.ops.aten.lift_fresh.default:  # makes a tensor of numbers
            for tensor in tensors_of((args, kwargs)):
                if not isinstance(tensor, nn.Parameter) and memory_of(tensor) not in self._known:
                    self.hidden.append(tensor)
                    self._known.add(memory_of(tensor))
        result = func(*args, **kwargs)
        self._known.update(memory_of(tensor) for tensor in tensors_of(result))
        return result


def known(*trees: Any) -> list[Tensor]:
    """Return the weights and constants of all networks in and behind trees: an action may read them."""
    found: list[Tensor] = []
    for network in modules_behind(trees, FAR):
        found += [*network.parameters(), *network.buffers()]
    return found


def leaves_of(policy: Any) -> list[Any]:
    """Return the functions which the parts of a policy have as attributes."""
    parts = policy.modules() if isinstance(policy, nn.Module) else ()
    return [each for part in parts for each in vars(part).values() if callable(each)]


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors with a memory in a nested structure."""
    leaves = pytree.tree_leaves(tree)
    tensors = (x for x in leaves if isinstance(x, Tensor) and not x._is_zerotensor())  # of derivatives
    return [x for x in tensors if x.layout == torch.strided and x.numel()]


def memory_of(tensor: Tensor) -> int:
    """Return where the memory of a tensor begins, which its views share."""
    return tensor.untyped_storage().data_ptr()


def check_nothing_hidden(
    hidden: Sequence[Tensor],
    what: str = "an action",
    remedy: str = "put what depends on the observation into the context, qsteer.value(fn, context=obs), or "
    "into fields of the value's frozen dataclass, and constants into buffers of a torch.nn.Module "
    "(register_buffer)",
) -> None:
    """Raise TypeError if there are any tensors."""
    if hidden:
        names = ", ".join(f"{tuple(x.shape)} of {x.dtype}".replace("torch.", "") for x in hidden[:4])
        raise TypeError(
            f"compile: expected {what} that reads its inputs and the weights of networks only, got "
            f"{len(hidden)} other tensor(s), which would be kept from the first time on: {names}; {remedy}"
        )
