"""The schemes of chunks.py by name, for a policy."""

from __future__ import annotations

from typing import Literal

from diffalign_controller.chunks import OverlapBlend, RecedingHorizon, Scheme, TemporalEnsemble
from diffalign_controller.policy import Policy

SchemeName = Literal["receding", "ensemble", "blend", "rtc"]


def scheme_of(name: SchemeName, policy: Policy, execute: int | None = None) -> Scheme:
    """The scheme; execute None is half of the policy's chunk.

    Raises: ValueError for rtc, real-time chunking, with a policy that was exported without its inputs, or for fewer
    than one action.
    """
    count = max(1, policy.chunk // 2) if execute is None else execute
    if name == "ensemble":
        return TemporalEnsemble(execute=count)
    if name == "blend":
        return OverlapBlend(count)
    if name == "rtc" and not policy.reads_plan:
        raise ValueError("the scheme rtc tells the policy what is planned, and this package has no inputs `previous` "
                         "and `weight` for it; export the run again with --real-time-chunking --sampler ode, or choose "
                         "another scheme (blend has the same mask for any package)")
    return RecedingHorizon(count, mask="exp" if name == "rtc" else None)
