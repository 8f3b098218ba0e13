"""Stacks: S critics side by side are those critics one by one, in value, gradient, order and checkpoint."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qsteer
from qsteer.critics import Critic, CriticConfig, LiveCritic
from qsteer.critics.networks import Normalizer
from qsteer.types import Sampler, Value

S, J, B, N, H, A = 3, 4, 5, 6, 2, 3
CONFIG = CriticConfig(obs_dim=N, action_dim=A, horizon=H, hidden=(16, 8), members=J, rho=0.5)


def critics(seeds: int = S) -> list[Critic]:
    """Critics of different weights and normalisation."""
    torch.manual_seed(0)
    made = [Critic(CONFIG).double() for _ in range(seeds)]
    for seed, critic in enumerate(made):
        critic.fit_normalisation(torch.randn(20, N).double() * (seed + 1) + seed)
    return made


def draw(rows: int = B, seeds: int = S) -> tuple[Tensor, Tensor]:
    """Observations and chunks, seed-major."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(seeds * rows, N, generator=generator).double(),
        torch.randn(seeds * rows, H, A, generator=generator).double(),
    )


def test_values_are_those_of_the_critics_one_by_one() -> None:
    (obs, a), ones = draw(), critics()
    value = Critic.stacked(ones).bind(obs)
    assert isinstance(value, Value)
    q = value.members(a)
    assert q.shape == (J, S * B)
    each = [critic.bind(s) for critic, s in zip(ones, obs.chunk(S), strict=True)]
    expected = torch.cat([v.members(x) for v, x in zip(each, a.chunk(S), strict=True)], dim=1)
    torch.testing.assert_close(q, expected, rtol=0, atol=1e-12)
    pessimistic = torch.cat([v(x) for v, x in zip(each, a.chunk(S), strict=True)])
    torch.testing.assert_close(value(a), pessimistic, rtol=0, atol=1e-12)
    wrong = Critic.stacked(ones[::-1]).bind(obs).members(a)
    assert (wrong - expected).abs().max() > 1e-2, "each seed has its own critic"


def test_gradients_are_those_of_the_critics_one_by_one() -> None:
    (obs, a), ones = draw(), critics()
    stack, target = Critic.stacked(ones), torch.randn(J, S * B).double()
    a.requires_grad_()
    (stack.members(stack.encode(obs), a) - target).square().mean(1).sum().mul(S).backward()
    whole = [x.grad for x in (a, *stack.parameters())]
    a.grad = None
    for critic, s, x, y in zip(ones, obs.chunk(S), a.chunk(S), target.chunk(S, 1), strict=True):
        (critic.members(critic.encode(s), x) - y).square().mean(1).sum().backward()
    weights = [
        torch.cat([p.grad for p in each]) for each in zip(*(c.parameters() for c in ones), strict=True)
    ]
    for got, expected in zip(whole, [a.grad, *weights], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_one_step_of_adam_is_one_step_of_each() -> None:
    (obs, a), ones = draw(), critics()
    stack = Critic.stacked(ones)
    for critic, s, x in [(stack, obs, a), *zip(ones, obs.chunk(S), a.chunk(S), strict=True)]:
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-2)
        critic.members(critic.encode(s), x).square().mean(1).sum().mul(critic.config.stack).backward()
        optimizer.step()
    for got, expected in zip(stack.unstacked(), ones, strict=True):
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(got.state_dict()[name], tensor, rtol=0, atol=1e-8)


def test_stacking_and_unstacking_are_inverse_and_copy() -> None:
    ones = [critic.eval() for critic in critics()]
    random = torch.get_rng_state()
    stack = Critic.stacked(ones)
    assert stack.config.stack == S and not stack.training
    again = stack.unstacked()
    assert torch.equal(torch.get_rng_state(), random), "no random number is drawn"
    assert [critic.config for critic in again] == [CONFIG] * S
    for critic, expected in zip(again, ones, strict=True):
        state = critic.state_dict()
        assert {name: (x.shape, x.dtype) for name, x in state.items()} == {
            name: (x.shape, x.dtype) for name, x in expected.state_dict().items()
        }
        assert all(torch.equal(x, expected.state_dict()[name]) for name, x in state.items())
        assert all(p.requires_grad for p in critic.parameters())
    with torch.no_grad():
        stack.net.first.weight.zero_()
    assert all(p.abs().sum() > 0 for c in (*ones, *again) for p in (c.net.first.weight,))
    (alone,) = ones[0].unstacked()
    assert torch.equal(alone.net.first.weight, ones[0].net.first.weight)
    assert Critic.stacked(ones[:1]).config == CONFIG


def test_repeats_compose_and_stay_with_their_seed() -> None:
    (obs, _), stack = draw(), Critic.stacked(critics())
    a = torch.randn(S * B * 6, H, A).double()
    expected = stack.bind(obs.repeat_interleave(6, 0)).members(a)
    for value in (stack.bind(obs).repeat(6), stack.bind(obs).repeat(2).repeat(3)):
        torch.testing.assert_close(value.members(a), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [qsteer.Euler(), qsteer.KeepBest(qsteer.TrustRegion(eta=0.3))])
def test_steering_all_seeds_at_once_is_steering_each(sampler: Sampler) -> None:
    (obs, noise), ones, rule = draw(), critics(), qsteer.Tweedie(alpha=0.5)

    def steered(s: Tensor, critic: Critic, x0: Tensor) -> Tensor:
        field = qsteer.field(lambda x, t, s: s.mean(1)[:, None, None] - x, context=s)
        return qsteer.sample(field, critic.bind(s), x0, rule=rule, sampler=sampler)

    parts = [steered(s, critic, x0) for s, critic, x0 in zip(obs.chunk(S), ones, noise.chunk(S), strict=True)]
    torch.testing.assert_close(steered(obs, Critic.stacked(ones), noise), torch.cat(parts), rtol=0, atol=1e-9)


def test_every_seed_is_normalised_by_its_own_data() -> None:
    data = torch.randn(S * 40, N).double() * 3 + torch.arange(S).repeat_interleave(40)[:, None]
    stack = Critic(CriticConfig(obs_dim=N, action_dim=A, horizon=H, stack=S)).double()
    stack.fit_normalisation(data)
    assert stack.normalizer.mean.shape == (S, 1, N)
    for part, rows in zip(stack.normalizer(data).chunk(S), data.chunk(S), strict=True):
        alone = Normalizer(N).double()
        alone.fit(rows)
        torch.testing.assert_close(part, alone(rows), rtol=0, atol=1e-12)
        torch.testing.assert_close(part.mean(0), torch.zeros(N).double(), rtol=0, atol=1e-12)


def test_a_checkpoint_carries_a_stack(tmp_path: object) -> None:
    (obs, a), stack = draw(), Critic.stacked(critics()).float()
    stack.save_pretrained(tmp_path)
    again = Critic.from_pretrained(tmp_path)
    assert again.config == stack.config
    assert torch.equal(again.bind(obs)(a), stack.bind(obs)(a))
    assert "a stack of 3 independent critics" in (tmp_path / "README.md").read_text()


def test_a_stack_can_act_live() -> None:
    (obs, a), stack, live = draw(), Critic.stacked(critics()), LiveCritic(Critic.stacked(critics()[::-1]))
    assert not torch.equal(live.bind(obs)(a), stack.bind(obs)(a))
    live.publish(stack)
    assert torch.equal(live.bind(obs)(a), stack.bind(obs)(a))


def refused(kind: type[Exception], match: str, do: Callable[[], object]) -> None:
    with pytest.raises(kind, match=match):
        do()


def test_what_cannot_be_stacked_is_refused() -> None:
    ones, (obs, a) = critics(), draw()
    stack = Critic.stacked(ones)
    other = Critic(CriticConfig(obs_dim=N, action_dim=A, horizon=H, hidden=(8,)))
    refused(ValueError, "rows in 3 equal groups.*got 14 rows", lambda: stack.encode(obs[:-1]))
    refused(ValueError, r"\(15, 2, 3\), got \(5, 2, 3\).*value.repeat", lambda: stack.bind(obs)(a[:B]))
    refused(ValueError, "stacked: expected critics of one configuration", lambda: Critic.stacked([]))
    refused(ValueError, "stacked: .*hidden=.8,", lambda: Critic.stacked([ones[0], other]))
    refused(ValueError, "stacked: .*none of them a stack", lambda: Critic.stacked([stack, stack]))
    sized = dict(obs_dim=N, action_dim=A, horizon=H)
    for wrong, match in (
        (dict(stack=0), "stack: expected at least 1"),
        (dict(stack=2, views=("top",)), "stack: expected 1 with views or features"),
        (dict(stack=2, features=3), "stack: expected 1 with views or features"),
    ):
        refused(ValueError, match, lambda wrong=wrong: CriticConfig(**sized, **wrong))
