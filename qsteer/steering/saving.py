"""A steering in a directory: what steers, and which policy it steers; never the policy's weights."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import qsteer
from qsteer.adapters import contract_of
from qsteer.adapters.files import copy_processors, lerobot_config, place_of
from qsteer.critics.critic import Critic
from qsteer.critics.live import LiveCritic
from qsteer.files import check_directory, replacing_directory, write_json
from qsteer.fingerprints import fingerprint
from qsteer.hosts import Host, parameters_of
from qsteer.hub import HubModule
from qsteer.steering.parts import encode

STEERING, CRITIC, MAPS = "steering.json", "critic", "maps"
FORMAT = 1
"""Of ``steering.json``; a change that older code would misread counts it up."""
LEROBOT = "config.json"
"""What lerobot reads: ``lerobot-eval --policy.path=DIRECTORY`` with the plugin ``lerobot_policy_qsteer``."""
CARD = """---
library_name: qsteer
pipeline_tag: robotics
tags: [qsteer, robotics, flow-matching]
---

# A steered policy

`{policy}`{at}, steered by a critic at inference time; no weight of the policy is changed or in here.

```python
import qsteer

handle = qsteer.load("{name}")     # loads the policy too; handle.policy is steered
```

* rule: `{rule}`
* sampler: `{sampler}`
"""


def save(handle: Any, path: str | Path, base: str | Path | None, revision: str | None) -> Path:
    """Write the directory from which :func:`qsteer.load` gives a handle back; see its ``save_pretrained``."""
    path = check_directory(Path(path))
    policy, critic = handle.policy, handle.critic
    if handle.critic_inputs is not None:
        raise TypeError(
            "save: expected a critic of the policy's own batch, got critic_inputs, a function, which cannot "
            "be saved; train the critic on what the policy sees, or steer in code"
        )
    critic = critic.critic if isinstance(critic, LiveCritic) else critic
    if type(critic) is not Critic:
        raise TypeError(
            f"save: expected a qsteer.Critic, got {type(critic).__name__}, which qsteer.load would not know; "
            "steer with it in code"
        )
    place = place_of(policy, base, revision)
    modules: list[HubModule] = []

    def keep(module: HubModule) -> str:
        if not any(module is kept for kept in modules):
            modules.append(module)
        return f"{MAPS}/{next(i for i, kept in enumerate(modules) if kept is module)}"

    described = {
        "format": FORMAT,
        "qsteer": qsteer.__version__,
        "base": {
            **place,
            "class": type(policy).__name__,
            "weights": weights_of(policy),
            "settings": settings_of(policy, handle.host),
        },
        "rule": encode(handle.rule, keep),
        "sampler": encode(handle.sampler, keep),
        "executed": handle.executed,
        "compile": handle.compile,
        "trace": handle.trace.steps,
    }
    with replacing_directory(path) as fresh:
        critic.save_pretrained(fresh / CRITIC)
        for i, module in enumerate(modules):
            module.save_pretrained(fresh / MAPS / str(i))
        write_json(described, fresh / STEERING)
        at = f" at revision `{place['revision']}`" if place["revision"] else ""
        shown = {"policy": place["path"] or type(policy).__name__, "at": at, "name": path.name}
        (fresh / "README.md").write_text(CARD.format(**shown, rule=handle.rule, sampler=handle.sampler))
        if (config := lerobot_config(policy)) is not None:
            (fresh / LEROBOT).write_text(json.dumps(config, indent=2) + "\n")
            copy_processors(place, fresh)
    return path


def settings_of(policy: Any, host: Host) -> dict[str, Any]:
    """Return what JSON can hold of a policy's contract and its number of Euler steps."""
    steps = host.read(policy, host.steps) if isinstance(host.steps, str) else host.steps
    return json.loads(json.dumps({"steps": steps} | asdict(contract_of(policy))))


def weights_of(policy: Any) -> str:
    """Return a fingerprint of all weights and buffers. Cost: a copy on the CPU and a hash, about 1 GB/s."""
    if isinstance(policy, nn.Module):
        state = policy.state_dict()
        return fingerprint(state.values(), prefix=" ".join(state))
    return fingerprint(parameters_of(policy))
