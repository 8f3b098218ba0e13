"""What the parts of `qsteer libero` take: simulators of all tasks, recorded batches and what is run on them.

``python benchmarks/libero/parts.py runs/libero-parts --assets FOLDER``, on one thread: for every task
building and resetting, then random walks of chunks of 10 with frames of 256 pixels at decisions; on the
recorded batches of a tiny random pi0.5 a distillation of a meta flow map (left in ``meta/`` for ``--maps``),
an audit of an untrained critic, and actions of every arm.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import qsteer
from qsteer.bench.timing import time_calls
from qsteer.data import SafetensorsBatches
from qsteer.envs import libero
from qsteer.evaluation.arms import Maps
from qsteer.experiments.libero import Table3, make_arm, record_walk
from qsteer.experiments.libero_policy import HORIZON, open_frozen
from qsteer.files import write_json
from qsteer.maps import MetaFlowMap, MetaMapConfig
from qsteer.training import HostTeacher, MetaTraining, distil
from qsteer.training.critic import fresh_critic
from qsteer.training.loop import METRICS

ARMS = ("base", "tweedie=0.2", "qgf-matched=0.2", "posterior=0.2", "best-of-5", "random-direction=0.2")


def simulate(task: int, assets: Path, size: int, chunks: int) -> dict[str, float]:
    """Return seconds to the first observation, seconds of a further reset, and steps per second."""
    begun = time.perf_counter()
    env = libero.make(task, size=size, assets=assets)
    env.reset(seed=0)
    built = time.perf_counter()
    first, _ = env.reset(seed=1)
    reset = time.perf_counter()
    draw = np.random.default_rng(0)
    for _ in range(chunks):
        for k in range(HORIZON):
            env.cameras(k == HORIZON - 1)
            seen, *_ = env.step(draw.uniform(-1, 1, 7).astype(np.float32))
    done = time.perf_counter()
    moved = {key: float(np.abs(seen[key] - first[key].astype(float)).mean()) for key in seen}
    shown = {key: float(seen[key].std()) for key in libero.VIEWS}
    env.close()
    if min(shown.values()) < 5 or moved[libero.STATE] == 0:
        raise RuntimeError(f"task {task}: expected pictures and a robot that moves, got {shown}, {moved}")
    return {
        "build_s": built - begun,
        "reset_s": reset - built,
        "steps_per_s": chunks * HORIZON / (done - reset),
        "contrast": min(shown.values()),
    }


def main() -> None:
    """Measure, and write ``parts.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="recorded of each task")
    parser.add_argument("--chunks", type=int, default=5, help="of a walk that is timed")
    parser.add_argument("--steps", type=int, default=100, help="of the distillation")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, object] = {"size": args.size, "tasks": {}}
    tasks = {task: simulate(task, args.assets, args.size, args.chunks) for task in libero.TASKS}
    report["tasks"] = tasks

    frozen = open_frozen("random")
    begun = time.perf_counter()
    for task in libero.TASKS:
        make_env = partial(libero.make, task, size=args.size, assets=args.assets)
        folder = record_walk(make_env, frozen.preprocess, args.out / f"task{task}", rows=args.rows)
        for file in sorted(folder.glob("*.safetensors")):
            target = args.out / "batches" / f"task{task}-{file.name}"
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
    batches = SafetensorsBatches(args.out / "batches")
    report["recording"] = {"rows": len(batches), "seconds": time.perf_counter() - begun}

    teacher = HostTeacher(frozen.policy, batches)
    torch.manual_seed(0)
    meta = MetaFlowMap(MetaMapConfig(*teacher.sizes(), width=32, depth=2, heads=2))
    training = MetaTraining(
        steps=args.steps, batch_size=4, learning_rate=1e-3, warmup=10, log_every=10, evaluate_every=10
    )
    begun = time.perf_counter()
    meta = distil(meta, teacher, args.out / "meta", training).requires_grad_(False).eval()
    losses = [json.loads(line)["loss"] for line in (args.out / "meta" / METRICS).read_text().splitlines()]
    report["distillation"] = {
        "steps": args.steps,
        "seconds": time.perf_counter() - begun,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }

    critic = fresh_critic(Table3().critic(8, 7), [0]).requires_grad_(False).eval()
    host = [{**batches.rows([i])} for i in range(min(len(batches), 12))]
    begun = time.perf_counter()
    found = qsteer.audit(frozen.policy, critic, host, samples=4)
    report["audit"] = {"states": len(host), "seconds": time.perf_counter() - begun, "status": found.status}

    opened = qsteer.open_action(frozen.policy, host[0], critic)
    maps = Maps(meta=meta)
    calls = {}
    for spec in ARMS:
        arm = make_arm(spec, maps)
        calls[spec] = partial(
            qsteer.sample, opened.field, opened.value, opened.noise, rule=arm.rule, sampler=arm.sampler
        )
    times = time_calls(calls, repeats=7)
    report["actions"] = {
        spec: {"ms": times[spec].p50, "ratio": times[spec].ratio(times["base"])} for spec in ARMS
    }
    print(write_json(report, args.out / "parts.json"))


if __name__ == "__main__":
    main()
