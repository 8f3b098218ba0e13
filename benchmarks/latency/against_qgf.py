"""An action of a small policy, eager and compiled, beside the QGF authors' own agent: CPU time on one thread.

python benchmarks/latency/against_qgf.py OUT [WIDTH LAYERS MEMBERS] [--theirs COMMAND]

COMMAND prints one JSON line of their milliseconds, and is run before and after ours.
"""

import argparse
import json
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qsteer
from qsteer.adapters import PlainPolicy
from qsteer.files import write_json
from qsteer.policies import FlowPolicy, FlowPolicyConfig

OBS, ACTION, CHUNK = 28, 5, 5
METHODS = {
    "unsteered": (None, qsteer.Euler()),
    "qgf": (qsteer.QGF(weight=0.06), qsteer.Euler()),
    "tweedie": (qsteer.Tweedie(0.2), qsteer.Euler()),
    "qgf, best of 8": (qsteer.QGF(weight=0.06), qsteer.BestOfN(8)),
}


def cpu_ms(act: Callable[[], Any], repeats: int = 200) -> float:
    """Return the median CPU time of a call, in milliseconds."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        act()
        times.append(time.process_time() - started)
    return float(np.median(times)) * 1e3


def main() -> None:
    """Time each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sizes", type=int, nargs="*", default=[256, 3, 4])
    parser.add_argument("--theirs", help="command")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, layers, members = args.sizes
    small = FlowPolicy(FlowPolicyConfig(OBS, ACTION, CHUNK, (width,) * layers)).requires_grad_(False)
    shape = qsteer.CriticConfig(OBS, ACTION, CHUNK, (width,) * layers, members)
    critic, obs = qsteer.Critic(shape).requires_grad_(False), torch.randn(1, OBS)
    policy = PlainPolicy(lambda x, t, obs: small(obs, x, t), CHUNK, ACTION)

    def theirs() -> dict[str, float]:
        if args.theirs is None:
            return {}
        return json.loads(subprocess.check_output(shlex.split(args.theirs), text=True).splitlines()[-1])

    found: dict[str, Any] = {
        "sizes": args.sizes,
        "torch": torch.__version__,
        "theirs": [theirs()],
        "ours": {},
    }
    for name in args.methods:
        rule, sampler = METHODS[name]
        row = found["ours"][name] = {}
        for mode in (None, "inductor"):
            with qsteer.steer(policy, critic, rule, sampler=sampler, compile=mode) as handle:
                torch.manual_seed(1)
                policy.predict_action_chunk(obs)
                handle.finish_compiling()
                policy.predict_action_chunk(obs)
                torch.manual_seed(1)
                row[f"{mode} action"] = policy.predict_action_chunk(obs)
                row["eager" if mode is None else "compiled"] = cpu_ms(
                    lambda: policy.predict_action_chunk(obs)
                )
                row["state"] = (handle.kinds or [""])[0]
        row["off"] = float((row.pop("None action") - row.pop("inductor action")).abs().max())
        print(name, row, flush=True)
    found["theirs"].append(theirs())
    write_json(found, args.out)
    print(json.dumps(found["theirs"]))


if __name__ == "__main__":
    main()
