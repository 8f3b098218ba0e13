"""Where lerobot's policies lie, and the small files beside their weights; imports lerobot to load one."""

import shutil
from pathlib import Path
from typing import Any

from qsteer.files import read_json
from qsteer.hub import fetch

PROCESSORS = ("policy_preprocessor", "policy_postprocessor")
"""lerobot's processors beside a checkpoint: NAME.json, and their states, NAME*.safetensors."""


def place_of(policy: Any, base: str | Path | None, revision: str | None) -> dict[str, str | None]:
    """Return path and revision of a policy's checkpoint.

    Raises:
        ValueError: they are not given, and lerobot's policy does not know them.
    """
    config = getattr(policy, "config", None)
    if base is None and (base := getattr(config, "pretrained_path", None)) is None and is_lerobots(policy):
        raise ValueError(
            "save: expected a policy whose config.pretrained_path says where its checkpoint is, got none; "
            "name it, save_pretrained(..., base='lerobot/pi05_libero_finetuned')"
        )
    if revision is None:
        revision = getattr(config, "pretrained_revision", None)
    return {"path": None if base is None else str(base), "revision": revision}


def is_lerobots(policy: Any) -> bool:
    """Return whether a policy is of lerobot's classes."""
    return any(cls.__module__.startswith("lerobot.") for cls in type(policy).__mro__)


def load_base(saved: dict[str, Any], device: str | None) -> Any:
    """Return lerobot's policy from the place that was saved, in eval mode.

    Raises:
        ValueError: no place was saved.
        FileNotFoundError: it is not there.
        ModuleNotFoundError: lerobot is not installed.
    """
    if saved["path"] is None:
        raise ValueError(
            f"policy: expected the {saved['class']} that was steered, for no checkpoint of it is known, got "
            "none; pass qsteer.load(..., policy=policy)"
        )
    fetch(saved["path"], saved["revision"], kind="policy", needed="config.json", whole=False)
    try:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the policy that was steered is lerobot\'s ({error}): pip install "qsteer[lerobot]"'
        ) from error
    config = PreTrainedConfig.from_pretrained(saved["path"], revision=saved["revision"])
    if device is not None:
        config.device = device
    kind = get_policy_class(config.type)
    policy = kind.from_pretrained(saved["path"], config=config, revision=saved["revision"])
    policy.config.pretrained_path = Path(saved["path"])
    return policy.eval()


def lerobot_config(policy: Any) -> dict[str, Any] | None:
    """Return the configuration by which lerobot knows a saved steering; None: the policy is not lerobot's."""
    config = getattr(policy, "config", None)
    if not is_lerobots(policy) or config is None:
        return None
    described = {
        side: {
            name: {"type": feature.type.value, "shape": list(feature.shape)}
            for name, feature in getattr(config, side).items()
        }
        for side in ("input_features", "output_features")
    }
    return {"type": "qsteer", "n_obs_steps": config.n_obs_steps, **described, "device": config.device}


def copy_processors(place: dict[str, str | None], folder: Path) -> None:
    """Copy the processors that lie beside a checkpoint: they are the policy's, and small."""
    if place["path"] is None:
        return
    first = f"{PROCESSORS[0]}.json"
    beside = fetch(place["path"], place["revision"], kind="policy", needed="config.json", whole=False)
    if not (beside / first).is_file():
        return
    for name in PROCESSORS:
        shutil.copy(beside / f"{name}.json", folder)
        for step in read_json(beside / f"{name}.json")["steps"]:
            if state := step.get("state_file"):
                shutil.copy(beside / state, folder)
