"""What a robot asks and is told: a decoded message becomes a request, a decision becomes a reply."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from qsteer.serving.codec import short
from qsteer.serving.options import OWN, Feedback, Options, RequestError, Told
from qsteer.types import Observation

PROMPTS = ("prompt", "task")
"""Keys of the instruction, openpi's and lerobot's; a request has one of them."""


@dataclass(frozen=True, eq=False)
class Request:
    """One observation of one robot, checked.

    Attributes:
        observation: the policy's inputs by name, without a batch axis; an instruction is under ``"task"``.
        seed: of its noise.
        unsteered_twin: whether the frozen policy's own chunk is asked for, too.
        key: requests of one key may share a call.
        feedback: what came of the last actions; None: nothing is told.
        robot: number of the connection.
    """

    observation: Mapping[str, Any]
    seed: int
    unsteered_twin: bool = False
    key: Hashable = None
    feedback: Feedback | None = None
    robot: int = 0


class Seen(NamedTuple):
    """What a critic saw of a decision, on its device.

    Attributes:
        observation: (1, ...).
        actions: (1, H, A), in the policy's units, without padding.
    """

    observation: Observation
    actions: Tensor


class Decision(NamedTuple):
    """What is decided for a request.

    Attributes:
        actions: (H, A), in the environment's units: the steps to execute.
        value: what the critic says of them.
        disagreement: standard deviation over the critic's members.
        strength: norm of the push over the velocity's, mean over guided steps; 0: there was none.
        displacement: root mean square from the unsteered twin per entry, in the policy's units; None:
            replies do not say it.
        seed: of the noise: the same seed and observation give the same reply.
        unsteered_actions: (H, A), the frozen policy's own from the same noise; None: it was not asked for.
        seen: what a critic that learns keeps of it, inside the server; None: no critic learns.
    """

    actions: np.ndarray
    value: float
    disagreement: float
    strength: float
    displacement: float | None
    seed: int
    unsteered_actions: np.ndarray | None = None
    seen: Seen | None = None

    def equals(self, other: "Decision") -> bool:
        """Return whether two decisions are the same to the bit."""
        mine, its = self.message(), other.message()
        return mine.keys() == its.keys() and all(np.array_equal(mine[name], its[name]) for name in mine)

    def message(self) -> dict[str, Any]:
        """Return the reply's own entries."""
        told = self._replace(seen=None)._asdict()
        return {name: value for name, value in told.items() if value is not None}


@dataclass(frozen=True)
class Input:
    """One entry of an observation.

    Attributes:
        kind: an image is sent as uint8, (h, w, c) or (c, h, w), or floating point in [0, 1]; numbers as an
            array of ``shape``.
        shape: without batch axis; of an image (c, h, w).
        resized: the policy resizes images itself, so that other sizes are welcome.
    """

    kind: Literal["numbers", "image"]
    shape: tuple[int, ...]
    resized: bool = False

    def read(self, name: str, found: Any) -> np.ndarray:
        """Return what a message has under ``name``, float32; images (c, h, w) in [0, 1], or uint8.

        Raises:
            RequestError: it is something else.
        """
        if self.kind == "numbers" and isinstance(found, list | int | float | np.generic):
            try:
                found = np.array(found, np.float32)
            except (TypeError, ValueError):
                pass  # said below
        if not isinstance(found, np.ndarray):
            raise RequestError(f"{name}: expected an array, got {type(found).__name__}; send a numpy array")
        numbers = found if found.dtype == np.uint8 else found.astype(np.float32)
        if not np.isfinite(numbers).all():
            raise RequestError(f"{name}: expected finite numbers, got NaN or infinity; look at the sensor")
        return self._read_image(name, numbers) if self.kind == "image" else self._read_numbers(name, numbers)

    def _read_numbers(self, name: str, found: np.ndarray) -> np.ndarray:
        if found.shape != self.shape:
            raise RequestError(
                f"{name}: expected shape {self.shape}, got {found.shape}; send one observation, without a "
                "batch axis"
            )
        return found.astype(np.float32)

    def _read_image(self, name: str, found: np.ndarray) -> np.ndarray:
        channels, *size = self.shape
        if found.ndim == 3 and found.shape[-1] == channels:
            found = np.moveaxis(found, -1, 0)
        wanted = f"(h, w, {channels}) or ({channels}, h, w)" + (
            "" if self.resized else f" with (h, w) = {tuple(size)}"
        )
        fits = found.ndim == 3 and found.shape[0] == channels and min(found.shape) > 0
        if not fits or not (self.resized or list(found.shape[1:]) == size):
            raise RequestError(
                f"{name}: expected an image {wanted}, got {found.shape}; send one image as the camera of the "
                "policy's training gave it"
            )
        if found.dtype != np.uint8 and not (found.min() >= 0 and found.max() <= 1):
            raise RequestError(
                f"{name}: expected uint8, or numbers in [0, 1], got {found.min():.3g} to {found.max():.3g}; "
                "send uint8"
            )
        return np.ascontiguousarray(found)


@dataclass(frozen=True)
class Interface:
    """What a served policy gets and gives.

    Attributes:
        inputs: of an observation, by the names under which a client sends them.
        names: the policy's own names of those that have another.
        horizon: H, steps of a reply.
        action_dim: A.
        prompt: whether the policy needs an instruction, takes one, or is given none.
        instruction: for requests without one.
        exact: requests of a call have the same instruction: its length changes what is computed, in the last
            bits.
    """

    inputs: Mapping[str, Input]
    names: Mapping[str, str]
    horizon: int
    action_dim: int
    prompt: Literal["needed", "optional", "unused"] = "unused"
    instruction: str | None = None
    exact: bool = False

    def read(self, message: Any, draw_seed: Callable[[], int]) -> Request | Told:
        """Return the request in a decoded message, or what it tells without an observation.

        Args:
            message: the client's; entries that are not asked for are left out.
            draw_seed: ``() -> seed``, for requests without one.

        Raises:
            RequestError: something is missing, or of another kind, shape or range.
        """
        if not isinstance(message, dict):
            raise RequestError(f"message: expected a map of observations, got {type(message).__name__}")
        options = Options.read(message.get(OWN, {}))
        if options.feedback is not None:
            self._check_steps(options.feedback)
        if message.keys() == {OWN} and (options.command or options.feedback):
            return Told(options.feedback, options.command)
        if options.command or (options.feedback and options.feedback.ends):
            raise RequestError(
                f"{OWN}: expected a command, or the end of an episode, in a message of its own, got "
                "observations beside it; send the next episode's first observation after the reply"
            )
        if missing := [name for name in self.inputs if name not in message]:
            raise RequestError(
                f"observation: expected {sorted(self.inputs)}, got no {missing} among "
                f"{short(sorted(map(str, message)))}; name it so, or start the server with --rename "
                f"YOURS={self.names.get(missing[0], missing[0])}"
            )
        observation: dict[str, Any] = {
            self.names.get(name, name): each.read(name, message[name]) for name, each in self.inputs.items()
        }
        shapes = tuple((name, array.shape, array.dtype.str) for name, array in observation.items())
        prompt = self._read_prompt(message)
        if prompt is not None:
            observation["task"] = prompt
        seed = draw_seed() if options.seed is None else options.seed
        key = shapes, prompt if self.exact else prompt is None
        return Request(observation, seed, options.unsteered_twin, key, options.feedback)

    def _check_steps(self, feedback: Feedback) -> None:
        if len(feedback.rewards) > self.horizon:
            raise RequestError(
                f"{OWN}.rewards: expected at most {self.horizon}, one of each step of the last reply, got "
                f"{len(feedback.rewards)}; tell of them with every request"
            )

    def _read_prompt(self, message: Mapping[str, Any]) -> str | None:
        given = next((message[name] for name in PROMPTS if name in message), self.instruction)
        if self.prompt == "unused" or (self.prompt == "optional" and given is None):
            return None
        if not isinstance(given, str):
            got = "none" if given is None else type(given).__name__
            raise RequestError(
                f"prompt: expected the instruction as text, got {got}; send it as 'prompt' or 'task', or "
                "start the server with --instruction"
            )
        return given

    def describe(self) -> dict[str, Any]:
        """Return what a client is told when it connects."""
        inputs: dict[str, Any] = {
            name: {"kind": each.kind, "shape": list(each.shape)} for name, each in self.inputs.items()
        }
        if self.prompt != "unused":
            inputs["prompt"] = {"kind": "text", "shape": []}
        return {"observations": inputs, "horizon": self.horizon, "action_dim": self.action_dim}

    def example(self, seed: int = 0) -> Request:
        """Return a request with a random observation."""
        draw = np.random.default_rng(seed)
        observation: dict[str, Any] = {
            self.names.get(name, name): draw.integers(0, 256, each.shape, np.uint8)
            if each.kind == "image"
            else draw.normal(size=each.shape).astype(np.float32)
            for name, each in self.inputs.items()
        }
        if self.prompt == "needed" or self.instruction is not None:
            observation["task"] = self.instruction or ""
        return Request(observation, seed)
