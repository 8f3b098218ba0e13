"""What the experiments know of each OGBench task: data, settings of the protocol and of the demonstration."""

from dataclasses import dataclass, replace
from pathlib import Path

from qsteer.online.fmq import FMQTraining
from qsteer.online.settings import OnlineTraining
from qsteer.rules import Tweedie
from qsteer.training.critic import CriticTraining
from qsteer.training.maps import FlowMapTraining, MetaTraining
from qsteer.training.policy import PolicyTraining

NUMBERS = (1, 2, 3, 4, 5)
"""OGBench's numbers of the goals of every task."""
PLAIN = PolicyTraining(layer_norm=False)
"""The policies of the committed checkpoints and of the results, from before there was LayerNorm."""
META = MetaTraining(steps=8_000, learning_rate=3e-4, warmup=200, evaluate_every=1_000, checkpoint_every=1_000)
FLOW_MAP = FlowMapTraining(
    steps=8_000,
    learning_rate=1e-3,
    warmup=200,
    decay=8_000,
)
ONLINE = OnlineTraining(
    critic=CriticTraining(target="sarsa", ema=0.02), env_steps=60_000, updates_per_step=0.25, warmup=8_000
)


@dataclass(frozen=True)
class Task:
    """One OGBench environment with its data set and five goals, and how each experiment is set up on it.

    Attributes:
        name: key in :data:`TASKS`.
        data: OGBench's name of the data set, which all goals share.
        horizon: in the protocol, actions per chunk.
        gamma: in the protocol, discount per step.
        rho: in the protocol, pessimism of the critic, in standard deviations over its members.
        alpha: in the protocol, strength of the guidance, relative to the velocity's norm.
        sparse: in the protocol, the reward is -1 until the goal is reached, not minus the number of its unmet
            parts (``qsteer.envs.ogbench.make`` and ``load`` take it).
        large: the papers use OGBench's data set of 100 million transitions, not the standard one.
        tuning_tasks: numbers of the goals on which ``alpha`` was chosen; results on the others are held out.
        published: the settings of the protocol are the paper's (QPILOTS, table 2), not this project's for a
            quick experiment.
        arms: of the demonstration, see :func:`qsteer.evaluation.arms.parse`. Their strengths were chosen on
            the tuning seeds. Empty: there is no demonstration, and what follows is not used.
        transitions: in the demonstration, size of the training split; the validation split is a tenth.
        policy: in the demonstration, how to clone the behaviour.
        critic: in the demonstration, how to train the critic.
        meta: in the demonstration, how to distil the meta flow map.
        flow_map: in the demonstration, how to distil the flow map.
        fmq: in the demonstration, how to adapt the flow map to the critic.
        online: in the demonstration, how to learn a critic while it steers.
        map_hidden: in the demonstration, widths of both maps.
        camera: of the film; None: the environment's own.
        minutes: how long the demonstration takes from scratch on two cores, roughly.
    """

    name: str
    data: str
    horizon: int
    gamma: float
    rho: float
    alpha: float
    sparse: bool = False
    large: bool = False
    tuning_tasks: tuple[int, ...] = (2, 4)
    published: bool = True
    arms: tuple[str, ...] = ()
    transitions: int = 200_000
    policy: PolicyTraining = PolicyTraining()  # noqa: RUF009  # frozen, as are the next ones
    critic: CriticTraining = CriticTraining()  # noqa: RUF009
    meta: MetaTraining = META
    flow_map: FlowMapTraining = FLOW_MAP
    fmq: FMQTraining = FMQTraining()  # noqa: RUF009
    online: OnlineTraining = ONLINE
    map_hidden: tuple[int, ...] = (256, 256, 256)
    camera: str | None = None
    minutes: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.horizon < 1:
            raise ValueError(f"horizon: expected at least 1, got {self.horizon}")
        if not 0 < self.gamma < 1:
            raise ValueError(f"gamma: expected a number between 0 and 1, got {self.gamma}")
        for name in ("rho", "alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")

    @property
    def domain(self) -> str:
        """Its name in the protocol: key in :data:`qsteer.experiments.protocol.DOMAINS`."""
        return f"{self.name}-sparse" if self.sparse else self.name

    @property
    def rule(self) -> Tweedie:
        """QPILOTS-U; the other method of the paper is ``Posterior(task.alpha)`` with 8 samples."""
        return Tweedie(self.alpha)

    @property
    def data_path(self) -> Path:
        """Where the data goes unless said otherwise."""
        return Path("runs/data") / f"{self.data}.npz"

    def environment(self, number: int | None = None) -> str:
        """Return OGBench's name of the environment with one goal; None: the goal that it has by default.

        Raises:
            ValueError: there is no such goal.
        """
        if number not in (None, *NUMBERS):
            raise ValueError(f"number: expected the number of a task, 1 to 5, got {number}")
        data, _, version = self.data.rpartition("-")
        return f"{data}-singletask{'' if number is None else f'-task{number}'}-{version}"


TASKS = {
    task.name: task
    for task in (
        Task("antmaze-large", "antmaze-large-navigate-v0", 1, 0.99, 0.5, 0.2, tuning_tasks=(1, 4)),
        Task("antmaze-giant", "antmaze-giant-navigate-v0", 1, 0.995, 0.5, 0.3, tuning_tasks=(1, 4)),
        Task(
            "humanoidmaze-medium", "humanoidmaze-medium-navigate-v0", 1, 0.995, 0.0, 0.2, tuning_tasks=(1, 4)
        ),
        Task("humanoidmaze-large", "humanoidmaze-large-navigate-v0", 1, 0.995, 0.0, 0.2, tuning_tasks=(1, 4)),
        Task("cube-double", "cube-double-play-v0", 5, 0.99, 0.5, 0.3),
        Task("cube-triple", "cube-triple-play-v0", 5, 0.99, 0.5, 0.5),
        Task("cube-quadruple", "cube-quadruple-play-v0", 5, 0.99, 0.5, 0.5, large=True),
        Task(
            "scene",
            "scene-play-v0",
            5,
            0.99,
            0.5,
            0.2,
            sparse=True,
            arms=("base", "best-of-8", "qgf=0.06", "tweedie=0.2", "random-direction=0.2", "random-qgf=0.06"),
            transitions=300_000,
            policy=PLAIN,
            camera="front_pixels",
            minutes=40,
        ),
        Task("puzzle-3x3", "puzzle-3x3-play-v0", 5, 0.99, 0.5, 0.3, sparse=True),
        Task("puzzle-4x4", "puzzle-4x4-play-v0", 5, 0.99, 0.5, 2.0, sparse=True, large=True),
        Task(
            "cube-single",
            "cube-single-play-v0",
            5,
            0.99,
            0.5,
            0.2,
            tuning_tasks=(2,),
            published=False,
            arms=("base", "best-of-8", "qgf=0.06", "tweedie=0.2", "random-direction=0.2", "random-qgf=0.06"),
            policy=PLAIN,
            camera="front_pixels",
            minutes=25,
        ),
        Task(
            "pointmaze-medium",
            "pointmaze-medium-navigate-v0",
            5,
            0.99,
            0.5,
            0.3,
            tuning_tasks=(1,),
            published=False,
            arms=("base", "best-of-8", "qgf-matched=0.3", "tweedie=0.3", "random-direction=0.3"),
            policy=replace(PLAIN, steps=6_000, hidden=(64, 64, 64)),
            critic=CriticTraining(steps=15_000, hidden=(64, 64, 64), ema=0.05),
            online=replace(
                ONLINE,
                critic=CriticTraining(target="sarsa", ema=0.05, hidden=(64, 64, 64)),
                evaluate_every=10_000,
            ),
            minutes=4,
        ),
        Task(
            "pointmaze-large",
            "pointmaze-large-navigate-v0",
            5,
            0.99,
            0.5,
            0.3,
            tuning_tasks=(1,),
            published=False,
        ),
    )
}
"""The tasks of the papers, and three small ones which this project adds."""
RECIPES = {name: TASKS[name] for name in ("cube-single", "pointmaze-medium", "scene")}
"""The tasks with a demonstration."""


def run_directory(task: str, seed: int) -> Path:
    """Return where policy and critic of a training seed go unless said otherwise."""
    return Path("runs") / task / f"seed{seed}"
