"""lerobot's own SmolVLA, trained here on play in MetaWorld, and steered: the demonstration on a VLA.

One policy is told one of three tasks in words. Its checkpoints name each other by paths relative to the
directory in which they were made: use them from there, as lerobot does.
"""

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qsteer.critics import Critic
from qsteer.data.lerobot import open_dataset, open_policy
from qsteer.envs.lerobot import env_config
from qsteer.envs.metaworld.configuration import ACTION, BLACK, IMAGE, STATE
from qsteer.envs.metaworld.world import LightWorld
from qsteer.evaluation.arms import parse
from qsteer.evaluation.compare import compare_driven
from qsteer.evaluation.lerobot import drive
from qsteer.experiments.demo import make_film, present
from qsteer.testing.checkpoints import halve, pi05, smolvla, write_vlm
from qsteer.trace import Trace
from qsteer.training.cloning import CloningTraining, clone
from qsteer.training.critic import CriticTraining
from qsteer.training.dataset import train_from_dataset

TASKS = ("push-v3", "pick-place-v3", "drawer-open-v3")
EPISODES = 600
"""Of play, for each task."""
DEPTH, WIDTH, CHUNK, EXECUTED = 4, 128, 10, 5
"""Layers of the VLM and of its action expert, and their width; actions of a chunk, and those executed."""
CLONING = CloningTraining(steps=10_000, decay=10_000, half=True, checkpoint_every=1_000)
CRITIC = CriticTraining(steps=20_000, horizon=EXECUTED, checkpoint_every=2_000)
ARMS = ("base", "best-of-8", "qgf=1.5", "tweedie-raw=1", "random-of-8", "random-tweedie-raw=1")
"""Their strengths were chosen on the tuning episodes of all tasks."""
STEERED = "tweedie-raw=1"
SIZE = 240
"""Edge of the film, in pixels."""


def demo_vla(
    task: str = TASKS[0],
    *,
    out: Path = Path("runs/demo"),
    episodes: int = 100,
    num_envs: int = 8,
    source: Path = Path("examples/checkpoints/metaworld"),
    from_scratch: bool = False,
    seed: int = 0,
) -> dict[str, object]:
    """Compare arms of a SmolVLA on a task of MetaWorld; arguments and result as of :func:`~.demo.demo`.

    Args:
        task: one of :data:`TASKS`.
        out: directory of ``results.json``, ``success.png``, ``trace.png`` and ``rollout.gif``.
        episodes: evaluation episodes per arm.
        num_envs: simulators at once.
        source: folder with ``policy`` and ``critic``.
        from_scratch: make data, policy and critic under ``runs/`` first; an interrupted run goes on.
        seed: training seed, with ``from_scratch``.

    Returns:
        What ``results.json`` holds.

    Raises:
        FileNotFoundError: the folder has no policy.
        ModuleNotFoundError: MetaWorld is not installed.
    """
    started = time.perf_counter()
    if from_scratch:
        source = make_checkpoints(Path("runs/metaworld"), seed)
    elif not (source / "policy").is_dir():
        raise FileNotFoundError(
            f"expected policy and critic in {source}, got none: run it in a checkout of qsteer, or make them "
            "with qsteer demo --host smolvla --from-scratch"
        )
    policy, *processors = open_policy(source / "policy")
    critic = Critic.from_pretrained(source / "critic").requires_grad_(False).eval()
    config = env_config("metaworld_light", task)
    make_env, driver = drive(config, None, policy, tuple(processors), critic)
    arms = [parse(spec, clip=None) for spec in ARMS]
    print(f"{task}: one frozen SmolVLA, one critic ({source}), the same {episodes} episodes for each arm")
    trace = Trace()
    report, runs = compare_driven(
        make_env,
        driver,
        arms,
        episodes=episodes,
        num_envs=num_envs,
        record=True,
        traces={STEERED: trace},
    )
    report = {"task": f"MetaWorld {task}", "checkpoints": str(source)} | report
    report = present(report, arms, runs, trace, out)
    film = partial(LightWorld, task, config.episode_length, SIZE)
    make_film(film, runs[0], next(run for run in runs if run.name == STEERED), out, None)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes on {os.cpu_count()} cores")
    return report


def make_checkpoints(
    root: Path,
    seed: int = 0,
    *,
    host: str = "smolvla",
    tasks: tuple[str, ...] = TASKS,
    episodes: int = EPISODES,
    camera: int = 0,
    width: int = WIDTH,
    cloning: CloningTraining = CLONING,
    critic: CriticTraining = CRITIC,
) -> Path:
    """Make data, policy and critic of a training seed; what is there already is not made again.

    Args:
        root: folder of the data and of a folder for each seed.
        seed: training seed.
        host: one of :data:`HOSTS`.
        tasks: MetaWorld's names.
        episodes: of play, for each task.
        camera: see :class:`~qsteer.envs.metaworld.configuration.MetaworldLight`.
        width: of the policy.
        cloning: how to train the policy.
        critic: how to train the critic.

    Returns:
        The folder of ``policy`` and ``critic``.
    """
    folder = root / f"seed{seed}"
    dataset = make_data(root / "dataset", camera, tasks, episodes)
    policy, before = make_policy(dataset, folder, seed, cloning, host, width)
    train_from_dataset(dataset, policy, before, folder / "critic", replace(critic, seed=seed), features=True)
    return folder


def make_data(
    directory: Path, camera: int = 0, tasks: tuple[str, ...] = TASKS, episodes: int = EPISODES
) -> Any:
    """Record play of the tasks, if it is not there, and return the LeRobotDataset."""
    from qsteer.envs.metaworld.play import record_play

    if (directory / "meta" / "info.json").is_file():
        return open_dataset(directory)
    return record_play(directory, tasks, episodes, camera=camera)


def make_policy(
    dataset: Any,
    folder: Path,
    seed: int,
    training: CloningTraining = CLONING,
    host: str = "smolvla",
    width: int = WIDTH,
) -> tuple[Any, Any]:
    """Train a policy on the dataset in ``folder/policy``; return it and its preprocessor.

    Args:
        dataset: a LeRobotDataset of play.
        folder: where it goes.
        seed: training seed.
        training: how.
        host: one of :data:`HOSTS`.
        width: of the policy.
    """
    from lerobot.policies.factory import make_pre_post_processors

    out = folder / "policy"
    if not (out / "trained").exists():
        policy: Any = HOSTS[host](dataset, folder, seed, width)
        processors = make_pre_post_processors(policy.config, str(out))
        clone(dataset, policy, processors, out, replace(training, seed=seed))
        halve(out)
        (out / "trained").touch()
    policy, before, _ = open_policy(out)
    return policy, before


def _new_smolvla(dataset: Any, folder: Path, seed: int, width: int) -> Any:
    edge = dataset.features[IMAGE]["shape"][0]
    eyes = {} if edge == BLACK else {"pixels": edge, "patch": 8, "vision_depth": 2}
    vlm = write_vlm(folder / "vlm", _words(dataset), width=width, depth=DEPTH, **eyes)
    return smolvla(
        folder / "policy",
        vlm,
        _stats(dataset),
        state=dataset.features[STATE]["shape"][0],
        action=dataset.features[ACTION]["shape"][0],
        pixels=edge,
        chunk=CHUNK,
        executed=EXECUTED,
        depth=DEPTH,
        seed=seed,
    )


def _new_pi05(dataset: Any, folder: Path, seed: int, width: int) -> Any:
    return pi05(
        folder / "policy",
        _words(dataset),
        _stats(dataset),
        state=dataset.features[STATE]["shape"][0],
        action=dataset.features[ACTION]["shape"][0],
        pixels=dataset.features[IMAGE]["shape"][0],
        chunk=CHUNK,
        executed=EXECUTED,
        width=width,
        depth=DEPTH,
        seed=seed,
    )


def _words(dataset: Any) -> list[str]:
    return " ".join(dataset.meta.tasks.index).split()


def _stats(dataset: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {
        key: {name: torch.as_tensor(value) for name, value in dataset.meta.stats[key].items()}
        for key in (STATE, ACTION)
    }


HOSTS = {"smolvla": _new_smolvla, "small_pi05": _new_pi05}
"""What can be trained: lerobot's SmolVLA, and its pi0.5."""
