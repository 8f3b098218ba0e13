"""lerobot's asynchronous inference with a steered policy: ``python -m lerobot_policy_qsteer.policy_server``.

It is lerobot's own server, with its options (``--host``, ``--port``, ``--fps``, ...), and needs the extra
``async``. A client asks for ``--policy_type=qsteer`` and names a saved steering. It sends
``actions_per_chunk`` actions of a chunk, more than ``n_action_steps``; all that is sent is steered, so the
critic must see that many steps.
"""

from typing import Any

from lerobot.async_inference import policy_server
from lerobot.async_inference.constants import SUPPORTED_POLICIES

from lerobot_policy_qsteer.modeling_qsteer import QSteerPolicy


class SteeringServer(policy_server.PolicyServer):
    """lerobot's server, which steers all actions that it sends."""

    def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Load the policy that the client asks for, and steer as many steps as it is sent.

        Raises:
            ValueError: the critic of a steered policy does not see as many steps.
        """
        self.policy: Any
        reply = super().SendPolicyInstructions(request, context)
        if isinstance(self.policy, QSteerPolicy):
            try:
                self.policy.steer_again(executed=self.actions_per_chunk)
            except ValueError:
                self.policy = None  # it would answer with actions that are not steered
                raise
        return reply


if "qsteer" not in SUPPORTED_POLICIES:
    SUPPORTED_POLICIES.append("qsteer")


def main() -> None:
    """Serve."""
    policy_server.PolicyServer = SteeringServer
    policy_server.serve()


if __name__ == "__main__":
    main()
