"""What lerobot's commands may say of a steered policy."""

from dataclasses import dataclass
from typing import NoReturn

from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig


@PreTrainedConfig.register_subclass("qsteer")
@dataclass
class QSteerConfig(PreTrainedConfig):
    """A steered policy: a saved steering (``--policy.path=DIRECTORY``), or one put together here.

    Attributes:
        base: checkpoint of the policy, a folder or a name on the hub.
        base_revision: of the hub's repository.
        critic: folder or name of the critic.
        rule: how it steers, as ``qsteer evaluate --arms`` spells it: ``tweedie=0.2``, ``qgf=0.06``,
            ``best-of-8``, ``tweedie=0.2+best-of-8``; None: as it was saved, or not at all.
        executed: steps of a chunk that are executed, where they are not the policy's ``n_action_steps``.
        compile: ``static``, ``graph`` or ``inductor``, see ``qsteer.steer``; None: the policy's own step.
        rtc_config: real-time chunking, which ``lerobot-rollout`` sets.
    """

    base: str | None = None
    base_revision: str | None = None
    critic: str | None = None
    rule: str | None = None
    executed: int | None = None
    compile: str | None = None
    rtc_config: RTCConfig | None = None

    @property
    def observation_delta_indices(self) -> None:
        """One observation."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """It is not trained."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """It is not trained."""
        return None

    def get_optimizer_preset(self) -> NoReturn:
        """Refuse."""
        raise not_trained()

    def get_scheduler_preset(self) -> None:
        """It is not trained."""
        return None

    def validate_features(self) -> None:
        """The base validates its own."""


def not_trained() -> TypeError:
    """Return the error of whoever would train a steered policy."""
    return TypeError(
        "qsteer: expected a policy to train, got a steered one, whose policy is frozen; train its base, and "
        "its critic by qsteer train-critic"
    )
