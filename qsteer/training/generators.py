"""The random generators of a run: seeded for it, and kept by its checkpoints."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of a device for a run, and restore them after it.

    Their streams are not those of ``torch.Generator().manual_seed(seed)``.
    """
    derived = int(np.random.SeedSequence((seed, 1)).generate_state(1)[0])
    shared = _list_shared(device)
    before = [generator.get_state() for generator in shared]
    for generator in shared:
        generator.manual_seed(derived)
    try:
        yield
    finally:
        for generator, state in zip(shared, before, strict=True):
            generator.set_state(state)


def _list_shared(device: torch.device) -> list[torch.Generator]:
    """Return torch's global generators of the CPU and of a device."""
    if device.type != "cuda":
        return [torch.default_generator]
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.default_generator, torch.cuda.default_generators[index]]


def list_generators(
    seed: int, device: torch.device, others: Sequence[torch.Generator]
) -> list[torch.Generator]:
    """Return what a run draws from: a new generator, torch's global ones, and others, which are rewound."""
    for generator in others:
        generator.manual_seed(generator.initial_seed())
    own = torch.Generator(device).manual_seed(seed)
    return list({id(g): g for g in (own, *_list_shared(device), *others)}.values())
