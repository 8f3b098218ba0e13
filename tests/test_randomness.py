"""What is drawn: torch's own numbers as ever; under ``seeded``, a row's do not depend on the other rows."""

import hosts
import pytest
import torch
from product_cases import RULES, SAMPLERS
from torch import Tensor

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.randomness import integers, normal, seeded, uniform

SEEDS = (7, 2, 9)
CASES = [
    *((rule, qsteer.Euler()) for rules in RULES.values() for rule in rules),
    *((qsteer.Tweedie(), sampler) for sampler in SAMPLERS.values()),
    (qsteer.Posterior(qsteer.maps.GlassPosterior(steps=2), samples=2), qsteer.BestOfN(3)),
    (qsteer.RandomDirection(redraw=True), qsteer.KeepBest(qsteer.BestOfN(2))),
]


def draw_all(rows: int, k: int) -> list[Tensor]:
    like = torch.zeros(1, dtype=torch.float64)
    return [
        normal((rows * k, 2), like),
        normal((3, rows * k, 2), like, rows=1).movedim(1, 0),
        uniform((rows * k, 2), like),
        integers(1000, rows * k, like.device),
    ]


def test_without_it_torch_draws_as_ever() -> None:
    torch.manual_seed(0)
    drawn = draw_all(2, 1)
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.randn(2, 2, dtype=torch.float64))
    assert drawn[3].dtype == torch.int64
    generator = torch.Generator().manual_seed(3)
    kept = normal((2,), torch.zeros(1), generator=generator)
    assert torch.equal(kept, torch.randn(2, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("k", [1, 4])
def test_a_row_draws_the_same_alone_and_in_company(k: int) -> None:
    with seeded(SEEDS):
        together = draw_all(len(SEEDS), k)
    for i, seed in enumerate(SEEDS):
        with seeded([seed]):
            alone = draw_all(1, k)
        for mine, ours in zip(alone, together, strict=True):
            assert torch.equal(mine, ours[i * k : (i + 1) * k])


def test_it_leaves_torchs_generator_as_it_was_and_seeds_a_single_rows() -> None:
    before = torch.get_rng_state()
    with seeded([5]):
        own = torch.randn(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own, torch.randn(3, generator=torch.Generator().manual_seed(5)))


def test_rows_that_belong_to_no_observation() -> None:
    with seeded(SEEDS), pytest.raises(ValueError, match="rows for 3 observations"):
        normal((4, 2), torch.zeros(1))


@pytest.mark.parametrize("rule, sampler", CASES, ids=str)
def test_every_method_acts_for_a_row_as_if_it_were_alone(
    rule: qsteer.Rule | None, sampler: qsteer.Sampler
) -> None:
    policy = hosts.build("plain")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        critic = Critic(CriticConfig(4, 3, 4, (16,))).eval()
    batch = hosts.observe(policy, len(SEEDS))

    def act(rows: slice) -> Tensor:
        with seeded(SEEDS[rows]), qsteer.steer(policy, critic, rule, sampler=sampler):
            return policy.predict_action_chunk({key: value[rows] for key, value in batch.items()})

    together = act(slice(None))
    assert not torch.equal(together[0], together[1])
    for i in range(len(SEEDS)):
        torch.testing.assert_close(act(slice(i, i + 1))[0], together[i], rtol=1e-4, atol=1e-5)
    assert torch.equal(act(slice(None)), together)  # nothing is left of an earlier action


@pytest.mark.parametrize("name", ("smolvla", "multi_task_dit", "groot", "evo1"))
def test_a_hosts_own_draw_is_the_rows(name: str) -> None:
    policy = hosts.shared(name)
    critic = Critic(CriticConfig(4, 3, 4, (16,), observation_key="observation.state")).eval()

    def noise(*seeds: int) -> Tensor:
        spy, blind = hosts.Spy([]), lambda _: torch.zeros(len(seeds), 4)
        with seeded(seeds), qsteer.steer(policy, critic, spy, critic_inputs=blind):
            hosts.plan(policy, hosts.observe(policy, len(seeds)))
        return spy.seen[0][2]

    together = noise(3, 4)
    assert torch.equal(noise(3)[0], together[0])
    assert not torch.equal(together[0], together[1])
