"""The online run: simulators, the loop, and what is kept of them on disk."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from qsteer.critics.critic import Critic
from qsteer.critics.live import LiveCritic
from qsteer.data.episodes import Chunks
from qsteer.envs.limits import Limits
from qsteer.files import locked_run
from qsteer.online.actors import Actor
from qsteer.online.logs import Tracker
from qsteer.online.loop import OnlineLoop
from qsteer.online.settings import OnlineTraining
from qsteer.training.critic import ACTING, LEARNERS, SteeredPolicy
from qsteer.training.generators import seeded
from qsteer.training.loop import processes
from qsteer.training.policy import PolicyTraining
from qsteer.types import Rule, Sampler

if TYPE_CHECKING:  # need gymnasium
    from qsteer.envs.cluster import Cluster
    from qsteer.envs.rollouts import MakeEnv


def train_online(
    make_env: "MakeEnv",
    actor: Actor,
    critic: LiveCritic,
    out: str | Path,
    training: OnlineTraining | None = None,
    *,
    rule: Rule | None = None,
    sampler: Sampler | None = None,
    offline: Chunks | None = None,
    act: SteeredPolicy | None = None,
    start: str | Path | None = None,
    cloning: PolicyTraining | None = None,
    tracker: str | None = None,
    limits: Limits | None = None,
    cluster: "Cluster | None" = None,
    progress: bool = True,
) -> Critic:
    """Let a frozen policy act, learn a critic from what happens, and steer with it; return the critic.

    Simulators run in processes of their own, and the learner learns while they step: one round sends one row
    of actions to every environment, makes the gradient steps that are due, and only then waits. The learner's
    moving average is published to ``critic`` between actions.

    If ``critic`` is a stack of S critics, S seeds are trained at once, each with its own environments, rows,
    gradient clipping and metrics. They are well or ill together: one that diverges takes all of them back.

    ``out`` (of a stack, ``out/seedS`` for each) gets ``metrics.jsonl``, ``speed.jsonl`` and the critics
    ``last`` and ``best``, which ``Critic.from_pretrained`` reads; ``out`` itself the learner's checkpoint and
    the replay. The same call goes on after a kill at any moment: every row that was stored is there, the
    learner starts from its last checkpoint and catches up. Simulators cannot be stored, so episodes that were
    running are cut, and a resumed run is not the same to the bit; what the learner, rule and sampler draw
    goes on where the checkpoint was written. ``last`` and ``best`` are replaced as a whole. Whether a rule or
    sampler is the one that the run began with is told by its class, its fields and its networks' weights; a
    warning names what cannot be compared, such as a lambda.

    Rows with a reward or an observation that is not finite are refused, their episodes cut; the metrics
    count them as ``refused``. So are rows with a reward that only a sensor's mistake explains, see
    :class:`~qsteer.data.outliers.RewardScale`; ``outliers.jsonl`` lists them. So are the rows in which a
    simulator raises, gives what its spaces do not hold, hangs or dies; it is replaced, and counted as
    ``failed``.

    A critic that diverges does not act: see :class:`~qsteer.online.health.Health`. Until it has recovered,
    the unsteered policy acts.

    Args:
        make_env: makes one environment, see :class:`~qsteer.envs.rollouts.Simulators`.
        actor: the frozen policy with ``critic``.
        critic: on the policy's device; the learner starts from a copy.
        out: run directory.
        training: how; defaults to ``OnlineTraining()``.
        rule: how the critic bends the policy's field; None: not at all.
        sampler: how the field becomes an action; None: the policy's own.
        offline: data to mix in.
        act: for the targets "td" and "fql", see :func:`~qsteer.training.critic.train_critic`.
        start: run directory of :func:`~qsteer.training.critic.train_critic`, with the same target and sizes:
            its learner goes on, with what is no part of a critic, such as IQL's V.
        cloning: the policies go on cloning with these settings, one step beside each of the critic's, on the
            same data; what acts are their moving averages (with the critic's ``ema``), which change in place
            and are kept as ``policy`` beside the critics. For an eager :class:`StateActor` with a policy for
            each seed. None: they stay frozen.
        tracker: name of a tracker of accelerate that gets the metrics too: tensorboard, wandb, trackio, ...
        limits: of the simulators' time and failures, which a resumed run may change; None: ``Limits()``.
        cluster: of Ray, on whose nodes the simulators run while policy and learner stay here; a resumed run
            may change it; None: on this machine.
        progress: show a progress bar.

    Raises:
        ValueError: ``out`` holds a run with other settings, ``act`` is missing or superfluous, the shapes of
            policy, critic and rows do not fit, rewards of ``offline`` are outliers, or the cluster
            has too few cores, or the actor cannot go on cloning.
        FileNotFoundError: ``start`` holds no run.
        ConnectionError: there is no such cluster.
        RuntimeError: a simulator failed too often in a row, or another run has ``out`` open.
        OSError: the disk has no room for the rows.
        ModuleNotFoundError: the tracker is not installed.
    """
    training = training or OnlineTraining()
    if (act is None) == (training.critic.target in ACTING):
        raise ValueError(
            f"train_online: expected act= when target is one of {ACTING} and only then, got act={act} with "
            f"target {training.critic.target!r}"
        )
    begun = None if start is None else Path(start)
    processes(critic.device)
    with locked_run(Path(out)), seeded(training.critic.seed, critic.device):
        loop = OnlineLoop(actor, critic, Path(out), training, rule, sampler, offline, act, begun, cloning)
        with closing(loop.replay):
            _train(loop, make_env, limits, cluster, tracker, progress)
    return loop.learner.target


def _train(
    loop: OnlineLoop,
    make_env: "MakeEnv",
    limits: Limits | None,
    cluster: "Cluster | None",
    tracker: str | None,
    progress: bool,
) -> None:
    """Do what is left to do of a run."""
    from qsteer.online.collect import Collector

    if loop.finished:
        loop.save_critics()  # which a kill may have prevented
        return
    training, config = loop.training, loop.live.config
    with (
        Collector(
            make_env,
            horizon=config.horizon,
            num_envs=config.stack * training.num_envs,
            row=training.row,
            gamma=training.critic.gamma,
            closing=LEARNERS[training.critic.target].need == "next_state",
            limits=limits,
            cluster=cluster,
            scale=loop.health.scale if training.refuse_outliers else None,
        ) as collector,
        closing(Tracker(tracker, loop.out)) as log,
        tqdm(
            total=training.env_steps, initial=loop.env_steps, desc=loop.out.name, disable=not progress
        ) as bar,
    ):
        loop.run(collector, log, bar)
