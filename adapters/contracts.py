"""The contract of lerobot's policies, from their configuration and the processors saved beside them."""

from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor

from qsteer.contract import Contract, Normalisation
from qsteer.files import read_json
from qsteer.fingerprints import fingerprint

PREPROCESSOR = "policy_preprocessor.json"
NORMALIZER = "normalizer_processor"
STATISTICS = {
    "mean_std": ("mean", "std"),
    "min_max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantile10": ("q10", "q90"),
}
"""The numbers by which each mode normalises."""
BOUNDS = {"min_max": 1.0, "quantiles": 5.0, "quantile10": 10.0, "mean_std": 20.0}
"""How far normalised actions may lie from 0: for all but min_max, whose bound is exact, a generous limit."""


def read_lerobot(policy: Any) -> Contract:
    """Return what ``policy.config`` says, and of statistics what the checkpoint's processors hold.

    Statistics are known if ``config.pretrained_path`` is a folder here with ``policy_preprocessor.json``;
    those given to the processors in their place by an override are not seen.
    """
    config = policy.config
    modes = {str(kind): mode.value.lower() for kind, mode in config.normalization_mapping.items()}
    states = {key: f for key, f in config.input_features.items() if f.type.value == "STATE"}
    action, state = modes.get("ACTION"), modes.get("STATE")
    held = _read_statistics(getattr(config, "pretrained_path", None))
    bound = None if action is None else BOUNDS.get(action)
    dim = config.action_feature.shape[-1]
    return Contract(
        observations=[(key, tuple(f.shape)) for key, f in states.items()],
        observation_normalisation=_summarise(held, state, sorted(states)),
        action_normalisation=cast(Normalisation | None, action),
        action_statistics=_summarise(held, action, ["action"]),
        action_low=None if bound is None else (-bound,) * dim,
        action_high=None if bound is None else (bound,) * dim,
    )


def _read_statistics(path: Any) -> dict[str, Tensor]:
    """Return the normaliser's numbers by their names, such as ``action.mean``; empty: there are none here."""
    if path is None or not (file := Path(path) / PREPROCESSOR).is_file():
        return {}
    for step in read_json(file)["steps"]:
        if step.get("registry_name") == NORMALIZER and step.get("state_file"):
            return load_file(Path(path) / step["state_file"])
    return {}


def _summarise(held: dict[str, Tensor], mode: str | None, keys: list[str]) -> str | None:
    """Return a fingerprint of the statistics of some entries; None: not known."""
    if mode == "identity":
        return "identity"
    names = [f"{key}.{name}" for key in keys for name in STATISTICS.get(mode or "", ())]
    if not names or any(name not in held for name in names):
        return None
    return fingerprint([held[name].float() for name in names], prefix=f"{mode} {names}")
