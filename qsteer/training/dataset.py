"""From a LeRobotDataset and a lerobot policy to a critic: read, split, train, rank what was held out."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from tqdm import tqdm

from qsteer.adapters import contract_of, host_of
from qsteer.auditing.ranking import correlate
from qsteer.contract import Contract
from qsteer.critics.critic import Critic
from qsteer.critics.encoders import FEATURES
from qsteer.data.exchange import ACTION, REWARD, fill
from qsteer.data.layout import Layout, infer_columns
from qsteer.data.lerobot import Rewards, Seen
from qsteer.data.replay import Replay
from qsteer.files import read_json, write_json
from qsteer.fingerprints import tensor_bytes
from qsteer.steering.checks import check_executed
from qsteer.training.critic import ACTING, LEARNERS, CriticTraining, fresh_critic
from qsteer.training.loop import fit

HELD_OUT = 10
"""One of so many episodes is held out."""
PARTS = "train", "held"
RANKED = 4096
"""Most chunks whose values are compared with returns."""


@dataclass(frozen=True)
class Ranking:
    """How values of held-out chunks compare with what came of them.

    Attributes:
        episodes: held out.
        chunks: of them.
        returns: rank correlation of Q(s, a) with the discounted returns, in [-1, 1], and its 95 % interval
            (bootstrap over chunks: those of one episode are not independent, so it is too narrow).
        preference: share of chunks preferred to one of another state, in [0, 1]; 0.5: blind to actions.
    """

    episodes: int
    chunks: int
    returns: tuple[float, float, float]
    preference: float

    def __str__(self) -> str:
        """Return a line."""
        value, low, high = self.returns
        return (
            f"held out: {self.chunks} chunks of {self.episodes} episodes; rank correlation of values and "
            f"returns {value:.2f} ({low:.2f} to {high:.2f}); prefers the recorded chunk to another state's "
            f"in {self.preference:.0%}"
        )


def train_from_dataset(
    dataset: Any,
    policy: Any,
    preprocessor: Any,
    out: str | Path,
    training: CriticTraining | None = None,
    *,
    views: Sequence[str] = (),
    features: bool = False,
    rewards: Rewards | None = None,
    failures: Sequence[int] = (),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Critic, Ranking | None]:
    """Train a critic of a lerobot policy on a LeRobotDataset; ``Critic.from_pretrained`` reads it in ``out``.

    A tenth of the episodes is held out and ranked at the end. A run that was interrupted goes on from its
    last checkpoint. What the critic sees is kept in ``out/data``, and read from there when the same command
    runs again.

    Cost: one pass over the dataset, see :class:`~qsteer.data.lerobot.Seen`; then that of the training.

    Args:
        dataset: a LeRobotDataset.
        policy: a lerobot policy; the critic sees its model space, and keeps its contract.
        preprocessor: the policy's own, with the statistics that it was trained with.
        out: run directory.
        training: how to train; its ``horizon`` is the policy's ``n_action_steps``.
        views: keys of the images that the critic sees beside the state.
        features: let it see the policy's pooled features, which know the instruction.
        rewards: the dataset's own, or "sparse"; see :class:`~qsteer.data.lerobot.Seen`.
        failures: numbers of episodes that failed, where no column says so.
        device: where to train; the policy stays where it is.
        progress: show progress bars.

    Returns:
        The critic, and how it ranks what was held out; None: nothing was.

    Raises:
        KeyError: the dataset lacks a column.
        ValueError: the target needs a policy's actions, ``out`` holds another run, or the data are not of
            such a policy.
    """
    out, training = Path(out), training or CriticTraining()
    if training.target in ACTING:
        raise ValueError(
            f"target: expected one of {sorted(set(LEARNERS) - set(ACTING))}, got {training.target!r}, which "
            "asks the policy at each update; train it with train_critic(act=...) on Episodes"
        )
    check_executed(training.horizon, policy, host_of(policy))
    seen = Seen(
        dataset,
        policy,
        preprocessor,
        training.observation_key,
        views,
        features=features,
        rewards=rewards,
        failures=failures,
    )
    _warn_of_tasks(seen)
    data, held = read_replays(seen, out / "data", training, device, progress)
    try:
        if not data.ready():
            raise ValueError(
                f"dataset: expected episodes of more than {data.layout.span} steps, for target "
                f"{training.target!r} and horizon {training.horizon}, got at most {max(seen.lengths())}; "
                "lower the horizon"
            )
        found = _Summary.of(data, training.observation_key)
        _warn_of_rewards(seen, found)

        config = training.critic_config(found.states.shape[1], found.actions.shape[1])
        sizes = {key: column.shape[1] for key, column in found.inputs.items()}
        config = replace(config, views=tuple(views), features=sizes.get(FEATURES, 0))
        policy_contract = replace(contract_of(policy), horizon=training.horizon)
        config = replace(config, contract=training.contract(config, found.contract, policy_contract))
        with torch.random.fork_rng(devices=[]):
            critic = fresh_critic(config, [training.seed], found.inputs)
            learner = LEARNERS[training.target](critic.to(device), data, training).to(device)
        identity = training.describe() | {"data": found.digest, "inputs": list(config.keys)}
        fit(learner, out, training, identity, progress=progress)
        learner.target.eval().save_pretrained(out)
        ranking = rank(learner.target, held, training.seed)
    finally:
        data.close()
        held.close()
    if ranking is not None:
        write_json(asdict(ranking), out / "ranking.json")
    return learner.target, ranking


def read_replays(
    seen: Seen, directory: Path, training: CriticTraining, device: torch.device | str, progress: bool
) -> tuple[Replay, Replay]:
    """Read the dataset into two replays on the disk, once: what is learnt from, and what is held out.

    Raises:
        ValueError: the directory holds other data, or no episode is long enough.
    """
    need = LEARNERS[training.target].need
    own = {"horizon": training.horizon, "gamma": training.gamma, "need": need}
    source = json.loads(json.dumps(seen.describe() | own))
    marker = directory / "source.json"
    if marker.is_file():
        kept = read_json(marker)
        if differing := [key for key in source if kept["source"].get(key) != source[key]]:
            raise ValueError(
                f"{directory}: expected data read from this dataset for this policy, got another "
                f"{', '.join(differing)}; use another run directory, or delete this one"
            )
        train, held = (
            Replay(_read_layout(kept[name]), directory=directory / name, device=where)
            for name, where in zip(PARTS, (device, "cpu"), strict=True)
        )
        return train, held
    for name in PARTS:  # of a pass that was interrupted
        shutil.rmtree(directory / name, ignore_errors=True)
    lengths = seen.lengths()
    out_of = hold_out(len(lengths))
    episodes = seen.trajectories()
    first = next(episodes)
    replays = [
        Replay(
            Layout(
                observations=infer_columns(first.observations),
                action_dim=first.actions.shape[2],
                horizon=training.horizon,
                gamma=training.gamma,
                need=needed,
                capacity=2 * training.horizon
                + sum(length + 1 for length, out in zip(lengths, out_of, strict=True) if out == is_held),
            ),
            directory=directory / name,
            device="cpu" if is_held else device,
        )
        for name, is_held, needed in zip(PARTS, (False, True), (need, "returns"), strict=True)
    ]
    bar = tqdm(chain([first], episodes), "reading", len(lengths), unit="episode", disable=not progress)
    for out, trajectory in zip(out_of, bar, strict=True):
        fill(replays[out], [trajectory])
    for replay in replays:
        replay.flush()
    layouts = {name: asdict(replay.layout) for name, replay in zip(PARTS, replays, strict=True)}
    write_json({"source": source} | layouts, marker)
    return replays[0], replays[1]


def _read_layout(kept: dict[str, Any]) -> Layout:
    columns = {key: (tuple(shape), dtype) for key, (shape, dtype) in kept["observations"].items()}
    return Layout(**{**kept, "observations": columns})


def hold_out(episodes: int) -> list[bool]:
    """Return which of so many episodes are held out: a tenth, one at least of several, always the same."""
    draw = torch.randperm(episodes, generator=torch.Generator().manual_seed(0)).tolist()
    held = set(draw[: max(1, episodes // HELD_OUT)]) if episodes > 1 else set()
    return [i in held for i in range(episodes)]


@dataclass(frozen=True)
class _Summary:
    """What must be known of the data that are learnt from."""

    states: Tensor
    actions: Tensor
    inputs: dict[str, Tensor]
    rewards: Tensor
    episodes: int
    succeeded: int
    digest: str

    @classmethod
    def of(cls, data: Replay, state: str) -> "_Summary":
        """Read all of it once."""
        digest, succeeded = sha256(), 0
        columns: dict[str, list[Tensor]] = {}
        episodes = 0
        for trajectory in data.trajectories():
            episodes += 1
            seen = dict(trajectory.observations)
            own = {ACTION: trajectory.actions[:, 0], REWARD: trajectory.rewards}
            for key, column in sorted((seen | own).items()):
                digest.update(f"{key} {tuple(column.shape)} {trajectory.terminal}".encode())
                digest.update(tensor_bytes(column))
                if column.dtype == torch.float32:
                    columns.setdefault(key, []).append(column.cpu())
            succeeded += trajectory.terminal
        joined = {key: torch.cat(parts) for key, parts in columns.items()}
        actions, rewards = joined.pop(ACTION), joined.pop(REWARD)
        return cls(joined[state], actions, joined, rewards, episodes, succeeded, digest.hexdigest()[:16])

    @property
    def contract(self) -> Contract:
        """Scale of the states, and range of the actions."""
        std, mean = torch.std_mean(self.states.double(), dim=0, correction=0)
        low, high = self.actions.aminmax(dim=0)
        return Contract(
            observation_mean=mean.tolist(),
            observation_std=std.clamp(min=0.01).tolist(),
            action_low=low.tolist(),
            action_high=high.tolist(),
        )


@torch.no_grad()
def rank(critic: Critic, held: Replay, seed: int = 0) -> Ranking | None:
    """Compare values of held-out chunks with their returns; None: there are fewer than two.

    Cost: two passes of the critic on at most 4,096 chunks.
    """
    starts = held.starts
    if len(starts) < 2:
        return None
    draw = torch.Generator().manual_seed(seed)
    starts = starts[torch.randperm(len(starts), generator=draw)[:RANKED]]
    device = next(critic.parameters()).device
    values, others, returns = [], [], []
    for rows in starts.split(256):
        drawn = held.gather(rows)
        value = critic.bind(tree_map(lambda column: column.to(device), drawn.observations))
        chunks = drawn.actions.to(device)
        values.append(value(chunks).cpu())
        others.append(value(chunks.roll(1, 0)).cpu())
        returns.append(cast(Tensor, drawn.returns))  # promised by the layout
    q, other, came = (torch.cat(parts).double() for parts in (values, others, returns))
    preference = ((q > other).double() + 0.5 * (q == other).double()).mean().item()
    episodes = sum(1 for _ in held.trajectories())
    return Ranking(episodes, len(q), correlate(q, came, draw), preference)


def _warn_of_tasks(seen: Seen) -> None:
    """Warn where the critic cannot know which of several tasks is meant."""
    if not seen.features and len(tasks := seen.tasks) > 1:
        _warn(
            f"dataset: expected one task, or a critic that sees the instruction, got {len(tasks)} tasks "
            f"({', '.join(map(repr, tasks[:3]))}) and none; add the policy's features (--features), which "
            "know it, or train a critic for each task"
        )


def _warn_of_rewards(seen: Seen, found: _Summary) -> None:
    """Warn of data in which no action is better than another."""
    if seen.relabelled and found.succeeded == found.episodes:
        _warn(
            f"dataset: expected episodes that fail among the {found.episodes}, got none; a critic of "
            "successes alone hardly tells actions apart, and steering by it does nothing: record failures, "
            "mark them (next.success, or --failures), and look at qsteer audit"
        )
    if bool((found.rewards == found.rewards[0]).all()):
        _warn(
            f"dataset: expected rewards that differ, got {found.rewards[0]:.4g} in every frame; values then "
            "say no more than how long an episode is: relabel them with --rewards sparse"
        )


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, skip_file_prefixes=(str(Path(__file__).parent),))
