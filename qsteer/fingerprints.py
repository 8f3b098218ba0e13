"""Hashes of networks and data: a resumed run must see what it started with."""

from collections.abc import Iterable
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> np.ndarray:
    """Return the content of a tensor of any dtype and device as bytes, uint8 of one axis."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def fingerprint(tensors: Iterable[Tensor], prefix: str = "") -> str:
    """Return 16 hexadecimal digits that depend on the bytes of all tensors, their order and ``prefix``.

    Cost: a copy of the tensors on the CPU, one after another.
    """
    digest = sha256(prefix.encode())
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()[:16]
