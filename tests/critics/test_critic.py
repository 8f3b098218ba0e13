"""Critics: one batched ensemble, bound to observations, in a checkpoint that carries everything it needs."""

import json
import math
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from qsteer.critics import BoundCritic, Critic, CriticConfig
from qsteer.types import Value

B, S, H, A, J = 5, 3, 4, 2, 4


def make(seed: int = 0, **changes: object) -> Critic:
    torch.manual_seed(seed)
    settings = {"obs_dim": S, "action_dim": A, "horizon": H, "hidden": (16, 8), "members": J}
    critic = Critic(CriticConfig(**settings | changes)).double()
    critic.fit_normalisation(torch.randn(50, S).double() * 3 + 2)
    return critic


def draw(seed: int = 1, rows: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, S, generator=generator).double(), torch.randn(
        rows, H, A, generator=generator
    ).double()


def member(critic: Critic, j: int, obs: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """One member written out as an ordinary MLP on [normalised observation, action]."""
    h = torch.cat([(obs - critic.normalizer.mean) / critic.normalizer.std, a.flatten(1)], dim=1)
    h = F.linear(h, critic.net.first.weight[j].T, critic.net.first.bias[j, 0])
    for layer in critic.net.rest:
        h = F.linear(F.layer_norm(F.gelu(h), h.shape[1:]), layer.weight[j].T, layer.bias[j, 0])
    return h[:, 0]


def test_the_ensemble_is_its_members_one_by_one() -> None:
    critic, (obs, a) = make(), draw()
    expected = torch.stack([member(critic, j, obs, a) for j in range(J)])
    torch.testing.assert_close(critic.members(critic.encode(obs), a), expected)
    assert (expected[0] - expected[1]).abs().min() > 1e-6  # members differ


def test_the_first_layer_counts_observation_and_action_as_its_inputs() -> None:
    weight = make(hidden=(512,)).net.first.weight
    assert weight.shape == (J, S + H * A, 512)
    assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(S + H * A), rel=0.01)


@pytest.mark.parametrize("rho", [0.0, 0.5, 2.0])
def test_the_value_is_mean_minus_rho_population_standard_deviations(rho: float) -> None:
    critic, (obs, a) = make(rho=rho), draw()
    value = critic.bind(obs)
    q = value.members(a)
    spread = ((q - q.mean(0)) ** 2).mean(0).sqrt()
    torch.testing.assert_close(value(a), q.mean(0) - rho * spread)


def test_repeat_orders_rows_as_the_protocol_says_and_encodes_nothing() -> None:
    critic, (obs, _) = make(), draw()
    _, a = draw(2, rows=3 * B)
    value = critic.bind(obs)
    assert isinstance(value, Value)
    critic.encode = lambda obs: pytest.fail("encoded again")  # type: ignore[method-assign]
    repeated = value.repeat(3)(a)
    del critic.encode
    torch.testing.assert_close(repeated, critic.bind(obs.repeat_interleave(3, dim=0))(a))
    torch.testing.assert_close(repeated.view(B, 3)[:, 1], value(a.view(B, 3, H, A)[:, 1]))


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_gradient_in_the_action_is_exact_wherever_the_critic_was_bound(context: type) -> None:
    critic, (obs, a) = make(rho=0.7), draw()
    with context():
        value = critic.bind(obs.clone())
    with torch.enable_grad():
        assert torch.autograd.gradcheck(value, a.requires_grad_())
        (g,) = torch.autograd.grad(value(a).sum(), a)
    assert all(p.grad is None for p in critic.parameters())
    step = 1e-6 * g / g.flatten(1).norm(dim=1)[:, None, None]
    rise = (value(a + step) - value(a - step)) / 2e-6
    torch.testing.assert_close(rise, g.flatten(1).norm(dim=1), rtol=1e-6, atol=1e-8)


def test_frozen_parameters_suffice_for_the_gradient() -> None:
    critic, (obs, a) = make().requires_grad_(False), draw()
    (g,) = torch.autograd.grad(critic.bind(obs)(a.requires_grad_()).sum(), a)
    assert g.abs().sum() > 0


def test_a_hosts_batch_serves_as_observation() -> None:
    critic, (obs, a) = make(observation_key="state"), draw()
    batch = {"state": obs, "task": ["lift"] * B}
    assert torch.equal(critic.bind(batch)(a), critic.bind(obs)(a))


def test_inputs_are_brought_to_the_critics_precision() -> None:
    critic, (obs, a) = make().float(), draw()
    value = critic.bind(obs)(a)
    assert value.dtype == torch.float32
    assert torch.equal(value, critic.bind(obs.float())(a.float()))


def test_a_checkpoint_carries_the_critic(tmp_path: object) -> None:
    critic, (obs, a) = make(hidden=(16, 8, 4), rho=0.25, observation_key="state").float(), draw()
    critic.save_pretrained(tmp_path)
    again = Critic.from_pretrained(tmp_path)
    assert again.config == critic.config
    assert not again.training
    assert torch.equal(again.bind({"state": obs})(a), critic.bind({"state": obs})(a))
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "config.json").read_text())["hidden"] == [16, 8, 4]
    again.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_the_model_card_says_what_it_is_and_how_to_use_it(tmp_path: object) -> None:
    make().save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: qsteer" in card
    assert "- qsteer\n" in card
    assert f"`(B, {H}, {A})`" in card
    assert "Critic.from_pretrained" in card
    assert "{{" not in card


def test_a_checkpoint_without_some_weights_is_refused(tmp_path: object) -> None:
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["net.first.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"net\.first\.bias"):
        Critic.from_pretrained(tmp_path)


def test_pessimism_of_a_tiny_ensemble_warns_once() -> None:
    obs, _ = draw()
    critic = make(members=2)
    with pytest.warns(UserWarning, match="3 or more members"):
        critic.bind(obs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        critic.bind(obs)
        make(members=2, rho=0.0).bind(obs)
        make(members=3).bind(obs)


def test_wrong_inputs_say_what_was_expected() -> None:
    critic, (obs, a) = make(), draw()
    with pytest.raises(KeyError, match=r"observation\.state.*'image'"):
        critic.bind({"image": obs})
    with pytest.raises(ValueError, match=rf"\(B, {S}\), got \({B}, {S + 1}\)"):
        critic.bind(torch.zeros(B, S + 1))
    with pytest.raises(ValueError, match=rf"\(B, {S}\), got \({S},\)"):
        critic.bind(torch.zeros(S))
    value = critic.bind(obs)
    assert isinstance(value, BoundCritic)
    with pytest.raises(ValueError, match=rf"\({B}, {H}, {A}\), got \({B}, {H + 1}, {A}\)"):
        value(torch.zeros(B, H + 1, A))
    with pytest.raises(ValueError, match=r"value\.repeat"):
        value(torch.cat([a, a]))


@pytest.mark.parametrize(
    "changes",
    [{"members": 0}, {"rho": -0.1}, {"hidden": ()}, {"hidden": (0,)}, {"obs_dim": 0}, {"horizon": 0}],
)
def test_impossible_configurations_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}: expected"):
        make(**changes)


@pytest.mark.gpu
def test_a_critic_on_the_gpu_takes_observations_from_anywhere() -> None:
    critic, (obs, a) = make(), draw()
    expected = critic.bind(obs)(a)
    torch.testing.assert_close(critic.cuda().bind(obs)(a.cuda()).cpu(), expected)
