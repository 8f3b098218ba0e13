"""MetaWorld (Yu et al. 2019, arXiv:1910.10897) by lerobot's own environment, light enough for a CPU.

lerobot renders 480 x 480 pixels each step. Here a policy sees the whole state and a black picture, or the
state of the gripper and a small camera. Importing this registers the environment ``metaworld_light``:
``lerobot-eval --env.type=metaworld_light --env.discover_packages_path=qsteer.envs.metaworld``.
"""

from qsteer.envs.metaworld.configuration import MetaworldLight

__all__ = ["MetaworldLight"]
