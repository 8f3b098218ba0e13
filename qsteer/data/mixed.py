"""Batches that mix offline data with the rows of a replay."""

from dataclasses import replace

import torch

from qsteer.data.episodes import Chunks, Transitions, join_transitions
from qsteer.data.replay import Replay


class Mixed:
    """Offline and online transitions in one batch: offline rows first, and alone until there are online ones.

    Args:
        offline: chunks of the data.
        online: a replay with chunks of the same length and the same discount.
        ratio: share of online transitions in a batch; ``None``: uniform over all transitions of both.
        lanes: of the replay (``None``: all).

    Raises:
        ValueError: ``ratio`` is no share, or chunks, discounts or what is needed of them differ.
    """

    def __init__(
        self,
        offline: Chunks,
        online: Replay,
        ratio: float | int | None = None,
        lanes: slice | range | None = None,
    ) -> None:
        if ratio is not None and not 0 <= ratio <= 1:
            raise ValueError(f"Mixed.ratio: expected None or a share in [0, 1], got {ratio}")
        layout = online.layout
        there = layout.horizon * layout.steps, layout.gamma ** (layout.horizon * layout.steps)
        if (offline.horizon, offline.discount) != there:
            raise ValueError(
                f"Mixed: expected chunks (H, gamma^H) of both alike, got {there} online and "
                f"{(offline.horizon, offline.discount)} offline; build both with the same horizon and gamma"
            )
        if offline.need != layout.need:
            raise ValueError(
                f"Mixed: expected transitions for need={layout.need!r} of both, got need={offline.need!r} "
                f"offline; build Chunks(..., need={layout.need!r})"
            )
        self.offline, self.online, self.ratio, self.lanes = offline, online, ratio, lanes

    def __len__(self) -> int:
        """Return the number of transitions of both."""
        return len(self.offline) + self.online.size(self.lanes)

    def sample(self, batch_size: int, generator: torch.Generator) -> Transitions:
        """Draw transitions with replacement; ``rows`` of the replay count on from the data's last.

        With ``ratio=None`` the number of online ones is drawn too: every transition is as likely as any
        other. Otherwise it is the nearest to ``ratio * batch_size``.
        """
        online = self.online.size(self.lanes)
        if not online:
            fresh = 0
        elif self.ratio is None:
            device = generator.device
            draw = torch.randint(
                len(self.offline) + online, (batch_size,), generator=generator, device=device
            )
            fresh = int((draw >= len(self.offline)).sum())
        else:
            fresh = round(self.ratio * batch_size)
        if not fresh:
            return self.offline.sample(batch_size, generator)
        new = self.online.sample(fresh, generator, self.lanes)
        new = replace(new, rows=new.rows + len(self.offline.episodes))
        if fresh == batch_size:
            return new
        return join_transitions([self.offline.sample(batch_size - fresh, generator), new])
