"""Lines of operators that are run as they are read: what a compiler would make of them takes a minute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsteer.compiling.cuts import Part
from qsteer.compiling.lines import read
from qsteer.training import compiled


def uncompiled(patch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> list[str]:
    """Run lines of updates as they are read; return a list of those that are built from now on.

    Args:
        patch: undoes it.
        spoil: makes something else of the loss, and of what is logged.
    """
    sources: list[str] = []

    def build(parts: list[Part]) -> tuple[list[Path], int]:
        sources.extend(part.source for part in parts)
        return [Path(str(len(sources) - 1))], 1

    def load(path: Path, device: torch.device) -> Callable[[list[Tensor]], list[Tensor]]:
        part = read(sources[int(path.name)])

        @torch.no_grad()
        def run(tensors: list[Tensor]) -> list[Tensor]:
            return [spoil(x) if x.is_floating_point() and not x.ndim else x for x in part(tensors)]

        return run

    patch.setattr(compiled, "build", build)
    patch.setattr(compiled, "load", load)
    return sources
