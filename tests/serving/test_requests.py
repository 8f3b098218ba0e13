"""What a message must hold, in whose names, shapes and units; anything else is an error that says so."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qsteer.serving.requests import Input, Interface, RequestError

IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
INTERFACE = Interface(
    {"observation/image": Input("image", (3, 4, 6)), "observation.state": Input("numbers", (2,))},
    {"observation/image": "observation.image"},
    horizon=5,
    action_dim=3,
    prompt="needed",
)


def message(**changes: Any) -> dict[str, Any]:
    """A request that can be answered, with changes; None takes an entry away."""
    whole: dict[str, Any] = {
        "observation/image": IMAGE,
        "observation.state": np.zeros(2, np.float32),
        "prompt": "push",
        "a camera for the film": IMAGE,
    }
    names = {"image": "observation/image", "state": "observation.state"}
    whole |= {names.get(name, name): value for name, value in changes.items()}
    return {name: value for name, value in whole.items() if value is not None}


def read(interface: Interface = INTERFACE, **changes: Any) -> Any:
    return interface.read(message(**changes), lambda: 77)


def test_a_request_has_the_policys_names_and_no_more() -> None:
    request = read()
    assert set(request.observation) == {"observation.image", "observation.state", "task"}
    assert np.array_equal(request.observation["observation.image"], np.moveaxis(IMAGE, -1, 0))
    assert request.observation["task"] == "push"
    assert (request.seed, request.unsteered_twin) == (77, False)


def test_images_in_either_order_and_in_either_unit() -> None:
    first = read().observation["observation.image"]
    assert np.array_equal(read(image=np.moveaxis(IMAGE, -1, 0)).observation["observation.image"], first)
    unit = read(image=IMAGE.astype(np.float64) / 255).observation["observation.image"]
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, first / 255, rtol=1e-6)


@pytest.mark.parametrize("sent", [[1, 2.5], np.array([1, 2.5], ">f8"), np.array([1.0, 2.5], np.float16)])
def test_numbers_of_any_kind(sent: Any) -> None:
    got = read(state=sent).observation["observation.state"]
    assert got.dtype == np.float32 and got.tolist() == [1, 2.5]


def test_what_may_share_a_call() -> None:
    assert read().key == read(prompt="pull").key == read(state=np.ones(2)).key
    assert read().key != read(image=IMAGE / np.float32(255)).key
    exact = replace(INTERFACE, exact=True)
    assert read(exact).key != read(exact, prompt="pull").key


def test_options() -> None:
    request = read(qsteer={"seed": 5, "unsteered_twin": True})
    assert (request.seed, request.unsteered_twin) == (5, True)


def test_an_instruction_of_the_servers() -> None:
    told = replace(INTERFACE, instruction="pull")
    assert read(told, prompt=None).observation["task"] == "pull"
    assert read(told).observation["task"] == "push"
    assert read(told, prompt=None, task="lift").observation["task"] == "lift"
    optional = replace(INTERFACE, prompt="optional")
    assert "task" not in read(optional, prompt=None).observation
    assert read(optional, prompt=None).key != read(optional).key
    assert "task" not in read(replace(INTERFACE, prompt="unused")).observation


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, r"no \['observation/image'\].*--rename YOURS=observation.image"),
    ({"state": np.zeros((1, 2))}, r"observation.state: expected shape \(2,\), got \(1, 2\); .*batch axis"),
    ({"state": np.array([0, np.nan])}, "expected finite numbers"),
    ({"state": np.array([0, np.inf], np.float16)}, "expected finite numbers"),
    ({"state": "text"}, "expected an array, got str"),
    ({"state": ["a", "b"]}, "expected an array, got list"),
    ({"image": IMAGE[:2]}, r"expected an image \(h, w, 3\) or \(3, h, w\) with \(h, w\) = \(4, 6\), got"),
    ({"image": IMAGE[None]}, "expected an image"),
    ({"image": IMAGE.astype(np.float32)}, r"expected uint8, or numbers in \[0, 1\], got 0 to 71"),
    ({"image": IMAGE.astype(np.int64) - 5}, r"in \[0, 1\]"),
    ({"prompt": None}, "prompt: expected the instruction as text, got none"),
    ({"prompt": 3}, "got int"),
    ({"qsteer": 3}, "expected a map of seed, unsteered_twin, .*, got int"),
    ({"qsteer": {"sed": 3}}, r"got \['sed'\]"),
    ({"qsteer": {"seed": True}}, "seed: expected a whole number"),
    ({"qsteer": {"seed": -1}}, "seed: expected a whole number"),
    ({"qsteer": {"seed": 2**63}}, "seed: expected a whole number"),
    ({"qsteer": {"unsteered_twin": 1}}, "expected true or false"),
]


@pytest.mark.parametrize("changes, match", WRONG, ids=[match for _, match in WRONG])
def test_what_is_wrong_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        read(**changes)


def test_no_map() -> None:
    with pytest.raises(RequestError, match="expected a map of observations, got list"):
        INTERFACE.read([], lambda: 0)


def test_other_sizes_where_the_policy_resizes() -> None:
    inputs = INTERFACE.inputs | {"observation/image": Input("image", (3, 4, 6), resized=True)}
    got = read(replace(INTERFACE, inputs=inputs), image=IMAGE[:2])
    assert got.observation["observation.image"].shape == (3, 2, 6)


def test_an_example_is_a_request() -> None:
    example = INTERFACE.example(3)
    sent = {"observation/image": example.observation["observation.image"], "prompt": ""}
    again = read(**sent, state=example.observation["observation.state"])
    assert again.key == read().key
    assert INTERFACE.describe()["observations"]["prompt"] == {"kind": "text", "shape": []}
