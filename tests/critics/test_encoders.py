"""What a critic can see: states, camera views, and what the frozen policy made of its observation."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hosts
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.critics import FEATURES, Critic, CriticConfig, LiveCritic, pooled
from qsteer.critics.encoders import random_shift

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


# Shapes and configuration


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


def test_the_default_encoder_is_drqs() -> None:
    critic = Critic(CriticConfig(obs_dim=0, action_dim=1, horizon=1, views=(TOP,)))
    (encoder,) = critic.views
    assert [tuple(layer.weight.shape) for layer in encoder.layers] == [(32, 3, 3, 3)] + [(32, 32, 3, 3)] * 3
    assert [layer.stride for layer in encoder.layers] == [(2, 2), (1, 1), (1, 1), (1, 1)]
    assert encoder.trunk[0].weight.shape == (50, 32 * 25**2)  # 64 -> 31 -> 29 -> 27 -> 25
    image = torch.rand(2, 3, 64, 64)
    h = image - 0.5
    for layer in encoder.layers:
        h = F.relu(F.conv2d(h, layer.weight, layer.bias, layer.stride))
    linear = encoder.trunk[0]
    expected = torch.tanh(F.layer_norm(F.linear(h.flatten(1), linear.weight, linear.bias), (50,)))
    torch.testing.assert_close(critic.context({TOP: image}), expected)
    torch.testing.assert_close(linear.weight @ linear.weight.T, torch.eye(50), atol=1e-4, rtol=0)


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


# What reaches the networks


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


# Random shift


def crops(view: Tensor, pixels: int) -> Tensor:
    """All shifts of a view, made by hand: (2p+1, 2p+1, C, s, s)."""
    padded, size = F.pad(view[None], (pixels,) * 4, mode="replicate")[0], view.shape[-1]
    span = range(2 * pixels + 1)
    return torch.stack([torch.stack([padded[:, y : y + size, x : x + size] for x in span]) for y in span])


def test_a_random_shift_is_a_crop_of_the_replicated_image() -> None:
    view, found = torch.rand(400, 3, 8, 8), []
    shifted = random_shift(view, 2, torch.Generator().manual_seed(0))
    for before, after in zip(view, shifted, strict=True):
        hits = (crops(before, 2) == after).flatten(2).all(2).nonzero().tolist()
        assert len(hits) == 1
        found.append(tuple(hits[0]))
    counts = torch.tensor([found.count((y, x)) for y in range(5) for x in range(5)])
    assert counts.min() > 3, "every shift occurs, rows and columns independently"
    assert ((counts - 16) ** 2 / 16).sum() < 51  # chi-square of 24, p = 0.001


def test_a_shift_is_the_generators_and_none_is_none() -> None:
    critic, obs, seen = make(), observe(), []
    for view in range(2):
        critic.views[view].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    generator = torch.Generator().manual_seed(0)
    first = critic.encode(obs, augment=generator)
    top, wrist = seen
    assert torch.equal(top, random_shift(obs[TOP] / 255, 2, generator.manual_seed(0)))
    assert torch.equal(wrist, random_shift(obs[WRIST] / 255, 2, generator)), "the generator goes on"
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


# Pooling the policy's features


@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_tokens_are_averaged_where_they_are(dtype: torch.dtype) -> None:
    tokens, mask = torch.randn(3, 5, 2), torch.tensor([[1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0] * 5]).to(dtype)
    tokens[mask == 0] = torch.nan
    out = pooled((tokens, mask))
    torch.testing.assert_close(out[0], tokens[0, :2].mean(0))
    torch.testing.assert_close(out[1], tokens[1, [1, 3, 4]].mean(0))
    assert torch.equal(out[2], torch.zeros(2))


def test_pooling_is_done_in_single_precision_and_leaves_vectors_alone() -> None:
    tokens = (100 + torch.rand(1, 1000, 2)).bfloat16()
    out = pooled([tokens, torch.ones(1, 1000)])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, tokens.double().mean(1).float())
    assert pooled(tokens[0]) is not None and torch.equal(pooled(tokens[0]), tokens[0])


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (None, "NoneType"),
        ({"a": torch.zeros(2, 3)}, "dict"),
        (torch.zeros(2, 3, 4), r"\(2, 3, 4\)"),
        ((torch.zeros(2, 3, 4), torch.ones(2, 4)), r"\[\(2, 3, 4\), \(2, 4\)\]"),
    ],
)
def test_what_cannot_be_pooled_says_so(features: object, got: str) -> None:
    with pytest.raises(ValueError, match=rf"policy's features: expected.*got {got}.*Host\.features"):
        pooled(features)


# Errors


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


# Checkpoints


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


# Hosts


@pytest.fixture(params=hosts.LEROBOT)
def policy(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    policy = hosts.shared(request.param)
    hosts.set_steps(policy, 3)
    yield policy
    qsteer.unsteer(policy)


def spied(policy: nn.Module) -> Tensor:
    """The policy's pooled features of ``observe(policy, 2)``."""
    seen: list = []
    with qsteer.steer(policy, hosts.Target(), sampler=hosts.Spy(seen)):
        action(policy)
    return pooled(seen[0][0].features)


def action(policy: nn.Module) -> Tensor:
    return policy.predict_action_chunk(hosts.observe(policy, 2), noise=hosts.draw(policy, 2))


class Listening(Critic):
    """A critic that remembers what it was bound to, and may be deaf to the policy's features."""

    deaf = False

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        self.heard = obs
        return super().bind(obs | {FEATURES: torch.zeros_like(obs[FEATURES])} if self.deaf else obs)


def listening(features: Tensor, **changes: object) -> Listening:
    torch.manual_seed(0)
    shape = dict(obs_dim=4, action_dim=3, horizon=4, hidden=(16,), features=features.shape[1])
    return Listening(CriticConfig(**shape | changes))


def test_a_host_gives_its_features_once_per_action(
    policy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, base = spied(policy), action(policy)
    assert features.shape[0] == 2 and (features[0] - features[1]).abs().max() > 1e-3
    critic, calls = listening(features), []
    monkeypatch.setattr("qsteer.steering.handle.pooled", lambda given: calls.append(1) or pooled(given))
    with qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.5)):
        steered = action(policy)
        critic.deaf = True
        deaf = action(policy)
    assert len(calls) == 2, "two actions of three steps"
    assert torch.equal(critic.heard[FEATURES], features)
    assert critic.heard[STATE].shape == (2, 4)
    assert not torch.equal(steered, base) and not torch.equal(steered, deaf)


def test_views_of_the_hosts_own_batch_steer_it(policy: nn.Module) -> None:
    critic = listening(spied(policy), obs_dim=0, views=(TOP,), view_size=SIZE, channels=4)
    base = action(policy)
    with qsteer.steer(policy, critic, qsteer.QGF(weight=0.5)):
        assert not torch.equal(action(policy), base)


@pytest.mark.parametrize("alone", [False, True])
def test_features_go_with_what_critic_inputs_make(policy: nn.Module, alone: bool) -> None:
    def inputs(batch: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
        return batch[STATE] * 2 if alone else {"mine": batch[STATE] * 2}

    features = spied(policy)
    critic = listening(features, observation_key=STATE if alone else "mine")
    with qsteer.steer(policy, critic, qsteer.QGF(weight=0.5), critic_inputs=inputs):
        action(policy)
    assert critic.heard.keys() == {critic.config.observation_key, FEATURES}
    assert torch.equal(critic.heard[FEATURES], features)


def test_features_of_another_width_or_none_at_all(policy: nn.Module) -> None:
    width = spied(policy).shape[1]
    wrong = listening(torch.zeros(1, width + 1))
    with (
        qsteer.steer(policy, wrong, qsteer.Tweedie()),
        pytest.raises(ValueError, match=rf"\(B, {width + 1}\), got \(2, {width}\).*CriticConfig.features"),
    ):
        action(policy)
    plain = hosts.build("plain")
    with (
        qsteer.steer(plain, wrong, qsteer.Tweedie()),
        pytest.raises(ValueError, match=r"policy's features: expected.*got dict.*PlainPolicy offers its obs"),
    ):
        action(plain)


def test_a_plain_policys_features_are_its_observation() -> None:
    policy = PlainPolicy(lambda x, t, obs: obs[:, :3].mean(1)[:, None, None] - x, horizon=4, action_dim=3)
    obs, noise = torch.randn(2, 4), torch.randn(2, 4, 3)
    critic = listening(obs)
    with qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.5)):
        policy.predict_action_chunk(obs, noise=noise)
    assert torch.equal(critic.heard[FEATURES], obs) and torch.equal(critic.heard[STATE], obs)


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
