"""What rules, samplers and hosts draw: from torch's generator, or each row from a generator of its own.

Drawn from one generator, a row's numbers depend on how many rows come before it. A server acts for several
robots in one batch; under :func:`seeded` what is drawn for a row depends on the row's own seed alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

_rows: ContextVar[tuple[torch.Generator, ...] | None] = ContextVar("qsteer_rows", default=None)
"""The generators of the observations that this thread acts for."""


@contextmanager
def seeded(seeds: Sequence[int]) -> Iterator[None]:
    """Draw for each observation of a batch from its own generator, in the block and in this thread.

    What qsteer draws comes from generators on the CPU, whatever the device is. For a single observation
    torch's own generators are seeded too, and given back as they were: a policy's own draws follow its seed.

    Args:
        seeds: one for each observation, in [0, 2**63).
    """
    token = _rows.set(tuple(torch.Generator().manual_seed(seed) for seed in seeds))
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=len(seeds) == 1):
            if len(seeds) == 1:
                torch.manual_seed(seeds[0])
            yield
    finally:
        _rows.reset(token)


def is_seeded() -> bool:
    """Return whether rows have generators of their own, see :func:`seeded`."""
    return _rows.get() is not None


def normal(
    shape: Sequence[int], like: Tensor, *, rows: int = 0, generator: torch.Generator | None = None
) -> Tensor:
    """Return standard normal numbers, on the device and in the dtype of ``like``.

    Args:
        shape: of the numbers.
        like: gives device and dtype.
        rows: the axis of ``shape`` on which rows lie, k for each observation, see
            :meth:`qsteer.types.Field.repeat`.
        generator: what is drawn from unless rows have generators of their own; None: torch's.
    """
    return _draw(partial(torch.randn, dtype=like.dtype), shape, like.device, rows, generator)


def uniform(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return numbers in [0, 1), rows on the first axis, on the device and in the dtype of ``like``."""
    return _draw(partial(torch.rand, dtype=like.dtype), shape, like.device)


def integers(high: int, rows: int, device: torch.device) -> Tensor:
    """Return a whole number below ``high`` for each row."""
    return _draw(partial(torch.randint, high), (rows,), device)


def _draw(
    draw: Callable[..., Tensor],
    shape: Sequence[int],
    device: torch.device,
    rows: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    own = _rows.get()
    if own is None:
        source = (
            {} if generator is None else {"generator": generator}
        )  # None is another operator to compilers
        return draw(tuple(shape), device=device, **source)
    if shape[rows] % len(own):
        raise ValueError(
            f"seeded: expected rows for {len(own)} observations, as many for each, got {shape[rows]}; give "
            "one seed for each observation of the batch"
        )
    part = (*shape[:rows], shape[rows] // len(own), *shape[rows + 1 :])
    return torch.cat([draw(part, generator=each) for each in own], rows).to(device)
