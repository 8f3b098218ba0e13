"""Policies without a velocity field: selection among their chunks, an error for all that needs a field."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qsteer
from qsteer.adapters import drawing

pytest.importorskip("lerobot")
import lerobot
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy

pytest.importorskip("diffusers")
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

FEATURES = {
    "input_features": {
        "observation.state": PolicyFeature(type=FeatureType.STATE, shape=(4,)),
        "observation.environment_state": PolicyFeature(type=FeatureType.ENV, shape=(2,)),
    },
    "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(3,))},
    "device": "cpu",
}


class Target(nn.Module):
    """How near a chunk is to the state."""

    def bind(self, obs: dict[str, Tensor]) -> qsteer.Value:
        state = obs["observation.state"]
        return qsteer.value(self.score, state if state.ndim == 2 else state[:, -1])

    def score(self, a: Tensor, state: Tensor) -> Tensor:
        assert a.shape[1:] == (4, 3)
        return -(a - state[:, None, :3]).square().flatten(1).sum(1)


@pytest.fixture(scope="module")
def diffusion() -> DiffusionPolicy:
    torch.manual_seed(0)
    config = DiffusionConfig(
        **FEATURES,
        n_obs_steps=1,
        horizon=8,
        n_action_steps=4,
        down_dims=(8, 16),
        n_groups=4,
        num_inference_steps=4,
    )
    return DiffusionPolicy(config).eval()


@pytest.fixture(scope="module")
def act() -> ACTPolicy:
    torch.manual_seed(0)
    config = ACTConfig(
        **FEATURES, chunk_size=6, n_action_steps=4, dim_model=16, n_heads=2, dim_feedforward=16,
        n_encoder_layers=1, latent_dim=4, n_vae_encoder_layers=1,
    )  # fmt: skip
    return ACTPolicy(config).eval()


def observe(rows: int = 2) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    state, goal = torch.randn(rows, 4, generator=draw), torch.randn(rows, 2, generator=draw)
    return {"observation.state": state, "observation.environment_state": goal}


def chunk(policy: nn.Module, rows: int = 2, seed: int = 0) -> Tensor:
    """As a data loader asks for it: with an axis for the observations' steps."""
    torch.manual_seed(seed)
    policy.reset()
    batch = observe(rows)
    if isinstance(policy, DiffusionPolicy):
        batch = {key: value[:, None] for key, value in batch.items()}
    return policy.predict_action_chunk(batch)


def worth(a: Tensor) -> Tensor:
    return Target().bind(observe(len(a)))(a[:, :4])


def test_best_of_n_selects_among_further_calls(diffusion):
    base = chunk(diffusion)
    with qsteer.steer(diffusion, Target(), qsteer.BestOfN(6)) as handle:
        best = chunk(diffusion)
        assert "steers the first 4 of 4 steps, 3 dimensions" in repr(handle)
    torch.manual_seed(0)
    batch = {key: value[:, None] for key, value in observe().items()}
    drawn = torch.stack([diffusion.predict_action_chunk(batch) for _ in range(6)], 1)
    assert torch.equal(drawn[:, 0], base), "candidate 0 is the policy's own"
    scores = torch.stack([worth(d) for d in drawn.unbind(1)], 1)
    assert torch.equal(best, drawn[torch.arange(2), scores.argmax(1)])
    assert torch.equal(chunk(diffusion), base), "removed"


def test_one_candidate_is_the_policy_bit_for_bit(diffusion):
    base = chunk(diffusion)
    after = torch.get_rng_state()
    for sampler in (qsteer.BestOfN(1), qsteer.RandomOfN(1), qsteer.Euler(), qsteer.TrustRegion(0.0)):
        with qsteer.steer(diffusion, Target(), sampler):
            assert torch.equal(chunk(diffusion), base)
            assert torch.equal(torch.get_rng_state(), after)


def test_select_action_is_steered(diffusion):
    def first() -> Tensor:
        torch.manual_seed(0)
        diffusion.reset()
        return diffusion.select_action(observe())

    base = first()
    with qsteer.steer(diffusion, Target(), qsteer.BestOfN(8)):
        assert not torch.equal(first(), base)
    assert torch.equal(first(), base)


def test_the_control_draws_from_the_same_candidates(diffusion):
    picks = set()
    for seed in range(8):
        torch.manual_seed(seed)
        diffusion.reset()
        batch = {key: value[:, None] for key, value in observe(1).items()}
        own = [diffusion.predict_action_chunk(batch) for _ in range(4)]
        with qsteer.steer(diffusion, Target(), qsteer.RandomOfN(4)):
            drawn = chunk(diffusion, 1, seed)
        (pick,) = [i for i, each in enumerate(own) if torch.equal(each, drawn)]
        picks.add(pick)
    assert len(picks) > 1


def test_the_trust_region_moves_the_finished_chunk(diffusion):
    base = chunk(diffusion)
    with qsteer.steer(diffusion, Target(), qsteer.TrustRegion(0.3)):
        moved = chunk(diffusion)
    torch.testing.assert_close((moved - base).flatten(1).norm(dim=1), torch.full((2,), 0.3))
    assert (worth(moved) > worth(base)).all()


def test_a_policy_that_does_not_sample_is_warned_of(act):
    base = chunk(act)
    with qsteer.steer(act, Target(), qsteer.BestOfN(3)):
        with pytest.warns(RuntimeWarning, match=r"expected one that samples, got the same chunk 3 times"):
            torch.testing.assert_close(chunk(act), base)


@pytest.mark.parametrize(
    "method",
    [
        qsteer.Tweedie(0.2),
        qsteer.QGF(0.1),
        qsteer.BeamSearch(2, 2),
        qsteer.FeynmanKac(2),
        qsteer.BestOfN(2, inner=qsteer.BeamSearch()),
    ],
    ids=lambda method: type(method).__name__,
)
def test_what_needs_a_velocity_says_so(diffusion, method):
    message = r"a velocity field for .*, got DiffusionPolicy, whose record names none; .*BestOfN\(8\)"
    with pytest.raises(TypeError, match=message):
        qsteer.steer(diffusion, Target(), method)
    with (
        qsteer.steer(diffusion, Target(), qsteer.BestOfN(2)) as handle,
        pytest.raises(TypeError, match=message),
    ):
        handle.swap(**({"rule": method} if isinstance(method, qsteer.Rule) else {"sampler": method}))
    with pytest.raises(TypeError, match="names none; steer it by selection"):
        qsteer.open_action(diffusion, observe())


@pytest.mark.parametrize(
    ("module", "host"),
    [
        ("pi0_fast/modeling_pi0_fast.py", drawing.PI0_FAST),
        ("vqbet/modeling_vqbet.py", drawing.VQBET),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_the_names_that_their_records_rely_on(module, host):
    code = (Path(lerobot.__file__).parent / "policies" / module).read_text()
    settings = (
        Path(lerobot.__file__).parent / "policies" / module.replace("modeling", "configuration")
    ).read_text()
    assert f"class {host.serves}(PreTrainedPolicy)" in code
    assert f"def {host.entry}(self, batch: dict[str, Tensor]" in code
    assert f"self.{host.queue}" in code
    for path in (host.executed, host.chunk):
        assert f"    {path.removeprefix('config.')}:" in settings
