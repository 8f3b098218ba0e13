"""What ``qsteer serve`` serves, from directories: a policy, a critic and an arm, or a saved steering."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qsteer.adapters import host_of
from qsteer.adapters.files import PROCESSORS
from qsteer.critics import Critic, LiveCritic
from qsteer.critics.encoders import pooled
from qsteer.evaluation.arms import Maps, parse
from qsteer.files import read_json
from qsteer.hub import CONFIG, fetch
from qsteer.online.actors import HostActor
from qsteer.policies import FlowPolicy
from qsteer.serving.requests import Input, Interface
from qsteer.serving.served import Served, ServedHost, ServedStates, stacked
from qsteer.steering.handle import Handle, steer
from qsteer.steering.loading import load
from qsteer.steering.opening import open_action
from qsteer.steering.saving import STEERING
from qsteer.training.critic import CriticTraining, fresh_critic

logger = logging.getLogger(__name__)

STATE = "observation.state"
"""The name of a small policy's observation."""
RESIZING = ("resize_imgs_with_padding", "image_resolution")
"""Entries of a lerobot policy's configuration which say that it resizes images itself."""


def open_served(
    policy: str | Path,
    critic: str | Path | None,
    arm: str,
    *,
    learns: CriticTraining | None = None,
    features: bool = False,
    maps: Maps | None = None,
    device: str = "cpu",
    rename: Mapping[str, str] | None = None,
    instruction: str | None = None,
    exact: int | None = None,
    displacement: bool = True,
) -> Served:
    """Return a policy that follows a critic, to be served.

    Args:
        policy: directory or hub name of a lerobot policy, or of a :class:`~qsteer.policies.FlowPolicy`.
        critic: directory or hub name of its critic; None, if it learns: a new one.
        arm: how it steers, see :func:`qsteer.evaluation.arms.parse`.
        learns: how the critic learns, for :class:`~qsteer.serving.learning.RobotLearning`; of a new one, also
            its shape, but for the horizon, which is the policy's. None: it stays as it is.
        features: a new critic of a lerobot policy sees the policy's features, too.
        maps: learnt maps which the arm may ask for, on the device.
        device: where the networks go.
        rename: a client's names of observations, and the policy's.
        instruction: for requests without one.
        exact: see :class:`Served`.
        displacement: whether replies say it.

    Raises:
        FileNotFoundError: one of them is not there.
        ValueError: the critic cannot steer the policy, the arm or a name is unknown, or the arm mixes rows.
        TypeError: no Host record describes the policy.
    """
    folder = fetch(str(policy), None, kind="policy", needed=CONFIG, whole=False)
    if critic is None and learns is None:
        raise ValueError("critic: expected one, got none; name it, or let a new one learn")
    judge = None if critic is None else Critic.from_pretrained(critic).to(device).requires_grad_(False).eval()
    live: Critic | LiveCritic
    if "type" not in read_json(folder / CONFIG):
        small = FlowPolicy.from_pretrained(policy).to(device).requires_grad_(False).eval()
        if instruction is not None:
            raise ValueError("instruction: expected none for a policy of states, got one; leave it out")
        if features:
            raise ValueError("features: expected none of a policy of states, got True; leave them out")
        shape = small.config.horizon, small.config.action_dim
        if judge is None:
            judge = _new(replace(_given(learns), horizon=shape[0]), small.config.obs_dim, shape[1]).to(device)
        live = judge if learns is None else LiveCritic(judge)
        inputs = {STATE: Input("numbers", (small.config.obs_dim,))}
        way = parse(arm, maps, clip="policy")
        interface = Interface(*renamed(inputs, rename), *shape)
        return ServedStates(
            small, live, way.rule, way.sampler, interface, exact=exact, displacement=displacement
        )
    from lerobot.utils.import_utils import register_third_party_plugins

    from qsteer.data.lerobot import open_policy

    register_third_party_plugins()
    host, before, after = open_policy(policy, device)
    way = parse(arm, maps, clip=None)
    if learns is None:
        assert judge is not None  # checked above
        handle = steer(host, judge, way.rule, sampler=way.sampler)
        return serve_lerobot(
            handle, before, after, rename, instruction, exact=exact, displacement=displacement
        )
    if judge is None:
        judge = _new_for_host(host, before, learns, features, instruction).to(device)
    actor = HostActor(host, LiveCritic(judge), before, after)
    actor.steer(way.rule, way.sampler)
    return serve_lerobot(
        actor.handle, before, after, rename, instruction, actor=actor, exact=exact, displacement=displacement
    )


def _given(learns: CriticTraining | None) -> CriticTraining:
    assert learns is not None  # or there is a critic
    return learns


def _new(learns: CriticTraining, obs_dim: int, action_dim: int, features: int = 0) -> Critic:
    shape = replace(learns.critic_config(obs_dim, action_dim), features=features)
    return fresh_critic(shape, [learns.seed]).requires_grad_(False).eval()


def _new_for_host(
    policy: Any,
    preprocess: Callable[[dict[str, Any]], Any],
    learns: CriticTraining,
    features: bool,
    instruction: str | None,
) -> Critic:
    """Return a critic of a lerobot policy's state, and of its features if they are asked for."""
    host = host_of(policy)
    inputs = {name: _input(policy.config, feature) for name, feature in _features(policy.config)}
    example = Interface(inputs, {}, 1, 1).example()
    batch = preprocess({name: stacked([example], name) for name in inputs} | {"task": [instruction or ""]})
    if (key := learns.observation_key) not in batch:
        raise KeyError(
            f"policy's batch: expected the state under {key!r}, which a new critic sees, got "
            f"{sorted(batch)}; give a critic of the policy's views"
        )
    size = 0
    if features:
        with torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
            size = pooled(open_action(policy, dict(batch)).field.features).shape[1]
    learns = replace(learns, horizon=int(host.read(policy, host.executed)))
    return _new(learns, batch[key].shape[1], host.action_dim(policy), size)


def open_steering(
    path: str | Path,
    *,
    device: str = "cpu",
    rename: Mapping[str, str] | None = None,
    instruction: str | None = None,
    exact: int | None = None,
    displacement: bool = True,
) -> Served:
    """Return a saved steering of a lerobot policy (``Handle.save_pretrained``), to be served eagerly.

    Arguments and errors are those of :func:`open_served` and :func:`qsteer.load`.
    """
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.utils.import_utils import register_third_party_plugins

    register_third_party_plugins()
    folder = fetch(str(path), None, kind="saved steering", needed=STEERING)
    handle = load(folder, device=device)
    if handle.compile is not None:
        logger.warning("compile=%r of the saved steering: a server acts eagerly", handle.compile)
        handle.remove()
        parts: dict[str, Any] = {"sampler": handle.sampler, "executed": handle.executed}
        handle = steer(handle.policy, handle.critic, handle.rule, **parts)
    config = handle.policy.config
    beside = folder if (folder / f"{PROCESSORS[0]}.json").is_file() else config.pretrained_path
    there = {"device_processor": {"device": str(device)}}
    before, after = make_pre_post_processors(config, str(beside), preprocessor_overrides=there)
    return serve_lerobot(handle, before, after, rename, instruction, exact=exact, displacement=displacement)


def serve_lerobot(
    handle: Handle,
    preprocess: Callable[[dict[str, Any]], Any],
    postprocess: Callable[[Tensor], Tensor],
    rename: Mapping[str, str] | None = None,
    instruction: str | None = None,
    *,
    actor: HostActor | None = None,
    exact: int | None = None,
    displacement: bool = True,
) -> ServedHost:
    """Return a steered lerobot policy with its processors, to be served; see :func:`open_served`."""
    policy, host = handle.policy, handle.host
    config = policy.config
    inputs = {name: _input(config, feature) for name, feature in _features(config)}
    horizon = host.read(policy, host.executed) if handle.executed is None else handle.executed
    dim = config.output_features["action"].shape[0]
    interface = Interface(
        *renamed(inputs, rename),
        int(horizon),
        int(dim),
        prompt=_prompt_of(preprocess, inputs),
        instruction=instruction,
    )
    return ServedHost(
        handle, interface, preprocess, postprocess, actor=actor, exact=exact, displacement=displacement
    )


def _features(config: Any) -> list[tuple[str, Any]]:
    """Return what a lerobot policy is sent, by name; the rest it fills in itself."""
    return [(name, each) for name, each in config.input_features.items() if "empty_camera" not in name]


def _input(config: Any, feature: Any) -> Input:
    resized = any(getattr(config, name, None) for name in RESIZING)
    if feature.type.value == "VISUAL":
        return Input("image", tuple(feature.shape), resized)
    return Input("numbers", tuple(feature.shape))


def renamed(
    inputs: Mapping[str, Input], rename: Mapping[str, str] | None
) -> tuple[dict[str, Input], dict[str, str]]:
    """Return inputs under a client's names, and the policy's names of those that were renamed.

    Raises:
        ValueError: the policy has no such input, or two have one name.
    """
    rename = dict(rename or {})
    if unknown := sorted(set(rename.values()) - set(inputs)):
        raise ValueError(f"rename: expected names of {sorted(inputs)}, got {unknown}; give CLIENT'S=POLICY'S")
    names = {theirs: own for own, theirs in rename.items()}
    found = {names.get(name, name): each for name, each in inputs.items()}
    if len(found) < len(inputs) or len(names) < len(rename):
        raise ValueError(f"rename: expected one name for each of {sorted(inputs)}, got {rename}")
    return found, rename


def _prompt_of(
    preprocess: Callable[[dict[str, Any]], Any], inputs: Mapping[str, Input]
) -> Literal["needed", "optional"]:
    """Return whether a preprocessor can do without an instruction, which is tried."""
    example = Interface(inputs, {}, 1, 1).example()
    try:
        preprocess({name: stacked([example], name) for name in inputs})
    except (KeyError, TypeError, ValueError):
        return "needed"
    return "optional"
