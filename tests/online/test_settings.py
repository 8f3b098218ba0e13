"""Settings of online runs that cannot be are refused."""

import pytest

from qsteer.online import OnlineTraining


@pytest.mark.parametrize(
    "changes", [{"env_steps": 0}, {"updates_per_step": 0.0}, {"offline_share": 1.0}, {"warmup": -1}]
)
def test_impossible_settings_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"OnlineTraining.{next(iter(changes))}: expected"):
        OnlineTraining(**changes)
