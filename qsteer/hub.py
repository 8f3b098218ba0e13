"""Networks that can be saved, shared on the hub, and loaded if no weight is missing."""

import contextlib
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import nn


class HubModule(nn.Module, PyTorchModelHubMixin, library_name="qsteer", pipeline_tag="robotics"):
    """A network with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    Saved are ``model.safetensors``, ``config.json`` and a model card, ``README.md``. A subclass takes a
    dataclass ``config`` in its constructor and keeps it; it names its ``tags`` and its card's template, a
    Jinja text that may refer to ``config``, as class arguments.
    """

    config: Any

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **hub: Any) -> "HubModule":
        """Load with the hub's machinery, but refuse a checkpoint that lacks weights."""
        with contextlib.redirect_stdout(None):  # the hub says where it loads from
            return super()._from_pretrained(strict=strict, **hub)

    def generate_model_card(self, **card: Any) -> ModelCard:
        """Return the model card that ``save_pretrained`` and ``push_to_hub`` write as README.md."""
        return super().generate_model_card(config=self.config, **card)
