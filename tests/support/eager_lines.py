"""Lines of operators that are run as they are read: what a compiler would make of them takes a minute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsteer.steering.lines import Line, read
from qsteer.training import compiled


class Library:
    """What a compiled line is to its caller."""

    def __init__(self, source: str, spoil: Callable[[Tensor], Tensor]) -> None:
        self.line, self.spoil = read(source), spoil

    @torch.no_grad()
    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        first, *others = self.line(*tensors)
        return [self.spoil(first), *others]


def uncompiled(patch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> list[str]:
    """Run lines of updates as they are read; return a list of those that are built from now on.

    Args:
        patch: undoes it.
        spoil: makes something else of the loss.
    """
    sources: list[str] = []

    def build(line: Line, inputs: list[Tensor]) -> tuple[Path, bool]:
        sources.append(line.source)
        return Path(str(len(sources) - 1)), False

    patch.setattr(compiled, "build", build)
    patch.setattr(compiled, "load", lambda path, device: Library(sources[int(path.name)], spoil))
    return sources
