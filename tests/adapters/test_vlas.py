"""EO1 beyond the laws: candidates on one prefix, features."""

import hosts
import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters.closures import read_closure, with_closure
from qsteer.hosts import HostField


def opened(policy: nn.Module, rows: int = 2, seed: int = 0) -> tuple[HostField, Tensor]:
    """The field of a host, and its noise."""
    field, _, noise = qsteer.open_action(policy, hosts.observe(policy, rows, seed))
    assert isinstance(field, HostField)
    return field, noise


@pytest.mark.parametrize("name", hosts.VLAS)
def test_candidates_on_one_prefix_are_what_they_would_be_alone(name: str):
    """In any order, as often as one likes: no call changes what the next one sees."""
    policy = hosts.shared(name)
    field, noise = opened(policy)
    x = field.draws(noise, 3).flatten(0, 1)
    alone = torch.stack([field(x.unflatten(0, (2, 3))[:, i], 0.3) for i in range(3)], 1).flatten(0, 1)
    for _ in range(2):
        torch.testing.assert_close(field.repeat(3)(x, 0.3), alone)
        torch.testing.assert_close(field.repeat(3)(x, torch.full((6,), 0.3)), alone)
    mixed = torch.tensor([0.3, 0.6])
    apart = torch.stack([field(noise, t.item())[i] for i, t in enumerate(mixed)])
    torch.testing.assert_close(field(noise, mixed), apart)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)


@pytest.mark.parametrize("name", hosts.VLAS)
def test_features_are_of_the_observations(name: str):
    policy = hosts.shared(name)
    first, again, other = (qsteer.critics.pooled(opened(policy, seed=seed)[0].features) for seed in (0, 0, 1))
    assert first.shape[0] == 2 and torch.equal(first, again)
    assert (first - other).abs().amax(1).min() > 1e-3


def loop(scale: Tensor, shift: float):
    def inside(x: Tensor, t: float, *, sign: int = 1) -> Tensor:
        return sign * (scale * x + shift + t)

    return inside


def test_a_function_on_other_variables_is_the_same_function():
    scale, x = torch.tensor(2.0), torch.ones(2)
    function = loop(scale, 0.5)
    variables = read_closure(function)
    assert variables == {"scale": scale, "shift": 0.5}
    other = with_closure(function, variables | {"scale": torch.tensor(3.0), "beside": 1})
    assert torch.equal(other(x, 1.0), torch.full((2,), 4.5))
    assert torch.equal(other(x, 1.0, sign=-1), torch.full((2,), -4.5))
    assert torch.equal(function(x, 1.0), torch.full((2,), 3.5)), "its own variables are as they were"


def test_what_is_no_function_of_a_loop_is_refused():
    def early():
        function = lambda x: x + later  # noqa: E731
        read_closure(function)
        later = 1
        return later

    with pytest.raises(RuntimeError, match=r"local: expected a function inside the host's loop"):
        early()
    with pytest.raises(RuntimeError, match=r"expected a function inside the host's loop.*got <built-in"):
        read_closure(torch.neg)
