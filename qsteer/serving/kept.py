"""Critics of a learning server that are kept: the last few to go back to, and those that were asked for."""

import shutil
from pathlib import Path

from qsteer.critics import Critic
from qsteer.files import mend_directory, replacing_directory

KEPT, EXPORTS = "kept", "exports"


class KeptCritics:
    """Critics in a run's directory, by the number of their gradient step.

    Args:
        out: the run's directory; ``kept/`` and ``exports/`` in it are this class's.
        most: how many are kept to go back to; those that were exported stay.
    """

    def __init__(self, out: Path, most: int) -> None:
        self.out, self.most = out, most
        for folder in (out / KEPT, out / EXPORTS):
            for path in {each.name.strip(".").partition(".")[0] for each in folder.glob("*")}:
                mend_directory(folder / path)

    def keep(self, critic: Critic, update: int) -> None:
        """Keep a critic to go back to, and let the oldest go."""
        self._write(critic, KEPT, update)
        for number in self._numbers(KEPT)[: -self.most]:
            shutil.rmtree(self._path(KEPT, number))

    def export(self, critic: Critic, update: int) -> str:
        """Write a critic for use elsewhere; return its path below the run's directory."""
        return str(self._write(critic, EXPORTS, update).relative_to(self.out))

    def before(self, update: int) -> tuple[int, Critic] | None:
        """Return the newest critic from before a gradient step, with its number; None: there is none."""
        found = [(number, kind) for kind in (KEPT, EXPORTS) for number in self._numbers(kind)]
        earlier = [each for each in found if each[0] < update]
        if not earlier:
            return None
        number, kind = max(earlier)
        return number, Critic.from_pretrained(self._path(kind, number))

    def drop_after(self, update: int) -> None:
        """Let those go that were kept after a gradient step."""
        for number in self._numbers(KEPT):
            if number > update:
                shutil.rmtree(self._path(KEPT, number))

    def _numbers(self, kind: str) -> list[int]:
        return sorted(int(path.name) for path in (self.out / kind).glob("*") if path.name.isdigit())

    def _path(self, kind: str, update: int) -> Path:
        return self.out / kind / f"{update:09d}"

    def _write(self, critic: Critic, kind: str, update: int) -> Path:
        path = self._path(kind, update)
        with replacing_directory(path) as fresh:
            critic.save_pretrained(fresh)
        return path
