"""The latency benchmark: what each way of steering a policy costs, and beside which three denominators.

The *stock* host is the policy's own code, not steered, in the same precision. The *fast* path is qsteer's own
unsteered loop, captured as a CUDA graph (on a CPU: on static buffers). The *roofline* is what the same work
would take at the device's measured best. An overhead that looks small beside a slow host is not a small one.

What is timed is the whole action, by :func:`~qsteer.bench.timing.time_calls`: every method in every round.
Parts, counts, work and memory come from runs of their own, of the same method without compilation.
"""

import platform
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qsteer
from qsteer.bench.counting import Cost, PassesByRows, Saved, count_into, counted_maps, saved_tensors
from qsteer.bench.parts import Marks, Timed, TimedCritic, measure_parts
from qsteer.bench.roofline import Ceilings, Work, counted_work, measure_ceilings
from qsteer.bench.timing import Latency, Timer, peak_memory, reserved_memory, time_calls
from qsteer.compiling.kept import Mode
from qsteer.compiling.runs import EAGER, MismatchError
from qsteer.flow import read_features
from qsteer.maps import FlowMap, GlassPosterior, MapConfig, MetaFlowMap, MetaMapConfig
from qsteer.testing.hosts import STATE, batch, make
from qsteer.types import Bindable, Rule, Sampler

type Method = tuple[Rule | None, Sampler]


@dataclass(frozen=True)
class Subject:
    """What is measured: a frozen policy, a critic on its device, and one batch of observations.

    Attributes:
        policy: any policy that :func:`qsteer.steer` takes, with parameters, of which
            ``predict_action_chunk(batch)`` makes a chunk; it is never changed.
        critic: steers it.
        batch: tensors by name, on the policy's device.
    """

    policy: Any
    critic: Any
    batch: dict[str, Tensor]

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    def action(self) -> Tensor:
        """Return what the policy itself does."""
        return self.policy.predict_action_chunk(self.batch)

    def open(self) -> qsteer.Opened:
        """Return field, value and noise of an action before its first step."""
        return qsteer.open_action(self.policy, self.batch, self.critic)


@dataclass(frozen=True)
class Row:
    """What was found of one method.

    Attributes:
        name: of the method.
        latency: of the whole action.
        parts: times of the parts of an action, and of their sum, the ``whole``, measured apart.
        cost: passes, counted.
        work: FLOPs, bytes and operators, counted.
        saved: tensors that autograd kept.
        predicted: ms that the counted passes take by themselves; None: it has maps or was compiled, and such
            passes were not timed.
        memory: bytes on the device beyond the policy's and the critic's own; None on a CPU.
    """

    name: str
    latency: Latency
    parts: dict[str, Latency] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    work: Work = field(default_factory=Work)
    saved: Saved = field(default_factory=Saved)
    predicted: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Report:
    """What was found of all methods.

    Attributes:
        conditions: what it was measured on and how.
        ceilings: the device's measured best.
        stock: the policy's own code, not steered.
        fast: our own unsteered path; None: see ``left_out``.
        rows: the methods.
        left_out: why a method, or the fast path, could not be measured, by name.
    """

    conditions: dict[str, Any]
    ceilings: Ceilings
    stock: Row
    fast: Row | None
    rows: list[Row]
    left_out: dict[str, str]


def make_subject(
    host: str,
    size: str = "small",
    *,
    cameras: int = 2,
    chunk: int = 10,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    views: bool = False,
    rows: int = 1,
    seed: int = 0,
) -> Subject:
    """Return a random policy with a random critic and random observations.

    Args:
        host: see :func:`qsteer.testing.hosts.make`, also for ``size``, ``cameras``, ``chunk``, ``device``,
            ``dtype`` and the errors.
        size: of the policy.
        cameras: number of images.
        chunk: actions of a chunk.
        device: of all.
        dtype: of the policy; the critic is float32.
        views: whether the critic sees the images too: QPILOTS' critic for LIBERO, 10 members of widths
            (128, 128, 128); else the demonstration's, 4 members of widths (256, 256, 256) on the state.
        rows: observations at once.
        seed: of weights and observations.

    Raises:
        ValueError: the MLP has no images to see.
    """
    policy: Any = make(host, size, cameras=cameras, chunk=chunk, device=device, dtype=dtype, seed=seed)
    observations = batch(policy, rows, seed)
    images = tuple(name for name in observations if "image" in name)
    if views and not images:
        raise ValueError(f"views: expected a policy with cameras, got {host}; take pi05, or views=False")
    shape: dict[str, Any] = {"hidden": (128,) * 3, "members": 10, "views": images} if views else {}
    spec = qsteer.adapters.host_of(policy)
    config = qsteer.CriticConfig(
        obs_dim=observations[STATE].shape[-1],
        action_dim=spec.action_dim(policy),
        horizon=spec.read(policy, spec.executed),
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = qsteer.Critic(config)
    return Subject(policy, critic.to(device).requires_grad_(False), observations)


def list_methods(subject: Subject) -> dict[str, Method]:
    """Return the methods of QPILOTS' table of latencies, and more; learnt maps are untrained ones."""
    meta, flow = make_maps(subject)
    glass = GlassPosterior(steps=4)
    euler, host = qsteer.Euler(), qsteer.adapters.host_of(subject.policy)
    depth = 0 if host.layers is None else len(host.read(subject.policy, host.layers))
    half = {"Tweedie, half the layers": (qsteer.Tweedie(layers=depth // 2), euler)} if depth > 1 else {}
    return {
        "unsteered": (None, euler),
        "Tweedie": (qsteer.Tweedie(), euler),
        "Tweedie, every 2nd step": (qsteer.Tweedie(every=2), euler),
        **half,
        "ForwardTweedie": (qsteer.ForwardTweedie(), euler),
        "ForwardTweedie, stale": (qsteer.ForwardTweedie(stale=True), euler),
        "QGF": (qsteer.QGF(), euler),
        "Posterior(map), N=4": (qsteer.Posterior(meta, samples=4), euler),
        "Posterior(GLASS), N=4": (qsteer.Posterior(glass, samples=4), euler),
        "BestOfN(5)": (None, qsteer.BestOfN(5)),
        "BestOfN(20)": (None, qsteer.BestOfN(20)),
        "BeamSearch(4, 4, 1)": (None, qsteer.BeamSearch(4, 4, 1)),
        "BeamSearch, flow map": (None, qsteer.BeamSearch(4, 4, 1, flow_map=flow)),
    }


def make_maps(subject: Subject) -> tuple[MetaFlowMap, FlowMap]:
    """Return untrained maps for a policy: MLPs, or transformers of width 256 and depth 4 on its tokens."""
    opened = subject.open()
    features, noise = read_features(opened.field), opened.noise
    options: dict[str, Any] = {"horizon": noise.shape[1], "action_dim": noise.shape[2]}
    if isinstance(features, Tensor):
        options |= {"features": features.shape[-1]}
    else:
        tokens = features[0]
        options |= {"features": tokens.shape[-1], "network": "transformer", "width": 256, "depth": 4}
    with torch.random.fork_rng(devices=[]):
        made = MetaFlowMap(MetaMapConfig(**options)), FlowMap(MapConfig(**options))
    for network in made:
        network.to(subject.device).requires_grad_(False)
    return made


def copy_sharing_weights(policy: nn.Module) -> Any:
    """Return a frozen copy of a policy on the same memory, to be steered for good; the other is untouched."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in policy.buffers()}
    for parameter in policy.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return deepcopy(policy, shared)


def steer_copy(
    subject: Subject, method: Method, *, critic: Bindable | None = None, mode: Mode | None = None
) -> Callable[[], Tensor]:
    """Return the call that makes an action under a method, on a copy of the policy on the same weights.

    Args:
        subject: what is steered.
        method: rule and sampler.
        critic: another critic than the subject's.
        mode: how it is compiled, see :func:`qsteer.steer`; None: not at all.

    Raises:
        TypeError, ValueError: the policy cannot be compiled so, see :func:`qsteer.steer`.
        MismatchError: Inductor does not compile it.
    """
    rule, sampler = method
    policy, critic = copy_sharing_weights(subject.policy), subject.critic if critic is None else critic
    handle = qsteer.steer(policy, critic, rule, sampler=sampler, compile=mode)
    act = partial(policy.predict_action_chunk, subject.batch)
    if mode == "inductor":
        act()
        handle.finish_compiling()
        act()  # which checks what was compiled
        if failed := [state for state in handle.kinds if state.startswith(EAGER)]:
            raise MismatchError(f"inductor: expected a compiled action, got one that {failed[0]}")
    return act


def choose_fast_mode(device: torch.device) -> Mode:
    """Return how the fast unsteered path is compiled on a device."""
    return "graph" if device.type == "cuda" else "static"


def measure(
    subject: Subject,
    methods: Mapping[str, Method],
    *,
    mode: Mode | None = None,
    repeats: int = 50,
    warmup: int = 5,
    timer: Timer | None = None,
    seed: int = 0,
) -> Report:
    """Measure what steering costs.

    Torch's threads, precision and allocator are used as they are found, and reported.

    Args:
        subject: the policy, its critic and the observations.
        methods: rule and sampler by name.
        mode: how the methods are compiled, ``"static"``, ``"graph"`` or ``"inductor"``; None: not at all. One
            that cannot be is left out with the reason.
        repeats: timed rounds; a p99 takes 100 or more.
        warmup: rounds before them.
        timer: see :func:`~qsteer.bench.timing.time_calls`.
        seed: of the order in the rounds.

    Raises:
        ValueError: the policy's own action is not finite, its device is not the current one, or a number is
            out of its range.
    """
    device = subject.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ValueError(
            f"policy: expected the current device, {torch.cuda.current_device()}, got {device}: times are "
            "taken on the former; call torch.cuda.set_device first"
        )
    if not torch.isfinite(subject.action()).all():
        raise ValueError("policy: expected finite actions, got others: nothing measured on them counts")
    calls: dict[str, Callable[[], object]] = {"stock": subject.action}
    left_out: dict[str, str] = {}
    held: dict[str, int] = {}
    fast = f"unsteered, {choose_fast_mode(device)}"
    for name, method, how in (
        (fast, (None, qsteer.Euler()), choose_fast_mode(device)),
        *((name, method, mode) for name, method in methods.items()),
    ):
        stood = reserved_memory(device)
        try:
            call = steer_copy(subject, method, mode=how)
            call()  # a capture that is refused is refused here
        except (MismatchError, TypeError, ValueError) as error:
            if how is None:
                raise
            left_out[name] = (str(error) or repr(error)).splitlines()[0]
        else:
            calls[name], held[name] = call, reserved_memory(device) - stood
    kept = {name: method for name, method in methods.items() if name in calls}
    counts = {name: count_method(subject, method) for name, method in kept.items()}
    counts["stock"] = count_method(subject, (None, qsteer.Euler()), subject.action)
    passes = {} if mode else list_single_passes(subject, [cost for cost, _, _ in counts.values()])
    rounds: dict[str, Any] = {"repeats": repeats, "warmup": warmup, "timer": timer}
    times = time_calls(calls | passes, **rounds, seed=seed)
    parts = {name: time_parts(subject, method, **rounds) for name, method in kept.items()}
    memory = {name: peak_memory(calls[name], device, held.get(name, 0)) for name in calls}
    dtypes = sorted({dtype for _, work, _ in counts.values() for dtype in work.dtypes}, key=str)

    def row(name: str, like: str) -> Row:
        expected = predict(counts[like][0], counts["stock"][0], times) if passes and like != "stock" else None
        return Row(name, times[name], parts.get(like, {}), *counts[like], expected, memory[name])

    return Report(
        conditions=describe_conditions(subject) | {"compile": mode, "repeats": repeats, "warmup": warmup},
        ceilings=measure_ceilings(device, dtypes),
        stock=row("stock", "stock"),
        fast=row(fast, "stock") if fast in times else None,
        rows=[row(name, name) for name in kept],
        left_out=left_out,
    )


def count_method(
    subject: Subject, method: Method, action: Callable[[], object] | None = None
) -> tuple[Cost, Work, Saved]:
    """Count what a method evaluates, without compilation; ``action``: another call that does the same."""
    cost = Cost(PassesByRows(), PassesByRows(), PassesByRows())
    watched = steer_copy(subject, (None, count_into(cost, *method)))
    with counted_maps(cost.map):
        watched()
    plain = action or steer_copy(subject, method)
    with counted_work() as work:
        plain()
    with saved_tensors() as saved:
        plain()
    return cost, work, saved


def time_parts(
    subject: Subject, method: Method, *, repeats: int = 20, warmup: int = 3, timer: Timer | None = None
) -> dict[str, Latency]:
    """Time the parts of an action under a method, without compilation.

    Returns:
        See :func:`~qsteer.bench.parts.measure_parts`.
    """

    def action(marks: Marks) -> Callable[[], object]:
        timed = Timed.of(*method, marks)
        return steer_copy(subject, (None, timed), critic=TimedCritic(subject.critic, marks))

    given = {} if timer is None else {"timer": timer}
    return measure_parts(action, device=subject.device, repeats=repeats, warmup=warmup, **given)


def list_single_passes(subject: Subject, costs: Iterable[Cost]) -> dict[str, Callable[[], object]]:
    """Return each kind of pass that is counted in ``costs`` as a call of its own, by the names of predict.

    A forward of the policy or the critic without a graph, one with a graph and its backward, on as many rows
    as they were counted with; and the critic's encoder.
    """
    opened, value, noise = subject.open()
    kinds = sorted({kind for cost in costs for kind in _split_passes(cost, len(noise))})
    calls = {str(kind): _make_pass(opened if kind[0] == "policy" else value, noise, *kind) for kind in kinds}
    return calls | {"bind": partial(subject.critic.bind, subject.batch)}


def predict(cost: Cost, stock: Cost, times: Mapping[str, Latency]) -> float | None:
    """Return the ms which a method should take if it did no more than the passes it counts.

    That is the stock host's time, less its own forwards, and the method's passes, each as it takes by itself
    in the same rounds (:func:`list_single_passes`). What is measured beyond that is hidden cost: the rule's
    arithmetic, autograd, the interpreter. None: there are learnt maps, whose passes are not timed.
    """
    if cost.map.forwards:
        return None
    batch = stock.field.forward_rows // stock.field.forwards

    def total(passes: Mapping[tuple[str, int, bool], int]) -> float:
        return sum(n * times[str(kind)].p50 for kind, n in passes.items())

    start = times["stock"].p50 - total(_split_passes(stock, batch)) + times["bind"].p50
    return start + total(_split_passes(cost, batch))


def _split_passes(cost: Cost, batch: int) -> dict[tuple[str, int, bool], int]:
    """Return how many passes of which network, on how many rows per observation, with a backward or not."""
    found = {}
    for name, passes in (("policy", cost.field), ("critic", cost.value)):
        if isinstance(passes, PassesByRows):
            for rows, n in passes.forwards_of.items():
                backwards = passes.backwards_of[rows]
                found[name, rows // batch, True], found[name, rows // batch, False] = backwards, n - backwards
    return {kind: n for kind, n in found.items() if n}


def _make_pass(network: Any, noise: Tensor, kind: str, rows: int, backward: bool) -> Callable[[], object]:
    """Return a call of one pass on ``rows`` rows per observation."""
    network = network.repeat(rows) if rows > 1 else network
    x = noise.repeat_interleave(rows, 0)

    def call() -> None:
        with torch.set_grad_enabled(backward):
            entered = x.detach().requires_grad_(backward)
            out = network(entered, 0.5) if kind == "policy" else network(entered)
            if backward:
                torch.autograd.grad(out.sum(), entered)

    return call


def describe_conditions(subject: Subject) -> dict[str, Any]:
    """Return what a measurement depends on."""
    policy, device, noise = subject.policy, subject.device, subject.open().noise
    on_gpu, host = device.type == "cuda", qsteer.adapters.host_of(policy)
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    return {
        "policy": type(policy).__name__,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "precisions": sorted({str(p.dtype).removeprefix("torch.") for p in policy.parameters()}),
        "images": [list(image.shape) for name, image in subject.batch.items() if "image" in name],
        "noise": list(noise.shape),
        "executed": host.read(policy, host.executed),
        "critic": str(getattr(subject.critic, "config", type(subject.critic).__name__)),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
    }
