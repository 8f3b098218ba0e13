"""Passes through learnt maps, counted."""

import hosts
from map_hosts import STEPS, STRONG, N, build, meta_map, opened

import qsteer
from qsteer.bench.counting import Passes, count, counted_maps


def test_count_counts_learnt_maps():
    policy = build("plain")
    hosts.set_steps(policy, STEPS)
    field, value, noise = opened(policy, rows=1)
    rule = qsteer.Posterior(meta_map("plain"), **STRONG)
    cost = count(field, value, noise, rule)
    assert (cost.map.forwards, cost.map.forward_rows) == (2, 2 * N)
    assert (cost.map.backwards, cost.map.backward_rows) == (2, 2 * N)
    assert str(cost).endswith("critic 2 forward 2 backward, map 2 forward 2 backward")
    maps = Passes()
    with counted_maps(maps):
        pass
    qsteer.sample(field, value, noise, rule=rule)
    assert maps == Passes(), "only in the block"
