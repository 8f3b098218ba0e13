"""Vectorised rollouts of chunked agents, paired over arms by common random numbers.

An agent is ``act(obs: (N, O), noise: (N, H, A)) -> (N, H, A)``. The noise is not the agent's: episode ``e``
of a run with seed ``s`` is reset with ``s + e`` and draws its noise from a generator of its own, seeded by
``(s, e)``. So two arms of one seed meet the same initial states with the same noise, and an episode does not
depend on how many environments run at once or on which episodes share its batch, but for the rounding of the
agent's own batched arithmetic and for what an agent draws from torch's global generator.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from qsteer.envs.seeds import EVALUATION_SEED
from qsteer.files import write_json
from qsteer.statistics import wilson_interval

try:
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode
    from gymnasium.vector.utils import create_empty_array
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('rollouts need gymnasium: pip install "qsteer[ogbench]"') from error

OUTCOMES = ("success", "sum_reward", "max_reward", "length")

type MakeEnv = Callable[[], gymnasium.Env]
type Agent = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rollouts:
    """What happened in the episodes of one arm; entry ``e`` of every array is episode ``e``.

    Attributes:
        name: of the arm.
        success: ``info["success"]`` (or ``"is_success"``) at any step, a flag or robomimic's
            ``{"task": flag}``; where the environment reports neither in the whole episode, whether it
            terminated.
        sum_reward: sum of the episode's rewards.
        max_reward: the largest of them.
        length: in environment steps.
        seed: of the environment's reset.
        act_s: seconds spent in the agent, all episodes together.
        eval_s: seconds of the whole run.
        actions: the executed actions of each episode, when recorded; not saved.
    """

    name: str
    success: Bool[np.ndarray, "E"]
    sum_reward: Float[np.ndarray, "E"]
    max_reward: Float[np.ndarray, "E"]
    length: Int[np.ndarray, "E"]
    seed: Int[np.ndarray, "E"]
    act_s: float
    eval_s: float
    actions: tuple[Float[np.ndarray, "_ A"], ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of lerobot's ``eval_info``, ``per_episode`` and ``aggregated``, and a few more."""
        n = len(self.success)
        low, high = wilson_interval(int(self.success.sum()), n)
        columns = {key: getattr(self, key).tolist() for key in (*OUTCOMES, "seed")}
        episodes = zip(*columns.values(), strict=True)
        return {
            "name": self.name,
            "per_episode": [
                {"episode_ix": e} | dict(zip(columns, row, strict=True)) for e, row in enumerate(episodes)
            ],
            "aggregated": {
                "avg_sum_reward": float(self.sum_reward.mean()),
                "avg_max_reward": float(self.max_reward.mean()),
                "pc_success": 100 * float(self.success.mean()),
                "pc_success_ci95": [100 * low, 100 * high],
                "eval_s": self.eval_s,
                "eval_ep_s": self.eval_s / n,
                "act_s": self.act_s,
            },
        }

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON, atomically."""
        return write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> "Rollouts":
        """Read what :meth:`save` wrote."""
        info = json.loads(Path(path).read_text())
        columns = {key: np.array([row[key] for row in info["per_episode"]]) for key in (*OUTCOMES, "seed")}
        total = info["aggregated"]
        return cls(info["name"], **columns, act_s=total["act_s"], eval_s=total["eval_s"], actions=None)


def rollout(
    make_env: MakeEnv,
    act: Agent,
    *,
    horizon: int,
    episodes: int = 100,
    seed: int = EVALUATION_SEED,
    num_envs: int = 8,
    name: str = "policy",
    record: bool = False,
    progress: bool = True,
) -> Rollouts:
    """Roll out one agent. Several arms should share one :class:`Simulators`, which see for the arguments."""
    with Simulators(make_env, horizon=horizon, num_envs=min(num_envs, episodes)) as simulators:
        return simulators.rollout(
            act, episodes=episodes, seed=seed, name=name, record=record, progress=progress
        )


class Simulators:
    """Environments in processes of their own, one vector step of which is a whole action chunk.

    Workers are forked from a clean server process, never from this one, whose thread pools a fork would
    break; each uses one thread. A script that calls this needs ``if __name__ == "__main__":``.

    Args:
        make_env: makes one environment, whose ``reset(seed=...)`` must fix the episode. Observations and
            actions are boxes, actions of one axis.
        horizon: H, actions per chunk; all are executed, unless the episode ends within the chunk.
        num_envs: environments, and rows of the agent's batch. About four a core keep the cores busy.
        gamma: discount of the rewards within a chunk.

    Raises:
        ValueError: an argument is out of range, or the environment has other spaces.

    Cost: to start, a few seconds of imports, and building ``num_envs + 2`` environments.

    Example:
        >>> with Simulators(partial(ogbench.make, name), horizon=5) as simulators:  # doctest: +SKIP
        ...     base = simulators.rollout(policy_act, name="base")
        ...     steered = simulators.rollout(steered_act, name="steered")
    """

    def __init__(self, make_env: MakeEnv, *, horizon: int, num_envs: int = 8, gamma: float = 1.0) -> None:
        if horizon < 1 or num_envs < 1:
            raise ValueError(f"horizon, num_envs: expected at least 1, got {horizon} and {num_envs}")
        make_chunked = partial(_make_chunked, make_env, horizon, gamma)
        probe = make_chunked()
        self.num_envs, self._chunk = num_envs, probe.chunk
        modules = [__name__, type(probe.unwrapped).__module__]
        probe.close()
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        multiprocessing.get_context(method).set_forkserver_preload(modules)
        with _limit_threads():
            self._envs = AsyncVectorEnv(
                [make_chunked] * num_envs, context=method, autoreset_mode=AutoresetMode.DISABLED
            )

    def rollout(
        self,
        act: Agent,
        *,
        episodes: int = 100,
        seed: int = EVALUATION_SEED,
        name: str = "policy",
        record: bool = False,
        noise_shape: tuple[int, ...] | None = None,
        progress: bool = True,
    ) -> Rollouts:
        """Run one arm. An environment that ends its episode starts another at once, so the batch stays full.

        Args:
            act: ``(obs: (N, O), noise: (N, H, A)) -> (N, H, A)``: an action chunk for each of N <=
                ``num_envs`` running episodes, in the environment's own action space, to whose bounds it is
                clipped. Float32 on the CPU, called without gradients. Randomness beyond ``noise`` comes from
                torch's global generator, which is seeded for the run and restored after it.
            episodes: how many.
            seed: of the run; episode ``e`` is reset with ``seed + e``.
            name: of the arm.
            record: keep the executed actions, from which :mod:`qsteer.evaluation.video` replays the episodes.
            noise_shape: of one chunk's noise; None: that of the chunk, (H, A).
            progress: show a bar with the success rate so far.

        Raises:
            TypeError: ``act`` returns no tensor.
            ValueError: an argument is out of range, or ``act`` returns another shape or something not finite.

        Cost: that of the simulation and the agent in turns; one round trip to the environments per chunk.
        """
        if episodes < 1 or seed < 0:
            raise ValueError(f"episodes, seed: expected at least 1 and 0, got {episodes} and {seed}")
        started, act_s, finished, successes = time.perf_counter(), 0.0, 0, 0
        generators = [make_noise_generator(seed, e) for e in range(episodes)]
        outcomes: list[dict[str, Any]] = [{} for _ in range(episodes)]
        actions: list[list[np.ndarray]] = [[] for _ in range(episodes)]
        waiting = iter(range(episodes))
        episode = np.full(self.num_envs, -1)  # of each environment; -1: none
        chunks = np.zeros((self.num_envs, *self._chunk.shape), np.float32)
        observations: Any = np.zeros(0)
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            torch.no_grad(),
            tqdm(total=episodes, desc=name, unit="episode", disable=not progress) as bar,
        ):
            torch.manual_seed(seed)
            while finished < episodes:
                idle = episode < 0
                episode[idle] = [next(waiting, -1) for _ in range(idle.sum())]
                if (fresh := idle & (episode >= 0)).any():
                    seeds: list[int | None] = [seed + max(e, 0) for e in episode.tolist()]
                    observations, _ = self._envs.reset(seed=seeds, options={"reset_mask": fresh})
                active = np.flatnonzero(episode >= 0)

                asked = time.perf_counter()
                obs = to_tensors(tree_map(itemgetter(active), observations))
                shape = noise_shape or self._chunk.shape
                draws = [torch.randn(shape, generator=generators[e]) for e in episode[active]]
                expected = len(active), *self._chunk.shape
                answer = _check_chunks(act(obs, torch.stack(draws)), expected)
                chunks[active] = answer.clip(self._chunk.low, self._chunk.high)
                act_s += time.perf_counter() - asked

                observations, _, terminated, truncated, info = self._envs.step(chunks)
                for i, e in zip(active, episode[active], strict=True):
                    if record:
                        actions[e].append(chunks[i, : info["executed"][i]].copy())
                    if terminated[i] or truncated[i]:
                        outcomes[e] = {key: info[key][i] for key in OUTCOMES}
                        episode[i], finished, successes = -1, finished + 1, successes + info["success"][i]
                        bar.set_postfix_str(f"success {successes / finished:.0%}", refresh=False)
                        bar.update()
        return Rollouts(
            name,
            **{key: np.array([outcome[key] for outcome in outcomes]) for key in OUTCOMES},
            seed=seed + np.arange(episodes),
            act_s=act_s,
            eval_s=time.perf_counter() - started,
            actions=tuple(map(np.concatenate, actions)) if record else None,
        )

    def close(self) -> None:
        """End the processes."""
        self._envs.close()

    def __enter__(self) -> "Simulators":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._envs.close(terminate=kind is not None)


class ChunkedAction(gymnasium.Wrapper):
    """One step executes a chunk (H, A) of actions, or what of it the episode has room for.

    After the end of an episode and before the first reset a step does nothing. ``info`` sums up the episode
    in ``success``, ``sum_reward``, ``max_reward`` and ``length``; ``executed`` is the number of actions of
    this step. An environment with a method ``cameras(on)`` renders the last frame of a chunk only.
    """

    def __init__(self, env: gymnasium.Env, horizon: int, gamma: float = 1.0) -> None:
        super().__init__(env)
        action, observation = env.action_space, env.observation_space
        if not (isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1):
            raise ValueError(f"action space: expected a Box of one axis, got {action}; wrap it")
        boxes = observation.values() if isinstance(observation, gymnasium.spaces.Dict) else [observation]
        if not all(isinstance(box, gymnasium.spaces.Box) for box in boxes):
            raise ValueError(
                f"observation space: expected a Box or a Dict of them, got {observation}; wrap the "
                "environment, for example in gymnasium.wrappers.FlattenObservation"
            )
        low, high = (np.tile(bound, (horizon, 1)) for bound in (action.low, action.high))
        self.action_space = self.chunk = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.gamma = gamma
        self._cameras: Callable[[bool], None] = getattr(env.unwrapped, "cameras", lambda on: None)
        self._observation: Any = tree_map(itemgetter(0), create_empty_array(observation))
        self._over = [True, False]  # terminated, truncated
        self._sums, self._reported = _start_sums(), False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        self._cameras(True)
        self._over, self._sums, self._reported = [False, False], _start_sums(), False
        self._observation, _ = self.env.reset(seed=seed, options=options)
        return self._observation, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute the chunk; the reward is the discounted sum of its rewards."""
        sums, executed, discounted = self._sums, 0, 0.0
        for k, single in enumerate(action):
            if any(self._over):
                break
            self._cameras(k == len(action) - 1)
            self._observation, reward, *self._over, info = self.env.step(single)
            success = _read_success(info)
            self._reported |= success is not None
            if success is None:  # an environment that reports successes has reported none in this step
                success = self._over[0] and not self._reported
            sums["success"] = sums["success"] or bool(success)
            sums["sum_reward"] += float(reward)
            sums["max_reward"] = max(sums["max_reward"], float(reward))
            sums["length"] += 1
            discounted += self.gamma**k * float(reward)
            executed += 1
        return self._observation, discounted, self._over[0], self._over[1], sums | {"executed": executed}


def make_noise_generator(seed: int, episode: int) -> torch.Generator:
    """Return the source of one episode's noise; that of (s, e + 1) is not that of (s + 1, e)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, episode)).generate_state(1)[0]))


def to_tensors(observations: Any) -> Any:
    """Return observations as tensors, one or a mapping of them; images stay bytes, the rest is float32."""

    def tensor(column: np.ndarray) -> Tensor:
        return torch.from_numpy(column if column.dtype == np.uint8 else column.astype(np.float32))

    return tree_map(tensor, observations)


def _make_chunked(make_env: MakeEnv, horizon: int, gamma: float) -> ChunkedAction:
    return ChunkedAction(make_env(), horizon, gamma)


def _read_success(info: Mapping[str, Any]) -> bool | None:
    """Return what a step's info says of success; None: nothing.

    Raises:
        TypeError: it is neither a flag nor robomimic's ``{"task": flag}``.
    """
    name = next((name for name in ("success", "is_success") if name in info), None)
    if name is None:
        return None
    said = info[name]
    flag = said["task"] if isinstance(said, Mapping) and "task" in said else said
    try:
        value = np.asarray(flag)
    except ValueError:  # rows of different length
        value = np.asarray(None)
    if value.size != 1 or value.dtype.kind not in "biuf" or value.item() not in (0, 1):
        raise TypeError(
            f'info["{name}"]: expected a flag, or {{"task": flag}}, got {said!r}; return True or False, '
            "for example from a wrapper"
        )
    return bool(value.item())


def _start_sums() -> dict[str, Any]:
    return {"success": False, "sum_reward": 0.0, "max_reward": -np.inf, "length": 0}


def _check_chunks(actions: object, shape: tuple[int, ...]) -> np.ndarray:
    if not isinstance(actions, Tensor):
        raise TypeError(f"act: expected a tensor, got {type(actions).__name__}; wrap it in torch.as_tensor")
    if actions.shape != shape:
        raise ValueError(
            f"act: expected chunks of shape (N, H, A) = {shape}, got {tuple(actions.shape)}; "
            "return one unpadded chunk (H, A) per observation"
        )
    if not torch.isfinite(actions).all():
        raise ValueError("act: expected finite actions, got NaN or infinity; look at the policy's inputs")
    return actions.float().cpu().numpy()


@contextmanager
def _limit_threads() -> Iterator[None]:
    """Let processes started here use one thread each."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)
