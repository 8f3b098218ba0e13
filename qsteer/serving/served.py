"""Policies as a server has them: a batch of checked requests becomes decisions, each row on its own.

What a request is answered depends on its observation and its seed, and not on who shares the batch: each row
draws from a generator of its own (:mod:`qsteer.randomness`), and methods that mix rows are refused. Kernels
for other numbers of rows round otherwise, in the last bits: ``exact`` always computes the same number.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from qsteer.adapters import contract_of
from qsteer.contract import Contract
from qsteer.critics import Critic, LiveCritic
from qsteer.flow import ask, ask_members, spread
from qsteer.online.actors import HostActor
from qsteer.policies import FlowPolicy
from qsteer.randomness import seeded
from qsteer.samplers import Euler, TrustRegion
from qsteer.sampling import acting, chain_of, nested, rms, sample
from qsteer.serving.requests import Decision, Interface, Request, Seen
from qsteer.steering.handle import Handle
from qsteer.trace import Step, Trace
from qsteer.types import Field, Observation, Rule, Sampler, Value


class Planned(NamedTuple):
    """Chunks of B observations.

    Attributes:
        executed: (B, H, A), in the environment's units.
        actions: (B, H, A), in the policy's, without padding.
        observations: what the critic saw; None: it is not kept, for no critic learns.
    """

    executed: np.ndarray
    actions: Tensor
    observations: Observation | None = None

    def seen(self, row: int) -> Seen | None:
        """Return what a critic that learns keeps of a row."""
        if self.observations is None:
            return None
        return tree_map(itemgetter(slice(row, row + 1)), Seen(self.observations, self.actions))


@dataclass(frozen=True)
class Judged(Sampler):
    """A sampler whose last actions are judged by the critic, and compared with their unsteered twins.

    Cost: that of ``inner``, 1 critic forward, and for the displacement of a steered action one more chain.

    Attributes:
        inner: makes the actions.
        displacement: whether they are compared.
        found: of each row of the last actions: value, disagreement and displacement, None without one.
    """

    inner: Sampler
    displacement: bool = True
    found: dict[str, Tensor | None] = field(default_factory=dict, compare=False)

    def __call__(
        self, field: Field, value: Value | None, noise: Float[Tensor, "B H A"]
    ) -> Float[Tensor, "B H A"]:
        """Return the inner sampler's actions."""
        assert value is not None
        actions = self.inner(field, value, noise)
        with torch.no_grad():
            self.found["value"] = ask(value, actions)
            self.found["disagreement"] = spread(ask_members(value, actions))
            self.found["displacement"] = self._moved(field, value, noise, actions)
        return actions

    def _moved(self, field: Field, value: Value, noise: Tensor, actions: Tensor) -> Tensor | None:
        if not self.displacement:
            return None
        if field is field.base and isinstance(self.inner, Euler):
            return torch.zeros(len(noise))
        return rms(actions - chain_of(self.inner)(field.base, None, noise), value.mask)


class Served(ABC):
    """A frozen policy, a critic and a method, behind a server.

    Attributes:
        interface: what the policy gets and gives.
        rule: bends the velocity; None: nothing does.
        sampler: makes the action.
        exact: each call computes this number of rows, so that a reply is the same to the bit whoever shares
            it; None: as many as are asked for.
        trace: counts fallbacks.
    """

    def __init__(
        self,
        interface: Interface,
        rule: Rule | None,
        sampler: Sampler,
        *,
        exact: int | None = None,
        displacement: bool = True,
    ) -> None:
        check_rows(sampler)
        self.interface = replace(interface, exact=exact is not None)
        self.exact, self.displacement = exact, displacement
        self.trace = Trace(keep=1, displacement=False)
        self.steer(rule, sampler)

    @property
    def live(self) -> LiveCritic | None:
        """The critic, if one that learns can renew it."""
        return None

    @property
    def policy_contract(self) -> Contract:
        """What the policy was trained on, for a critic that learns from it."""
        return Contract()

    def steer(self, rule: Rule | None, sampler: Sampler) -> None:
        """Choose how to act from the next call on; called in the thread that acts."""
        self.rule, self.sampler = rule, sampler
        self._judged = Judged(sampler, self.displacement)

    def act(self, requests: Sequence[Request]) -> list[Decision | Exception]:
        """Return a decision for each request of one key.

        A row whose actions are not finite is an error of its own.

        Cost: an action of so many rows; where a twin is asked for, an unsteered action of those rows.
        """
        rows = self._padded(requests)
        self.trace.actions.clear()
        planned = self._plan(rows, self.rule, self._judged)
        actions = planned.executed
        strengths = mean_strength(self.trace.actions[-1] if self.trace.actions else [], len(rows))
        columns = {
            name: None if column is None else column.tolist() for name, column in self._judged.found.items()
        }
        asking = [i for i, request in enumerate(requests) if request.unsteered_twin]
        twins: dict[int, np.ndarray] = {}
        if asking:
            twin = self._plan(self._padded([requests[i] for i in asking]), None, chain_of(self.sampler))
            twins = dict(zip(asking, twin.executed, strict=False))
        decisions: list[Decision | Exception] = []
        for i, request in enumerate(requests):
            judged = {name: None if column is None else column[i] for name, column in columns.items()}
            if np.isfinite(actions[i]).all():
                own: Any = judged | {"strength": strengths[i], "seed": request.seed, "seen": planned.seen(i)}
                decisions.append(Decision(actions[i], **own, unsteered_actions=twins.get(i)))
            else:
                decisions.append(FloatingPointError(f"policy: expected finite actions, got {actions[i]}"))
        return decisions

    def warm_up(self) -> None:
        """Act once, so that the first robot does not wait.

        With ``exact`` that is where it is tried: rows of one observation must be equal to the bit wherever
        they lie in the batch, and whatever lies beside them.

        Raises:
            RuntimeError: they are not.
        """
        first = self.interface.example()
        (alone,) = self.act([first])
        if isinstance(alone, Exception):
            raise alone
        if self.exact is None:
            return
        for odd in (0, 1):
            rows = [first if i % 2 == odd else self.interface.example(i + 1) for i in range(self.exact)]
            for found in self.act(rows)[odd::2]:
                if isinstance(found, Exception) or not found.equals(alone):
                    raise RuntimeError(
                        "exact: expected a row to be the same to the bit beside any others, got another on "
                        "this device; leave --exact out, or use --max-batch 1"
                    )

    @abstractmethod
    def _plan(self, requests: Sequence[Request], rule: Rule | None, sampler: Sampler) -> Planned:
        """Return chunks by a method."""

    def _padded(self, requests: Sequence[Request]) -> list[Request]:
        """Return as many requests as are computed: the last one again."""
        return [*requests, *[requests[-1]] * ((self.exact or 0) - len(requests))]


class ServedStates(Served):
    """A :class:`~qsteer.policies.FlowPolicy` on states.

    Args:
        policy: frozen.
        critic: on its device.
        rule: see :class:`Served`.
        sampler: its chain clips to the policy's bounds.
        interface: with one input, the state.
        exact: see :class:`Served`.
        displacement: whether replies say it.

    Raises:
        ValueError: the critic cannot steer the policy, or the sampler mixes rows.
    """

    def __init__(
        self,
        policy: FlowPolicy,
        critic: Critic | LiveCritic,
        rule: Rule | None,
        sampler: Sampler,
        interface: Interface,
        *,
        exact: int | None = None,
        displacement: bool = True,
    ) -> None:
        policy.check_critic(critic.config)
        super().__init__(interface, rule, sampler, exact=exact, displacement=displacement)
        self.policy, self.critic = policy, critic

    @property
    def live(self) -> LiveCritic | None:
        """The critic, if one that learns can renew it."""
        return self.critic if isinstance(self.critic, LiveCritic) else None

    @property
    def policy_contract(self) -> Contract:
        """What the policy was trained on."""
        return self.policy.contract

    def _plan(self, requests: Sequence[Request], rule: Rule | None, sampler: Sampler) -> Planned:
        (key,) = requests[0].observation
        obs = stacked(requests, key).to(self.policy.first.weight)
        with seeded([request.seed for request in requests]), acting(self.critic):
            policy_field, value = self.policy.field(obs), self.critic.bind(obs)
            like = obs.new_zeros(len(obs), self.policy.config.horizon, self.policy.config.action_dim)
            noise = policy_field.draws(like, 1)[:, 0]
            trace = self.trace if sampler is self._judged else None
            actions = sample(policy_field, value, noise, rule=rule, sampler=sampler, trace=trace)
        return Planned(actions.float().cpu().numpy(), actions, None if self.live is None else obs)


class ServedHost(Served):
    """A steered host, between its pre- and postprocessor. A policy without a velocity acts row by row.

    Args:
        handle: what steers it; the server uses its policy alone from now on.
        interface: what the policy gets and gives.
        preprocess: turns a batch of observations, images in [0, 1] and instructions under ``"task"``, into
            the policy's; lerobot's preprocessor.
        postprocess: turns (B, A) steps of the policy into the environment's; lerobot's postprocessor.
        predict: asks the steered policy for chunks; None: its ``predict_action_chunk``.
        actor: of the handle, for a critic that learns; None: none does.
        exact: see :class:`Served`.
        displacement: whether replies say it.

    Raises:
        ValueError: the sampler mixes rows, the policy keeps a history of observations, or the handle acts by
            a fast path, which computes one shape of batch.
    """

    def __init__(
        self,
        handle: Handle,
        interface: Interface,
        preprocess: Callable[[dict[str, Any]], Any],
        postprocess: Callable[[Tensor], Tensor],
        *,
        predict: Callable[[Any], Tensor] | None = None,
        actor: HostActor | None = None,
        exact: int | None = None,
        displacement: bool = True,
    ) -> None:
        if handle.compile is not None:
            raise ValueError(
                f"handle: expected one that acts eagerly, got compile={handle.compile!r}, which is compiled "
                "for one number of robots; steer without compile"
            )
        history = getattr(getattr(handle.policy, "config", None), "n_obs_steps", 1)
        if history > 1:
            raise ValueError(
                f"policy: expected one that acts on the latest observation, got n_obs_steps={history}: the "
                "protocol does not say when an episode begins; train it with n_obs_steps=1"
            )
        super().__init__(interface, handle.rule, handle.sampler, exact=exact, displacement=displacement)
        self.handle, self.preprocess, self.postprocess = handle, preprocess, postprocess
        self.predict = handle.policy.predict_action_chunk if predict is None else predict
        self.actor, self._quiet = actor, Trace(steps=False)

    @property
    def live(self) -> LiveCritic | None:
        """The critic, if one that learns can renew it."""
        critic = None if self.actor is None else self.actor.critic
        return critic if isinstance(critic, LiveCritic) else None

    @property
    def policy_contract(self) -> Contract:
        """What the policy was trained on."""
        return contract_of(self.handle.policy) if self.actor is None else self.actor.contract

    def _plan(self, requests: Sequence[Request], rule: Rule | None, sampler: Sampler) -> Planned:
        if self.handle.host.step is None and len(requests) > 1:
            return self._plan_apart(requests, rule, sampler)
        names = requests[0].observation
        batch: dict[str, Any] = {
            name: [request.observation[name] for request in requests]
            if name == "task"
            else stacked(requests, name)
            for name in names
        }
        with self._acting_by(rule, sampler), seeded([request.seed for request in requests]):
            chunk = self.predict(self.preprocess(batch))[:, : self.interface.horizon]
            steps = [self.postprocess(step) for step in chunk.unbind(1)]
        executed = torch.stack(steps, 1).float().cpu().numpy()
        return Planned(executed, chunk, None if self.actor is None else self.actor.seen)

    def _plan_apart(self, requests: Sequence[Request], rule: Rule | None, sampler: Sampler) -> Planned:
        found, planned = [], []
        for request in requests:
            planned.append(self._plan([request], rule, sampler))
            found.append(dict(self._judged.found))
        for name in found[0]:
            columns = [each[name] for each in found]
            whole = [column for column in columns if column is not None]
            self._judged.found[name] = torch.cat(whole) if whole else None
        kept = [each.observations for each in planned if each.observations is not None]
        return Planned(
            np.concatenate([each.executed for each in planned]),
            torch.cat([each.actions for each in planned]),
            tree_map(lambda *rows: torch.cat(rows), *kept) if kept else None,
        )

    @contextmanager
    def _acting_by(self, rule: Rule | None, sampler: Sampler) -> Iterator[None]:
        """Let the handle act by a method that was checked when it was made, in the block."""
        handle = self.handle
        own = handle.rule, handle.sampler, handle.trace
        handle.rule, handle.sampler = rule, sampler
        handle.trace = self.trace if sampler is self._judged else self._quiet
        try:
            yield
        finally:
            handle.rule, handle.sampler, handle.trace = own


def stacked(requests: Sequence[Request], name: str) -> Tensor:
    """Return an entry of all observations, (B, ...); bytes as numbers in [0, 1]."""
    whole = torch.from_numpy(np.stack([request.observation[name] for request in requests]))
    return whole.float() / 255 if whole.dtype == torch.uint8 else whole


def mean_strength(steps: Sequence[Step], rows: int) -> list[float]:
    """Return each observation's strength: the mean over its guided steps and candidates; 0 without any."""
    if not steps:
        return [0.0] * rows
    found = torch.cat([step.strength.unflatten(0, (rows, -1)) for step in steps], 1).double().cpu().numpy()
    guided = [row[np.isfinite(row)] for row in found]  # row by row: a sum of columns rounds by their place
    return [float(row.mean()) if row.size else 0.0 for row in guided]


def check_rows(sampler: Sampler) -> None:
    """Raise ValueError unless each row of a sampler is made without a look at the others."""
    for each in nested(sampler):
        if isinstance(each, TrustRegion) and each.beta > 0 and each.typical is None:
            raise ValueError(
                f"sampler: expected one that treats each robot alone, got {type(each).__name__}(beta="
                f"{each.beta}), which compares its disagreement with the batch's mean; set typical, the "
                "disagreement that counts as 1"
            )
