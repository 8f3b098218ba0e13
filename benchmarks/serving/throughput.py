"""Requests per second and their latency for 1 to 16 robots: waiting requests in one call, and one at a time.

python benchmarks/serving/throughput.py OUT [--policies cube-single metaworld] [--robots 1 2 4 8 16]

From the root of the checkout, for the checkpoints of the examples name each other from there. Robots live in
a process of their own and ask again as soon as they are answered. Both servers act by the same policy in this
process, on one thread of torch; every round asks both, one after the other, so that ratios are of one run.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsteer.files import write_json
from qsteer.serving import BatchLimits, Served, Server, ServerLimits, open_served
from qsteer.serving.codec import pack

FOLDER = Path("examples/checkpoints")
RULES = {"cube-single": "tweedie=0.2", "metaworld": "tweedie-raw=1"}
BATCH = 16
ROBOTS = """
import asyncio, json, sys, time
from websockets.asyncio.client import connect

async def live(port, message, ready, until, found):
    address = f"ws://127.0.0.1:{port}"
    async with connect(address, compression=None, proxy=None) as one:
        await one.recv()
        await one.send(message)  # the first is not counted
        await one.recv()
        await ready.wait()
        while (since := time.perf_counter()) < until():
            await one.send(message)
            reply = await one.recv()
            assert isinstance(reply, bytes), reply
            found.append(time.perf_counter() - since)

async def meet(port, robots, seconds, message):
    found, ready = [], asyncio.Barrier(robots)
    end = [float("inf")]
    class Ready:
        async def wait(self):
            await ready.wait()
            end[0] = min(end[0], time.perf_counter() + seconds)
    await asyncio.gather(*(live(port, message, Ready(), lambda: end[0], found) for _ in range(robots)))
    return found, seconds + max(0.0, time.perf_counter() - end[0])

for line in sys.stdin:
    port, robots, seconds, path = json.loads(line)
    found = asyncio.run(meet(port, robots, seconds, open(path, "rb").read()))
    print(json.dumps(found), flush=True)
"""
"""What runs in the robots' process, which does not wait for torch."""


def main() -> None:
    """Measure each policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--policies", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument("--robots", nargs="+", type=int, default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each server in a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    about = {"cpus": os.cpu_count(), "load": os.getloadavg(), "torch": torch.__version__, "threads": 1}
    settings = {"batch": BATCH, "seconds": args.seconds, "rounds": args.rounds}
    for name in args.policies:
        served = open_served(FOLDER / name / "policy", FOLDER / name / "critic", RULES[name])
        found[name] = {"rule": RULES[name], "robots": asyncio.run(measure(served, args))}
        write_json({"conditions": about | settings, "policies": found}, args.out)


async def measure(served: Served, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each number of robots."""
    rows = []
    command = [sys.executable, "-c", ROBOTS]
    with (
        tempfile.NamedTemporaryFile() as message,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as robots,
    ):
        Path(message.name).write_bytes(pack(observation(served)))
        free = ServerLimits(rate=1e9)
        together = Server(served, port=0, limits=free, batching=BatchLimits(BATCH, timeout=300))
        alone = Server(served, port=0, limits=free, batching=BatchLimits(1, timeout=300))
        async with together, alone:
            for count in args.robots:
                seen: dict[str, tuple[list[float], float]] = {"together": ([], 0.0), "alone": ([], 0.0)}
                for _ in range(args.rounds):
                    for way, server in (("together", together), ("alone", alone)):
                        order = [server.port, count, args.seconds, message.name]
                        seconds, whole = await asyncio.to_thread(send, robots, order)
                        seen[way] = seen[way][0] + seconds, seen[way][1] + whole
                rows.append({"robots": count} | summarise(seen))
                print(json.dumps(rows[-1]), flush=True)
        assert robots.stdin is not None
        robots.stdin.close()
    return rows


def observation(served: Served) -> dict[str, Any]:
    """Return what the robots ask."""
    example = served.interface.example(1).observation
    return {**example, "prompt": "push the puck"} if "task" in example else dict(example)


def send(robots: "subprocess.Popen[str]", order: list[Any]) -> tuple[list[float], float]:
    """Let robots ask; return the seconds of each request, and of all together."""
    assert robots.stdin is not None and robots.stdout is not None
    robots.stdin.write(json.dumps(order) + "\n")
    robots.stdin.flush()
    return tuple(json.loads(robots.stdout.readline()))


def summarise(seen: dict[str, tuple[list[float], float]]) -> dict[str, Any]:
    """Return rate and latencies of both ways, and the ratio of their rates."""
    ways = {
        way: {
            "requests": len(seconds),
            "per_second": round(len(seconds) / whole, 2),
            **{f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 2) for q in (50, 95, 99)},
        }
        for way, (seconds, whole) in seen.items()
    }
    return ways | {"ratio": round(ways["together"]["per_second"] / ways["alone"]["per_second"], 2)}


if __name__ == "__main__":
    main()
