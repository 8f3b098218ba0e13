"""What a critic can see: states, camera views, and what the frozen policy made of its observation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import qsteer
from qsteer.critics import FEATURES, Critic, CriticConfig, LiveCritic
from qsteer.critics.encoders import shift_randomly

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
SIZE = 16
CONFIG = CriticConfig(
    obs_dim=4,
    action_dim=3,
    horizon=4,
    hidden=(16, 16),
    views=(TOP, WRIST),
    view_size=SIZE,
    features=7,
    latent=5,
    channels=8,
    shift=2,
)
ROWS = 6


def make(**changes: object) -> Critic:
    torch.manual_seed(0)
    return Critic(replace(CONFIG, **changes))


def observe(rows: int = ROWS, size: int = SIZE, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images = {
        key: torch.randint(256, (rows, 3, size, size), dtype=torch.uint8, generator=draw)
        for key in (TOP, WRIST)
    }
    vectors = {key: torch.randn(rows, n, generator=draw) for key, n in ((STATE, 4), (FEATURES, 7))}
    return images | vectors | {"task": ["lift"] * rows}


def chunks(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 4, 3, generator=torch.Generator().manual_seed(1))


def seen_by_encoder(critic: Critic, view: int = 0) -> list[Tensor]:
    """A list to which every later input of a view's encoder is appended."""
    seen: list[Tensor] = []
    critic.views[view].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return seen


@pytest.mark.parametrize(
    ("changes", "context", "keys"),
    [
        ({}, 4 + 3 * 5, (STATE, TOP, WRIST, FEATURES)),
        ({"obs_dim": 0, "features": 0}, 10, (TOP, WRIST)),
        ({"views": (), "obs_dim": 0}, 5, (FEATURES,)),
        ({"views": [WRIST], "features": 0, "strides": [2, 2]}, 9, (STATE, WRIST)),
        ({"views": (), "features": 0}, 4, (STATE,)),
    ],
)
def test_any_inputs_go_together(changes: dict, context: int, keys: tuple[str, ...]) -> None:
    critic, obs = make(**changes), observe()
    assert (critic.config.context, critic.config.keys) == (context, keys)
    assert critic.context(obs).shape == (ROWS, context)
    assert critic.encode(obs).shape == (4, ROWS, 16)
    value = critic.bind({key: obs[key] for key in keys})
    assert value.members(chunks()).shape == (4, ROWS)
    assert torch.equal(value(chunks()), critic.bind(obs)(chunks()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"obs_dim": 0, "views": (), "features": 0},
            "obs_dim: expected at least 1, got 0, and neither views",
        ),
        ({"obs_dim": -1}, "obs_dim: expected at least 0"),
        ({"features": -1}, "features: expected at least 0"),
        ({"shift": -1}, "shift: expected at least 0"),
        ({"latent": 0}, "latent: expected at least 1"),
        ({"channels": 0}, "channels: expected at least 1"),
        ({"strides": ()}, "strides: expected positive ones"),
        ({"view_size": 12, "strides": (2, 2, 2)}, "leave something of a view of 12 pixels, got .2, 2, 2."),
    ],
)
def test_impossible_inputs_are_refused(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(CONFIG, **changes)


def test_every_input_influences_the_value() -> None:
    critic, obs = make(), observe()
    value = critic.bind(obs)(chunks())
    for key in critic.config.keys:
        other = critic.bind(obs | {key: obs[key].flip(0)})(chunks())
        assert (other - value).abs().min() > 1e-5, key
    swapped = critic.bind(obs | {TOP: obs[WRIST], WRIST: obs[TOP]})(chunks())
    assert (swapped - value).abs().min() > 1e-5, "each view has its own encoder"


def test_every_parameter_learns() -> None:
    critic = make()
    critic.members(critic.encode(observe()), chunks()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in critic.parameters())


def test_bytes_are_255ths() -> None:
    critic, obs = make(), observe()
    unit = obs | {key: obs[key].float() / 255 for key in (TOP, WRIST)}
    assert torch.equal(critic.encode(obs), critic.encode(unit))
    seen = seen_by_encoder(critic)
    critic.encode(obs)
    assert torch.equal(seen[0], unit[TOP]) and 0.99 < seen[0].max() <= 1.0


@pytest.mark.parametrize(
    ("height", "width"), [(2 * SIZE, 2 * SIZE), (SIZE, 3 * SIZE), (SIZE // 2, SIZE // 2)]
)
def test_images_of_another_size_are_averaged_over_areas(height: int, width: int) -> None:
    critic, obs = make(), observe()
    image = torch.rand(ROWS, 3, height, width)
    seen = seen_by_encoder(critic)
    critic.encode(obs | {TOP: image})
    if height < SIZE:
        expected = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    else:
        expected = image.unflatten(3, (SIZE, -1)).mean(4).unflatten(2, (SIZE, -1)).mean(3)
    torch.testing.assert_close(seen[0], expected)


def test_states_and_features_are_normalised_and_pixels_are_not() -> None:
    critic, obs = make(), observe(rows=500, size=2)
    critic.fit_normalisation(obs | {STATE: obs[STATE] * 3 + 1, FEATURES: obs[FEATURES] * 9 - 2})
    for normalizer, key, scale, shift in (
        (critic.normalizer, STATE, 3, 1),
        (critic.features.normalizer, FEATURES, 9, -2),
    ):
        torch.testing.assert_close(normalizer.mean, obs[key].mean(0) * scale + shift)
        torch.testing.assert_close(normalizer.std, obs[key].std(0, correction=0) * scale)
    states = make(views=(), features=0)
    states.fit_normalisation(obs[STATE])
    torch.testing.assert_close(states.normalizer.mean, obs[STATE].mean(0))


def test_a_bound_critic_encodes_once() -> None:
    critic, calls = make(), []
    for encoder in (*critic.views, critic.features):
        encoder.register_forward_hook(lambda *_: calls.append(1))
    field = qsteer.field(lambda x, t: -x)
    for sampler in (qsteer.Euler(), qsteer.BestOfN(3)):
        calls.clear()
        qsteer.sample(field, critic.bind(observe()), chunks(), rule=qsteer.Tweedie(0.2), sampler=sampler)
        assert len(calls) == 3, "two views and the features, whatever the sampler asks"


def test_a_shift_is_the_generators_and_none_is_none() -> None:
    critic, obs, seen = make(), observe(), []
    for view in range(2):
        critic.views[view].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generator = torch.Generator().manual_seed(0)
    first = critic.encode(obs, augment=generator)
    top, wrist = seen
    assert torch.equal(top, shift_randomly(obs[TOP] / 255, 2, generator.manual_seed(0)))
    assert torch.equal(wrist, shift_randomly(obs[WRIST] / 255, 2, generator)), "the generator goes on"
    assert torch.equal(first, critic.encode(obs, augment=generator.manual_seed(0)))
    assert not torch.equal(first, critic.encode(obs, augment=generator))
    assert not torch.equal(first, critic.encode(obs))
    assert torch.equal(critic.encode(obs), critic.encode(obs))
    still = make(shift=0)
    assert torch.equal(still.encode(obs, augment=generator), still.encode(obs))


def test_states_are_not_augmented() -> None:
    critic, generator = make(views=()), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(critic.encode(observe(), augment=generator), critic.encode(observe()))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({TOP: None}, KeyError, rf"expected key '{TOP}'.*CriticConfig.views"),
        ({STATE: None}, KeyError, r"expected key 'observation.state'.*observation_key"),
        ({FEATURES: None}, KeyError, rf"expected key '{FEATURES}'.*CriticConfig.features"),
        ({WRIST: torch.zeros(ROWS, SIZE, SIZE, 3)}, ValueError, r"\(6, 16, 16, 3\).*channels first"),
        ({WRIST: torch.zeros(3, SIZE, SIZE)}, ValueError, r"expected .*\(B, 3, h, w\).*got \(3, 16, 16\)"),
        ({WRIST: torch.zeros(ROWS, 3, 4, 4).long()}, ValueError, "uint8 or floating point.*int64"),
        ({FEATURES: torch.zeros(ROWS, 8)}, ValueError, r"\(B, 7\), got \(6, 8\).*pooled"),
        ({FEATURES: torch.zeros(1, 7)}, ValueError, r"one row per environment.*got \[6, 6, 6, 1\] rows"),
    ],
)
def test_wrong_inputs_say_what_was_expected(change: dict, error: type[Exception], match: str) -> None:
    obs = {key: x for key, x in (observe() | change).items() if x is not None}
    with pytest.raises(error, match=match):
        make().bind(obs)


def test_a_tensor_is_a_state_alone() -> None:
    with pytest.raises(TypeError, match=r"mapping with \['observation.state', .*only a critic of states"):
        make().bind(torch.zeros(ROWS, 4))


def test_a_checkpoint_carries_all_inputs(tmp_path: Path) -> None:
    critic, obs = make(strides=(2, 2)), observe()
    critic.fit_normalisation(obs)
    critic.save_pretrained(tmp_path)
    again = Critic.from_pretrained(tmp_path)
    assert again.config == critic.config
    assert torch.equal(again.bind(obs)(chunks()), critic.bind(obs)(chunks()))
    card = (tmp_path / "README.md").read_text()
    for line in (
        "* state: `observation.state`, shape `(B, 4)`",
        f"* image: `{TOP}`, shape `(B, 3, height, width)`",
        f"* image: `{WRIST}`",
        "16 x 16 pixels",
        "* the policy's own features: `policy.features`, shape `(B, 7)`",
    ):
        assert line in card
    assert "{" not in card.partition("# Critic")[2] and "\n\n\n" not in card.partition("# Critic")[2]


def test_a_card_names_only_what_the_critic_sees(tmp_path: Path) -> None:
    make(obs_dim=0, features=0, views=(TOP,)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "* state" not in card and "features" not in card and "stack" not in card and WRIST not in card
    Critic.from_pretrained(tmp_path)


CHECKPOINT = Path(__file__).parents[2] / "examples" / "checkpoints" / "cube-single" / "critic"


def test_a_checkpoint_from_before_there_were_inputs_is_what_it_was() -> None:
    stored = json.loads((CHECKPOINT / "config.json").read_text())
    assert not stored.keys() & {"views", "features", "stack"}, "an old one"
    critic, weights = Critic.from_pretrained(CHECKPOINT), load_file(CHECKPOINT / "model.safetensors")
    assert critic.config == CriticConfig(**stored)
    assert critic.state_dict().keys() == weights.keys()
    rows, config = 5, critic.config
    obs = torch.randn(rows, config.obs_dim)
    a = torch.randn(rows, config.horizon, config.action_dim).clamp(-1, 1)
    w = weights["net.first.weight"]  # the arithmetic of the time, operation by operation
    s = (obs - weights["normalizer.mean"]) / weights["normalizer.std"]
    z = torch.baddbmm(weights["net.first.bias"], s.expand(len(w), -1, -1), w[:, : config.obs_dim])
    h = torch.baddbmm(z, a.flatten(1).expand(len(w), -1, -1), w[:, config.obs_dim :])
    for i in range(len(config.hidden)):
        h = F.layer_norm(F.gelu(h), h.shape[-1:])
        h = torch.baddbmm(weights[f"net.rest.{i}.bias"], h, weights[f"net.rest.{i}.weight"])
    assert torch.equal(critic.encode(obs), z)
    assert torch.equal(critic.bind(obs).members(a), h.squeeze(-1))


def test_a_live_critic_renews_encoders_and_their_normalisation() -> None:
    obs, first = observe(), make()
    torch.manual_seed(1)
    second = Critic(CONFIG)
    second.fit_normalisation(obs)
    live = LiveCritic(first)
    assert torch.equal(live.bind(obs)(chunks()), first.bind(obs)(chunks()))
    live.publish(second)
    assert torch.equal(live.bind(obs)(chunks()), second.bind(obs)(chunks()))


@pytest.mark.gpu
def test_nothing_goes_over_the_host() -> None:
    critic = make().cuda()
    obs = {key: x.cuda() for key, x in observe(size=40).items() if isinstance(x, Tensor)}
    a, generator = chunks().cuda(), torch.Generator("cuda").manual_seed(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = critic.bind(obs)(a)
        critic.encode(obs, augment=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), make().bind(observe(size=40))(chunks()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("scale", "shift"), [(255.0, 0.0), (2.0, -1.0)])
def test_images_of_another_range_are_refused_at_the_first_bind(scale: float, shift: float) -> None:
    critic, obs = make(), observe()
    wrong = obs | {WRIST: obs[WRIST].float() / 255 * scale + shift}
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"'{WRIST}' as uint8, or floating point in \[0, 1\], got"):
            critic.bind(wrong)
    critic.bind(obs | {WRIST: obs[WRIST].float() / 255})
    critic.bind(wrong)  # it is checked once: reading the range of every image would make an action wait
