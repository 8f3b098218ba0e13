"""The reaching policy: a flow over chunks, given the state and the instruction."""

from collections import deque
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from qsteer.adapters import Host
from qsteer.adapters.contracts import read_lerobot
from qsteer.clock import PAPER
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.testing.reach.configuration_reach import ACTION, STATE, ReachConfig


class ReachPolicy(PreTrainedPolicy):
    """A policy of lerobot's interface, trained by its own ``forward``; see :class:`ReachConfig`."""

    config_class = ReachConfig
    name = "reach"
    __qsteer_host__ = Host(
        serves="ReachPolicy",
        entry="sample_actions",
        step="denoise_step",
        batch="predict_action_chunk",
        clock=PAPER,
        steps="config.num_steps",
        executed="config.n_action_steps",
        action_shape="config.action_feature.shape",
        chunk="config.chunk_size",
        queue="_queue",
        features=itemgetter("told"),
        bounds=(-1.0, 1.0),
        contract=read_lerobot,
    )

    def __init__(self, config: ReachConfig, **kwargs: Any) -> None:
        super().__init__(config)
        self.flow = FlowPolicy(
            FlowPolicyConfig(
                obs_dim=2 + len(config.tasks),
                action_dim=2,
                horizon=config.chunk_size,
                hidden=(config.width,) * 3,
            )
        )
        self.reset()

    def get_optim_params(self) -> Any:
        """Return what is trained."""
        return self.parameters()

    def reset(self) -> None:
        """Forget the chunk that is being executed."""
        self._queue: deque[Tensor] = deque()

    def tell(self, batch: dict[str, Any]) -> Float[Tensor, "B F"]:
        """Return state and instruction, one of each known one, as numbers.

        Raises:
            ValueError: an instruction is not known.
        """
        state = batch[STATE]
        if unknown := sorted({task for task in batch["task"] if task not in self.config.tasks}):
            raise ValueError(f"task: expected one of {self.config.tasks}, got {unknown}; train it on these")
        which = torch.tensor([self.config.tasks.index(task) for task in batch["task"]], device=state.device)
        return torch.cat([state, torch.nn.functional.one_hot(which, len(self.config.tasks)).to(state)], 1)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Return the flow matching loss of action chunks (B, H, 2)."""
        a = batch[ACTION]
        noise, t = torch.randn_like(a), torch.rand(len(a), device=a.device)
        x = noise + t[:, None, None] * (a - noise)
        v = self.denoise_step(x, t, self.tell(batch))
        kept = ~batch["action_is_pad"][..., None]
        loss = ((v - (a - noise)).square() * kept).sum() / (2 * kept.sum())
        return loss, {"loss": loss.item()}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """Return chunks (B, H, 2) in model space."""
        return self.sample_actions(self.tell(batch), noise)

    def sample_actions(self, told: Tensor, noise: Tensor | None = None) -> Tensor:
        """Integrate the velocity by Euler's method."""
        steps = self.config.num_steps
        x = noise
        if x is None:
            x = torch.randn(len(told), self.config.chunk_size, 2, device=told.device)
        for t, dt in PAPER.grid(steps):
            x = x + dt * self.denoise_step(x, torch.full((len(x),), float(t), device=x.device), told)
        return x

    def denoise_step(self, x_t: Tensor, timestep: Tensor, told: Tensor) -> Tensor:
        """Return the velocity; t = 1 is the action."""
        return self.flow.velocity(x_t, timestep, self.flow.encode(told))

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], noise: Tensor | None = None, **_: Any) -> Tensor:
        """Return the next action (B, 2)."""
        if not self._queue:
            chunk = self.predict_action_chunk(batch, noise)[:, : self.config.n_action_steps]
            self._queue.extend(chunk.unbind(1))
        return self._queue.popleft()
