"""Lines cut at marks compute what they did, and compile little."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from qsteer.compiling import lines
from qsteer.compiling.cuts import Layout, Part, mark
from qsteer.compiling.lines import Line, read, write

STEPS = 5
type Step = Callable[[Tensor, Tensor, int], Tensor]


def cut(
    step: Step, encode: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> tuple[Line, Tensor]:
    """A chain of steps, cut, after it has been compared with itself on other inputs."""
    monkeypatch.setattr(lines, "MANY", 0)

    def chain(inputs: list[Tensor], mark: Callable[[], None]) -> Tensor:
        x, goal = inputs
        seen = None
        for k in range(STEPS):
            mark()
            seen = encode(goal) if seen is None else seen
            x = step(x, seen, k)
        mark()
        return 2 * x

    with torch.no_grad():
        line = write(lambda inputs: chain(inputs, mark), [torch.randn(3, 4), torch.randn(3, 4)], [])
    inputs = [torch.randn(3, 4), torch.randn(3, 4)]
    found = line.run([laid_out(part) for part in line.parts], inputs)
    torch.testing.assert_close(found, chain(inputs, lambda: None))
    return line


def laid_out(part: Part) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """The function that a part is, which looks at what it is given."""
    function = read(part.source)

    def run(tensors: list[Tensor]) -> Sequence[Tensor]:
        assert tuple(map(Layout.of, tensors)) == part.inputs
        return function(tensors)

    return run


def through_a_view(goal: Tensor) -> Tensor:
    seen = torch.zeros(3, 5)
    seen[:, 1:] = goal
    return seen.exp()


@pytest.mark.parametrize("factor", [lambda k: 0.5, lambda k: 0.1 * k + 0.1], ids=["alike", "other numbers"])
def test_steps_are_one_part_and_what_all_read_is_another(
    factor: Callable[[int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = cut(lambda x, seen, k: x + factor(k) * (seen - x), torch.tanh, monkeypatch)
    assert len(line.parts) == 3 and [part for part, _ in line.calls] == [0, *[1] * STEPS, 2]


def test_numbers_in_formed_tensors_are_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    line = cut(lambda x, seen, k: x + torch.full((4,), k / 7) * seen, torch.tanh, monkeypatch)
    assert len(line.parts) == 3


def test_other_steps_are_other_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    line = cut(lambda x, seen, k: x.sin() if k == 2 else x + seen, torch.tanh, monkeypatch)
    assert len(line.parts) == 4


def test_memory_written_through_a_view_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(lambda x, seen, k: x + seen[:, 1:] * seen[:, :1].add_(1), through_a_view, monkeypatch)
    cut(lambda x, seen, k: x + seen[:, 1:], through_a_view, monkeypatch)


def test_of_several_results_some_are_read_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Tensor] = []

    def encode(goal: Tensor) -> Tensor:
        values, indices = goal.sort(1)
        places[:] = [indices]
        return values

    def step(x: Tensor, seen: Tensor, k: int) -> Tensor:
        return x.gather(1, places[0]) if k == 0 else x + seen

    cut(step, encode, monkeypatch)


def test_what_is_not_contiguous_passes_from_part_to_part(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(lambda x, seen, k: (x + seen).mT.contiguous().mT, lambda goal: goal.mT.tanh().mT, monkeypatch)
