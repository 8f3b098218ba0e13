"""Updates of every learner, eager and compiled, in turns: time, and how far weights are apart.

``python benchmarks/learning/updates.py benchmarks/learning/updates.json``: networks of 256 x 3, batches of
256, four members, random data of the sizes of cube-single, on one thread and on two. A line takes a minute or
two to compile.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qsteer
from qsteer.data import Chunks, Episodes
from qsteer.files import write_json
from qsteer.maps import FlowMap, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.policies import FlowPolicy, FlowPolicyConfig
from qsteer.training import CriticTraining, FlowMapTraining, MetaTraining, PolicyTraining, StateTeacher
from qsteer.training.critic import ACTING, LEARNERS, fresh_critic
from qsteer.training.loop import Learner, Training, descend, differentiator
from qsteer.training.maps import FlowMapDistillation, MetaDistillation
from qsteer.training.policy import FlowMatching

OBS, ACTION, CHUNK, HIDDEN, ROWS = 28, 5, 5, (256, 256, 256), 20_000
COMPARED, ROUNDS, EACH = 20, 8, 10
NAMES = *LEARNERS, "policy", "meta", "flow"


def episodes() -> Episodes:
    """Return random episodes of 200 steps."""
    torch.manual_seed(0)
    ends = torch.arange(ROWS) % 200 == 199
    states = torch.randn(2, ROWS, OBS)
    return Episodes(
        observations=states[0],
        next_observations=states[1],
        actions=torch.rand(ROWS, ACTION) * 2 - 1,
        rewards=-torch.ones(ROWS),
        terminals=ends,
        ends=ends,
    )


def build(name: str, data: Episodes, compiled: bool) -> tuple[Learner, Training]:
    """Return a learner with its settings, always with the same weights."""
    torch.manual_seed(1)
    policy = FlowPolicy(FlowPolicyConfig(OBS, ACTION, CHUNK, HIDDEN))
    if name == "policy":
        cloning = PolicyTraining(compile=compiled)
        return FlowMatching(policy, Chunks(data, CHUNK, 1.0, "actions"), cloning.batch_size), cloning
    policy.requires_grad_(False)
    teacher = StateTeacher(policy, Chunks(data, CHUNK, 1.0, "actions"))
    if name == "meta":
        meta = MetaTraining(compile=compiled)
        config = MetaMapConfig(*teacher.sizes(), hidden=HIDDEN)
        return MetaDistillation(MetaFlowMap(config), teacher, meta), meta
    if name == "flow":
        curriculum = {"diagonal_steps": -1, "anneal_steps": 1}  # the full range at once
        flow = FlowMapTraining(distillation="eulerian", **curriculum, compile=compiled)
        shape = MapConfig(*teacher.sizes(), hidden=HIDDEN, residual=True)
        return FlowMapDistillation(FlowMap(shape), teacher, flow), flow
    settings, kind = CriticTraining(target=name, hidden=HIDDEN, compile=compiled), LEARNERS[name]
    critic = fresh_critic(settings.critic_config(OBS, ACTION), [0], data.observations)

    def act(critic: qsteer.Critic, obs: Tensor, noise: Tensor) -> Tensor:
        return qsteer.sample(policy.field(obs), critic.bind(obs), noise, rule=qsteer.QGF(weight=0.06))

    chunks = Chunks(data, CHUNK, settings.gamma, kind.need)
    return kind(critic, chunks, settings, act if name in ACTING else None), settings


class Updates:
    """A learner that is updated, and timed."""

    def __init__(self, name: str, data: Episodes, compiled: bool) -> None:
        self.learner, self.training = build(name, data, compiled)
        self.parameters = [p for p in self.learner.parameters() if p.requires_grad]
        self.optimizer = self.training.optimizer(self.parameters)
        self.differentiate = differentiator(self.learner, self.optimizer, self.training)
        self.generator = torch.Generator().manual_seed(0)
        self.step, self.wall, self.cpu = 0, [], []
        began = time.perf_counter()
        self.run(1)
        self.first_s = time.perf_counter() - began

    def run(self, count: int) -> None:
        """Make updates."""
        for _ in range(count):
            self.step += 1
            self.differentiate(self.generator)
            descend(self.learner, self.optimizer, self.training, self.step)

    def timed(self) -> None:
        """Make some updates and note what one took."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(EACH)
        self.wall.append((time.perf_counter() - wall) / EACH)
        self.cpu.append((time.process_time() - cpu) / EACH)

    def report(self) -> dict[str, float]:
        """Return medians over the rounds."""
        return {
            "updates_per_s": round(1 / float(np.median(self.wall)), 1),
            "cpu_ms": round(float(np.median(self.cpu)) * 1e3, 2),
            "least_cpu_ms": round(min(self.cpu) * 1e3, 2),
            "first_s": round(self.first_s, 1),
        }


def main() -> None:
    """Time each learner."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--learners", nargs="*", choices=NAMES, default=NAMES)
    args = parser.parse_args()
    data, found = episodes(), dict[str, Any]()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.learners:
            both = {word: Updates(name, data, word == "compiled") for word in ("eager", "compiled")}
            for each in both.values():
                each.run(COMPARED - 1)
            eager, compiled = (
                torch.cat([p.detach().flatten() for p in each.parameters]) for each in both.values()
            )
            off = ((eager - compiled).norm() / eager.norm()).item()
            for _ in range(ROUNDS):
                for each in both.values():
                    each.timed()
            row = {word: each.report() for word, each in both.items()}
            faster = row["compiled"]["updates_per_s"] / row["eager"]["updates_per_s"]
            row |= {"faster": round(faster, 2), f"weights_off_after_{COMPARED}": off}
            found.setdefault(name, {})[f"{threads} threads"] = row
            print(name, threads, row, flush=True)
            write_json({"torch": torch.__version__, "learners": found}, args.out)


if __name__ == "__main__":
    main()
