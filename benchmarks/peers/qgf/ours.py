"""Train our critic of a recipe with some settings changed, to see which of the authors' settings matters.

python benchmarks/peers/qgf/ours.py --task cube-single --out DIR --set members=2 rho=1 ema=0.005
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from qsteer.data import Episodes
from qsteer.envs import ogbench
from qsteer.experiments.tasks import RECIPES
from qsteer.training import train_critic

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--task", choices=list(RECIPES), required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--set", nargs="+", required=True, metavar="NAME=JSON", help="settings of CriticTraining")
args = parser.parse_args()
task = RECIPES[args.task]
changed = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
data, _ = ogbench.load(task.environment(), task.data_path)
train_critic(Episodes.from_ogbench(data), args.out, replace(task.critic, **changed))
