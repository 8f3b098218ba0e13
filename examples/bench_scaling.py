"""How many environments one learner's node can take: its parts measured, the whole predicted and measured.

    ray start --head --num-cpus 16
    OMP_NUM_THREADS=1 python examples/bench_scaling.py --ray auto --out scaling.json

Environments are dummies: as many numbers as the policy sees, and a step that sleeps (``--step-ms``), because
a simulator elsewhere takes no time of this node's cores. The policy is the cube-single checkpoint's, steered
by Tweedie; critic and learner are the recipe's. A round gives N rows, one of each environment:

    seconds of a round = act / H + send + store + max(simulate, learn + receive)

``act`` of N chunks, which last for H rounds; ``send`` of the commands and ``receive`` of answers that are
there; ``simulate`` until the last answer is there and received, during which the learner makes its N times
``--updates`` updates; ``store`` in the replay. Each part is measured alone, then the loop as a whole, in
turns (``--repeats``), of which the medians are taken; beside the seconds of the clock CPU time of the thread
that acts and learns, as a machine that others use wants it.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gymnasium
import numpy as np
import torch

import qsteer
from qsteer.critics import LiveCritic
from qsteer.envs.cluster import Cluster
from qsteer.experiments.tasks import RECIPES
from qsteer.files import write_json
from qsteer.online.actors import Decision, StateActor
from qsteer.online.collect import Collector
from qsteer.online.logs import LogWindow
from qsteer.online.loop import OnlineLoop
from qsteer.policies import FlowPolicy
from qsteer.training.critic import fresh_critic

CHECKPOINT = Path(__file__).parent / "checkpoints" / "cube-single" / "policy"
EPISODE = 200
MOST = 500
"""Updates of a chunk's rounds: where it would be more, the whole is not measured."""
BEYOND = (1, 4, 16, 64, 256, 1024)

type Parts = dict[str, float]


class Dummy(gymnasium.Env):
    """Observes its own clock; a step sleeps."""

    def __init__(self, obs_dim: int, action_dim: int, step_s: float) -> None:
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_dim,), np.float32)
        self.step_s, self.clock = step_s, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.clock, self.state = 0, self.np_random.normal(size=self.observation_space.shape)
        return self.state.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Sleep, and observe the next state."""
        time.sleep(self.step_s)
        self.clock += 1
        self.state = 0.9 * self.state + 0.1 * action.mean()
        return self.state.astype(np.float32), -1.0, False, self.clock >= EPISODE, {"success": False}


class Stopwatch:
    """Seconds of parts: of the clock, and of this thread's CPU."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)

    def time(self, name: str, call: Callable[[], Any], per: int = 1) -> Any:
        """Time a call that does ``per`` of what is counted."""
        wall, cpu = time.perf_counter(), time.thread_time()
        answer = call()
        self.cpu[name].append((time.thread_time() - cpu) / per)
        self.wall[name].append((time.perf_counter() - wall) / per)
        return answer

    def medians(self) -> tuple[Parts, Parts]:
        """Return those of the clock, and of the CPU."""
        return {k: median(v) for k, v in self.wall.items()}, {k: median(v) for k, v in self.cpu.items()}


def open_loop(out: Path, policy: FlowPolicy, num_envs: int) -> OnlineLoop:
    """Return the loop of the recipe with so many environments."""
    recipe = RECIPES["cube-single"].online
    shape = policy.config
    critic = LiveCritic(fresh_critic(recipe.critic.critic_config(shape.obs_dim, shape.action_dim), [0]))
    training = replace(recipe, num_envs=num_envs, warmup=0, env_steps=10**9, capacity=2_000)
    actor = StateActor([policy], critic)
    return OnlineLoop(actor, critic, out, training, qsteer.Tweedie(alpha=0.2), None, None, None)


def measure(
    policy: FlowPolicy, num_envs: int, updates: list[float], cluster: Cluster, step_s: float, repeats: int
) -> list[dict[str, Any]]:
    """Measure the parts at one size, and the whole for each number of updates per step."""
    shape = policy.config
    horizon, simulated = shape.horizon, step_s * cluster.envs_per_actor
    make_env = partial(Dummy, shape.obs_dim, shape.action_dim, step_s)
    parts, whole = Stopwatch(), Stopwatch()
    played = [many for many in updates if num_envs * many * horizon <= MOST]
    rounds = horizon if num_envs >= 16 else 4 * horizon
    with (
        tempfile.TemporaryDirectory() as out,
        Collector(make_env, horizon=horizon, num_envs=num_envs, cluster=cluster, closing=False) as collector,
    ):
        loop = open_loop(Path(out), policy, num_envs)
        window, lanes = LogWindow(0, 0), np.arange(num_envs)
        chunk = torch.zeros(num_envs, horizon, shape.action_dim)

        def idle(obs: torch.Tensor, asking: np.ndarray) -> Decision:
            return Decision(chunk[: len(asking)], chunk[: len(asking)], obs)

        while loop.replay.size() < 4 * num_envs or loop.env_steps < 300:
            loop.replay.add(collector.step(idle, loop.generator))
        loop.catch_up(20, window)  # the first ones settle the critic's inputs
        loop.steer()
        obs = torch.randn(num_envs, shape.obs_dim)
        for _ in range(repeats):
            for _ in range(horizon):
                parts.time("send", partial(collector.send, idle, loop.generator))
                rows = parts.time("simulate", collector.receive)
                parts.time("store", partial(loop.replay.add, rows))
                collector.send(idle, loop.generator)
                time.sleep(1.5 * simulated + 0.05)
                parts.time("receive", collector.receive)
            parts.time("act", partial(loop.act, obs, lanes))
            parts.time("update", partial(loop.catch_up, loop.update + 20, window), per=20)
            for many in played:
                whole.time(f"{many:g}", partial(play, loop, collector, window, many, rounds), per=rounds)
    (wall, cpu), (round_wall, round_cpu) = parts.medians(), whole.medians()
    size = {"num_envs": num_envs, "actors": -(-num_envs // cluster.envs_per_actor)}
    rows = []
    for many in played:
        seconds = predict(wall, num_envs, many, horizon)
        busy = predict(cpu | {"simulate": 0.0}, num_envs, many, horizon)
        compared = {
            "round": {"measured": round_wall[f"{many:g}"], "predicted": seconds},
            "round_cpu": {"measured": round_cpu[f"{many:g}"], "predicted": busy},
            "rows/s": {"measured": num_envs / round_wall[f"{many:g}"], "predicted": num_envs / seconds},
        }
        rows.append(size | {"updates_per_step": many, "seconds": wall, "cpu_seconds": cpu} | compared)
    return rows


def play(loop: OnlineLoop, collector: Collector, window: LogWindow, updates: float, rounds: int) -> None:
    """Do what the loop does in so many rounds, and make the updates that are due in them."""
    start, done = loop.env_steps, loop.update
    for _ in range(rounds):
        loop.steer()
        collector.send(loop.act, loop.generator)
        due = done + int((loop.env_steps - start + loop.training.num_envs) * updates)
        if due > loop.update:
            loop.catch_up(due, window)
        loop.replay.add(collector.receive())


def predict(parts: Parts, num_envs: int, updates_per_step: float, horizon: int) -> float:
    """Return the seconds of a round."""
    learn = num_envs * updates_per_step * parts["update"]
    meanwhile = max(parts["simulate"], learn + parts["receive"])
    return parts["act"] / horizon + parts["send"] + parts["store"] + meanwhile


def fit(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return CPU seconds of each part as a line in actors and environments; of an update, the median."""
    sizes = [[1.0, row["actors"], row["num_envs"]] for row in measured]
    lines = {}
    for name in ("send", "receive", "store", "act"):
        known = (0, 1, 2) if name in ("send", "receive") else (0, 2)
        table = np.array(sizes)[:, known]
        seconds = np.array([row["cpu_seconds"][name] for row in measured])
        weights = 1 / seconds  # relative errors
        found = np.linalg.lstsq(table * weights[:, None], seconds * weights, rcond=None)[0]
        lines[name] = dict(zip([("fixed", "actor", "env")[k] for k in known], found.tolist(), strict=True))
    lines["update"] = {"fixed": median(row["cpu_seconds"]["update"] for row in measured)}
    return lines


def extrapolate(
    lines: dict[str, dict[str, float]], num_envs: int, updates: float, horizon: int, step_s: float
) -> dict[str, Any]:
    """Predict what a free core takes against so many environments, each in an actor of its own."""
    counts = {"fixed": 1, "actor": num_envs, "env": num_envs}
    parts = {name: sum(counts[k] * v for k, v in line.items()) for name, line in lines.items()}
    seconds = predict(parts | {"simulate": step_s + parts["receive"]}, num_envs, updates, horizon)
    shares = {
        "act": parts["act"] / horizon,
        "messages": parts["send"] + parts["receive"],
        "store": parts["store"],
        "learn": num_envs * updates * parts["update"],
    }
    return {
        "num_envs": num_envs,
        "updates_per_step": updates,
        "step_s": step_s,
        "rows/s": num_envs / seconds,
        "shares": {name: share / seconds for name, share in shares.items()},
    }


def main() -> None:
    """Measure, predict, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ray", default="local", metavar="ADDRESS", help="auto, local or HOST:PORT")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="environments")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 4], help="that share the environments")
    parser.add_argument("--updates", type=float, nargs="+", default=[0.25, 1.0], help="per step")
    parser.add_argument("--step-ms", type=float, default=1.0, help="that a dummy's step sleeps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    policy = FlowPolicy.from_pretrained(CHECKPOINT).requires_grad_(False)
    measured = []
    print(
        f"{'envs':>5}{'actors':>7}{'updates':>8}{'rows/s':>9}{'predicted':>10}{'busy ms':>9}{'predicted':>10}"
    )
    for size in args.sizes:
        for actors in sorted({min(size, actors) for actors in args.actors}):
            cluster = Cluster(address=args.ray, envs_per_actor=-(-size // actors))
            for row in measure(policy, size, args.updates, cluster, args.step_ms / 1e3, args.repeats):
                measured.append(row)
                rate, busy = row["rows/s"].values(), [1e3 * ms for ms in row["round_cpu"].values()]
                shown = "".join(f"{number:>10.1f}" for number in (*rate, *busy))
                print(f"{size:>5}{actors:>7}{row['updates_per_step']:>8g}{shown}", flush=True)
    lines = fit(measured)
    beyond = [
        extrapolate(lines, size, updates, policy.config.horizon, step_s)
        for step_s in (0.001, 0.02)
        for updates in (0.0, *args.updates)
        for size in BEYOND
    ]
    print("\non a free core, an actor for each environment:")
    print(f"{'envs':>5}{'updates':>8}{'step ms':>8}{'rows/s':>9}")
    for row in beyond:
        print(
            f"{row['num_envs']:>5}{row['updates_per_step']:>8g}{1e3 * row['step_s']:>8g}{row['rows/s']:>9.0f}"
        )
    if args.out:
        settings = {"step_s": args.step_ms / 1e3, "repeats": args.repeats, "horizon": policy.config.horizon}
        command = " ".join(("python", *sys.argv))
        report = {"command": command, "settings": settings, "measured": measured}
        report |= {"lines": lines, "beyond": beyond}
        print(f"results: {write_json(report, args.out)}")


if __name__ == "__main__":
    main()
