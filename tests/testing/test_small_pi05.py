"""A pi0.5 that lerobot loads as a plugin: its own code, a state that is text, and steered as any other."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lerobot.policies.pi05.modeling_pi05")
pytest.importorskip("transformers")

import qsteer
from qsteer.data.lerobot import open_policy
from qsteer.testing.checkpoints import pi05
from qsteer.testing.small_pi05 import SmallPI05Config

TASK = "Push the puck to a goal"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    numbers = {"mean": 0.0, "std": 0.5, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    stats = {
        key: {name: torch.full((size,), value) for name, value in numbers.items()}
        for key, size in (("observation.state", 3), ("action", 2))
    }
    folder = tmp_path_factory.mktemp("pi05")
    words = TASK.split()
    return pi05(folder, words, stats, state=3, action=2, width=32, depth=2, tokens=20), folder


def seen(state: list[float]) -> dict[str, Any]:
    return {
        "observation.state": torch.tensor([state]),
        "observation.image": torch.zeros(1, 3, 28, 28),
        "task": [TASK],
    }


def test_lerobot_loads_it_and_it_acts_the_same_steered_or_not(made: Any) -> None:
    policy, folder = made
    loaded, before, after = open_policy(folder)
    batch, noise = before(seen([0.1, -0.2, 0.3])), torch.randn(1, 10, 2)
    base = policy.predict_action_chunk(batch, noise=noise)
    assert torch.equal(loaded.predict_action_chunk(batch, noise=noise), base)
    with qsteer.steer(loaded, Nearer(), qsteer.Tweedie(1.0, scaling="raw")):
        steered = loaded.predict_action_chunk(batch, noise=noise)
    assert steered[:, :5].square().sum() < base[:, :5].square().sum()
    assert torch.equal(loaded.predict_action_chunk(batch, noise=noise), base)
    assert after(base).shape == (1, 10, 2)


class Nearer:
    """Wants the executed actions small."""

    def bind(self, obs: Any) -> qsteer.Value:
        return qsteer.value(lambda a: -a.square().sum((-1, -2)))


def test_a_number_of_the_state_is_a_word_that_the_tokenizer_knows(made: Any) -> None:
    _, folder = made
    _, before, _ = open_policy(folder)
    batch = before(seen([-1.5, 0.0, 1.5]))
    assert batch["task"] == [f"Task: {TASK}, State: -1 128 255;\nAction: "]
    tokens = batch["observation.language.tokens"][batch["observation.language.attention_mask"]]
    step = next(s for s in before.steps if hasattr(s, "input_tokenizer"))
    assert step.input_tokenizer.convert_ids_to_tokens(tokens.tolist()) == (
        ["Task", ":", *TASK.split(), ",", "State", ":", "-1", "128", "255", ";", "Action", ":"]
    )


def test_near_numbers_begin_with_near_embeddings(made: Any) -> None:
    policy, folder = made
    _, before, _ = open_policy(folder)
    step = next(s for s in before.steps if hasattr(s, "input_tokenizer"))
    ids = step.input_tokenizer.convert_tokens_to_ids([str(i) for i in range(256)])
    rows = policy.model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight[ids]
    distance = torch.cdist(rows, rows)
    mean = torch.stack([distance.diagonal(k).mean() for k in (1, 4, 16, 64)])
    assert (mean.diff() > 0).all() and mean[0] < 0.2 * mean[-1]


@pytest.mark.parametrize(("name", "value"), [("width", 40), ("width", 16), ("depth", 0), ("vocabulary", 0)])
def test_sizes_out_of_range_are_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*expected"):
        SmallPI05Config(**{name: value})
