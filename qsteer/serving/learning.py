"""A served policy's critic learns from the robots, in the thread that acts and between its calls."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import tree_map

from qsteer.auditing.page import Check
from qsteer.auditing.stored import check_stored
from qsteer.files import locked_run, read_json, write_json
from qsteer.online.learner import CHECK_EVERY, OnlineLearner
from qsteer.online.logs import LogWindow, Tracker
from qsteer.online.settings import OnlineTraining
from qsteer.sampling import chain_of
from qsteer.serving.kept import KeptCritics
from qsteer.serving.lanes import Lanes
from qsteer.serving.options import RequestError
from qsteer.serving.served import Served
from qsteer.serving.share import Share
from qsteer.trace import Trace
from qsteer.training.critic import ACTING
from qsteer.training.generators import seeded
from qsteer.training.loop import processes
from qsteer.types import Observation, Rule, Sampler

logger = logging.getLogger(__name__)

ENDLESS = 10**12
"""Environment steps of a run that is stopped by its owner."""
ROWS = 256
"""Rows on which a critic is audited, at most, and a quarter of which must have been seen."""
PATIENCE = 60.0
"""Seconds for which what is due beside gradient steps waits for a moment without requests."""
CONTROL = "control.json"


class ServedActor:
    """A served policy as the learner steers it.

    Attributes:
        contract: what the critic learns is about.
    """

    def __init__(self, served: Served) -> None:
        self.served, self.contract = served, served.policy_contract
        self._frozen = chain_of(served.sampler)

    @property
    def trace(self) -> Trace:
        """Records the guided steps of the latest call."""
        return self.served.trace

    @trace.setter
    def trace(self, trace: Trace) -> None:
        trace.steps, trace.displacement = True, False  # replies say the strength, and compare themselves
        self.served.trace = trace

    def steer(self, rule: Rule | None, sampler: Sampler | None) -> None:
        """Choose how to act from now on; neither rule nor sampler: the unsteered policy."""
        self.served.steer(rule, self._frozen if sampler is None else sampler)


class RobotLearning:
    """Learns a critic from what the served robots tell, and steers them with it.

    All of it happens in the thread that acts. Nothing waits for more than one gradient step, and those take
    at most ``share`` of the time in which requests wait. Steering begins after the warm-up, once the critic
    is well (:class:`~qsteer.online.health.Health`) and agrees with the rows that it learns from
    (:func:`~qsteer.auditing.stored.check_stored`), which is asked again every ``audit_every`` gradient steps
    until it does, and after every illness.

    ``out`` is a run's directory as of :func:`~qsteer.online.train_online`; beside it ``kept/`` has the last
    critics to go back to, and ``exports/`` those that were asked for. After a kill at any moment, the same
    settings go on with every row that a robot was told is stored, and from the learner's last checkpoint.

    Args:
        served: a policy that was opened to learn; the learner starts from a copy of its critic.
        out: run directory.
        training: how; ``num_envs`` is the most robots at once, ``row`` the steps of a reply, and
            ``env_steps`` and what concerns evaluations are not used.
        share: of the time in which requests wait, for learning.
        keep: critics to go back to.
        keep_every: gradient steps between two of them.
        audit_every: gradient steps between two audits that fail.
        clock: seconds.

    Attributes:
        frozen: whether the critic stays as it is; rows are stored all the same.
        audited: what the audit found; None: it has not been asked since the critic began, or was ill.
        fault: why learning has stopped, an error of its own; None: it has not.
        unwritten: why the latest log, checkpoint or kept critic could not be written; None: it was.

    Raises:
        ValueError: ``out`` holds a run with other settings, a reply has another number of steps than the
            critic sees, or the target asks for actions of its own.
        RuntimeError: another run has ``out`` open.
        OSError: the disk has no room for the rows.
    """

    def __init__(
        self,
        served: Served,
        out: str | Path,
        training: OnlineTraining,
        *,
        share: float = 0.5,
        keep: int = 5,
        keep_every: int = 2_000,
        audit_every: int = 200,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if (critic := served.live) is None:
            raise ValueError("served: expected a LiveCritic, got another critic; open_served(learns=...)")
        steps, horizon = served.interface.horizon, critic.config.horizon
        if not steps == horizon == training.row:
            raise ValueError(
                f"critic: expected one of the {steps} steps of a reply, which are stored as a row, got a "
                f"horizon of {horizon} and rows of {training.row}; learn a new critic, or set the policy's "
                "executed steps"
            )
        if training.critic.target in ACTING:
            raise ValueError(
                f"target: expected one that learns from stored actions, got {training.critic.target!r}; use "
                "sarsa, iql or monte_carlo"
            )
        self.served, self.share, self.clock = served, Share(share, clock), clock
        self.keep_every, self.audit_every = keep_every, audit_every
        self.out = Path(out)
        processes(critic.device)
        with ExitStack() as stack:
            stack.enter_context(locked_run(self.out))
            stack.enter_context(seeded(training.critic.seed, critic.device))
            self.actor = ServedActor(served)
            self.learner = OnlineLearner(self.actor, critic, self.out, training, served.rule, served.sampler)
            stack.callback(self.learner.replay.close)
            self._stack = stack.pop_all()
        self.lanes = Lanes(steps, training.num_envs, self.learner)
        self.kept = KeptCritics(self.out, keep)
        control = read_json(self.out / CONTROL) if (self.out / CONTROL).exists() else {}
        self.frozen = bool(control.get("frozen", False))
        # Of the critic that a rollback has brought back, until it learns again.
        self._position: int | None = control.get("position") if self.frozen else None
        self.audited: Check | None = None
        self.fault: str | None = None
        self.unwritten: str | None = None
        self.info: dict[str, float] = {}
        self._asked = self._unchecked = 0
        self._logged = self._saved = self.learner.env_steps
        self._last_kept = self.learner.update
        self._overdue: float | None = None
        self._window, self._tracker = (
            LogWindow(self.learner.env_steps, self.learner.update),
            Tracker(None, self.out),
        )

    @property
    def steering(self) -> bool:
        """Whether the critic steers."""
        return self.learner.steers and self.audited is not None and self.audited.verdict != "fail"

    def begin(self) -> None:
        """Take up steering where a former run has left it."""
        self._audit_if_due()
        self._steer()

    def slice(self, waiting: bool) -> bool:
        """Do one step of what is due, if it may be done now; return whether more is due.

        Args:
            waiting: whether requests wait.
        """
        if self.fault is not None:
            return False
        try:
            return self._slice(waiting)
        except Exception as error:  # the robots go on
            logger.exception("learning has stopped")
            self.fault = f"{type(error).__name__}: {error}"
            return False

    def command(self, name: str) -> dict[str, Any]:
        """Do what is asked for, and return what has become of it.

        ``freeze``: the critic stays as it is; ``learn``: it learns again; ``rollback``: the newest critic
        that was kept or exported before the one that acts is brought back, and frozen; again, the one before;
        ``export``: the one that acts is written below ``out/exports``.

        Raises:
            RequestError: there is nothing to go back to, or the disk does not take what is to be written.
        """
        told: dict[str, Any] = {}
        try:
            if name == "rollback":
                told["critic"] = self._roll_back()
            elif name == "export":
                told["critic"] = self.kept.export(self.learner.learner.target, self.position)
            elif name == "learn":
                self.frozen = False
            else:
                self.frozen = True
            write_json({"frozen": self.frozen, "position": self._position}, self.out / CONTROL)
        except (OSError, SafetensorError) as error:
            raise RequestError(
                f"{name}: expected to write to {self.out}, got {error}; free the disk, and ask again"
            ) from None
        logger.info("%s: %s", name, told or f"at gradient step {self.learner.update}")
        return {"command": name, **told, **self.state()}

    @property
    def position(self) -> int:
        """Number of the gradient step whose critic acts."""
        return self.learner.update if self._position is None else self._position

    def state(self) -> dict[str, Any]:
        """Return how far learning is."""
        learner = self.learner
        return {
            "rows": len(learner.replay),
            "env_steps": learner.env_steps,
            "updates": learner.update,
            "due": learner.due,
            "warmup": learner.training.warmup,
            "position": self.position,
            "steering": self.steering,
            "frozen": self.frozen,
            "healthy": learner.health.steers,
            "trips": learner.health.trips,
            "refused": int(self.lanes.refused.sum()),
            "audit": None if self.audited is None else f"{self.audited.verdict}: {self.audited.finding}",
            "fault": self.fault,
            "unwritten": self.unwritten,
            **self.info,
        }

    def close(self) -> None:
        """Write what is learnt, and let others open the directory."""
        try:
            if self.fault is None:
                self._write(self._log)
                self.learner.save()
        finally:
            self._stack.close()

    def _slice(self, waiting: bool) -> bool:
        if self._upkeep(waiting):
            return True
        if not self._due or (waiting and not self.share.allows()):
            return False
        since = self.clock()
        with self._window.share("learn"):
            self._step()
        self.share.learn(self.clock() - since, waiting)
        return True

    @property
    def _due(self) -> bool:
        learner = self.learner
        return not self.frozen and learner.update < learner.due and learner.source.ready()

    def _step(self) -> None:
        """Make a gradient step; every few, look after the critic and publish it."""
        learner = self.learner
        info = learner.step()
        self._position = None
        if learner.live.device.type == "cuda":
            torch.cuda.synchronize(learner.live.device)
        self._unchecked += 1
        if self._unchecked < CHECK_EVERY and self._due:
            return
        self._unchecked = 0
        learner.watch(info, self._window)
        learner.live.publish(learner.learner.target)
        if not learner.health.steers:
            self.audited = None
        elif self._window.info is info:
            self.info = {name: float(info[name]) for name in ("loss", "q") if name in info}
        self._steer()

    def _upkeep(self, waiting: bool) -> bool:
        """Do one thing that is due beside gradient steps; while requests wait, only if it has waited long."""
        learner, training = self.learner, self.learner.training
        audit = learner.steers and not self.steering and learner.update >= self._asked
        kept = learner.health.steers and learner.update >= self._last_kept + self.keep_every
        logs = learner.crossed(self._logged, training.log_every)
        saves = learner.crossed(self._saved, training.checkpoint_every)
        if not (audit or kept or logs or saves):
            self._overdue = None
            return False
        self._overdue = self._overdue or self.clock() + PATIENCE
        if waiting and self.clock() < self._overdue:
            return False
        if audit:
            self._audit_if_due()
            self._steer()
        elif kept:
            self._last_kept = learner.update
            self._write(lambda: self.kept.keep(learner.learner.target, learner.update))
        elif logs:
            self._write(self._log)
        else:
            self._saved = learner.env_steps
            self._write(learner.save)
        return True

    def _write(self, work: Callable[[], None]) -> None:
        """Do what writes to the disk; what a full one does not take is said, and tried when next due."""
        try:
            work()
            self.unwritten = None
        except (OSError, SafetensorError) as error:
            logger.error("not written, and tried again when next due: %s", error)
            self.unwritten = f"{type(error).__name__}: {error}"

    def _steer(self) -> None:
        self.learner.steer(self.steering)

    def _audit_if_due(self) -> None:
        """Ask the critic about rows of finished episodes, if it might steer."""
        learner = self.learner
        if not learner.steers:
            return
        rows = self._finished_rows()
        self._asked = learner.update + (CHECK_EVERY if rows is None else self.audit_every)
        if rows is None:
            self.audited = None
            return
        self.audited = check_stored(learner.learner.target, *rows, seed=learner.update)
        if self.audited.verdict == "fail":
            logger.warning("the critic does not steer yet: %s", self.audited.finding)

    def _finished_rows(self) -> tuple[Observation, Tensor, Tensor] | None:
        """Return observations, actions and returns of rows whose episodes have ended; None: too few have.

        Cost: a pass over what is stored.
        """
        replay, parts = self.learner.replay, []
        for each in replay.trajectories():
            if each.terminal or each.truncated:
                executed = int(each.executed[-1])
                returns = replay.layout.sum_returns(each.rewards.cpu(), executed, each.terminal)
                parts.append((each.observations, each.actions, returns.to(each.rewards)))
        if not parts or sum(len(part[2]) for part in parts) < ROWS // 4:
            return None
        whole = tree_map(lambda *columns: torch.cat(columns), *parts)
        rows = torch.linspace(0, len(whole[2]) - 1, min(ROWS, len(whole[2]))).long().to(whole[2].device)
        return tree_map(lambda column: column[rows], whole)

    def _roll_back(self) -> str:
        learner = self.learner
        if (found := self.kept.before(self.position)) is None:
            raise RequestError(
                "rollback: expected a critic that was kept or exported before the one that acts, got none; "
                "wait for one, or freeze"
            )
        number, critic = found
        with torch.no_grad():
            for own in (learner.learner.critic, learner.learner.target):
                own.load_state_dict(critic.state_dict())
        learner.optimizer.state.clear()
        learner.health.begin(learner.learner, learner.optimizer)
        learner.live.publish(learner.learner.target)
        self.kept.drop_after(number)
        self.frozen, self._position, self._last_kept, self.audited = True, number, learner.update, None
        self._audit_if_due()
        self._steer()
        learner.save()
        return f"{number:09d}"

    def _log(self) -> None:
        learner, window = self.learner, self._window
        self._logged = learner.env_steps
        self._window = LogWindow(learner.env_steps, learner.update)
        learner.log(window, self.lanes, [{}], self._tracker)
