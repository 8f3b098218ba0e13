"""What directories become: contracts of small policies and of lerobot's, renamed inputs, saved steerings."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from robots import STATE, requests_of, same

import qsteer
from qsteer.critics import Critic, CriticConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.serving import Input, ServedHost, ServedStates, open_served, open_steering
from qsteer.serving.opening import renamed

ROOT = Path(__file__).parents[2]
VLA = ROOT / "examples/checkpoints/metaworld"
RENAME = {"observation/image": "observation.image", "observation/state": STATE}


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    """A folder with ``policy`` and ``critic``."""
    torch.manual_seed(0)
    shape = {"obs_dim": 6, "action_dim": 3, "horizon": 4, "hidden": (8,)}
    FlowPolicy(FlowPolicyConfig(**shape)).save_pretrained(tmp_path / "policy")
    Critic(CriticConfig(**shape)).save_pretrained(tmp_path / "critic")
    return tmp_path


@pytest.fixture
def vla(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedHost]:
    """The SmolVLA of the examples, whose checkpoints name each other from there."""
    pytest.importorskip("lerobot")
    monkeypatch.chdir(ROOT)
    served = open_served(VLA / "policy", VLA / "critic", "tweedie-raw=1", rename=RENAME, exact=4)
    assert isinstance(served, ServedHost)
    yield served


def test_a_small_policy(networks: Path) -> None:
    served = open_served(networks / "policy", networks / "critic", "tweedie=0.2+best-of-2")
    assert isinstance(served, ServedStates)
    assert served.interface.inputs == {STATE: Input("numbers", (6,))}
    assert (served.interface.horizon, served.interface.action_dim) == (4, 3)
    served.warm_up()
    assert served.act(requests_of(served, 2))[1].actions.shape == (4, 3)
    assert served.sampler == qsteer.BestOfN(2, inner=qsteer.Euler(clip="policy"))


def test_misuse_of_a_small_policy(networks: Path) -> None:
    parts = networks / "policy", networks / "critic"
    with pytest.raises(ValueError, match="treats each robot alone"):
        open_served(*parts, "trust-region-adaptive=0.3")
    with pytest.raises(ValueError, match=r"expected names of \['observation.state'\], got \['x'\]"):
        open_served(*parts, "base", rename={"observation/state": "x"})
    with pytest.raises(ValueError, match="instruction: expected none"):
        open_served(*parts, "base", instruction="push")
    with pytest.raises(ValueError, match="arm: expected"):
        open_served(*parts, "twedie=1")
    with pytest.raises(FileNotFoundError):
        open_served(networks / "none", networks / "critic", "base")


def test_names() -> None:
    inputs = {"a": Input("numbers", (1,)), "b": Input("numbers", (2,))}
    assert renamed(inputs, None) == (inputs, {})
    assert renamed(inputs, {"x": "a"}) == ({"x": inputs["a"], "b": inputs["b"]}, {"x": "a"})
    for wrong in ({"x": "a", "y": "a"}, {"b": "a"}):
        with pytest.raises(ValueError, match="rename: expected one name"):
            renamed(inputs, wrong)


def test_a_vla_exact_to_the_bit_and_in_its_robots_units(vla: ServedHost) -> None:
    interface = vla.interface
    assert interface.inputs["observation/image"] == Input("image", (3, 32, 32), resized=True)
    assert interface.inputs["observation/state"] == Input("numbers", (10,))
    assert (interface.prompt, interface.horizon, interface.action_dim) == ("needed", 5, 4)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    message = {"observation/image": image, "observation/state": np.zeros(10), "prompt": "push the puck"}
    request = interface.read(message | {"qsteer": {"seed": 3, "unsteered_twin": True}}, lambda: 0)
    (alone,) = vla.act([request])
    others = [interface.read(message | {"qsteer": {"seed": i}}, lambda: 0) for i in range(3)]
    same(vla.act([*others, request])[3], alone, bits=True)
    assert alone.actions.shape == alone.unsteered_actions.shape == (5, 4)
    assert alone.strength > 0.01 and alone.displacement > 0.01


def test_a_saved_steering_acts_as_what_was_saved(vla: ServedHost, tmp_path: Path) -> None:
    vla.handle.save_pretrained(tmp_path / "steering", base=VLA / "policy")
    again = open_steering(tmp_path / "steering", rename=RENAME, exact=4)
    (request,) = requests_of(vla, 1, twin=True)
    request.observation["task"] = "push the puck"  # type: ignore[index]
    same(again.act([request])[0], vla.act([request])[0], bits=True)
    assert again.interface == vla.interface
