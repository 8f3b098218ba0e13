"""Train a small VLA of lerobot's and its critic on play in MetaWorld, to be steered there.

    python examples/train_small_vla.py --host small_pi05 --tasks push-v3 --out runs/pi05
    python examples/train_small_vla.py --camera 64 --tasks drawer-open-v3 --episodes 400 --out runs/camera

``--host small_pi05``: lerobot's pi0.5, which reads the state as text. ``--camera 64``: the policy sees a
picture of 64 pixels and the gripper's state; where the object is, only the picture says.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from qsteer.experiments.vla import CLONING, CRITIC, EPISODES, HOSTS, TASKS, WIDTH, make_checkpoints


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", choices=list(HOSTS), default="smolvla")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--camera", type=int, default=0, help="edge of the picture; 0: it is black")
    parser.add_argument("--episodes", type=int, default=EPISODES, help="of play, for each task")
    parser.add_argument("--width", type=int, default=WIDTH, help="of the policy")
    parser.add_argument("--steps", type=int, default=CLONING.steps, help="of the policy's training")
    parser.add_argument("--critic-steps", type=int, default=CRITIC.steps)
    parser.add_argument(
        "--float32", action="store_true", help="faster than bfloat16 on a CPU that cannot compute in it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder of the data and of the seeds")
    args = parser.parse_args()
    folder = make_checkpoints(
        args.out,
        args.seed,
        host=args.host,
        tasks=tuple(args.tasks),
        episodes=args.episodes,
        camera=args.camera,
        width=args.width,
        cloning=replace(CLONING, steps=args.steps, decay=args.steps, half=not args.float32),
        critic=replace(CRITIC, steps=args.critic_steps),
    )
    print(f"policy and critic: {folder}")


if __name__ == "__main__":
    main()
