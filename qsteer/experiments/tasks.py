"""The settings of the demonstration tasks: data, training and steering, in one place."""

from dataclasses import dataclass, replace
from pathlib import Path

from qsteer.online.fmq import FMQTraining
from qsteer.online.settings import OnlineTraining
from qsteer.training.critic import CriticTraining
from qsteer.training.maps import FlowMapTraining, MetaTraining
from qsteer.training.policy import PolicyTraining

META = MetaTraining(steps=8_000, learning_rate=3e-4, warmup=200, evaluate_every=1_000, checkpoint_every=1_000)
FLOW_MAP = FlowMapTraining(
    steps=8_000,
    batch_size=128,
    distillation="lagrangian",
    diagonal_steps=1,
    anneal_steps=2_500,
    zero_share=0.5,
)
ONLINE = OnlineTraining(
    critic=CriticTraining(target="sarsa", ema=0.02), env_steps=60_000, updates_per_step=0.25, warmup=8_000
)


@dataclass(frozen=True)
class Recipe:
    """All that makes one demonstration.

    Attributes:
        task: OGBench's name of the task.
        data: OGBench's name of the data set.
        transitions: size of the training split; the validation split is a tenth.
        policy: how to clone the behaviour.
        critic: how to train the critic.
        meta: how to distil the meta flow map.
        flow_map: how to distil the flow map.
        fmq: how to adapt the flow map to the critic.
        online: how to learn a critic while it steers.
        map_hidden: widths of both maps.
        arms: the arms of the demonstration, see :func:`qsteer.evaluation.arms.parse`. Their strengths were
            chosen on the tuning seeds.
        camera: of the film; None: the environment's own.
        minutes: how long everything takes from scratch on two cores, roughly.
    """

    task: str
    data: str
    transitions: int
    policy: PolicyTraining
    critic: CriticTraining
    arms: tuple[str, ...]
    minutes: int
    meta: MetaTraining = META
    flow_map: FlowMapTraining = FLOW_MAP
    fmq: FMQTraining = FMQTraining()  # noqa: RUF009  # frozen
    online: OnlineTraining = ONLINE
    map_hidden: tuple[int, ...] = (256, 256, 256)
    camera: str | None = None

    @property
    def data_path(self) -> Path:
        """Where the data goes unless said otherwise."""
        return Path("runs/data") / f"{self.data}.npz"


CUBE_SINGLE = Recipe(
    task="cube-single-play-singletask-v0",
    data="cube-single-play-v0",
    transitions=200_000,
    policy=PolicyTraining(steps=30_000),
    critic=CriticTraining(steps=30_000),
    arms=("base", "best-of-8", "qgf=0.06", "tweedie=0.2", "random-direction=0.2"),
    minutes=25,
    camera="front_pixels",
)
POINTMAZE = Recipe(
    task="pointmaze-medium-navigate-singletask-v0",
    data="pointmaze-medium-navigate-v0",
    transitions=200_000,
    policy=PolicyTraining(steps=6_000, hidden=(64, 64, 64)),
    critic=CriticTraining(steps=15_000, hidden=(64, 64, 64), ema=0.05),
    online=replace(
        ONLINE,
        critic=CriticTraining(target="sarsa", ema=0.05, hidden=(64, 64, 64)),
        evaluate_every=10_000,
    ),
    arms=("base", "best-of-8", "qgf-matched=0.3", "tweedie=0.3", "random-direction=0.3"),
    minutes=4,
)
SCENE = Recipe(
    task="scene-play-singletask-v0",
    data="scene-play-v0",
    transitions=300_000,
    policy=PolicyTraining(steps=30_000),
    critic=CriticTraining(steps=30_000),
    arms=("base", "best-of-8", "qgf=0.06", "tweedie=0.2", "random-direction=0.2"),
    minutes=40,
    camera="front_pixels",
)
RECIPES = {"cube-single": CUBE_SINGLE, "pointmaze-medium": POINTMAZE, "scene": SCENE}


def run_directory(task: str, seed: int) -> Path:
    """Return where policy and critic of a training seed go unless said otherwise."""
    return Path("runs") / task / f"seed{seed}"


CHECKPOINTS = Path(__file__).parents[2] / "examples" / "checkpoints"
"""Where a checkout keeps the small policies and critics of the demonstration."""
