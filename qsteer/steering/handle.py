"""Steer a pretrained policy in place."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import EllipsisType
from typing import Any

import torch
from huggingface_hub import HfApi
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qsteer.adapters import unwrapped
from qsteer.compiling.kept import Mode
from qsteer.critics.critic import Critic
from qsteer.critics.live import LiveCritic
from qsteer.flow import normal
from qsteer.hosts import Host, parameters_of
from qsteer.sampling import acting, outside_inference_mode, sample, steered_action
from qsteer.steering.checks import (
    check_critic,
    check_executed,
    check_kind,
    check_methods,
    check_rtc,
    check_velocity,
    checked_rule,
    checked_sampler,
    read_inputs,
    read_sizes,
    warn_of_dropout,
)
from qsteer.steering.compiled import Compiled, checked_compile
from qsteer.steering.opening import Executed, Interception, bind_critic, interception_of
from qsteer.trace import Trace
from qsteer.types import Bindable, Field, Rule, Sampler, Value

IDLE = 3
"""Actions without a guided step after which a handle whose trace records them warns."""
_frozen_by = WeakTensorKeyDictionary()
"""How many handles keep a parameter frozen: two policies may share a module."""


class Handle(Interception):
    """What :func:`steer` installed; :meth:`swap` changes it, :meth:`remove` or leaving ``with`` removes it.

    Attributes:
        policy: the steered policy.
        host: where it keeps its loop.
        critic: what is bound to each observation.
        rule: bends the velocity; None: nothing does.
        sampler: makes the action.
        critic_inputs: turns the host's batch into what the critic is bound to; None: nothing does.
        executed: number of steps executed; None: the policy's own.
        wrappers: what was around the policy, outermost first.
        trace: what the rule did, and how often anything fell back to the base policy since ``steer``.
    """

    def __init__(
        self,
        policy: Any,
        host: Host,
        critic: Bindable,
        rule: Rule | None,
        sampler: Sampler,
        critic_inputs: Callable[[Any], Any] | None,
        trace: Trace,
        compiled: Compiled | None,
        executed: int | None = None,
        wrappers: tuple[Any, ...] = (),
    ) -> None:
        self.executed, self.wrappers, self._acted = executed, wrappers, 0
        self.critic, self.rule, self.sampler = critic, rule, sampler
        self.critic_inputs, self.trace, self._compiled = critic_inputs, trace, compiled
        self._frozen = [p for p in parameters_of(policy) if p.requires_grad or p in _frozen_by]
        super().__init__(policy, host, wrappers)
        for parameter in self._frozen:
            _frozen_by[parameter] = _frozen_by.get(parameter, 0) + 1
            parameter.requires_grad_(False)
        host.empty_queue(policy)

    def __repr__(self) -> str:
        state = self._extent() if self._replaced else "removed"
        policy = " in ".join((self.host.serves, *(type(each).__name__ for each in reversed(self.wrappers))))
        return f"Handle({policy}, {self.rule}, {self.sampler}, {state})"

    def _extent(self) -> str:
        """Say which part of a chunk is steered."""
        steps, dim = read_sizes(self.critic, self.policy, self.host, self.executed)
        chunk = self.host.chunk
        of = "" if chunk is None else f" of {self.host.read(self.policy, chunk)}"
        return f"steers the first {steps}{of} steps, {dim} dimensions"

    def __enter__(self) -> "Handle":
        self._check_live()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the policy exactly, without the actions it has queued; removing twice does nothing."""
        if self._replaced:
            if self.trace.steps and not self._acted:
                self._warn(
                    "an action of the policy to record before the handle is removed, got none; call the "
                    "policy that was steered (handle.policy), not a copy"
                )
            self.host.empty_queue(self.policy)
        self._restore()
        for parameter in self._frozen:
            others = _frozen_by.pop(parameter, 1) - 1
            if others:
                _frozen_by[parameter] = others
            else:
                parameter.requires_grad_(True)
        self._frozen = []

    @property
    def compile(self) -> Mode | None:
        """How actions are made fast; None: they are not."""
        return None if self._compiled is None else self._compiled.mode

    def save_pretrained(
        self, path: str | Path, *, base: str | Path | None = None, revision: str | None = None
    ) -> Path:
        """Write the steering to a directory, from which :func:`qsteer.load` gives it back; return its path.

        In it are the critic, rule, sampler and learnt maps, where the policy's checkpoint is and a
        fingerprint of its weights, a model card, and for lerobot's policies what ``lerobot-eval
        --policy.path=PATH`` reads; never the policy's weights. A :class:`LiveCritic` is saved as it acts now.

        Cost: one pass over the policy's weights.

        Args:
            path: the directory; what is there is replaced as a whole.
            base: where the policy's checkpoint is, a folder or a repository of the hub; None: where its
                ``config.pretrained_path`` says.
            revision: of that repository.

        Raises:
            TypeError: the critic, rule or sampler is of a class of your own, or there are ``critic_inputs``.
            ValueError: it is not known where lerobot's policy comes from.
            OSError: the directory cannot be written to.
            RuntimeError: the handle was removed.
        """
        from qsteer.steering.saving import save

        self._check_live()
        return save(self, path, base, revision)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str:
        """Save the steering as a repository of the hub, and return its address; see :meth:`save_pretrained`.

        Args:
            repo_id: the repository, which is made if it is not there.
            base: see :meth:`save_pretrained`.
            revision: see :meth:`save_pretrained`.
            private: whether a repository that is made is private; None: as the owner's settings say.
        """
        api = HfApi()
        with TemporaryDirectory() as folder:
            saved = self.save_pretrained(Path(folder) / "steering", base=base, revision=revision)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=saved))

    @property
    def kinds(self) -> list[str]:
        """What has become of each kind of action that ``compile`` keeps, in words."""
        return [] if self._compiled is None else [run.state for run in self._compiled.runs]

    def finish_compiling(self, timeout_s: float = 600.0) -> bool:
        """Wait for the kinds of action seen so far to be compiled (``compile="inductor"``).

        Args:
            timeout_s: for all together.

        Returns whether there is nothing more to wait for; ``handle.kinds`` says what became of each.
        """
        until = time.monotonic() + timeout_s
        runs = [] if self._compiled is None else self._compiled.runs
        return all(run.finished.wait(max(0.0, until - time.monotonic())) for run in runs)

    def swap(
        self,
        *,
        rule: Rule | EllipsisType | None = ...,
        sampler: Sampler | EllipsisType | None = ...,
        critic: Bindable | EllipsisType = ...,
        critic_inputs: Callable[[Any], Any] | EllipsisType | None = ...,
    ) -> None:
        """Change the method from the next action on; what is not named stays.

        Actions that the policy has queued for ``select_action`` are dropped, for they are of the former
        method: it plans anew at its next call. Call it from the thread that does.

        Args:
            rule: the new rule; None: no rule.
            sampler: the new sampler; None: the host's own Euler chain.
            critic: the new critic.
            critic_inputs: turns the host's batch into what the critic is bound to; None: nothing does.

        Raises:
            TypeError, ValueError: as for :func:`steer`; nothing is changed then.
            RuntimeError: the handle was removed.
        """
        self._check_live()
        new_rule = self.rule if rule is ... else checked_rule(rule)
        new_sampler = self.sampler if sampler is ... else checked_sampler(sampler)
        check_velocity(self.host, new_rule, new_sampler)
        if critic is not ...:
            inputs = self.critic_inputs if critic_inputs is ... else critic_inputs
            check_critic(critic, self.policy, self.host, self.executed, inputs is not None)
            self.critic = critic
        if critic_inputs is not ...:
            self.critic_inputs = critic_inputs
        self.rule, self.sampler = new_rule, new_sampler
        self.host.empty_queue(self.policy)

    def _act(self, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Float[Tensor, "B H A"]:
        """Stand in for the host's entry: encode, then rule and sampler."""
        critic = self.critic
        with acting(critic), outside_inference_mode():
            args, kwargs, batch = normal((args, kwargs, batch))
            if (network := self._compiled_whole(critic)) is not None:
                action = self._whole(network, batch, args, kwargs)
            else:
                field, value, noise = self._encoded(critic, batch, args, kwargs)
                if self._compiled is not None and field.held:
                    raise RuntimeError(
                        "compile: expected real-time chunking to be off, got a chunk that is held to the "
                        "former one, which the fast path does not know; leave compile out, or switch it off"
                    )
                if self._compiled is None:
                    action = sample(
                        field, value, noise, rule=self.rule, sampler=self.sampler, trace=self.trace
                    )
                else:
                    action = self._compiled(field, value, noise, self.rule, self.sampler, self.trace)
            self._acted += len(action) > 0
            if self._acted == IDLE and self.rule and self.trace.steps and not self.trace.actions:
                self._warn(
                    f"guided steps after {IDLE} actions, got none; the rule's start, stop and every leave no "
                    "step of the policy's, or the sampler runs without it"
                )
            return action

    def _compiled_whole(self, critic: Bindable) -> Critic | None:
        """Return the network of a critic that is compiled with the policy's own code and the action."""
        if self._compiled is None or self._compiled.mode != "inductor" or self.host.whole is None:
            return None
        network = critic.critic if isinstance(critic, LiveCritic) else critic
        return network if isinstance(network, Critic) and self.critic_inputs is None else None

    def _whole(
        self, critic: Critic, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Float[Tensor, "B H A"]:
        """Return the action, made in one with the encodings for policy and critic."""
        assert self._compiled is not None and self.host.whole is not None
        rule, sampler = self.rule, self.sampler
        sizes = read_sizes(critic, self.policy, self.host, self.executed)
        first = self.host.begins(self.policy)

        def act(inputs: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> Tensor:
            batch, args, kwargs = inputs
            field, noise = self._encode(args, kwargs)
            value = Executed.of(bind_critic(critic, batch, None, field), noise, *sizes, first)
            return steered_action(field, value, noise, rule, sampler)

        method = self.host.whole(self.policy), critic, sizes, rule, sampler, id(rule), id(sampler)
        return self._compiled.whole(act, (batch, args, kwargs), method, rule, self.trace)

    @staticmethod
    def _warn(expected: str) -> None:
        warnings.warn(
            f"trace: expected {expected}",
            RuntimeWarning,
            skip_file_prefixes=(os.path.dirname(os.path.dirname(__file__)),),
        )

    def _encoded(
        self, critic: Bindable, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Field, Executed, Float[Tensor, "B H A"]]:
        """Encode the observation for policy and critic; before a graph, each on a stream of its own."""
        sizes = read_sizes(critic, self.policy, self.host, self.executed)
        first = self.host.begins(self.policy)
        if self._compiled is None or self._compiled.mode != "graph" or read_inputs(critic).features:
            field, noise = self._encode(args, kwargs)
            value = self._bind(critic, batch, field)
        else:
            # What the second stream allocates is free for it again only after the first has used it.
            one, two = self._compiled.streams
            two.wait_stream(one)
            with torch.cuda.stream(two):
                value = self._bind(critic, batch, None)
            field, noise = self._encode(args, kwargs)
            one.wait_stream(two)
        return field, Executed.of(value, noise, *sizes, first), noise

    def _bind(self, critic: Bindable, batch: Any, field: Field | None) -> Value:
        value = bind_critic(critic, batch, self.critic_inputs, field)
        if self._compiled is not None and not is_dataclass(value):
            raise TypeError(
                "critic.bind: expected a frozen dataclass, whose tensors are all that depends on the "
                f"observation, for the fast path, got {type(value).__name__}; return "
                "qsteer.value(fn, context=obs), or leave compile out"
            )
        return value

    def _check_live(self) -> None:
        if not self._replaced:
            raise RuntimeError(
                "handle: expected one in place, got one that was removed; call qsteer.steer again"
            )


def steer(
    policy: Any,
    critic: Bindable,
    rule_or_sampler: Rule | Sampler | None = None,
    *,
    sampler: Sampler | None = None,
    critic_inputs: Callable[[Any], Any] | None = None,
    trace: bool = False,
    compile: Mode | None = None,
    executed: int | None = None,
) -> Handle:
    """Steer a pretrained policy in place: it keeps its identity and type, and follows the critic from now on.

    The critic sees the host's model space, without padding, up to the steps that are executed; the steps
    after those are the policy's own, as the handle's repr says. While steered, the policy's parameters are
    frozen, and its steered methods run uncompiled whoever compiles them. Actions that it has queued for
    ``select_action`` are dropped. In a wrapper (``torch.compile``, ``DistributedDataParallel``, PEFT) the
    policy inside is steered.

    Cost per action: the host's prefix once, then what rule and sampler say; nothing else is evaluated.

    Args:
        policy: lerobot's pi0, pi0.5 or SmolVLA, a :class:`qsteer.adapters.PlainPolicy`, or any policy that
            says by an attribute ``__qsteer_host__`` (a :class:`Host`) where it keeps its loop.
        critic: a :class:`qsteer.Critic`, a :class:`qsteer.critics.LiveCritic` that goes on learning, or any
            object with ``bind(obs) -> Value``. If its configuration says ``features``, it is given those of
            the policy.
        rule_or_sampler: what bends the velocity, or the sampler when there is no rule to name; None: no rule.
        sampler: makes the action; None: :class:`qsteer.Euler`, the host's own chain. Without a rule either,
            that is the unsteered policy, bit for bit.
        critic_inputs: ``batch -> obs``, when the critic needs something else than the host's batch.
        trace: record each guided step in ``handle.trace``, not only fallbacks.
        compile: ``"graph"`` (CUDA) replays the whole action behind the prefix, critic and gradients included,
            as one CUDA graph, and the critic encodes its observation beside the prefix on a second stream
            (unless it sees the policy's features); ``"static"`` runs the same code eagerly on any device:
            keys and values are not copied at each step, what depends on the time alone is tabulated,
            candidates share one prefix. Weights may change in place, the critic's at no cost; the policy's
            are prepared anew. A new kind of action (shapes, rule, sampler, critic) is captured and checked
            when it first comes. All that depends on the observation must be in tensors of the value that
            ``critic.bind`` returns, a frozen dataclass such as ``qsteer.value(fn, context=obs)``, with the
            same ``fn`` each time. ``"inductor"`` acts as ``"static"`` while the action is compiled to one
            line of operators in another process (a minute on a CPU the first time, seconds once it is on the
            disk), and then by that line, up to rounding; it needs a C++ compiler. None: the host's own step,
            bit for bit.
        executed: number of steps of each chunk that are executed, where it is not the policy's own number:
            lerobot's asynchronous inference executes ``actions_per_chunk``. The critic must see all of them.
            None: the policy's own (``n_action_steps``), of which a critic's horizon may cover the first only.

    Returns:
        The handle that changes the method or takes it away; also a context manager.

    Raises:
        TypeError: an argument is of the wrong kind, no Host record describes the policy, or its step cannot
            be prepared for ``compile``; (the first action of a kind) a tensor that is no input enters it.
        ValueError: the critic is on another device, or sees more than the policy executes, or less than
            ``executed``; that is more than a chunk has; ``compile`` is unknown, or "graph" without CUDA.
        MismatchError: (the first action of a kind) the fast path is not what the host does.
        RuntimeError: the policy is steered already; (an action) real-time chunking is on and is not known, or
            stands beside ``compile``.

    Example:
        >>> policy = PI05Policy.from_pretrained("lerobot/pi05_libero_finetuned")  # doctest: +SKIP
        >>> with qsteer.steer(policy, critic, qsteer.Tweedie(alpha=0.2)):  # doctest: +SKIP
        ...     action = policy.select_action(batch)
    """
    policy, host, wrappers = unwrapped(policy)
    if isinstance(rule_or_sampler, Sampler):
        if sampler is not None:
            raise TypeError(
                f"sampler: expected one, got {rule_or_sampler} and {sampler}; nest them, for example "
                "BestOfN(8, inner=TrustRegion())"
            )
        rule_or_sampler, sampler = None, rule_or_sampler
    rule, sampler = checked_rule(rule_or_sampler), checked_sampler(sampler)
    if (handle := handle_of(policy, host)) is not None:
        raise RuntimeError(
            f"policy: expected one that is not steered, got {handle} on it; change that with its swap(...), "
            "or call qsteer.unsteer(policy) first"
        )
    check_velocity(host, rule, sampler)
    check_kind(policy, host)
    check_methods(policy, host)
    check_rtc(policy, host)
    check_executed(executed, policy, host)
    check_critic(critic, policy, host, executed, critic_inputs is not None)
    warn_of_dropout(policy)
    compiled = checked_compile(compile, policy, host)
    return Handle(
        policy, host, critic, rule, sampler, critic_inputs, Trace(steps=trace), compiled, executed, wrappers
    )


def unsteer(policy: Any) -> None:
    """Remove what :func:`steer` installed on ``policy``; a policy that is not steered is left as it is."""
    policy, host, _ = unwrapped(policy)
    if (handle := handle_of(policy, host)) is not None:
        handle.remove()


def handle_of(policy: Any, host: Host) -> Handle | None:
    """Return the handle that steers ``policy``."""
    present = interception_of(policy, host)
    return present if isinstance(present, Handle) else None
