"""Vectorised rollouts of chunked agents, paired over arms by common random numbers.

An agent is ``act(obs: (N, O), noise: (N, H, A)) -> (N, H, A)``. The noise is not the agent's: episode ``e``
of a run with seed ``s`` is reset with ``s + e`` and draws its noise from a generator of its own, seeded by
``(s, e)``. So two arms of one seed meet the same initial states with the same noise, and an episode does not
depend on how many environments run at once or on which episodes share its batch, but for the rounding of the
agent's own batched arithmetic and for what an agent draws from torch's global generator.
"""

import json
import time
from collections.abc import Callable, Mapping
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

from qsteer.data.layout import find_finite
from qsteer.envs.limits import Limits
from qsteer.envs.seeds import EVALUATION_SEED
from qsteer.files import write_json
from qsteer.statistics import wilson_interval

try:
    import gymnasium

    from qsteer.envs.chunked import OUTCOMES, make_chunked
    from qsteer.envs.cluster import Actors, Cluster
    from qsteer.envs.workers import Failure, Processes, Workers
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('rollouts need gymnasium: pip install "qsteer[ogbench]"') from error

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
        failed: times that a simulator failed and its episode was begun again.
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
    failed: int = 0

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
                "failed": self.failed,
            },
        }

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON, atomically."""
        return write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> "Rollouts":
        """Read what :meth:`save` wrote."""
        info = json.loads(Path(path).read_text())
        columns: dict[str, Any] = {
            key: np.array([row[key] for row in info["per_episode"]]) for key in (*OUTCOMES, "seed")
        }
        total = info["aggregated"]
        times = {"act_s": total["act_s"], "eval_s": total["eval_s"]}
        return cls(info["name"], **columns, **times, failed=total.get("failed", 0))


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
    limits: Limits | None = None,
    cluster: Cluster | None = None,
) -> Rollouts:
    """Roll out one agent. Several arms should share one :class:`Simulators`, which see for the arguments."""
    num_envs = min(num_envs, episodes)
    with Simulators(
        make_env, horizon=horizon, num_envs=num_envs, limits=limits, cluster=cluster
    ) as simulators:
        return simulators.rollout(
            act, episodes=episodes, seed=seed, name=name, record=record, progress=progress
        )


class Simulators:
    """Environments in processes of their own, one vector step of which is a whole action chunk.

    An environment that raises, gives what its spaces do not hold, hangs, or whose process dies is replaced,
    and its episode begun again from the same seed; the other episodes do not notice. A script that calls this
    needs ``if __name__ == "__main__":``.

    Args:
        make_env: makes one environment, whose ``reset(seed=...)`` must fix the episode. Observations and
            actions are boxes, actions of one axis. The first is built in this process, for its spaces, where
            nothing that hangs can be interrupted.
        horizon: H, actions per chunk; all are executed, unless the episode ends within the chunk.
        num_envs: environments, and rows of the agent's batch. About four a core keep the cores busy.
        gamma: discount of the rewards within a chunk.
        limits: of time, and of failures; None: ``Limits()``.
        cluster: of Ray, on whose nodes the environments run; None: on this machine.

    Attributes:
        failed: failures of each environment so far: (N,).

    Raises:
        ValueError: an argument is out of range, the environment has other spaces, or the cluster too few
            cores.
        ConnectionError: there is no such cluster.

    Cost: to start, a few seconds of imports, and building ``num_envs + 1`` environments.

    Example:
        >>> with Simulators(partial(ogbench.make, name), horizon=5) as simulators:  # doctest: +SKIP
        ...     base = simulators.rollout(policy_act, name="base")
        ...     steered = simulators.rollout(steered_act, name="steered")
    """

    def __init__(
        self,
        make_env: MakeEnv,
        *,
        horizon: int,
        num_envs: int = 8,
        gamma: float = 1.0,
        limits: Limits | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        if horizon < 1 or num_envs < 1:
            raise ValueError(f"horizon, num_envs: expected at least 1, got {horizon} and {num_envs}")
        make = partial(make_chunked, make_env, horizon, gamma)
        probe = make()
        self.num_envs, self._chunk = num_envs, probe.chunk
        space, modules = probe.observation_space, [type(probe.unwrapped).__module__]
        probe.close()
        limits = limits or Limits()
        self._workers: Workers = (
            Processes(make, num_envs, space, modules, limits)
            if cluster is None
            else Actors(make, num_envs, space, cluster, limits)
        )

    @property
    def failed(self) -> Int[np.ndarray, "N"]:
        """Failures of each environment so far."""
        return self._workers.failed

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

        An episode in which a simulator fails, or gives an observation or a reward that is not finite, is
        neither a success nor a failure: it is begun again, with the same seed and noise. A simulator that
        diverges and means that as a failure of the policy should end the episode itself.

        Raises:
            TypeError: ``act`` returns no tensor.
            ValueError: an argument is out of range, or ``act`` returns another shape or something not finite.
            RuntimeError: an episode failed as often as ``Limits.failures`` allows.

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
        fresh = np.zeros(self.num_envs, bool)  # environments whose episode is to begin
        chunks = np.zeros((self.num_envs, *self._chunk.shape), np.float32)
        workers, failed = self._workers, int(self.failed.sum())
        workers.in_a_row[:] = 0
        with (
            torch.random.fork_rng(range(torch.cuda.device_count())),
            torch.no_grad(),
            tqdm(total=episodes, desc=name, unit="episode", disable=not progress) as bar,
        ):
            torch.manual_seed(seed)
            while finished < episodes:
                idle = episode < 0
                episode[idle] = [next(waiting, -1) for _ in range(idle.sum())]
                fresh |= idle & (episode >= 0)
                for e in episode[fresh].tolist():
                    generators[e] = make_noise_generator(seed, e)
                    actions[e].clear()
                active = np.flatnonzero(episode >= 0)
                starts = {i: seed + int(episode[i]) for i in np.flatnonzero(fresh).tolist()}
                obs, failures = self._begin(starts, active.tolist())
                fresh[:] = np.isin(np.arange(self.num_envs), list(failures))
                if failures:
                    continue

                asked = time.perf_counter()
                shape = noise_shape or self._chunk.shape
                draws = [torch.randn(shape, generator=generators[e]) for e in episode[active]]
                expected = len(active), *self._chunk.shape
                answer = _check_chunks(act(obs, torch.stack(draws)), expected)
                chunks[active] = answer.clip(self._chunk.low, self._chunk.high)
                act_s += time.perf_counter() - asked

                workers.start("step", {i: chunks[i] for i in active.tolist()})
                answers, failures = workers.finish()
                for i, (_, terminated, truncated, info) in answers.items():
                    e = episode[i]
                    if not np.isfinite(info["sum_reward"]):
                        failures[i] = Failure("expected finite rewards, got NaN or infinity")
                        workers.fail(i, failures[i])
                        continue
                    if record:
                        actions[e].append(chunks[i, : info["executed"]].copy())
                    if terminated or truncated:
                        outcomes[e] = {key: info[key] for key in OUTCOMES}
                        episode[i], finished, successes = -1, finished + 1, successes + info["success"]
                        workers.in_a_row[i] = 0
                        bar.set_postfix_str(f"success {successes / finished:.0%}", refresh=False)
                        bar.update()
                fresh[list(failures)] = True
        return Rollouts(
            name,
            **{key: np.array([outcome[key] for outcome in outcomes]) for key in OUTCOMES},
            seed=seed + np.arange(episodes),
            act_s=act_s,
            eval_s=time.perf_counter() - started,
            actions=tuple(map(np.concatenate, actions)) if record else None,
            failed=int(self.failed.sum()) - failed,
        )

    def _begin(self, seeds: Mapping[int, int], active: list[int]) -> tuple[Any, dict[int, Failure]]:
        """Begin episodes; return the observations of the active environments, and those that failed."""
        self._workers.start("reset", seeds)
        _, failures = self._workers.finish()
        obs = to_tensors(tree_map(itemgetter(active), self._workers.observations))
        for row, why in find_faults(obs).items():
            if (i := active[row]) not in failures:
                failures[i] = Failure(why)
                self._workers.fail(i, failures[i])
        return obs, failures

    def close(self) -> None:
        """End the processes."""
        self._workers.close()

    def __enter__(self) -> "Simulators":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.close(kill=kind is not None)


def make_noise_generator(seed: int, episode: int) -> torch.Generator:
    """Return the source of one episode's noise; that of (s, e + 1) is not that of (s + 1, e)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, episode)).generate_state(1)[0]))


def to_tensors(observations: Any) -> Any:
    """Return observations as tensors, one or a mapping of them; images stay bytes, the rest is float32."""

    def tensor(column: np.ndarray) -> Tensor:
        return torch.from_numpy(column if column.dtype == np.uint8 else column.astype(np.float32))

    return tree_map(tensor, observations)


def find_faults(observations: Any) -> dict[int, str]:
    """Return the rows of observations that are not finite, and which entry of them is not."""
    faults: dict[int, str] = {}
    parts = observations if isinstance(observations, Mapping) else {"": observations}
    for key, column in parts.items():
        if column.is_floating_point():
            name = f"observation[{key!r}]" if key else "observation"
            said = f"expected a finite {name}, got NaN or infinity"
            faults |= {int(row): said for row in np.flatnonzero(~find_finite(column))}
    return faults


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
