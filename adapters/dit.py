"""lerobot's multi-task DiT with the flow-matching objective. Imports nothing of lerobot."""

from typing import Any

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import Clock
from qsteer.hosts import Host


def observe(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the batch as it was given: the policy puts its history in the observation's place."""
    return dict(arguments["batch"])


def begins(policy: Any) -> int:
    """Return the step of the last observation: chunks begin with the first."""
    return policy.config.n_obs_steps - 1


def refuses(policy: Any) -> str | None:
    """Return what of a configuration is no Euler chain of a velocity."""
    config = policy.config
    if not config.is_flow_matching:
        return f"objective={config.objective!r}; train it with objective='flow_matching'"
    if config.integration_method != "euler":
        return f"integration_method={config.integration_method!r}; set it to 'euler'"
    if config.sigma_min:
        return (
            f"sigma_min={config.sigma_min}, whose paths do not end at the action; train it with sigma_min=0"
        )
    return None


MULTI_TASK_DIT = Host(
    serves="MultiTaskDiTPolicy",
    entry="objective.conditional_sample",
    step="noise_predictor.forward",
    batch="predict_action_chunk",
    clock=Clock(count="linspace"),
    steps="config.num_integration_steps",
    executed="config.n_action_steps",
    first=begins,
    action_shape="config.action_feature.shape",
    x="x",
    chunk="config.horizon",
    queue="_queues",
    observe=observe,
    features=lambda context: context["conditioning_vec"],
    refuses=refuses,
    bounds=action_bounds,
    contract=read_lerobot,
)

HOSTS = (MULTI_TASK_DIT,)
