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
    parser.add_argument("--json", type=Path, help="where the figures go; default: OUT/learning.json")
    args = parser.parse_args()
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
    path.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, path.with_suffix(".png"))
    print(json.dumps({name: report[name] for name in ("frozen", "learnt")}), path)


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
    """Return success over steps, of the frozen policy, and of the last quarter."""
    at = np.array([each["at"] for each in episodes])
    success = np.array([each["success"] for each in episodes], float)
    bins = range(0, int(at[-1]) + 1, args.every)
    curve = [
        {
            "steps": low,
            "episodes": int(inside.sum()),
            "success": float(success[inside].mean()) if inside.any() else None,
        }
        for low in bins
        for inside in [(at > low) & (at <= low + args.every)]
    ]

    def rate(of: np.ndarray) -> dict[str, Any]:
        return {"episodes": int(of.sum()), "success": float(success[of].mean()) if of.any() else None}

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        "task": TASK,
        "settings": settings,
        "frozen": rate(at <= args.warmup),
        "learnt": rate(at > 0.75 * at[-1]),
        "curve": curve,
        "episodes": [{"at": int(a), "success": bool(s)} for a, s in zip(at, success, strict=True)],
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the curve."""
    from qsteer.plotting import CONTROL, MUTED, STEERED, STYLE, add_caption, add_title, load_pyplot, save

    plt = load_pyplot()
    known = [point for point in report["curve"] if point["success"] is not None]
    every, warmup = report["settings"]["every"], report["settings"]["warmup"]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
        add_title(axes, f"{report['task']}, served: success of the robots' episodes")
        axes.axvspan(0, warmup, color=CONTROL, alpha=0.1, linewidth=0)
        axes.axhline(report["frozen"]["success"], color=MUTED, linewidth=0.8)
        steps, rates = zip(*[(p["steps"] + every / 2, p["success"]) for p in known], strict=True)
        axes.plot(steps, rates, "o-", color=STEERED, linewidth=2, markersize=4)
        axes.set(xlabel="steps of all robots", ylim=(0, 1), xlim=(0, None))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        caption = (
            f"shaded: warm-up, the frozen policy; line: its mean. {report['settings']['robots']} robots, "
        )
        add_caption(fig, caption + f"{report['settings']['rule']}, points of {every} steps")
        save(fig, path)


if __name__ == "__main__":
    main()
