"""Before one steers: what can be known of a critic without a rollout, one file per question."""

from qsteer.auditing.audit import audit
from qsteer.auditing.page import Audit, Check

__all__ = ["Audit", "Check", "audit"]
