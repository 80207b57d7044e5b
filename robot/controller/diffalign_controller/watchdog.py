"""When what a controller relies on is too old: pure functions of ages in seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """How old things may be before the robot holds, and how long it may hold before it stops for good.

    observation_age_s: since the newest observation was measured. unchanged_s: since its values last changed, for frozen
    cameras and encoders, None where a robot at rest reports equal values. inference_s: since the pending decision was
    asked for. hold_s: of one hold.

    Raises: ValueError for an age that is not positive.
    """

    observation_age_s: float = 0.1
    unchanged_s: float | None = None
    inference_s: float = 0.5
    hold_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("observation_age_s", "unchanged_s", "inference_s", "hold_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def blind(self, *, age_s: float, unchanged_s: float) -> str | None:
        """Why the observation cannot be trusted, None if it can."""
        if age_s > self.observation_age_s:
            return f"observation is {age_s:.3f} s old, allowed are {self.observation_age_s} s"
        if self.unchanged_s is not None and unchanged_s > self.unchanged_s:
            return f"observation has not changed for {unchanged_s:.3f} s, allowed are {self.unchanged_s} s"
        return None

    def late(self, *, pending_s: float | None) -> str | None:
        """Why the policy is too late, None if it is not; pending_s is None while nothing is asked."""
        if pending_s is not None and pending_s > self.inference_s:
            return f"inference has taken {pending_s:.3f} s, allowed are {self.inference_s} s"
        return None

    def expired(self, *, held_s: float) -> bool:
        """Whether a hold has lasted too long."""
        return held_s > self.hold_s
