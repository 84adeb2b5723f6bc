"""Scheduling policies: one per file, chosen by name."""

from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.policies.dual_pool import DualPool

POLICIES: dict[str, type[Policy]] = {DualPool.name: DualPool}
