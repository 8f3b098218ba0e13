"""The laws of injection for posterior samples and learnt maps: what methods leave, and what they cost."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hosts
import pytest
import torch
from map_hosts import STEPS, STRONG, N, build, chunk, flow_map, lend, meta_map, opened
from torch import Tensor, nn

import qsteer
from qsteer.adapters import host_of
from qsteer.bench.counting import Passes, counted_maps
from qsteer.maps import GlassPosterior
from qsteer.steering.handle import steer

GUIDED = STEPS - 1
LAST = 2  # of 3 steps, those which a beam's branch is completed with: ceil(0.4 * 3)


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(name: str) -> Iterator[nn.Module]:
    yield from lend(name)


@dataclass(frozen=True)
class Case:
    """A method, and its passes per action: (forwards, rows per observation, backwards, rows)."""

    make: Callable[[str], tuple[qsteer.types.Rule | None, qsteer.types.Sampler]]
    policy: tuple[int, int, int, int]
    map: tuple[int, int, int, int] = (0, 0, 0, 0)


def rule(make: Callable[[str], Any], sampler: qsteer.types.Sampler | None = None) -> Callable[[str], Any]:
    return lambda name: (make(name), sampler or qsteer.Euler())


CASES = {
    "Posterior of GLASS": Case(
        rule(lambda name: qsteer.Posterior(GlassPosterior(steps=3), **STRONG)),
        (1 + GUIDED * 3, 1 + GUIDED * (1 + 2 * N), GUIDED * 3, GUIDED * (1 + 2 * N)),
    ),
    "GradientFreePosterior of GLASS": Case(
        rule(lambda name: qsteer.GradientFreePosterior(GlassPosterior(), **STRONG)),
        (1 + GUIDED * 4, 1 + GUIDED * (1 + 3 * N), 0, 0),
    ),
    "Posterior of a map": Case(
        rule(lambda name: qsteer.Posterior(meta_map(name), **STRONG)),
        (STEPS, STEPS, GUIDED, GUIDED),
        (GUIDED, GUIDED * N, GUIDED, GUIDED * N),
    ),
    "Posterior of a map that stands alone": Case(
        rule(lambda name: qsteer.Posterior(meta_map(name, residual=False), **STRONG)),
        (STEPS, STEPS, 0, 0),
        (GUIDED, GUIDED * N, GUIDED, GUIDED * N),
    ),
    "GradientFreePosterior of a map": Case(
        rule(lambda name: qsteer.GradientFreePosterior(meta_map(name), **STRONG)),
        (STEPS, STEPS, 0, 0),
        (GUIDED, GUIDED * N, 0, 0),
    ),
    "BestOfN of Posterior": Case(
        rule(lambda name: qsteer.Posterior(meta_map(name), **STRONG), qsteer.BestOfN(3)),
        (STEPS, 3 * STEPS, GUIDED, 3 * GUIDED),
        (GUIDED, 3 * GUIDED * N, GUIDED, 3 * GUIDED * N),
    ),
    "BeamSearch": Case(
        lambda name: (None, qsteer.BeamSearch(2, 3, 2)),
        (STEPS + 2 * LAST, STEPS * 2 + 2 * LAST * 6, 0, 0),
    ),
    "BeamSearch of a flow map": Case(
        lambda name: (None, qsteer.BeamSearch(2, 3, 2, flow_map=flow_map(name))),
        (0, 0, 0, 0),
        (1 + 2, 2 * (1 + 2 * 3), 0, 0),
    ),
    "TrustRegion of BestOfN": Case(
        lambda name: (None, qsteer.TrustRegion(beta=1.0, inner=qsteer.BestOfN(3))), (STEPS, 3 * STEPS, 0, 0)
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_it_steers_in_every_grad_mode_and_is_gone_when_removed(policy: nn.Module, name: str, case: Case):
    other, (rule, sampler) = build(name), case.make(name)
    hosts.set_steps(other, STEPS)
    base, critic = chunk(policy), hosts.Target()
    steered = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), steer(policy, critic, rule, sampler=sampler) as handle:
            steered.append(chunk(policy))
            assert not steered[-1].requires_grad
            assert handle.trace.fallbacks == 0
            if mode is torch.no_grad:
                assert torch.equal(chunk(other), base), "a second instance is untouched"
    assert ((steered[0] - base).abs().amax((1, 2)) > 0.05).all()
    assert torch.equal(*steered)
    assert torch.equal(chunk(policy), base)


def test_it_costs_what_it_says(policy: nn.Module, name: str, case: Case, monkeypatch: pytest.MonkeyPatch):
    """On one prefix, whose features are asked for once."""
    prefixes, features, passes, maps = [], [], Passes(), Passes()
    model, host = type(hosts.loop(policy)), host_of(policy)
    step = model.denoise_step

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return passes.seen(step(self, *args, **kwargs))

    def asked(context: dict[str, Any]) -> Any:
        features.append(context)
        return host.features(context)

    counting.__wrapped__ = step  # for inspect.signature
    monkeypatch.setattr(model, "denoise_step", counting)
    if name != "plain":
        embed = model.embed_prefix
        monkeypatch.setattr(
            model, "embed_prefix", lambda self, *a, **k: prefixes.append(a) or embed(self, *a, **k)
        )
        monkeypatch.setattr(policy, "__qsteer_host__", replace(host, features=asked), raising=False)
    rule, sampler = case.make(name)
    with steer(policy, hosts.Target(), rule, sampler=sampler), counted_maps(maps):
        chunk(policy, rows=3)
    for counted, expected in ((passes, case.policy), (maps, case.map)):
        forwards, forward_rows, backwards, backward_rows = expected
        assert (counted.forwards, counted.backwards) == (forwards, backwards)
        assert (counted.forward_rows, counted.backward_rows) == (3 * forward_rows, 3 * backward_rows)
    if name != "plain":
        assert len(prefixes) == 1
        assert len(features) == (case.map[0] > 0)


def test_no_step_leaves_a_graph_or_rows_in_a_cache(policy: nn.Module, name: str, case: Case):
    """Neither in the context that the next step reads, nor in its repetitions."""
    seen: list = []
    rule, sampler = case.make(name)
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        chunk(policy)
    field, value, noise = seen[0]
    qsteer.sample(field, value, noise, rule=rule, sampler=sampler)
    fields = [field, *field._repeats.values()]
    for part in fields:
        held = leaves(part.context)
        assert held
        assert not any(tensor.requires_grad for tensor in held)
        if name != "plain":
            prefix = part.context["prefix_pad_masks"].shape[1]
            assert {layer.values.shape[2] for layer in part.context["past_key_values"].layers} == {prefix}


def leaves(context: dict[str, Any]) -> list[Tensor]:
    cache = getattr(context.get("past_key_values"), "layers", ())
    parts = [context, [(layer.keys, layer.values) for layer in cache]]
    return [t for t in torch.utils._pytree.tree_leaves(parts) if isinstance(t, Tensor)]


def test_memory_is_flat(policy: nn.Module, name: str):
    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    hosts.set_steps(policy, 3)
    methods = [case.make(name) for case in CASES.values()]
    with steer(policy, hosts.Target()) as handle:

        def act() -> None:
            for rule, sampler in methods:
                handle.swap(rule=rule, sampler=sampler)
                chunk(policy, rows=1)

        act()
        gc.collect()
        gc.disable()  # flat without the collector's help
        try:
            count = tensors()
            for _ in range(3):
                act()
            assert tensors() == count
        finally:
            gc.enable()


def test_learnt_maps_keep_their_gradients_to_themselves(policy: nn.Module, name: str):
    meta = meta_map(name)
    with steer(policy, hosts.Target(), qsteer.Posterior(meta, **STRONG)):
        chunk(policy)
    assert all(p.requires_grad and p.grad is None for p in meta.parameters())


IDLE = {
    "Posterior": (qsteer.Posterior(GlassPosterior(), alpha=0.0), None),
    "GradientFreePosterior": (qsteer.GradientFreePosterior(GlassPosterior(), alpha=0.0), None),
    "BeamSearch": (None, qsteer.BeamSearch(particles=1, rounds=0, eta=0.0)),
    "TrustRegion": (None, qsteer.TrustRegion(eta=0.0, beta=1.0)),
}


@pytest.mark.parametrize("method", IDLE)
def test_at_strength_zero_it_is_the_host_bit_for_bit(policy: nn.Module, method: str):
    batch = hosts.observe(policy, rows=2)
    rule, sampler = IDLE[method]
    for steps in (3, 7, 10):
        hosts.set_steps(policy, steps)
        torch.manual_seed(steps)
        base, state = policy.predict_action_chunk(batch), torch.get_rng_state()
        with steer(policy, hosts.Target(), rule, sampler=sampler):
            torch.manual_seed(steps)
            assert torch.equal(policy.predict_action_chunk(batch), base)
        assert torch.equal(torch.get_rng_state(), state), "the host's own random stream"


def test_the_critic_moves_nothing_that_it_does_not_see(policy: nn.Module, name: str):
    field, value, x = opened(policy)
    mask, t = value.mask.bool(), torch.full((2,), 0.4)
    assert mask.sum() == 4 * 3
    for rule in (
        qsteer.Posterior(GlassPosterior(steps=2), **STRONG),
        qsteer.Posterior(meta_map(name), **STRONG),
        qsteer.GradientFreePosterior(GlassPosterior(steps=2), **STRONG),
    ):
        push = rule(field, value)(x, t) - field(x, t)
        assert (push[:, mask] != 0).all()
        assert (push[:, ~mask] == 0).all()
    base = qsteer.sample(field, value, x)
    for sampler in (qsteer.BeamSearch(1, 1, 0), qsteer.TrustRegion(beta=1.0)):
        moved = qsteer.sample(field, value, x, sampler=sampler) - base
        assert (moved[:, mask] != 0).all()
        assert (moved[:, ~mask] == 0).all()


def test_disagreement_shrinks_the_trust_region(policy: nn.Module):
    torch.manual_seed(0)
    critic = qsteer.Critic(qsteer.CriticConfig(obs_dim=4, action_dim=3, horizon=4, hidden=(32, 32)))
    base = chunk(policy, rows=4)
    moves = []
    for beta in (0.0, 2.0):
        with steer(policy, critic, qsteer.TrustRegion(eta=0.3, beta=beta)):
            moves.append((chunk(policy, rows=4) - base).flatten(1).norm(dim=1))
    assert moves[0] == pytest.approx(0.3, rel=1e-3)
    assert (moves[1] < 0.25).all()
    assert (moves[1] > 0.01).all()


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_a_bfloat16_host_and_a_float32_map(policy: nn.Module, name: str):
    """As checkpoints are run: the map is near what it is on the same host in float32."""
    half, meta, x, t = build(name), meta_map(name), hosts.draw(policy, 2), torch.full((2,), 0.5)
    if name == "smolvla":
        half.model.vlm_with_expert.to(torch.bfloat16)
    else:
        half.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
    hosts.set_steps(half, STEPS)
    fields = [opened(host)[0] for host in (policy, half)]
    assert fields[1].context["past_key_values"].layers[0].values.dtype == torch.bfloat16
    with torch.no_grad():
        fine, coarse = (meta.net(meta.on(field).z, (x, x, x), (t, t, t)) for field in fields)
    assert coarse.dtype == torch.float32
    torch.testing.assert_close(coarse, fine, rtol=0, atol=0.1)
    base = chunk(half)
    for case in ("Posterior of GLASS", "Posterior of a map", "BeamSearch of a flow map"):
        rule, sampler = CASES[case].make(name)
        with steer(half, hosts.Target(), rule, sampler=sampler) as handle:
            assert (chunk(half) - base).abs().max() > 0.05
            assert handle.trace.fallbacks == 0
    assert torch.equal(chunk(half), base)
