"""Posterior samples and learnt maps on lerobot's own code: what they compute, and what they cost."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import hosts
import pytest
import torch
from fields import as_installed
from torch import Tensor, nn

import qsteer
from qsteer.adapters import host_of
from qsteer.bench.counting import Passes, count, counted_maps
from qsteer.hosts import Host
from qsteer.maps import (
    EulerMap,
    FlowMap,
    GlassPosterior,
    MapConfig,
    MetaFlowMap,
    MetaMapConfig,
)
from qsteer.steering.handle import steer, unsteer

H, A, STEPS, N = 6, 5, 3, 4
GUIDED = STEPS - 1
LAST = 2  # of 3 steps, those which a beam's branch is completed with: ceil(0.4 * 3)


@pytest.fixture(params=hosts.HOSTS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def policy(name: str) -> Iterator[nn.Module]:
    policy = shared(name)
    hosts.set_steps(policy, STEPS)
    yield policy
    unsteer(policy)


class Plain(hosts.Plain):
    """Says which part of its observation a learnt map reads."""

    @property
    def __qsteer_host__(self) -> Host:
        return replace(super().__qsteer_host__, features=lambda context: context["obs"]["observation.state"])


def build(name: str) -> nn.Module:
    return Plain(0) if name == "plain" else hosts.build(name)


_shared: dict[str, nn.Module] = {}


def shared(name: str) -> nn.Module:
    """One host per process, for tests that leave it as they found it."""
    return _shared.setdefault(name, build(name))


def chunk(policy: nn.Module, rows: int = 2, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return policy.predict_action_chunk(
        hosts.observe(policy, rows, seed), noise=hosts.draw(policy, rows, seed)
    )


def opened(
    policy: nn.Module, batch: dict[str, Tensor] | None = None, rows: int = 2
) -> tuple[Any, Any, Tensor]:
    """Field, value and noise of one action."""
    seen: list = []
    batch = hosts.observe(policy, rows) if batch is None else batch
    with steer(policy, hosts.Target(), hosts.Spy(seen)):
        policy.predict_action_chunk(batch, noise=hosts.draw(policy, len(batch["observation.state"])))
    return seen[0]


SIZES = {"pi0": (9 + 1, 12), "pi05": (9, 12), "smolvla": (10, 24), "plain": (4,)}
"""Tokens (4 of the image, 5 of the prompt, 1 of the state) and their features."""


def scramble(network: nn.Module) -> nn.Module:
    """Draw all weights: as initialised, zero gates would hide the observation."""
    torch.manual_seed(7)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return network.eval()


def config(name: str, kind: type[MapConfig] = MetaMapConfig, **arguments: Any) -> Any:
    small = {"width": 16, "depth": 2, "heads": 2, "hidden": (32, 32), "harmonics": 4}
    return kind(
        *shared(name).action_shape if name == "plain" else (H, A),
        features=SIZES[name][-1],
        network="mlp" if name == "plain" else "transformer",
        **small | arguments,
    )


def meta_map(name: str, residual: bool = True) -> MetaFlowMap:
    return scramble(MetaFlowMap(config(name, residual=residual)))


def flow_map(name: str) -> FlowMap:
    return scramble(FlowMap(config(name, MapConfig)))


# Every method


@dataclass(frozen=True)
class Case:
    """A method, and its passes per action: (forwards, rows per observation, backwards, rows)."""

    make: Callable[[str], tuple[qsteer.types.Rule | None, qsteer.types.Sampler]]
    policy: tuple[int, int, int, int]
    map: tuple[int, int, int, int] = (0, 0, 0, 0)


def rule(make: Callable[[str], Any], sampler: qsteer.types.Sampler | None = None) -> Callable[[str], Any]:
    return lambda name: (make(name), sampler or qsteer.Euler())


STRONG = {"alpha": 0.4, "samples": N, "clip": None}
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


def test_the_euler_map_is_the_hosts_chain_bit_for_bit(policy: nn.Module):
    times = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for steps in (3, 7, 10):
        hosts.set_steps(policy, steps)
        base = chunk(policy)
        field, _, noise = opened(policy)
        with torch.no_grad():
            assert torch.equal(EulerMap(field)(noise, *times)[..., : base.shape[-1]], base)
            three = noise.repeat_interleave(3, 0)
            rows = EulerMap(field).repeat(3)(three, *(t.repeat_interleave(3) for t in times))
        torch.testing.assert_close(rows[::3, :, : base.shape[-1]], base, rtol=0, atol=2e-6)


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


# What posterior samples compute


def test_glass_samples_are_single_runs(policy: nn.Module):
    """N rows on a repeated context equal N runs alone, each on its own observation."""
    field, _, x = opened(policy)
    eps, t = torch.randn(3, *x.shape), torch.tensor([0.3, 0.7], dtype=torch.float64)
    with torch.no_grad():
        together = GlassPosterior(field)(eps, x, t)
        known = GlassPosterior(field).given(field(x, t), eps, x, t)
        alone = torch.cat([GlassPosterior(field)(eps[n : n + 1], x, t) for n in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=5e-6)
    torch.testing.assert_close(together, known, rtol=0, atol=5e-6)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("kind", ["GLASS of one step", "an untrained residual map"])
def test_without_spread_posterior_is_tweedie(policy: nn.Module, name: str, kind: str):
    posterior = GlassPosterior(steps=1) if kind == "GLASS of one step" else MetaFlowMap(config(name))
    base, chunks = chunk(policy), []
    for rule in (qsteer.Tweedie(alpha=0.4), qsteer.Posterior(posterior, alpha=0.4, samples=N)):
        with steer(policy, hosts.Target(), rule):
            chunks.append(chunk(policy))
    assert (chunks[0] - base).abs().max() > 0.05
    torch.testing.assert_close(chunks[0], chunks[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["glass", "map"])
def test_law_08_the_posteriors_gradient_is_the_true_one(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
):
    """Against central differences of ``log mean_n exp Q(x1_n)`` at fixed noise, through the host's own code.

    Hosts cast to float32 on the way. Here that is a name for float64: they compute in double precision.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    policy, seen = build(name).double(), []
    batch = {
        key: value.double() if value.is_floating_point() else value
        for key, value in hosts.observe(policy).items()
    }
    with steer(policy, hosts.Target().double(), hosts.Spy(seen)):
        policy.predict_action_chunk(batch, noise=hosts.draw(policy).double())
        field, value, noise = seen[0]
        posterior = GlassPosterior(field, steps=3) if sampler == "glass" else meta_map(name).double()
        rule = qsteer.Posterior(
            posterior, alpha=1.0, samples=N, scaling="raw", clip=None, standardize=False, tau=0.3
        )
        bound = rule.on(field).posterior
        for time, x in ((0.2, noise), (0.7, 0.5 * noise)):
            t = torch.tensor([time], dtype=torch.float64)
            torch.manual_seed(0)
            push = (rule(field, value)(x, t) - field(x, t))[0]
            torch.manual_seed(0)
            eps = torch.randn(N, *x.shape, dtype=torch.float64)

            def potential(x: Tensor, t: Tensor = t, eps: Tensor = eps) -> Tensor:
                q = torch.cat([value(sample) for sample in bound(eps, x, t)])
                return (0.3 * q).logsumexp(0)

            differences = torch.zeros_like(x[0])
            for i, j in value.mask.nonzero().tolist():
                nudge = torch.zeros_like(x)
                nudge[0, i, j] = 1e-5
                with torch.no_grad():
                    differences[i, j] = (potential(x + nudge) - potential(x - nudge)) / 2e-5
            error = (push - differences).norm() / differences.norm()
            tweedie = qsteer.Tweedie(alpha=1.0, scaling="raw", clip=None)(field, value)
            apart = (push - 0.3 * (tweedie(x, t) - field(x, t))[0]).norm() / push.norm()
            print(f"{name} t={time}: error {error:.1e}, samples are not their mean: {apart:.2f}")
            assert push.dtype == torch.float64
            assert error < 1e-7
            assert apart > 0.02


# What learnt maps see


def test_features_have_their_shapes(policy: nn.Module, name: str):
    features = opened(policy)[0].features
    if name == "plain":
        assert torch.equal(features, hosts.observe(policy, 2)["observation.state"])
        return
    tokens, mask = features
    assert tokens.shape == (2, *SIZES[name])
    assert mask.shape == tokens.shape[:2]
    assert mask.dtype == torch.bool
    assert mask.all()
    assert not tokens.requires_grad
    assert (tokens.flatten(0, 1).std(0) > 0.01).any()


def test_features_tell_observations_apart(policy: nn.Module, name: str):
    """Each part of the observation that the velocity follows, the learnt map can follow too."""
    batch = hosts.observe(policy, 2)
    idle = {"observation.state"} if name == "pi05" else set()  # pi0.5 reads the state as text
    x, t = hosts.draw(policy, 2), torch.full((2,), 0.5)
    eps, meta = x[None], meta_map(name, residual=False)
    with torch.no_grad():
        base = meta.on(opened(policy, batch)[0])(eps, x, t)
        for key in batch.keys() - {"observation.language.attention_mask"}:
            other = meta.on(opened(policy, batch | {key: batch[key].flip(0)})[0])(eps, x, t)
            assert torch.equal(other, base) == (key in idle), key


@pytest.mark.parametrize("name", ["pi0", "smolvla"])
def test_features_keep_the_scale_of_the_state(policy: nn.Module, name: str):
    batch = hosts.observe(policy, 2)
    batch["observation.state"][1] = 2 * batch["observation.state"][0]
    for key in batch.keys() - {"observation.state"}:
        batch[key][1] = batch[key][0]
    x, t = hosts.draw(policy, 1).expand(2, -1, -1), torch.full((2,), 0.5)
    with torch.no_grad():
        a, b = meta_map(name, residual=False).on(opened(policy, batch)[0])(x[None], x, t)[0]
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("name", hosts.LEROBOT)
def test_padding_is_not_read(policy: nn.Module, name: str):
    batch = hosts.observe(policy, 2)
    words, present = "observation.language.tokens", "observation.language.attention_mask"
    batch[present][:, -2:] = False
    x, t = hosts.draw(policy, 2), torch.full((2,), 0.5)
    meta = meta_map(name, residual=False)

    def samples(word: int | None) -> Tensor:
        tokens = batch[words].clone()
        if word is not None:
            tokens[:, word] = (tokens[:, word] + 1) % 64
        field = opened(policy, batch | {words: tokens})[0]
        tokens, mask = field.features
        assert (~mask).sum(1).tolist() == [2, 2]
        with torch.no_grad():
            return meta.on(field)(x[None], x, t)

    base = samples(None)
    torch.testing.assert_close(samples(-1), base, rtol=0, atol=1e-6)
    assert not torch.allclose(samples(0), base, rtol=0, atol=1e-3)


def test_rows_belong_to_their_observation(policy: nn.Module, name: str):
    """A batch of two gives what each gives alone; rows b*k .. b*k+k-1 of a repetition are observation b's."""
    batch = hosts.observe(policy, 2)
    x, t = hosts.draw(policy, 2), torch.tensor([0.3, 0.6], dtype=torch.float64)
    eps = torch.randn(3, *x.shape)
    both = opened(policy, batch)[0]
    single = [opened(policy, {k: v[b : b + 1] for k, v in batch.items()})[0] for b in range(2)]
    meta, jump = meta_map(name), flow_map(name)
    with torch.no_grad():
        samples = meta.on(both)(eps, x, t)
        alone = torch.cat([meta.on(f)(eps[:, [b]], x[[b]], t[[b]]) for b, f in enumerate(single)], 1)
        torch.testing.assert_close(samples, alone, rtol=0, atol=1e-5)
        swapped = meta.on(single[0])(eps[:, [1]], x[[1]], t[[1]])
        assert not torch.allclose(swapped, alone[:, [1]], rtol=0, atol=1e-3), "the observation matters"

        k_x, k_t = eps.transpose(0, 1).flatten(0, 1), t.repeat_interleave(3)
        alone = torch.cat(
            [
                jump.on(f).repeat(3)(k_x[3 * b : 3 * b + 3], *[k_t[3 * b : 3 * b + 3], torch.ones(3)])
                for b, f in enumerate(single)
            ]
        )
        for repeated in (jump.on(both).repeat(3), jump.on(both.repeat(3))):
            torch.testing.assert_close(repeated(k_x, k_t, torch.ones(6)), alone, rtol=0, atol=1e-5)


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


def test_features_that_no_map_can_read_are_refused():
    field, _, _ = opened(hosts.shared("plain"))
    with as_installed(), pytest.raises(ValueError, match=r"got HostField with dict.*Host.features"):
        meta_map("plain").on(field)
    mute = replace(field, host=replace(field.host, features=None))
    with as_installed(), pytest.raises(ValueError, match=r"got HostField without.*Host.features"):
        meta_map("plain").on(mute)
