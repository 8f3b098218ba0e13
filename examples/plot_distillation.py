"""Draw the curves of distillation runs, such as ``runs/cube-single/seed*/meta``."""

import argparse
import json
from pathlib import Path

from qsteer.evaluation.plots import plot_distillation
from qsteer.files import write_json
from qsteer.training.loop import METRICS


def main() -> None:
    """Read each run's metrics; write a picture, and the curves as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--plot", type=Path, default=Path("docs/distillation.png"), help="picture to write")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/distillation.json"), help="JSON to write"
    )
    args = parser.parse_args()
    runs = {
        str(run): [json.loads(line) for line in (run / METRICS).read_text().splitlines()] for run in args.runs
    }
    for name, lines in runs.items():
        print(
            f"{name}: posterior error {lines[-1]['posterior_error']:.3f}, floor {lines[-1]['floor']:.3f}, "
            f"denoised action alone {lines[-1]['tweedie']:.3f}"
        )
    print(f"curves: {write_json(runs, args.out)}")
    print(f"plot:   {plot_distillation(runs, args.plot)}")


if __name__ == "__main__":
    main()
