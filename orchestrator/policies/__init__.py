"""Scheduling policies: one per file, chosen by name."""

from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.policies.distserve import DistServe
from edgellm.orchestrator.policies.dual_pool import DualPool

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (DualPool, DistServe)}
