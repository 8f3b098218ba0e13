"""A steered policy, from the directory that ``Handle.save_pretrained`` has written."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qsteer.adapters import unwrapped
from qsteer.adapters.files import load_base
from qsteer.critics.critic import Critic
from qsteer.files import read_json
from qsteer.hosts import parameters_of
from qsteer.hub import WEIGHTS, HubModule, fetch
from qsteer.steering.handle import Handle, steer
from qsteer.steering.parts import decode
from qsteer.steering.saving import CRITIC, FORMAT, STEERING, settings_of, weights_of


def load(
    path: str | Path,
    *,
    policy: Any = None,
    revision: str | None = None,
    device: str | None = None,
) -> Handle:
    """Steer a policy as it was when its handle was saved; ``handle.policy`` is it.

    No code that the directory names is executed: classes are qsteer's own, the policy's class is lerobot's.

    Cost: loading the policy, and one pass over its weights, which must be those that were steered.

    Args:
        path: the directory, or a repository of the hub.
        policy: the policy, if it is there already, or is not of lerobot's; None: it is loaded from where it
            was, by lerobot.
        revision: of the hub's repository ``path``; that of the policy is in it.
        device: where the policy that is loaded goes; None: as its own configuration says.

    Raises:
        FileNotFoundError: there is no such directory or repository, or the policy is not where it was.
        ValueError: it was saved by a later version, a file is broken, the policy is another one or has other
            weights, or ``policy`` is needed.
        TypeError, RuntimeError: as for :func:`qsteer.steer`.
    """
    folder = fetch(str(path), revision, kind="saved steering", needed=STEERING)
    saved = read_json(folder / STEERING)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        got = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(
            f"{folder / STEERING}: expected format {FORMAT}, got {got}; load it with the version of qsteer "
            "that saved it, or a later one"
        )

    def network(kind: type[HubModule], at: str) -> HubModule:
        if not (folder / at).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{folder / STEERING}: expected a folder inside it, got {at!r}; save it again")
        return restored(kind, folder / at)

    rule, sampler = decode(saved["rule"], network), decode(saved["sampler"], network)
    base = saved["base"]
    if policy is None:
        policy = load_base(base, device)
    check_base(policy, base)
    critic = restored(Critic, folder / CRITIC).eval()
    place = next((parameter.device for parameter in parameters_of(unwrapped(policy)[0])), None)
    for network_of in (critic, *modules_in(rule), *modules_in(sampler)):
        network_of.to(place).requires_grad_(False)
    return steer(
        policy,
        critic,
        rule,
        sampler=sampler,
        trace=saved["trace"],
        compile=saved["compile"],
        executed=saved["executed"],
    )


def restored[M: HubModule](kind: type[M], folder: Path) -> M:
    """Return a network in the precision in which it was saved."""
    network, weights = kind.from_pretrained(folder), load_file(folder / WEIGHTS)
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        network.to(dtypes.pop()).load_state_dict(weights)
    return network


def check_base(policy: Any, saved: dict[str, Any]) -> None:
    """Raise ValueError unless a policy is the one that was steered: its weights, contract and Euler steps."""
    inner, host, _ = unwrapped(policy)
    if type(inner).__name__ != saved["class"]:
        raise ValueError(
            f"policy: expected the {saved['class']} that was steered, got {type(inner).__name__}"
        )
    if (weights := weights_of(inner)) != saved["weights"]:
        where = f" ({saved['path']}, revision {saved['revision']})" if saved["path"] else ""
        raise ValueError(
            f"policy: expected the weights that were steered{where}, fingerprint {saved['weights']}, got "
            f"{weights}: the critic was trained for another policy, or the dtype differs; load the same "
            "checkpoint, or steer this one and save that"
        )
    for name, got in settings_of(inner, host).items():
        expected = saved["settings"].get(name)
        if None not in (expected, got) and expected != got:
            raise ValueError(
                f"policy: expected {name} = {expected}, with which it was steered, got {got}; set it so, or "
                "steer this one and save that"
            )


def modules_in(part: Any) -> list[HubModule]:
    """Return the networks in a rule or sampler."""
    if isinstance(part, HubModule):
        return [part]
    return [module for each in getattr(part, "__dict__", {}).values() for module in modules_in(each)]
