"""lerobot's policies without a velocity field: selection among their chunks works.

Diffusion Policy, VQ-BeT, ACT and pi0-FAST.
"""

from dataclasses import replace

from qsteer.adapters.contracts import read_lerobot
from qsteer.adapters.lerobot import action_bounds
from qsteer.clock import PAPER
from qsteer.hosts import Host

DIFFUSION = Host(
    serves="DiffusionPolicy",
    entry="predict_action_chunk",
    step=None,
    batch="predict_action_chunk",
    clock=PAPER,
    steps=1,
    executed="config.n_action_steps",
    action_shape="config.action_feature.shape",
    chunk="config.n_action_steps",
    queue="_queues",
    bounds=action_bounds,
    contract=read_lerobot,
)

VQBET = replace(
    DIFFUSION, serves="VQBeTPolicy", executed="config.action_chunk_size", chunk="config.action_chunk_size"
)

ACT = replace(DIFFUSION, serves="ACTPolicy", chunk="config.chunk_size", queue="_action_queue")

PI0_FAST = replace(ACT, serves="PI0FastPolicy")

HOSTS = (DIFFUSION, VQBET, ACT, PI0_FAST)
