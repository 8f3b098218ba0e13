"""Behaviour cloning of the reaching policy, by its own loss and lerobot's processors."""

from pathlib import Path
from typing import Any

import torch
from tqdm import trange

from qsteer.testing.reach.configuration_reach import ACTION, STATE, ReachConfig
from qsteer.testing.reach.modeling_reach import ReachPolicy
from qsteer.testing.reach.processor_reach import make_reach_pre_post_processors


def clone(dataset: Any, out: str | Path, steps: int = 3000, seed: int = 0) -> ReachPolicy:
    """Train a policy on a dataset, and save it with its processors as lerobot's training does.

    Cost: 5 ms a step on a core.
    """
    config = ReachConfig(device="cpu")
    torch.manual_seed(seed)
    policy = ReachPolicy(config)
    before, after = make_reach_pre_post_processors(config, dataset.meta.stats)
    rows = dataset.hf_dataset.with_format("numpy")
    columns = {key: torch.as_tensor(rows[key][:]) for key in (STATE, ACTION, "episode_index", "task_index")}
    names = list(dataset.meta.tasks.sort_values("task_index").index)
    episode = columns["episode_index"]
    start = torch.arange(len(episode))
    ends = torch.cat([(episode[1:] != episode[:-1]).nonzero()[:, 0], start[-1:]])
    last = ends[torch.searchsorted(ends, start)]
    chunk = start[:, None] + torch.arange(config.chunk_size)
    padded, chunk = chunk > last[:, None], chunk.minimum(last[:, None])
    batch = before({STATE: columns[STATE], ACTION: columns[ACTION], "task": ""})
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="cloning"):
        drawn = torch.randint(len(start), (256,))
        loss, _ = policy(
            {
                STATE: batch[STATE][drawn],
                ACTION: batch[ACTION][chunk[drawn]],
                "action_is_pad": padded[drawn],
                "task": [names[i] for i in columns["task_index"][drawn].tolist()],
            }
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    policy.eval().save_pretrained(out)
    before.save_pretrained(out)
    after.save_pretrained(out)
    return policy
