"""Distil a meta flow map from a frozen vision-language-action policy: what qsteer.Posterior samples from.

    python examples/distill_mfm.py      # a tiny random pi0.5 on random observations: offline, half a minute
    python examples/distill_mfm.py --policy tiny-smolvla
    python examples/distill_mfm.py --policy lerobot/pi05_libero_finetuned --data lerobot/libero --device cuda
    accelerate launch --num_processes 4 examples/distill_mfm.py --policy ... --data ... --device cuda

``--data`` is a LeRobotDataset (needs ``pip install "lerobot[dataset]"``), or a directory of batches after the
policy's preprocessor, written by ``qsteer.training.record``: faster, for nothing is decoded again. A run that
was interrupted goes on when the same command is given, on another number of processes if you like.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from wrap_pretrained import load_policy

from qsteer.maps import MetaFlowMap, MetaMapConfig
from qsteer.testing import hosts as random_hosts
from qsteer.training import (
    HostTeacher,
    MetaTraining,
    PosteriorError,
    SafetensorsBatches,
    distil,
    lerobot_batches,
    record,
)
from qsteer.training.loop import METRICS, SPEED, processes

TINY = {"tiny-pi05": random_hosts.pi05, "tiny-smolvla": random_hosts.smolvla}
SIZES = {
    "steps": (40_000, 200),
    "batch_size": (256, 16),
    "width": (512, 32),
    "depth": (8, 2),
    "heads": (8, 2),
}
"""Defaults: of the paper, and for tiny policies."""


def synthetic(policy: Any, directory: Path, seed: int, files: int = 4, rows: int = 16) -> SafetensorsBatches:
    """Record random observations and chunks, as a user would record those of a robot."""
    batches = []
    for i in range(files):
        batch = random_hosts.batch(policy, rows, seed=seed + i)
        shape = (rows, policy.config.chunk_size, *policy.config.action_feature.shape)
        batch["action"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
        batches.append(batch)
    record(batches, directory)
    return SafetensorsBatches(directory)


def open_data(data: str, policy: Any, checkpoint: str) -> Any:
    """Open a directory of batches, or a LeRobotDataset."""
    if Path(data).is_dir():
        return SafetensorsBatches(data)
    return lerobot_batches(policy, data, checkpoint=checkpoint)


def main(argv: list[str] | None = None) -> None:
    """Distil, report, save."""
    parser = argparse.ArgumentParser(description="Distil a meta flow map from a frozen policy.")
    parser.add_argument("--policy", default="tiny-pi05", help=f"lerobot checkpoint, or {' or '.join(TINY)}")
    parser.add_argument("--data", help="directory of batches, or name of a LeRobotDataset")
    parser.add_argument("--held-out", help="the same, to measure the posterior error on")
    parser.add_argument("--actions", choices=["policy", "data"], default="policy", help="see HostTeacher")
    parser.add_argument("--out", type=Path, default=Path("runs/mfm"), help="run directory")
    for name, (paper, tiny) in SIZES.items():
        text = f"default: {paper}, or {tiny} for a tiny policy"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, batches and noise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the finished map")
    args = parser.parse_args(argv)
    tiny = args.policy in TINY
    size = {n: d[tiny] if getattr(args, n) is None else getattr(args, n) for n, d in SIZES.items()}

    # The teacher: the policy, and observations to ask it about.
    state = processes(args.device)
    policy = (TINY[args.policy]() if tiny else load_policy(args.policy)).to(args.device)
    if tiny and args.data is None:
        with state.main_process_first():
            data = synthetic(policy, args.out / "data", seed=0)
            held_out = synthetic(policy, args.out / "held_out", seed=1000)
    elif args.data is None:
        parser.error("--data: expected the data to distil on, got none")
    else:
        data = open_data(args.data, policy, args.policy)
        held_out = args.held_out and open_data(args.held_out, policy, args.policy)
    teacher = HostTeacher(policy, data, args.actions)
    error = None
    if held_out and state.is_main_process:
        held_out = HostTeacher(policy, held_out, args.actions)
        error = PosteriorError(held_out, observations=4, samples=16, steps=16)

    # The map: as the paper's, initialised so that a sample is the policy's own denoised action.
    torch.manual_seed(args.seed)
    shape = {name: size[name] for name in ("width", "depth", "heads")}
    meta = MetaFlowMap(MetaMapConfig(*teacher.sizes(), **shape)).to(args.device)

    every = max(1, size["steps"] // 20)
    training = MetaTraining(
        steps=size["steps"],
        batch_size=size["batch_size"],
        seed=args.seed,
        learning_rate=1e-3 if tiny else 1e-4,
        warmup=min(2000, size["steps"] // 10),
        ema=0.005 if tiny else 1e-4,
        log_every=every,
        evaluate_every=5 * every,
        checkpoint_every=5 * every,
    )
    distil(meta, teacher, args.out, training, held_out=error)

    if state.is_main_process:
        for line in (args.out / METRICS).read_text().splitlines():
            if "posterior_error" in line or error is None:
                print("  ".join(f"{name} {number:.4g}" for name, number in json.loads(line).items()))
        speed = json.loads((args.out / SPEED).read_text().splitlines()[-1])
        print(f"{speed['samples/s']:.0f} samples/s on {state.num_processes} process(es): {args.out}")
        if args.push_to_hub:
            meta.push_to_hub(args.push_to_hub)


if __name__ == "__main__":
    main()
