"""What an audit found: checks with figures and verdicts, as a page, as JSON, as a picture."""

import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qsteer.files import write_json
from qsteer.plotting import BASE, CONTROL, MUTED, STEERED, STYLE, add_caption, add_title, load_pyplot, save

type Verdict = Literal["pass", "warn", "fail", "not known"]

WIDTH = 110


@dataclass(frozen=True)
class Check:
    """One question about a policy and a critic.

    Attributes:
        name: of the check.
        question: what is asked.
        verdict: ``"pass"``, ``"warn"``, ``"fail"``, or ``"not known"`` where what it needs is not there.
        finding: the answer, a sentence.
        threshold: where the verdict changes, and why there.
        figures: the numbers it stands on, JSON-able.
    """

    name: str
    question: str
    verdict: Verdict
    finding: str
    threshold: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Audit:
    """What :func:`qsteer.audit` found. ``print`` it for the page.

    Attributes:
        checks: one per question, in the order of the page.
        recommended: range of the strength ``alpha`` in which a push pays; None: there is none, or a check
            fails.
        alpha: the strength at which ``strength`` was measured: the one that is proposed, or the rule's own
            where no push pays.
        rule: what was audited.
        states: how many observations.
        samples: actions of the policy per observation.
        seed: of all noise.
        seconds: that it took.
    """

    checks: tuple[Check, ...]
    recommended: tuple[float, float] | None
    alpha: float
    rule: str
    states: int
    samples: int
    seed: int
    seconds: float

    @property
    def verdict(self) -> Literal["steer", "do not steer", "not known"]:
        """``"steer"`` if no check fails and a push is known to pay."""
        verdicts = [check.verdict for check in self.checks]
        if "fail" in verdicts:
            return "do not steer"
        return "not known" if self.recommended is None else "steer"

    @property
    def status(self) -> int:
        """Exit status: 0 for ``"steer"``, else 1."""
        return 0 if self.verdict == "steer" else 1

    def __getitem__(self, name: str) -> Check:
        """Return the check of a name.

        Raises:
            KeyError: there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"audit: expected one of {[check.name for check in self.checks]}, got {name!r}")

    def __str__(self) -> str:
        """Return the page."""
        lines = [
            f"audit of {self.rule}: {self.states} states, {self.samples} actions each, seed {self.seed}, "
            f"{self.seconds:.0f} s",
            "",
        ]
        for check in self.checks:
            lines += _wrap(f"{check.verdict.upper():<10}{check.name}: {check.finding}", "")
            lines += _wrap(check.threshold, " " * 10)
        lines += ["", self.summary]
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """The verdict in a line."""
        if self.verdict == "steer" and self.recommended is not None:
            low, high = self.recommended
            return f"STEER: alpha {self.alpha:.2g}, range {low:.2g} to {high:.2g}"
        names = ", ".join(check.name for check in self.checks if check.verdict == "fail")
        if names:
            return f"DO NOT STEER: {names}"
        names = ", ".join(c.name for c in self.checks if c.verdict == "not known")
        return f"NOT KNOWN: {names}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything, JSON-able."""
        return {"verdict": self.verdict, "status": self.status} | asdict(self)

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON, atomically, and return the path."""
        return write_json(self.to_dict(), path)

    def plot(self, path: str | Path) -> Path:
        """Draw the critic's view of a push by its strength, and what it makes of actions; returns the path.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        plt = load_pyplot()
        figures = {check.name: check.figures for check in self.checks}
        sweep, ranks = figures.get("push", {}), figures.get("rank", {})
        with plt.rc_context(STYLE):
            fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
            add_title(left, "gain, judged by others")
            if self.recommended:
                left.axvspan(*self.recommended, color=STEERED, alpha=0.08, linewidth=0)
            for name, colour in (("random", CONTROL), ("gain", STEERED)):
                if name in sweep:
                    mean, low, high = zip(*sweep[name], strict=True)
                    left.fill_between(sweep["alpha"], low, high, color=colour, alpha=0.16, linewidth=0)
                    left.plot(sweep["alpha"], mean, color=colour, linewidth=2)
            left.axhline(0, color=MUTED, linewidth=0.8)
            left.set(xscale="log", xlabel="alpha", ylabel="sd of the policy's own actions")
            add_title(middle, "displacement")
            if "displacement" in sweep:
                low, median, high = zip(*sweep["displacement"], strict=True)
                middle.fill_between(sweep["alpha"], low, high, color=STEERED, alpha=0.16, linewidth=0)
                middle.plot(sweep["alpha"], median, color=STEERED, linewidth=2)
            middle.set(xscale="log", xlabel="alpha", ylabel="rms per entry")
            add_title(right, "the policy's action preferred to")
            named = {name: value for name, value in ranks.items() if name not in ("returns", "foresight")}
            for i, (mean, low, high) in enumerate(named.values()):
                right.plot([low, high], [i, i], color=STEERED, linewidth=2)
                right.plot(mean, i, "o", color=STEERED)
            right.axvline(0.5, color=BASE, linewidth=0.8)
            right.set(xlim=(0, 1), ylim=(-0.5, max(len(named), 1) - 0.5))
            right.set_yticks(range(len(named)), [name.replace("_", " ") for name in named])
            add_caption(fig, f"{self.summary}; bands: 95 % of the mean over states; displacement: 10 to 90 %")
            return save(fig, path)


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=" " * 10)
