"""Record the dataset and train the policy: ``python -m qsteer.testing.reach DIRECTORY``."""

import argparse
from pathlib import Path

from qsteer.testing.reach.cloning import clone
from qsteer.testing.reach.world import record_dataset

if __name__ == "__main__":  # lerobot imports all modules of a plugin
    parser = argparse.ArgumentParser(prog="python -m qsteer.testing.reach", description=__doc__)
    parser.add_argument("directory", type=Path, help="for dataset/ and policy/")
    parser.add_argument("--episodes", type=int, default=300)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    found = record_dataset(args.directory / "dataset", args.episodes)
    clone(found, args.directory / "policy", args.steps)
    print(f"dataset: {args.directory / 'dataset'}\npolicy:  {args.directory / 'policy'}")
