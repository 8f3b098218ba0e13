"""Are the audit's verdicts right where steering can hurt? The demonstration's critic, whole and spoilt.

python benchmarks/audit/demo_critics.py          # in a checkout; goes on where it was interrupted
python benchmarks/audit/demo_critics.py DATA     # once more, with held-out data:
                                                 # qsteer generate --transitions 20000 --seed 7 --data DATA
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calibrate import AUDIT_SEED, EPISODE_SEED, Scaled, table
from torch import Tensor

import qsteer
from qsteer.cli.audit import visit
from qsteer.critics import Critic
from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.envs.rollouts import Simulators
from qsteer.experiments.tasks import RECIPES
from qsteer.files import write_json
from qsteer.policies import FlowPolicy

TASK = RECIPES["cube-single"]
OUT = Path("benchmarks/audit/cube-single.json")
EPISODES = 100


@dataclass(frozen=True)
class Spoilt:
    """A critic whose bound values are changed."""

    critic: Critic
    sign: float = 1.0
    members: int | None = None

    @property
    def config(self) -> Any:
        """What it sees."""
        return self.critic.config

    def bind(self, obs: Tensor) -> qsteer.Value:
        """Bind it."""
        return Changed(self.critic.bind(obs), self.sign, self.members)


@dataclass(frozen=True)
class Changed(qsteer.Value):
    """A value times a sign, of the first members."""

    value: qsteer.Value
    sign: float
    first: int | None

    def __call__(self, a: Tensor) -> Tensor:
        """Return the mean of the members."""
        return self.members(a).mean(0)

    def members(self, a: Tensor) -> Tensor:
        """Return what each member says."""
        return self.sign * self.value.members(a)[: self.first]

    def repeat(self, k: int) -> "Changed":
        """Repeat it."""
        return replace(self, value=self.value.repeat(k))


def critics(critic: Critic) -> dict[str, Any]:
    """Return the critic, and what became of it."""
    torch.manual_seed(0)
    untrained = Critic(critic.config)
    untrained.normalizer.load_state_dict(critic.normalizer.state_dict())
    return {
        "as trained": critic,
        "its first 2 members": Spoilt(critic, members=2),
        "sign turned": Spoilt(critic, sign=-1.0),
        "untrained": untrained,
        "observations x 0.5": Scaled(critic, observation=0.5),
        "actions x 3": Scaled(critic, action=3.0),
        "vertical axis turned": Scaled(critic, action=torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])),
    }


def main() -> None:
    """Audit each critic, roll out its arms, print the table."""
    torch.set_num_threads(1)
    path = Path(sys.argv[1]) if sys.argv[1:] else None
    data = None if path is None else Episodes.from_ogbench(ogbench.load(TASK.environment(), path)[0])
    source = Path("examples/checkpoints") / TASK.name
    policy, critic = FlowPolicy.from_pretrained(source / "policy"), Critic.from_pretrained(source / "critic")
    states = visit(TASK.environment(), policy, 128, seed=0)
    result: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"rows": {}, "arms": {}}
    result |= {"task": TASK.environment(), "episodes": EPISODES, "checkpoints": str(source)}
    sampler = qsteer.Euler(clip="policy")
    make_env = partial(ogbench.make, TASK.environment())
    with Simulators(make_env, horizon=policy.config.horizon, num_envs=10) as simulators:

        def roll(name: str, rule: qsteer.Rule | None, critic: Any) -> None:
            if name in result["arms"]:
                return

            def act(obs: Tensor, noise: Tensor) -> Tensor:
                value = None if rule is None else critic.bind(obs)
                return qsteer.sample(policy.field(obs), value, noise, rule=rule, sampler=sampler)

            run = simulators.rollout(act, episodes=EPISODES, seed=EPISODE_SEED, name=name, progress=False)
            result["arms"][name] = {"success": run.success.astype(int).tolist()}
            write_json(result, OUT)
            print(f"{name}: {run.success.mean():.0%}", flush=True)

        roll("base", None, None)
        for name, each in critics(critic).items():
            if name not in result["rows"]:
                found = qsteer.audit(policy, each, [states], seed=AUDIT_SEED)
                result["rows"][name] = {"critic": name, "seed": "demo", "audit": found.to_dict()}
                print(f"{name}: {found.summary}", flush=True)
            row = result["rows"][name]
            if data is not None and "with data" not in row:
                row["with data"] = qsteer.audit(policy, each, [states], data=data, seed=AUDIT_SEED).to_dict()
                write_json(result, OUT)
                print(f"{name}: {row['with data']['verdict']}", flush=True)
            alpha = row["audit"]["alpha"]
            row |= {"steered": f"{name}, tweedie={alpha:g}", "random": f"random={alpha:g}"}
            roll(row["steered"], qsteer.Tweedie(alpha), each)
            roll(row["random"], qsteer.RandomDirection(alpha), each)
    write_json(result, OUT)
    table(OUT)


if __name__ == "__main__":
    main()
