"""CUDA rehearsed without CUDA: updates of critics and losses of maps, on the meta device.

``tests/steering/test_rehearsal.py`` says what that sees and what it cannot. The optimiser is Adam of torch's
plain operators: the fused one, which training takes, refuses meta. Batches are drawn on the CPU, then moved.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fields import noise, uniform
from play_data import A, H, S, episodes
from rehearsal import META, RehearsalError, check_like, on_meta, rehearsed
from small_maps import NETWORKS, features, single, small
from torch import Tensor
from training_runs import CRITIC, act

from qsteer.critics import Critic, CriticConfig
from qsteer.data import Chunks
from qsteer.data.episodes import Transitions
from qsteer.maps import (
    diagonal_loss,
    direct_loss,
    eulerian_loss,
    fmq_target,
    lagrangian_loss,
    progressive_loss,
    semigroup_loss,
    trust_radius,
)
from qsteer.training.critic import ACTING, LEARNERS, CriticLearner, SteeredPolicy
from qsteer.training.loop import descend, differentiator, processes


@dataclass(frozen=True)
class Given:
    """A source of one batch."""

    batch: Transitions

    def sample(self, batch_size: int, generator: torch.Generator, /) -> Transitions:
        assert len(self.batch.actions) == batch_size
        return self.batch


def learner(target: str, stack: int = 1, acting: SteeredPolicy = act) -> CriticLearner:
    """A critic's learner on meta."""
    kind, settings = LEARNERS[target], replace(CRITIC, target=target, distilled=4)
    chunks = Chunks(episodes(), H, settings.gamma, kind.need)
    batch = on_meta(chunks.sample(settings.batch_size * stack, torch.Generator().manual_seed(0)))
    with torch.device(META):  # as training has it: the average is of parameters that are not replaced
        critic = Critic(CriticConfig(S, A, H, (8,), members=3, stack=stack))
        return kind(critic, Given(batch), settings, acting if target in ACTING else None)


def update(learner: CriticLearner) -> tuple[Tensor, dict[str, Tensor]]:
    """Take two steps, of which the first makes the optimiser's state."""
    processes("cpu")
    optimizer = torch.optim.Adam(p for p in learner.parameters() if p.requires_grad)
    differentiate = differentiator(learner, optimizer, learner.settings)
    for step in (1, 2):
        with rehearsed():
            loss, info = differentiate(torch.Generator())
            descend(learner, optimizer, learner.settings, step)
    return loss, info


@pytest.mark.parametrize(
    ("target", "stack"), [*((target, 1) for target in LEARNERS), *((t, 2) for t in LEARNERS if t != "fql")]
)
def test_an_update_of_a_critic(target: str, stack: int) -> None:
    loss, info = update(learner(target, stack))
    for number in (loss, *info.values()):
        check_like(number.detach(), torch.empty((), device=META))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda noise: noise + torch.zeros(A), "a CPU tensor"),
        (lambda noise: noise * float(noise.mean()), "no host read"),
        (lambda noise: noise * torch.tensor([1.0, 2.0], device=noise.device), "no upload"),
    ],
)
def test_a_fault_of_an_update_is_refused(fault: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(RehearsalError, match=words):
        update(learner("td", acting=lambda critic, obs, noise: fault(noise)))


LOSSES: dict[str, Callable[..., Tensor]] = {
    "diagonal": lambda u, x, r, t, w: diagonal_loss(u, x, x, t),
    "direct": lambda u, x, r, t, w: direct_loss(u, x, r, t, lambda x, r: x, 3),
    "lagrangian": lambda u, x, r, t, w: lagrangian_loss(u, x, r, t),
    "eulerian": lambda u, x, r, t, w: eulerian_loss(u, x, r, t),
    "eulerian-velocity": lambda u, x, r, t, w: eulerian_loss(u, x, r, t, torch.zeros_like(x)),
    "progressive": progressive_loss,
    "semigroup": semigroup_loss,
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_of_a_map(network: str, loss: Callable[..., Tensor]) -> None:
    """No loss of a map is captured: torch's forward derivatives upload numbers."""
    given = single((features(network), noise(3, 2, 2), uniform(3, 3).sort(1).values.unbind(1)))
    flow_map, (seen, x, (r, w, t)) = on_meta((small(network).float(), given))
    with rehearsed(captured=False):
        z = flow_map.net.encode(seen)
        found = loss(lambda *at: flow_map.average_velocity(z, *at), x, r, t, w)
        check_like(found, t)
        found.mean().backward()


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("typical", [None, 1.0])
def test_a_trust_region(beta: float, typical: float | None) -> None:
    u, g, q = on_meta((torch.zeros(3, 2, 2), torch.zeros(3, 2, 2), torch.zeros(4, 3)))
    with rehearsed():
        etas: tuple[Any, ...] = 0.3, trust_radius(0.3, q, beta, typical)
        for eta in etas:
            check_like(fmq_target(u, g, eta), u)
