"""KeepBest's two runs: the same noise, the same candidates, and a base that is one."""

from dataclasses import dataclass

import pytest
import torch
from fields import BASE, VALUE, noise

import qsteer
from qsteer.types import Field

INNER = [
    qsteer.BestOfN(4),
    qsteer.RandomOfN(4),
    qsteer.BeamSearch(2, 2, 2),
    qsteer.KeepBest(qsteer.BestOfN(3)),
]


@dataclass(frozen=True)
class Listed(qsteer.Sampler):
    """Keeps what an inner sampler returns."""

    inner: qsteer.Sampler
    runs: list[torch.Tensor]

    def __call__(self, field, value, noise):
        self.runs.append(self.inner(field, value, noise))
        return self.runs[-1]


@pytest.mark.parametrize("inner", INNER, ids=str)
def test_both_runs_see_the_same_candidates(inner):
    """With a rule that does nothing, both runs are the same run, which the sampler alone makes."""
    torch.manual_seed(0)
    x, listed = noise(3, 2, 2), Listed(inner, [])
    qsteer.sample(BASE, VALUE, x, rule=lambda f, v: f, sampler=qsteer.KeepBest(listed))
    torch.manual_seed(0)
    alone = qsteer.sample(BASE, VALUE, x, sampler=inner)
    assert len(listed.runs) == 2 and all(torch.equal(run, alone) for run in listed.runs)


class Bent(Field):
    """A field of one's own that does not say what it bends."""

    def __init__(self, field):
        self.field = field

    def __call__(self, x, t):
        return self.field(x, t) + 1.0

    def repeat(self, k):
        return Bent(self.field.repeat(k))


class Based(Bent):
    """One that says it."""

    @property
    def base(self):
        return self.field.base


def test_a_rule_without_a_base_is_refused_and_one_with_is_guarded():
    x, worse = noise(3, 2, 2), qsteer.value(lambda a: -a.flatten(1).sum(1))
    with pytest.raises(TypeError, match=r"expected a rule whose field says what it bends, got Bent"):
        qsteer.sample(BASE, worse, x, rule=lambda f, v: Bent(f), sampler=qsteer.KeepBest())
    with pytest.raises(TypeError, match="give it a property base"):
        qsteer.sample(BASE, worse, x, rule=lambda f, v: Bent(f), sampler=qsteer.BestOfN(2, qsteer.KeepBest()))
    got = qsteer.sample(BASE, worse, x, rule=lambda f, v: Based(f), sampler=qsteer.KeepBest())
    assert torch.equal(got, qsteer.sample(BASE, worse, x))
