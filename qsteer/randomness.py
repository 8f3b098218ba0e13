"""What rules, samplers and hosts draw: from torch's generator, or each row from a generator of its own.

Drawn from one generator, a row's numbers depend on how many rows come before it. A server acts for several
robots in one batch; under :func:`seeded` what is drawn for a row depends on the row's own seed alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

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

    def draw(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=like.dtype, device=device)

    return _draw(draw, shape, like.device, rows, generator)


def uniform(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return numbers in [0, 1), rows on the first axis, on the device and in the dtype of ``like``."""

    def draw(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=like.dtype, device=device)

    return _draw(draw, shape, like.device)


def integers(high: int, rows: int, device: torch.device) -> Tensor:
    """Return a whole number below ``high`` for each row."""

    def draw(shape: Sequence[int], device: torch.device, generator: torch.Generator | None) -> Tensor:
        return torch.randint(high, tuple(shape), generator=generator, device=device)

    return _draw(draw, (rows,), device)


def _draw(
    draw: Callable[[Sequence[int], torch.device, torch.Generator | None], Tensor],
    shape: Sequence[int],
    device: torch.device,
    rows: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    own = _rows.get()
    if own is None:
        return draw(shape, device, generator)
    if shape[rows] % len(own):
        raise ValueError(
            f"seeded: expected rows for {len(own)} observations, as many for each, got {shape[rows]}; give "
            "one seed for each observation of the batch"
        )
    part = [*shape[:rows], shape[rows] // len(own), *shape[rows + 1 :]]
    return torch.cat([draw(part, torch.device("cpu"), each) for each in own], rows).to(device)
