"""Compare the samplers of qsteer/selecting.py with others on cube-single's tuning seeds.

An arm is a short name (see :func:`qsteer.evaluation.arms.parse`) or Python: ``FeynmanKac(8, 1.0, CLIPPED)``.
"""

import argparse
from functools import partial
from pathlib import Path

import qsteer
from qsteer import BestOfN  # noqa: F401  # for arms in Python
from qsteer.critics import Critic
from qsteer.envs import ogbench
from qsteer.envs.seeds import TUNING_SEED
from qsteer.evaluation.arms import Arm, parse
from qsteer.evaluation.compare import compare, format_comparison
from qsteer.experiments.tasks import RECIPES
from qsteer.files import write_json
from qsteer.policies import FlowPolicy
from qsteer.selecting import ExpectileOfN, FeynmanKac, PruneSeeds  # noqa: F401

CLIPPED = qsteer.Euler(clip="policy")


def read(arm: str) -> Arm:
    """Return an arm of its name, or of Python."""
    return Arm(arm, None, eval(arm)) if "(" in arm else parse(arm)


def main() -> None:
    """Run the arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/cube-single/seed0"), help="holds both networks")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", type=read, required=True)
    args = parser.parse_args()
    report, _ = compare(
        partial(ogbench.make, RECIPES["cube-single"].environment()),
        FlowPolicy.from_pretrained(args.run / "policy"),
        Critic.from_pretrained(args.run / "critic"),
        args.arms,
        episodes=args.episodes,
        seed=TUNING_SEED,
    )
    print(format_comparison(report))
    write_json(report, args.out)


if __name__ == "__main__":
    main()
