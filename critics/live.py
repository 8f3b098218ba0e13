"""The acting copy of a critic that is still learning, on the policy's own device."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from qsteer.critics.critic import Batch, BoundCritic, Critic, CriticConfig


class _Depth(threading.local):
    """How many times this thread has entered :meth:`LiveCritic.acting`."""

    count = 0


class LiveCritic:
    """A frozen copy of a critic which a learner renews between actions, never during one.

    The learner hands weights over (:meth:`publish`) and goes on; the next action installs them. Weights and
    normalisation change in place: no tensor ever gets another address, so that a captured CUDA graph sees the
    change. All of it stays on the device of ``critic``, which is to be the policy's. On CUDA, copies run on
    the current stream, and events order them: no thread waits for the device. A deep copy begins with the
    weights published last, and is published to by itself.

    Attributes:
        critic: the acting copy; read it inside :meth:`acting`.
        version: number of the publish that is acting; 0 is the critic as it was given.

    Args:
        critic: the learner's critic (its moving average, as a rule); it is copied.

    Cost: three sets of weights; one copy of them per publish, and one per publish that is acted on.

    Example:
        >>> critic = Critic(CriticConfig(obs_dim=3, action_dim=2, horizon=5))
        >>> live = LiveCritic(critic)  # qsteer.steer(policy, live, qsteer.Tweedie(alpha=0.2))
        >>> live.publish(critic)  # by the learner, at any time
        >>> live.bind(torch.zeros(4, 3))(torch.zeros(4, 5, 2)).shape, live.version
        (torch.Size([4]), 1)
    """

    def __init__(self, critic: Critic) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.critic = deepcopy(critic).requires_grad_(False).eval()
            self.critic.zero_grad()
            self._weights = list_tensors(self.critic)
            self._staged = [tensor.clone() for tensor in self._weights]
        self.version = self._published = 0
        self._depth, self._actors, self._turn = _Depth(), 0, threading.Condition()
        if self._on_cuda:
            self._ready, self._installed = torch.cuda.Event(), torch.cuda.Event()
            self._left: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveCritic":
        with self.acting():
            return LiveCritic(self.critic)

    def __repr__(self) -> str:
        return f"LiveCritic({self.config}, version={self.version})"

    @property
    def config(self) -> CriticConfig:
        """The critic's configuration."""
        return self.critic.config

    @property
    def device(self) -> torch.device:
        """Where the critic acts."""
        return self._weights[0].device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the acting copy's parameters."""
        return self.critic.parameters()

    def publish(self, source: Critic) -> None:
        """Hand over the weights and normalisation of ``source``, for the actions that begin from now on.

        Called by the learner, in its own thread and, on CUDA, with its own stream current. It never waits for
        an action. Of several publishes between two actions the last one counts.

        Raises:
            ValueError: ``source`` has another configuration.
        """
        if source.config != self.config:
            raise ValueError(
                f"publish: expected a critic of {self.config}, got {source.config}; make a new LiveCritic of "
                "it and handle.swap(critic=...)"
            )
        with self._turn, torch.inference_mode(False), torch.no_grad():
            if self._on_cuda:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(self._installed)
            torch._foreach_copy_(self._staged, list_tensors(source))
            if self._on_cuda:
                self._ready.record(stream)
            self._published += 1

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Hold the weights still for a whole sampling call.

        On entry the weights published last are installed. Threads may act at the same time: one that finds
        something to install waits until those which are acting have finished; hence an action must not wait
        for another to begin. A thread that is acting already goes on.
        """
        if not self._depth.count:
            self._enter()
        self._depth.count += 1
        try:
            yield
        finally:
            self._depth.count -= 1
            if not self._depth.count:
                self._leave()

    def bind(self, obs: Batch) -> BoundCritic:
        """Encode ``obs`` with the newest weights; see :meth:`qsteer.Critic.bind`.

        The value reads the acting weights: use it inside the same :meth:`acting`, or later actions change
        what it says.
        """
        with self.acting():
            return self.critic.bind(obs)

    def _enter(self) -> None:
        with self._turn:
            # A later version will do as well; or frequent publishes would starve this thread.
            wanted = self._published
            self._turn.wait_for(lambda: not self._actors or self.version >= wanted)
            if not self._actors and self.version < self._published:
                self._install()
            if self._on_cuda:
                torch.cuda.current_stream(self.device).wait_event(self._installed)
            self._actors += 1

    def _install(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self._on_cuda:
                stream = torch.cuda.current_stream(self.device)
                for event in (self._ready, *self._left.values()):  # the kernels of earlier actions
                    stream.wait_event(event)
            torch._foreach_copy_(self._weights, self._staged)
            if self._on_cuda:
                self._installed.record(stream)
                self._left.clear()
        self.version = self._published

    def _leave(self) -> None:
        with self._turn:
            if self._on_cuda:
                stream = torch.cuda.current_stream(self.device)
                self._left[stream] = stream.record_event()
            self._actors -= 1
            self._turn.notify_all()

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"


def list_tensors(critic: Critic) -> list[Tensor]:
    """Return all tensors of a critic: parameters and buffers, in an order that the configuration fixes."""
    return [*critic.parameters(), *critic.buffers()]
