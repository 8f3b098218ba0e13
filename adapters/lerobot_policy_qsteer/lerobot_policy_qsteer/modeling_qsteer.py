"""A steered policy as lerobot's own: it hands everything on to the policy that is steered."""

from pathlib import Path
from typing import Any, NoReturn, cast

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

import qsteer
from lerobot_policy_qsteer.configuration_qsteer import QSteerConfig, not_trained
from qsteer.adapters.files import load_base
from qsteer.critics import Critic
from qsteer.evaluation.arms import parse


class QSteerPolicy(PreTrainedPolicy):
    """A policy that is steered from the beginning.

    Args:
        config: see :class:`QSteerConfig`.
        handle: of the steering; None: it is put together as ``config`` says.
        given: what lerobot's factory knows beyond that: statistics, which are in the base's processors.

    Raises:
        ValueError: the configuration names no base or no critic, or the critic is of another policy.
    """

    config_class = QSteerConfig
    name = "qsteer"
    config: QSteerConfig

    def __init__(self, config: QSteerConfig, handle: qsteer.Handle | None = None, **given: Any) -> None:
        super().__init__(config)
        self.handle = put_together(config) if handle is None else handle
        self.base = self.handle.policy
        if isinstance(self.handle.critic, nn.Module):
            self.critic = self.handle.critic  # goes where the policy goes
        config.input_features = self.base.config.input_features
        config.output_features = self.base.config.output_features

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        revision: str | None = None,
        **given: Any,
    ) -> "QSteerPolicy":
        """Load a saved steering, and its policy.

        Args:
            pretrained_name_or_path: what ``handle.save_pretrained`` or ``push_to_hub`` wrote.
            config: what the command line says of it: another ``rule``, ``executed``, or device.
            revision: of the hub's repository.
            given: ignored, as by lerobot's own policies.

        Raises:
            ValueError: it names a base or a critic, which are in the directory; or as :func:`qsteer.load`.
        """
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision)
        config = cast(QSteerConfig, config)
        if named := [name for name in ("base", "base_revision", "critic") if getattr(config, name)]:
            raise ValueError(
                f"qsteer: expected no {', '.join(named)} beside a saved steering, which has its own, got "
                f"{[getattr(config, name) for name in named]}; leave them out, or --policy.path"
            )
        handle = qsteer.load(pretrained_name_or_path, revision=revision, device=config.device)
        policy = cls(config, handle)
        if config.rule is not None:
            arm = parse(config.rule, clip=None)
            handle.swap(rule=arm.rule, sampler=arm.sampler)
        if config.executed is not None or config.compile is not None:
            policy.steer_again(executed=config.executed, compile=config.compile)
        return policy.eval()

    def _save_pretrained(self, save_directory: Path, **given: Any) -> None:
        """Save the steering, not the weights."""
        base, revision = self.config.base, self.config.base_revision
        self.handle.save_pretrained(save_directory, base=base, revision=revision)

    def steer_again(self, *, executed: int | None = None, compile: Any = None) -> None:
        """Steer another number of steps, or on another path; None: as before.

        Raises:
            ValueError: the critic does not see as many steps.
        """
        former = self.handle
        executed = former.executed if executed is None else executed
        compile = former.compile if compile is None else compile
        former.remove()
        try:
            self.handle = qsteer.steer(
                self.base,
                former.critic,
                former.rule,
                sampler=former.sampler,
                trace=former.trace.steps,
                compile=compile,
                executed=executed,
            )
        except Exception:
            self.handle = qsteer.steer(self.base, former.critic, former.rule, sampler=former.sampler)
            raise

    def reset(self) -> None:
        """Begin an episode."""
        if hasattr(self, "base"):  # lerobot calls it while it is constructed
            self.base.reset()

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Return the next action of the steered policy, in model space."""
        return self.base.select_action(batch, **kwargs)

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Return a steered chunk, in model space."""
        return self.base.predict_action_chunk(batch, **kwargs)

    def supports_rtc(self) -> bool:
        """Return whether the base has real-time chunking; steering is composed with it."""
        own = getattr(self.base, "supports_rtc", None)
        return callable(own) and bool(own())

    def init_rtc_processor(self) -> None:
        """Give the base the real-time chunking that was configured here."""
        self.base.config.rtc_config = self.config.rtc_config
        self.base.init_rtc_processor()

    def forward(self, batch: dict[str, Tensor], **kwargs: Any) -> NoReturn:
        """Refuse: a steered policy is not trained."""
        raise not_trained()

    def get_optim_params(self) -> NoReturn:
        """Refuse: a steered policy is not trained."""
        raise not_trained()


def put_together(config: QSteerConfig) -> qsteer.Handle:
    """Load base and critic, and steer.

    Raises:
        ValueError: one of them is not named.
    """
    if config.base is None or config.critic is None:
        raise ValueError(
            f"qsteer: expected --policy.base and --policy.critic, got {config.base} and {config.critic}; "
            "name both, or a saved steering by --policy.path"
        )
    place = {"path": config.base, "revision": config.base_revision}
    policy = load_base(place, config.device)
    critic = Critic.from_pretrained(config.critic).to(config.device).requires_grad_(False).eval()
    arm = parse(config.rule or "base", clip=None)
    return qsteer.steer(
        policy,
        critic,
        arm.rule,
        sampler=arm.sampler,
        executed=config.executed,
        compile=cast(Any, config.compile),
    )
