"""A robot's side of a server that learns: openpi's client, and what came of its actions.

This file needs openpi-client and nothing else of qsteer; copy it to the robot's machine.
"""

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4


class Client:
    """Asks a server (``qsteer serve --learn``) for actions, and tells it what came of them.

    Args:
        host: the server's address; ``wss://...`` with TLS.
        port: the server's.
        api_key: the server's; None: it has none.

    Raises:
        RuntimeError: by any call, what the server has against it.

    Example:
        >>> robot = Client("127.0.0.1", 8000)  # doctest: +SKIP
        >>> chunk = robot.infer({"observation.state": state})["actions"]  # doctest: +SKIP
        >>> rewards = [step(action) for action in chunk]  # doctest: +SKIP
        >>> robot.outcome(rewards, done=True, success=True)  # doctest: +SKIP
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8000, api_key: str | None = None) -> None:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy  # only robots have it

        self._policy = WebsocketClientPolicy(host, port, api_key)
        self._episode: str | None = None
        self._told: dict[str, Any] = {}

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says of itself."""
        return self._policy.get_server_metadata()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the server's reply; its ``actions`` (H, A) are to be executed, all of them."""
        self._episode = self._episode or uuid4().hex
        own = {**observation.get("qsteer", {}), "episode": self._episode, **self._told}
        self._told = {}
        return self._policy.infer({**observation, "qsteer": own})

    def outcome(
        self,
        rewards: Sequence[float],
        *,
        done: bool = False,
        truncated: bool = False,
        success: bool = False,
    ) -> dict[str, Any] | None:
        """Tell what came of the last actions: with the next request, or at once if the episode is over.

        Args:
            rewards: one of each step that was executed.
            done: the task is over, nothing follows; the next request begins another episode.
            truncated: a time limit, or a person, ended the episode.
            success: the task was done.

        Returns how many rows of this robot are stored, under ``"stored"``, if it was told at once.
        """
        self._told = {"rewards": [float(reward) for reward in rewards], "success": bool(success)}
        if not (done or truncated):
            return None
        own = {"episode": self._episode, **self._told, "done": bool(done), "truncated": bool(truncated)}
        self._episode, self._told = None, {}
        return self._policy.infer({"qsteer": own})

    def command(self, name: str) -> dict[str, Any]:
        """Ask a server to ``freeze``, ``learn``, ``rollback`` or ``export``; return what has become of it."""
        return self._policy.infer({"qsteer": {"command": name}})
