"""Loss and gradients of a learner as one compiled line of operators.

The line is a function of the batch, of the random numbers that the loss draws, and of the weights, which the
optimiser goes on changing in place. Batches are drawn, gradients clipped and weights moved as without it.
"""

import logging
import time
import warnings
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qsteer.compiling.hidden import Watch, check_nothing_hidden, known
from qsteer.compiling.inductor import build, explain, load
from qsteer.compiling.kinds import rebuilt, signature
from qsteer.compiling.lines import Draw, Line, Recorded, Replayed, write
from qsteer.compiling.runs import MismatchError, check_alike, unlike, unmoved

if TYPE_CHECKING:  # which imports this file
    from qsteer.training.loop import Learner

log = logging.getLogger(__name__)

KINDS = 4
"""Most kinds of batches: a learner whose every batch is a kind of its own would compile for ever."""

type Outcome = tuple[Tensor, dict[str, Tensor], list[Tensor | None]]
"""Loss, what to log, and the gradient of each parameter; None: it has none."""


@cache
def has_compiler() -> bool:
    """Return whether there is a C++ compiler; warn, the first time, if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of torch's own kinds
        warnings.warn(
            f"compile: expected a C++ compiler, got {explain(f'{type(error).__name__}: {error}')}; the eager "
            "update trains, and the run counts as one with compile=False",
            RuntimeWarning,
            skip_file_prefixes=(str(Path(__file__).parents[1]),),
        )
        return False
    return True


class Compiled(NamedTuple):
    """A compiled line, and the random numbers that it wants."""

    line: Line
    libraries: list[Any]
    draws: list[Draw]

    def __call__(self, tensors: Sequence[Tensor], drawn: Sequence[Tensor]) -> Outcome:
        """Return what the line makes of a batch and of random numbers."""
        return self.line.run(self.libraries, [*tensors, *drawn])


class CompiledLoss:
    """Loss and gradients of a learner, compiled at the first batch of each kind, which waits for it.

    Random numbers are those that the eager loss draws, from the same generators in the same order. The first
    batch of a kind is computed eagerly, too, and compared.

    Args:
        learner: stays as it is; its weights may change in place.
        parameters: get the gradients.
    """

    def __init__(self, learner: "Learner", parameters: Sequence[nn.Parameter]) -> None:
        self.learner, self.parameters = learner, list(parameters)
        self.device = self.parameters[0].device
        self._kinds: dict[Hashable, Compiled] = {}

    def __call__(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw a batch, leave the gradients in the parameters, and return the loss and what to log.

        Raises:
            MismatchError: the compiled line does not compute what the eager loss does.
            RuntimeError: it cannot be compiled.
            TypeError: the loss reads tensors that are neither in the batch nor in networks, draws random
                numbers that depend on others, or gets batches of ever new kinds.
        """
        batch = self.learner.sample(generator)
        tensors: list[Tensor] = []
        kind = signature(batch, tensors)
        if (compiled := self._kinds.get(kind)) is None:
            compiled, drawn = self.compile(batch, tensors, generator)
            self._kinds[kind] = compiled
        else:
            drawn = [draw() for draw in compiled.draws]
        loss, info, gradients = compiled(tensors, drawn)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss, info

    def differentiate(self, batch: Any, generator: torch.Generator) -> Outcome:
        """Compute eagerly what is compiled."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels count as drawing random numbers
            loss, info = self.learner.batch_loss(batch, generator)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return loss.detach(), info, [None if g is None else g.contiguous() for g in gradients]

    def compile(
        self, batch: Any, tensors: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[Compiled, list[Tensor]]:
        """Compile the line for batches like this one; return it with random numbers for this one."""
        if len(self._kinds) == KINDS:
            raise TypeError(
                f"compile: expected batches of at most {KINDS} kinds (shapes and functions), got one more; "
                "each would be compiled by itself: leave compile out"
            )
        log.info("compiling the update: about a minute the first time")
        began = time.perf_counter()
        with Watch([*tensors, *known(vars(self.learner), batch)]) as watch, Recorded() as recorded:
            eager = self.differentiate(batch, generator)
        check_nothing_hidden(
            watch.hidden,
            "a loss",
            "register constants as buffers of a torch.nn.Module, draw random numbers by torch, or leave "
            "compile out",
        )
        drawn = recorded.drawn
        try:
            line = write(
                lambda given: self.differentiate(rebuilt(batch, iter(given)), generator), tensors, drawn
            )
            paths, new = build(line.parts)
        except Exception as error:  # whatever the compiler says
            raise RuntimeError(
                f"compile: expected an update that Inductor compiles, got {type(error).__name__}: {error}; "
                "leave compile out"
            ) from error
        compiled = Compiled(line, [load(path, self.device) for path in paths], recorded.draws)
        self.check(compiled, eager, batch, tensors, drawn, generator)
        took, how = time.perf_counter() - began, "compiled" if new else "found on the disk"
        log.info("an update was %s in %.1f s", how, took)
        return compiled, drawn

    def check(
        self,
        compiled: Compiled,
        eager: Outcome,
        batch: Any,
        tensors: Sequence[Tensor],
        drawn: Sequence[Tensor],
        generator: torch.Generator,
    ) -> None:
        """Compare loss and gradients with the eager ones; if they differ, again at other weights.

        A gradient may be zero but for rounding, as that of a residual map is at first, and a rule may choose
        between candidates of nearly the same value.

        Raises:
            MismatchError: they differ.
        """
        try:
            return compare(compiled(tensors, drawn), eager, tensors)
        except MismatchError:
            before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with unmoved(None, self.device), torch.no_grad():
                given = [unlike(tensor) for tensor in tensors]
                for parameter in self.parameters:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            with Replayed(drawn):
                eager = self.differentiate(rebuilt(batch, iter(given)), generator)
            compare(compiled(given, drawn), eager, given)
        finally:
            for parameter, weight in zip(self.parameters, before, strict=True):
                parameter.data.copy_(weight)


def compare(got: Outcome, expected: Outcome, inputs: Sequence[Tensor]) -> None:
    """Raise MismatchError unless two outcomes agree to what the least precise of the inputs allows."""
    for name, a, b in zip(("loss", "gradient"), flatten(got), flatten(expected), strict=True):
        check_alike(f"the compiled update's {name}", a, b, list(inputs))


def flatten(outcome: Outcome) -> tuple[Tensor, Tensor]:
    """Return the loss, and all gradients as one vector."""
    loss, _, gradients = outcome
    return loss, torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
