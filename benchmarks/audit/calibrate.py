"""Are the audit's verdicts right? Critics of several qualities, audited, then measured in the simulator.

python benchmarks/audit/calibrate.py train      # policy and data first: qsteer demo --from-scratch
python benchmarks/audit/calibrate.py measure    # goes on where it was interrupted
python benchmarks/audit/calibrate.py table
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gymnasium import Env
from gymnasium.wrappers import TimeLimit
from torch import Tensor

import qsteer
from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.envs.rollouts import Simulators
from qsteer.experiments.tasks import RECIPES, run_directory
from qsteer.files import write_json
from qsteer.policies import FlowPolicy
from qsteer.statistics import paired_interval, wilson_interval
from qsteer.training import train_critic

TASK = RECIPES["pointmaze-medium"]
SEEDS = (0, 1)
TUNED_ON = (0,)
"""Seeds of critics on which the thresholds were set; the others are reported."""
STEPS = {"150 steps": 150, "1000 steps": 1000, "4000 steps": 4000}
SHORT = 1500
"""Of training on batches of 128; the recipe takes 15,000 of 256."""
AUDIT_SEED, EPISODE_SEED = 30000, 10000
LIMIT = 700
"""Steps of an episode, of the 1000 of the task: four of four steered ones needed 380 to 610."""


def shuffle_rewards(data: Episodes) -> Episodes:
    """Return the data with rewards and terminals of other rows."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return replace(data, rewards=data.rewards[order], terminals=data.terminals[order])


def succeed_always(data: Episodes) -> Episodes:
    """Return the data as demonstrations of 100 steps, each of which ends in success."""
    last = (torch.arange(1, len(data) + 1) % 100 == 0) | data.ends
    return replace(data, rewards=last.float(), terminals=last, ends=last)


@dataclass(frozen=True)
class Scaled:
    """A critic that is given other units than it was trained on."""

    critic: Critic
    observation: float = 1.0
    action: Any = 1.0

    @property
    def config(self) -> Any:
        """What it sees."""
        return self.critic.config

    def bind(self, obs: Tensor) -> qsteer.Value:
        """Bind to other units."""
        return Units(self.critic.bind(obs * self.observation), self.action)


@dataclass(frozen=True)
class Units(qsteer.Value):
    """A value of actions in other units."""

    value: qsteer.Value
    factor: Any

    def __call__(self, a: Tensor) -> Tensor:
        """Return the value."""
        return self.value(a * self.factor)

    def members(self, a: Tensor) -> Tensor:
        """Return what each member says."""
        return self.value.members(a * self.factor)

    def repeat(self, k: int) -> "Units":
        """Repeat it."""
        return replace(self, value=self.value.repeat(k))


def train(root: Path) -> None:
    """Train the critics, those of all seeds side by side."""
    columns, _ = ogbench.load(TASK.environment(), TASK.data_path)
    data = Episodes.from_ogbench(columns)
    settings = replace(TASK.critic, batch_size=128)
    runs = {name: (data, replace(settings, steps=steps)) for name, steps in STEPS.items()}
    short = replace(settings, steps=SHORT)
    runs |= {
        "all succeed": (succeed_always(data), short),
        "rewards shuffled": (shuffle_rewards(data), short),
        "2 members": (data, replace(short, members=2)),
    }
    for name, (episodes, training) in runs.items():
        train_critic(episodes, root / name.replace(" ", "-"), training, seeds=SEEDS)


def critics(root: Path, seed: int) -> dict[str, Any]:
    """Return the critics of one seed, by name."""
    names = [*STEPS, "all succeed", "rewards shuffled", "2 members"]
    found: dict[str, Any] = {
        name: Critic.from_pretrained(root / name.replace(" ", "-")).unstacked()[seed] for name in names
    }
    recipe = run_directory(TASK.name, seed) / "critic"
    if (recipe / "config.json").exists():
        found["15000 steps"] = Critic.from_pretrained(recipe)
    best = found.get("15000 steps", found["4000 steps"])
    torch.manual_seed(seed)
    fresh = Critic(best.config)
    fresh.normalizer.load_state_dict(best.normalizer.state_dict())
    return found | {
        "untrained": fresh,
        "observations x 0.5": Scaled(best, observation=0.5),
        "actions x 3": Scaled(best, action=3.0),
        "actions x 0.1": Scaled(best, action=0.1),
        "one action axis turned": Scaled(best, action=torch.tensor([1.0, -1.0])),
    }


def make_env(limit: int) -> Env:
    """Return the simulator."""
    return TimeLimit(ogbench.make(TASK.environment()), limit)


def measure(
    root: Path, out: Path, seeds: tuple[int, ...], episodes: int, only: list[str], afresh: bool
) -> None:
    """Audit each critic, and roll out the arms; what is in ``out`` already is kept."""
    torch.set_num_threads(1)
    policy = FlowPolicy.from_pretrained(run_directory(TASK.name, 0) / "policy")
    _, columns = ogbench.load(TASK.environment(), TASK.data_path)
    held_out = Episodes.from_ogbench(columns)
    draw = torch.Generator().manual_seed(AUDIT_SEED)
    states = held_out.observations[torch.randint(len(held_out), (128,), generator=draw)]
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}, "arms": {}}
    result |= {"task": TASK.environment(), "episodes": episodes, "limit": LIMIT, "tuned_on": list(TUNED_ON)}
    sampler = qsteer.Euler(clip=(-1.0, 1.0))

    def roll(simulators: Simulators, name: str, rule: Any, critic: Any) -> None:
        if name in result["arms"] or not episodes:
            return

        def act(obs: Tensor, noise: Tensor) -> Tensor:
            value = None if rule is None else critic.bind(obs)
            return qsteer.sample(policy.field(obs), value, noise, rule=rule, sampler=sampler)

        run = simulators.rollout(act, episodes=episodes, seed=EPISODE_SEED, name=name, progress=False)
        result["arms"][name] = {"success": run.success.astype(int).tolist(), "length": run.length.tolist()}
        write_json(result, out)
        print(f"{name}: {run.success.mean():.0%}", flush=True)

    start: Callable[[], Simulators] = partial(
        Simulators, partial(make_env, LIMIT), horizon=policy.config.horizon, num_envs=20
    )
    rows = [(seed, name, critic) for seed in seeds for name, critic in critics(root, seed).items()]
    with start() if episodes else nullcontext() as simulators:
        for seed, name, critic in rows:
            if only and name not in only:
                continue
            key = f"{name}, seed {seed}"
            if key not in result["rows"] or afresh:
                found = qsteer.audit(policy, critic, [states], held_out, seed=AUDIT_SEED)
                result["rows"][key] = {"critic": name, "seed": seed, "audit": found.to_dict()}
                write_json(result, out)
                print(f"{key}: {found.summary}", flush=True)
            row = result["rows"][key]
            alpha = row["audit"]["alpha"]
            row |= {"steered": f"{key}, tweedie={alpha:g}", "random": f"random={alpha:g}"}
            if simulators is not None:
                roll(simulators, row["steered"], qsteer.Tweedie(alpha), critic)
                roll(simulators, row["random"], qsteer.RandomDirection(alpha), critic)
                roll(simulators, "base", None, None)
    write_json(result, out)


def table(out: Path) -> None:
    """Print the table."""
    result = json.loads(out.read_text())
    arms = {name: arm["success"] for name, arm in result["arms"].items()}
    print("| critic | seed | verdict | alpha | range | failed | base | steered | random | gain |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"].values():
        found = row["audit"]
        failed = ", ".join(c["name"] for c in found["checks"] if c["verdict"] == "fail")
        between = "{:g} to {:g}".format(*found["recommended"]) if found["recommended"] else "none"
        cells = [
            row["critic"],
            row["seed"],
            found["verdict"],
            f"{found['alpha']:g}",
            between,
            failed or "none",
        ]
        shown = ("base", row.get("steered"), row.get("random"))
        cells += [_rate(arms[name]) if name in arms else "" for name in shown]
        if row.get("steered") in arms:
            gain = paired_interval(arms[row["steered"]], arms["base"])
            cells.append(f"{gain.difference:+.0%} ({gain.low:+.0%} to {gain.high:+.0%})")
        print("| " + " | ".join(map(str, cells)) + " |")


def _rate(success: list[int]) -> str:
    low, high = wilson_interval(sum(success), len(success))
    return f"{sum(success) / len(success):.0%} ({low:.0%} to {high:.0%})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "table"))
    parser.add_argument("--root", type=Path, default=Path("runs/audit"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/audit/pointmaze-medium.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--episodes", type=int, default=100, help="0: audits only")
    parser.add_argument("--only", nargs="*", default=[], help="critics")
    parser.add_argument("--afresh", action="store_true", help="audit again; rollouts are kept")
    args = parser.parse_args()
    if args.what == "train":
        train(args.root)
    elif args.what == "measure":
        measure(args.root, args.out, tuple(args.seeds), args.episodes, args.only, args.afresh)
    else:
        table(args.out)
