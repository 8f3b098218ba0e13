"""A server learns to steer a policy from the robots that it serves, from nothing.

    python examples/serve_learning.py --out runs/serve-learning
    python examples/serve_learning.py --task push-v3 --robots 8 --out runs/serve-push

starts ``qsteer serve --learn`` with a frozen policy of this checkout, and robots in simulators of their own,
which know the server through :mod:`qsteer.client` and openpi-client alone. While the warm-up lasts the frozen
policy acts; then the critic that it has learnt from these robots begins to steer them. Run again, it goes on.
Needs ``qsteer[serve,plots]``, openpi-client, and ``qsteer[ogbench]`` or, for push-v3, ``qsteer[metaworld]``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Lock
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from qsteer.evaluation.arms import describe_arm
from qsteer.evaluation.curves import Curve, plot_curves
from qsteer.statistics import wilson_interval

STATE = "observation.state"
ONE = Lock()
"""Held while a simulator is made or reset: MetaWorld draws from numpy's global generator."""


class World(NamedTuple):
    """A task: its policy, what makes a simulator, what a request is, and options of the server."""

    policy: str
    make: Callable[[], gymnasium.Env]
    ask: Callable[[Any], dict[str, Any]]
    options: tuple[str, ...] = ()


def make_cube() -> gymnasium.Env:
    """Return OGBench's simulator."""
    from qsteer.envs import ogbench
    from qsteer.experiments.tasks import TASKS

    return ogbench.make(TASKS["cube-single"].environment())


def make_push() -> gymnasium.Env:
    """Return MetaWorld's."""
    from qsteer.envs.metaworld.world import LightWorld

    return LightWorld("push-v3")


def ask_cube(seen: Any) -> dict[str, Any]:
    """Return a request."""
    return {STATE: np.asarray(seen, np.float32)}


def ask_push(seen: Any) -> dict[str, Any]:
    """Return a request, with the task in words."""
    return {
        STATE: seen["agent_pos"],
        "observation.image": seen["pixels"],
        "prompt": "Push the puck to a goal",
    }


WORLDS = {
    "cube-single": World("examples/checkpoints/cube-single/policy", make_cube, ask_cube),
    "push-v3": World(
        "examples/checkpoints/metaworld/policy",
        make_push,
        ask_push,
        ("--features", "--plugin", "qsteer.envs.metaworld"),
    ),
}


def main() -> None:
    """Serve, let the robots live, and draw what came of it."""
    os.environ.setdefault("MUJOCO_GL", "disabled")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(WORLDS), default="cube-single")
    parser.add_argument("--policy", type=Path, help="default: the task's in this checkout")
    parser.add_argument("--rule", default="best-of-8", help="how the critic steers, see qsteer evaluate")
    parser.add_argument("--robots", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30_000, help="of all robots together")
    parser.add_argument("--warmup", type=int, default=6_000, help="unsteered steps at first")
    parser.add_argument("--updates-per-step", type=float, default=0.25)
    parser.add_argument("--hz", type=float, default=10.0, help="steps a second of each robot, as real ones")
    parser.add_argument("--every", type=int, default=2_000, help="steps of a point of the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/serve-learning"))
    parser.add_argument("--json", type=Path, help="where the report goes; default: OUT/learning.json")
    parser.add_argument("--draw", nargs="+", type=Path, metavar="JSON", help="draw reports, and nothing else")
    parser.add_argument("--plot", type=Path, help="the picture; default: OUT/learning.png")
    args = parser.parse_args()
    picture = args.plot or args.out / "learning.png"
    if args.draw:
        reports = [json.loads(path.read_text()) for path in args.draw]
        print(describe(reports), draw(reports, picture), sep="\n")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    episodes = args.out / "episodes.jsonl"
    server, port = serve(args)
    try:
        live(args, port, episodes)
    finally:
        server.terminate()
        server.wait(60)
    report = summarise(args, [json.loads(line) for line in episodes.open()])
    path = args.json or args.out / "learning.json"
    path.write_text(json.dumps(report) + "\n")
    print(describe([report]), path, draw([report], picture), sep="\n")


def serve(args: argparse.Namespace) -> tuple[subprocess.Popen, int]:
    """Start the server; return it, and its port."""
    command = [sys.executable, "-m", "qsteer.cli", "serve", "--port", "0"]
    command += ["--policy", str(args.policy or WORLDS[args.task].policy), *WORLDS[args.task].options]
    command += ["--rule", args.rule, "--learn", str(args.out / "run"), "--robots", str(args.robots)]
    command += ["--warmup", str(args.warmup), "--updates-per-step", str(args.updates_per_step)]
    command += ["--ema", "0.02", "--seed", str(args.seed)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("listening: "):
            return server, int(line.rsplit(":", 1)[1])
    raise SystemExit("the server did not start")


def live(args: argparse.Namespace, port: int, episodes: Path) -> None:
    """Let the robots act until the steps are used up; write a line for each of their episodes."""
    former = [json.loads(line) for line in episodes.open()] if episodes.exists() else []
    done = before = sum(line["steps"] for line in former)
    began, queue, stop = time.monotonic(), Queue[dict[str, Any]](), Event()
    seeds = [args.seed * 100_000 + i * 1_000 + len(former) for i in range(args.robots)]
    with ThreadPoolExecutor(args.robots) as pool:
        robots = [pool.submit(robot, args, port, seed, queue, stop) for seed in seeds]
        try:
            while done < args.steps:
                try:
                    episode = queue.get(timeout=10)
                except Empty:
                    for each in robots:
                        if each.done():
                            each.result()
                    continue
                done += episode["steps"]
                with episodes.open("a") as file:
                    file.write(json.dumps({**episode, "at": done}) + "\n")
                rate = (done - before) / (time.monotonic() - began)
                success = "success" if episode["success"] else "-"
                print(f"{done} steps ({rate:.0f} a second): {success}", flush=True)
        finally:
            stop.set()


def robot(args: argparse.Namespace, port: int, seed: int, queue: Queue[dict[str, Any]], stop: Event) -> None:
    """Live, in a simulator of its own, until told to stop."""
    from qsteer.client import Client

    with ONE:
        world, client, ask = WORLDS[args.task].make(), Client(port=port), WORLDS[args.task].ask
    while not stop.is_set():
        with ONE:
            seen, _ = world.reset(seed=seed)
        seed += 1
        over, steps, success, values, due = False, 0, False, [], time.monotonic()
        while not over:
            reply = client.infer(ask(seen))
            values.append(reply["value"])
            rewards: list[float] = []
            done = truncated = False
            for action in reply["actions"]:
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic() - 1.0) + 1 / args.hz
                seen, reward, done, truncated, info = world.step(np.clip(action, -1, 1))
                rewards.append(float(reward))
                success = success or bool(info.get("success", info.get("is_success")))
                if over := done or truncated:
                    break
            steps += len(rewards)
            client.outcome(rewards, done=done, truncated=truncated, success=success)
        queue.put({"steps": steps, "success": success, "value": float(np.mean(values))})


def summarise(args: argparse.Namespace, episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report: settings, and every episode with the steps of all robots at its end."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    ended = [[each["at"], each["success"]] for each in episodes]
    return {"task": args.task, "settings": settings, "episodes": ended}


def describe(reports: Sequence[dict[str, Any]]) -> str:
    """Return how often the frozen policy of the warm-up succeeded, and the robots in the last quarter."""
    frozen, last = [], []
    for report in reports:
        steps, warmup = report["episodes"][-1][0], report["settings"]["warmup"]
        frozen += [success for at, success in report["episodes"] if at <= warmup]
        last += [success for at, success in report["episodes"] if at > 0.75 * steps]
    parts = []
    for name, found in (("frozen", frozen), ("last quarter", last)):
        low, high = wilson_interval(sum(found), len(found))
        rate = f"{sum(found) / len(found):.0%} ({low:.0%} to {high:.0%}) of {len(found)} episodes"
        parts.append(f"{name}: {rate}")
    return "; ".join(parts)


def draw(reports: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw success over the steps of all robots, a run a line."""
    curves, levels = [], []
    for report in reports:
        at, success = np.array(report["episodes"], float).T
        every, warmup = report["settings"]["every"], report["settings"]["warmup"]
        bins = np.ceil(at / every)
        whole = [number for number in np.unique(bins) if number * every <= at[-1]]
        rates = [success[bins == number].mean() for number in whole]
        curves.append(Curve(np.array(whole) * every, np.array(rates)))
        levels += success[at <= warmup].tolist()
    name = f"{describe_arm(reports[0]['settings']['rule'])}, learnt from the robots"
    return plot_curves({name: curves}, path, levels={"the frozen policy": float(np.mean(levels))})


if __name__ == "__main__":
    main()
