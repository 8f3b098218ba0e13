"""A server learns to steer cube-single from the robots that it serves, from nothing.

    python examples/serve_learning.py --out runs/serve-learning

starts ``qsteer serve --learn`` with the frozen policy of this checkout, and robots in simulators of their
own, which know the server through :mod:`qsteer.client` and openpi-client alone. While the warm-up lasts the
frozen policy acts; then the critic that it has learnt from these robots begins to steer them. Run again, it
goes on. Needs ``qsteer[ogbench,serve,plots]`` and openpi-client.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np

from qsteer.evaluation.arms import describe_arm
from qsteer.evaluation.curves import Curve, plot_curves
from qsteer.statistics import wilson_interval

STATE = "observation.state"
CHECKPOINT = Path("examples/checkpoints/cube-single/policy")
TASK = "cube-single"


def main() -> None:
    """Serve, let the robots live, and draw what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", type=Path, default=CHECKPOINT)
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
    command = [sys.executable, "-m", "qsteer.cli", "serve", "--port", "0", "--policy", str(args.policy)]
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
    began = time.monotonic()
    context = get_context("spawn")
    queue, stop = context.Queue(), context.Event()
    bodies = [
        context.Process(target=robot, args=(port, args.seed + 1000 * i + len(former), args.hz, queue, stop))
        for i in range(args.robots)
    ]
    for body in bodies:
        body.start()
    while done < args.steps:
        try:
            episode = queue.get(timeout=10)
        except Empty:
            if not all(body.is_alive() for body in bodies):
                raise SystemExit("a robot has died; run this again to go on") from None
            continue
        done += episode["steps"]
        with episodes.open("a") as file:
            file.write(json.dumps({**episode, "at": done}) + "\n")
        rate = (done - before) / (time.monotonic() - began)
        print(f"{done} steps ({rate:.0f} a second): {'success' if episode['success'] else '-'}", flush=True)
    stop.set()
    for body in bodies:
        body.join(60)


def robot(port: int, seed: int, hz: float, queue: Any, stop: Any) -> None:
    """Live: in a process of its own."""
    os.environ.setdefault("MUJOCO_GL", "disabled")
    from qsteer.client import Client
    from qsteer.envs import ogbench
    from qsteer.experiments.tasks import TASKS

    env, client = ogbench.make(TASKS[TASK].environment()), Client(port=port)
    while not stop.is_set():
        observation, _ = env.reset(seed=seed)
        seed += 1
        over, steps, success, values, due = False, 0, False, [], time.monotonic()
        while not over:
            reply = client.infer({STATE: np.asarray(observation, np.float32)})
            values.append(reply["value"])
            rewards: list[float] = []
            done = truncated = False
            for action in reply["actions"]:
                time.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic() - 1.0) + 1 / hz
                observation, reward, done, truncated, info = env.step(np.clip(action, -1, 1))
                rewards.append(float(reward))
                success = success or bool(info["success"])
                if over := done or truncated:
                    break
            steps += len(rewards)
            client.outcome(rewards, done=done, truncated=truncated, success=success)
        queue.put({"steps": steps, "success": success, "value": float(np.mean(values))})


def summarise(args: argparse.Namespace, episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report: settings, and every episode with the steps of all robots at its end."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    ended = [[each["at"], each["success"]] for each in episodes]
    return {"task": TASK, "settings": settings, "episodes": ended}


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
