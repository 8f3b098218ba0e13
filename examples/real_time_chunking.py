"""Success and continuity when a robot moves on while its next chunk is computed: chunking, steering, both.

    python examples/real_time_chunking.py --task cube-single --out benchmarks/rtc/cube-single.json

Policy and critic see chunks of 10 actions, and are trained if they are not there (``--runs``). A chunk is
asked for every 5 steps, and is there after a delay of 0 to 4 steps, in which the robot executes what is left
of the one before. Strengths are chosen on the tuning seeds (``--tuning``); arms share episodes and noise.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import qsteer
from qsteer.chunking import continued
from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.envs.seeds import EVALUATION_SEED, TUNING_SEED
from qsteer.evaluation.arms import parse
from qsteer.experiments.tasks import RECIPES
from qsteer.files import check_output, write_json
from qsteer.policies import FlowPolicy
from qsteer.statistics import wilson_interval
from qsteer.training import train_critic, train_policy

HORIZON, EVERY = 10, 5
ARMS = ("base", "qgf=0.06", "tweedie=0.2", "random-direction=0.2")


def prepare(task: str, runs: Path) -> tuple[FlowPolicy, Critic]:
    """Return policy and critic of chunks of 10, trained first if they are not there."""
    recipe, data = RECIPES[task], runs / f"{task}.npz"
    if not (runs / "critic" / "model.safetensors").exists():
        if not data.exists():
            ogbench.generate(recipe.data, data, transitions=recipe.transitions, val_transitions=1000, seed=0)
        episodes = Episodes.from_ogbench(ogbench.load(recipe.environment(), data)[0])
        train_policy(episodes, runs / "policy", replace(recipe.policy, horizon=HORIZON))
        train_critic(episodes, runs / "critic", replace(recipe.critic, horizon=HORIZON))
    return FlowPolicy.from_pretrained(runs / "policy"), Critic.from_pretrained(runs / "critic")


def roll(
    environment: str, policy: FlowPolicy, critic: Critic, arm: str, chunked: bool, delay: int, seeds: range
) -> dict[str, Any]:
    """Return success and seams of one arm under one delay, all episodes side by side."""
    method, envs = parse(arm), [ogbench.make(environment) for _ in seeds]
    observations = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    running, success = np.ones(len(envs), bool), np.zeros(len(envs), bool)
    chunk: Tensor | None = None
    seams, steps = [], []

    def execute(actions: Tensor, rows: np.ndarray) -> None:
        for column in actions.unbind(1):
            for i in np.flatnonzero(rows & running):
                observations[i], _, terminated, truncated, info = envs[i].step(column[i].numpy())
                success[i] |= bool(info.get("success", terminated))
                running[i] = not (terminated or truncated)

    while running.any():
        obs = torch.from_numpy(observations).float()
        noise = torch.stack([torch.randn(HORIZON, policy.config.action_dim, generator=g) for g in draws])
        field = policy.field(obs)
        if chunk is not None and chunked:
            field = continued(field, chunk[:, EVERY:], HORIZON, delay=delay)
        new = qsteer.sample(field, critic.bind(obs), noise, rule=method.rule, sampler=method.sampler)
        if chunk is not None:
            execute(chunk[:, EVERY : EVERY + delay], running)
            alive = torch.from_numpy(running)
            seams.append((new[:, delay] - chunk[:, EVERY + delay - 1])[alive])
            steps.append(new[:, delay:].diff(dim=1)[alive].flatten(0, 1))
            execute(new[:, delay:EVERY], running)
        else:  # the robot waits for its first chunk
            execute(new[:, :EVERY], running)
        chunk = new
    for env in envs:
        env.close()
    low, high = wilson_interval(int(success.sum()), len(success))
    jump, within = (torch.cat(parts).square().mean().sqrt().item() for parts in (seams, steps))
    return {
        "arm": arm,
        "chunking": chunked,
        "delay": delay,
        "success": float(success.mean()),
        "low": low,
        "high": high,
        "episodes": len(success),
        "seam": jump,
        "within": within,
    }


def main() -> None:
    """Run all arms under all delays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--task", choices=list(RECIPES), default="cube-single")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--delays", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--tuning", action="store_true", help="the tuning seeds, to choose strengths on")
    parser.add_argument("--runs", type=Path, help="default runs/chunking/TASK")
    parser.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = parser.parse_args()
    check_output(args.out)
    torch.set_num_threads(1)
    policy, critic = prepare(args.task, args.runs or Path("runs/chunking") / args.task)
    first = TUNING_SEED if args.tuning else EVALUATION_SEED
    cells = [(arm, on, delay) for delay in args.delays for arm in args.arms for on in (False, True)]
    rows = []
    for cell in tqdm(cells, unit="arm"):
        seeds = range(first, first + args.episodes)
        rows.append(roll(RECIPES[args.task].environment(), policy, critic, *cell, seeds))
        row = rows[-1]
        print(
            f"delay {row['delay']}  {row['arm']:22} {'held' if row['chunking'] else 'free'}  success "
            f"{row['success']:4.0%} ({row['low']:.0%} to {row['high']:.0%})  seam {row['seam']:.3f}  within "
            f"{row['within']:.3f}"
        )
        write_json(
            {"task": args.task, "seed": first, "horizon": HORIZON, "every": EVERY, "rows": rows}, args.out
        )


if __name__ == "__main__":
    main()
