"""A lerobot plugin to try things on: an environment, a dataset of clumsy demonstrations, a small policy.

Importing it registers ``reach`` with lerobot, as an environment and as a policy.
``python -m qsteer.testing.reach runs/reach`` records the dataset and clones the policy, in two minutes on a
core.
"""

from qsteer.testing.reach.configuration_reach import TASKS, ReachConfig, ReachEnvConfig

__all__ = ["TASKS", "ReachConfig", "ReachEnvConfig"]
