"""What critics are made of: the law of initial weights, normalisation, and groups of networks."""

import math

import pytest
import torch

from qsteer.critics.networks import EnsembleLinear, EnsembleMLP, Normalizer


def test_initialisation_has_the_law_of_nn_linear() -> None:
    torch.manual_seed(0)
    layer, bound = EnsembleLinear(3, 100, 200), 1 / math.sqrt(100)
    for w in (*layer.weight, *layer.bias):
        assert w.abs().max() <= bound
        assert w.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)  # uniform
    reference = torch.nn.Linear(100, 200).weight
    assert layer.weight[0].std().item() == pytest.approx(reference.std().item(), rel=0.03)
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_normalisation_standardises_but_does_not_blow_up_what_hardly_varies() -> None:
    data = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 1.0, 1e-6])
    normalizer = Normalizer(3)
    normalizer.fit(data + 7)
    out = normalizer(data + 7)
    torch.testing.assert_close(out[:, :2].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(out[:, :2].std(0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
    assert out[:, 2].abs().max() < 1e-3


B, S, N = 5, 3, 6


def test_a_state_value_has_groups_too() -> None:
    torch.manual_seed(0)
    ones = [EnsembleMLP(1, N, 0, (8,)) for _ in range(S)]
    stack = EnsembleMLP(1, N, 0, (8,), groups=S)
    stack.load_state_dict(
        {name: torch.cat([one.state_dict()[name] for one in ones]) for name in stack.state_dict()}
    )
    s = torch.randn(S * B, N)
    v = stack(stack.encode(s))
    assert v.shape == (1, S * B)
    expected = torch.cat([one(one.encode(x)) for one, x in zip(ones, s.chunk(S), strict=True)], dim=1)
    torch.testing.assert_close(v, expected)
