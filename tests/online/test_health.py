"""A learning critic's health: bounds by formula, each illness alone, a real critic that is brought back."""

import math

import pytest
import torch
from fields import as_installed

from qsteer.critics import Critic, CriticConfig
from qsteer.data.episodes import Transitions
from qsteer.online.health import Health
from qsteer.training.critic import CriticTraining, Sarsa

SETTINGS = CriticTraining(
    target="sarsa", batch_size=32, horizon=1, gamma=0.9, ema=0.1, members=2, hidden=(16, 16), rho=0.0
)
WEIGHTS = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]


def seen(*rewards: float, gamma: float = 0.9, **kwargs) -> Health:
    health = Health(gamma, **kwargs)
    health.observe_rewards(torch.tensor(rewards))
    return health


# ---------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize(
    ("rewards", "low", "high"),
    [
        ((-1.0, 0.0), -10.0, 0.0),
        ((0.0, 1.0), 0.0, 10.0),
        ((-1.0, -1.0), -10.0, -1.0),  # a single step costs 1 already
        ((2.0, 3.0), 2.0, 30.0),
        ((-1.0, 2.0), -10.0, 20.0),
    ],
)
def test_bounds_are_those_of_all_returns_and_a_margin_of_their_width(rewards, low, high):
    for margin in (0.0, 0.25):
        slack = margin * (high - low)
        assert seen(*rewards, margin=margin).bounds == pytest.approx((low - slack, high + slack))
    generator = torch.Generator().manual_seed(0)
    for length in (1, 2, 50):  # whatever is drawn, returns lie within; the extremes are reached
        drawn = torch.empty(200, length).uniform_(*sorted(rewards), generator=generator)
        returns = (drawn * 0.9 ** torch.arange(length)).sum(1)
        assert ((returns >= low - 1e-4) & (returns <= high + 1e-4)).all()
    extremes = [sum(r * 0.9**k for k in range(n)) for r in rewards for n in (1, 1000)]
    assert min(low, 0) == pytest.approx(min(*extremes, 0)) and high == pytest.approx(max(*extremes, *rewards))


def test_bounds_widen_with_the_rewards_seen_and_heed_no_other_numbers():
    health = Health(0.9, margin=0.0)
    assert health.bounds is None
    health.observe_rewards(torch.zeros(3, 2))
    assert health.bounds is None, "zeros alone say nothing of the scale"
    health.observe_rewards(torch.tensor([math.nan, 1.0, math.inf, -math.inf]))
    assert health.bounds == pytest.approx((0.0, 10.0))
    health.observe_rewards(torch.tensor([[-2.0], [0.5]]))
    assert health.bounds == pytest.approx((-20.0, 10.0))
    health.observe_rewards(torch.tensor([math.nan]))
    health.observe_rewards(torch.zeros(0))
    assert health.bounds == pytest.approx((-20.0, 10.0))


# ------------------------------------------------------------------------------------------------- illnesses


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(bad):
    health = Health(0.9)
    good = {"loss": 1.0, "q": torch.tensor(0.5)}
    assert health.check(good, WEIGHTS) is None
    assert health.check(good | {"q_std": torch.tensor(bad)}, WEIGHTS) == "not finite: q_std"
    assert health.check(good | {"loss": bad}, WEIGHTS) == "not finite: loss"
    ill = [WEIGHTS[0], torch.nn.Parameter(torch.tensor([1.0, bad]))]
    assert health.check(good, ill) == "not finite: parameters"
    graded = torch.nn.Parameter(torch.ones(2))
    graded.grad = torch.tensor([bad, 0.0])
    assert health.check(good, [graded]) == "not finite: gradients"
    assert health.trips == 4


@pytest.mark.parametrize("name", ["q", "q_min", "q_max", "v", "y"])
def test_values_beyond_any_return_are_an_illness(name):
    health = seen(-1.0, 0.0, margin=0.5)
    for inside in (-15.0, -10.0, 0.0, 5.0):
        assert health.check({name: torch.tensor(inside)}, WEIGHTS) is None
    for outside in (-15.1, 5.1):
        assert health.check({name: outside}, WEIGHTS) == (
            f"{name} = {outside:.4g} beyond any return: [-15, 5]"
        )
    assert health.check({"grad_norm": 1e6}, WEIGHTS) is None, "no value"
    assert Health(0.9).check({name: 1e6}, WEIGHTS) is None, "no reward was seen"


def test_a_loss_explodes_over_its_running_median_and_the_returns_square():
    health = seen(0.0, 1.0, explosion=10.0, window=5)  # returns in [0, 10]: square 100
    for loss in (20.0, 1e6, 20.0, 20.0, 20.0):
        assert health.check({"loss": loss}, WEIGHTS) is None, "no median yet"
    assert health.check({"loss": 199.0}, WEIGHTS) is None
    assert health.check({"loss": 201.0}, WEIGHTS) == "loss = 201, 20 is usual"
    quiet = seen(0.0, 1.0, explosion=10.0, window=5)
    for loss in (1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 1.0, 99.0):  # a first success after many zeros
        assert quiet.check({"loss": loss}, WEIGHTS) is None
    for _ in range(3):
        assert health.check({"loss": 1e5}, WEIGHTS) is not None or health.trips == 3
    assert health.check({"loss": 1e5}, WEIGHTS) is None, "what stays is usual"


def test_steering_is_forbidden_until_it_has_recovered():
    health = Health(0.9, recovery=3)
    assert health.steers
    assert health.check({"loss": math.nan}, WEIGHTS) and not health.steers
    for expected in (False, False, True, True):
        assert health.check({"loss": 1.0}, WEIGHTS) is None
        assert health.steers == expected
    health.check({"loss": math.nan}, WEIGHTS)
    health.check({"loss": 1.0}, WEIGHTS)
    health.check({"loss": math.nan}, WEIGHTS)
    assert not health.steers and health.trips == 3


def test_bounds_apply_to_a_value_once_it_has_been_inside():
    """Rewards of .001 and a fresh critic's values of .3: it learns its way in, and is then watched."""
    health = seen(0.0, 0.001, margin=0.5)  # returns in [0, .01]
    for q in (0.3, 0.1, 0.0149, 0.016, 0.0149, 0.009, 0.0149):
        assert health.check({"q": q}, WEIGHTS) is None
    assert health.check({"q": 0.016, "q_max": 0.3}, WEIGHTS) == "q = 0.016 beyond any return: [-0.005, 0.015]"


@pytest.mark.parametrize("place", [0, 2000, 3999])
def test_a_few_outliers_widen_no_bounds(place):
    rewards = torch.rand(4000, generator=torch.Generator().manual_seed(0)) - 0.5
    usual = seen(*rewards.tolist())
    rewards[torch.arange(place, place + 5) % 4000] = -1e6
    health = seen(*rewards.tolist())
    assert health.scale.outliers == 5 and health.bounds == pytest.approx(usual.bounds, rel=0.01)
    for _ in range(health.window):
        assert health.check({"loss": 1.0, "y": 0.1}, WEIGHTS) is None
    assert "loss = 1e+11" in health.check({"loss": 1e11}, WEIGHTS)
    assert "beyond any return" in health.check({"y": -1e4}, WEIGHTS)


@pytest.mark.parametrize(
    ("step", "rare"), [(0.0, 1.0), (-1.0, 0.0), (-1.0, 1000.0), (-0.001, 1.0), (1.0, -1000.0)]
)
def test_a_rare_success_is_no_outlier(step, rare):
    health = Health(0.9)
    health.observe_rewards(torch.full((100_000,), step))
    health.observe_rewards(torch.tensor([rare]))
    low, high = health._returns()
    assert health.scale.outliers == 0 and low <= min(step, rare) and high >= max(step, rare)


# --------------------------------------------------------------------------------------- a critic that learns


class Fake:
    """One-step transitions of a task with reward -|a - s|; ``poison`` makes the next batch's rewards NaN."""

    poison = False

    def sample(self, batch_size: int, generator: torch.Generator) -> Transitions:
        s, s2 = (torch.randn(batch_size, 1, generator=generator) for _ in range(2))
        a, a2 = (torch.rand(batch_size, 1, 1, generator=generator) * 2 - 1 for _ in range(2))
        r = -(a[:, 0, 0] - s[:, 0]).abs().clamp(max=1.0)
        if self.poison:
            r = torch.where(torch.arange(batch_size) == 3, math.nan, r)
        rows, valid = torch.arange(batch_size), torch.ones(batch_size, 1, dtype=torch.bool)
        return Transitions(rows, s, a, r, 0.9, torch.ones(batch_size), s2, a2, valid)


class Loop:
    """Updates, and a check after each."""

    def __init__(self, lr: float = 3e-3, **kwargs) -> None:
        torch.manual_seed(0)
        self.source = Fake()
        critic = Critic(CriticConfig(1, 1, 1, hidden=(16, 16), members=2, rho=0.0))
        self.learner = Sarsa(critic, self.source, SETTINGS)
        self.parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr, fused=True)
        self.generator = torch.Generator().manual_seed(1)
        self.health = Health(0.9, keep_every=5, recovery=10, window=10, **kwargs)
        self.health.observe_rewards(torch.tensor([-1.0, 0.0]))

    def update(self) -> float:
        loss, info = self.learner.loss(self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.learner.after_step()
        self.reason = self.health.check({"loss": loss.detach()} | info, self.parameters)
        if self.reason is None:
            self.health.keep(self.learner, self.optimizer)
        return float(loss.detach())

    def state(self) -> list[torch.Tensor]:
        moments = [t for s in self.optimizer.state_dict()["state"].values() for t in s.values()]
        return [t.clone() for t in (*self.learner.state_dict().values(), *moments)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_healthy_run_never_trips():
    loop = Loop()
    losses = [loop.update() for _ in range(150)]
    assert loop.health.trips == 0 and loop.health.steers
    assert sum(losses[-50:]) < 0.5 * sum(losses[:50])


def test_a_poisoned_batch_is_undone_to_the_bit_and_learning_goes_on():
    loop = Loop()
    states = []
    for _ in range(43):
        loop.update()
        states.append(loop.state())
    loop.source.poison = True
    loop.update()
    assert loop.reason == "not finite: parameters, gradients, loss, y"
    assert not all(t.isfinite().all() for t in loop.state()) and not loop.health.steers
    loop.health.restore(loop.learner, loop.optimizer)
    assert equal(loop.state(), states[40])  # kept after updates 1, 6, ..., 41: moments and averages too
    averaged = loop.learner.target.bind(torch.zeros(1, 1))
    loop.source.poison = False
    losses = [loop.update() for _ in range(100)]
    assert loop.health.steers and (loop.health.trips, loop.health.restores) == (1, 1)
    assert all(map(math.isfinite, losses)) and sum(losses[-20:]) < sum(losses[:20])
    assert averaged(torch.zeros(1, 1, 1)).isfinite()


def test_what_was_kept_is_not_touched_by_what_is_learnt_from_it():
    loop = Loop()
    for _ in range(41):
        loop.update()
    kept = loop.state()
    for _ in range(3):
        loop.update()
        loop.health.restore(loop.learner, loop.optimizer)
        assert equal(loop.state(), kept)


def test_divergence_is_noticed_while_actions_and_weights_are_finite():
    loop = Loop()
    for _ in range(60):
        loop.update()
    loop.optimizer.param_groups[0]["lr"] = 3.0
    for updates in range(1, 60):  # noqa: B007
        loop.update()
        if loop.reason:
            break
    assert loop.reason and "beyond any return" in loop.reason and updates < 30
    assert all(t.isfinite().all() for t in loop.state())
    loop.health.restore(loop.learner, loop.optimizer)
    losses = []
    while len(losses) < 80:
        loop.optimizer.param_groups[0]["lr"] = 1e-3
        losses.append(loop.update())
        if loop.reason:  # the state was kept when it already ran away
            loop.health.restore(loop.learner, loop.optimizer)
    assert loop.health.steers and loop.health.trips <= 3
    assert sum(losses[-20:]) / 20 < 1.0


def test_a_relapse_goes_back_one_state_further():
    loop = Loop()
    states = []
    for _ in range(12):
        loop.update()
        states.append(loop.state())  # kept: 0, 5, 10; the last two are there
    for expected in (10, 5, 5):
        loop.health.check({"loss": math.nan}, loop.parameters)
        loop.health.restore(loop.learner, loop.optimizer)
        assert equal(loop.state(), states[expected])
    assert (loop.health.trips, loop.health.restores) == (3, 3)


def test_a_check_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch):
    loop, reads = Loop(), []
    tolist, item = torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (reads.append("tolist"), tolist(self))[1])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: (reads.append("item"), item(self))[1])
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: (reads.append("bool"), bool(item(self)))[1])
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: (reads.append("float"), float(item(self)))[1])
    info = {"loss": torch.tensor(1.0), "q": torch.tensor(-1.0), "y": torch.tensor(-2.0), "lr": 1e-3}
    assert loop.health.check(info, loop.parameters) is None
    assert reads == ["tolist"]


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"gamma": 1.0}, "gamma: expected 0 <= gamma < 1, got 1.0"),
        ({"gamma": math.nan}, "gamma: expected"),
        ({"margin": -0.1}, "margin, explosion: expected at least 0 and more than 1, got -0.1"),
        ({"explosion": 1.0}, "explosion"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"keep_every": 0}, "keep_every: expected at least 1"),
        ({"recovery": 0}, "recovery: expected at least 1"),
    ],
)
def test_arguments_out_of_range_are_refused(bad, message):
    with as_installed(), pytest.raises(ValueError, match=message):
        Health(**{"gamma": 0.9} | bad)


def test_nothing_can_be_restored_that_was_not_kept():
    loop = Loop()
    with pytest.raises(RuntimeError, match=r"expected a kept state, got none; call keep\(\)"):
        loop.health.restore(loop.learner, loop.optimizer)
