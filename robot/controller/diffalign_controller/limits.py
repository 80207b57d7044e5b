"""A robot's limits from a file, and from the package where the file says nothing.

The fields of a joint are those of ROS 2's joint_limits.yaml: has_position_limits, min_position, max_position,
has_velocity_limits, max_velocity, and the same for acceleration and jerk. JSON is read without anything installed, YAML
with PyYAML.

    joint_limits:
      shoulder: {has_position_limits: true, min_position: -2.0, max_position: 2.0,
                 has_velocity_limits: true, max_velocity: 1.0}
      elbow: {has_velocity_limits: true, max_velocity: 1.5}
    workspace: {min: [-0.7, -0.7, -0.1], max: [0.7, 0.7, 0.1]}    # of the tool, in metres; optional

Legend: Da action features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_controller.safety import Limits

Array = NDArray[np.floating]
Box = tuple[tuple[float, ...], tuple[float, ...]]
_KINDS = ("velocity", "acceleration", "jerk")
_FIELDS = {"has_position_limits", "min_position", "max_position", "has_effort_limits", "max_effort",
           *(f"has_{kind}_limits" for kind in _KINDS), *(f"max_{kind}" for kind in _KINDS)}


def read_limits(file: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file. Raises: ValueError if it is missing or names an unknown field."""
    if not file.is_file():
        raise ValueError(f"--limits {file}: there is no such file")
    parsed = _parsed(file)
    content: dict[str, Any] = parsed if isinstance(parsed, dict) else {}
    joints = content.get("joint_limits")
    if not isinstance(joints, dict) or not joints or not all(isinstance(joint, dict) for joint in joints.values()):
        raise ValueError(f"{file} must hold a mapping joint_limits: {{joint: {{has_position_limits: ...}}}}")
    unknown = {f"joint_limits.{name}.{key}" for name, joint in joints.items() for key in set(joint) - _FIELDS}
    unknown |= set(content) - {"joint_limits", "workspace"}
    if unknown:
        raise ValueError(f"{file} names {', '.join(sorted(unknown))}; known are joint_limits, workspace and, of a "
                         f"joint, {', '.join(sorted(_FIELDS))}")
    return content


def limits_of(content: dict[str, Any], low: Array, high: Array, rate_hz: float, names: Sequence[str] | None) -> Limits:
    """The limits of every command feature: the file's where it has one, else the package's low and high [Da].

    names: of the robot's joints in the order of a command; without them the file's order counts. Effort is no command
    here, and its limits are left to the servos. A joint without a bound of velocity, acceleration or jerk gets the
    largest that its others leave in one period.

    Raises: ValueError if the file's joints are not the robot's, if a joint has no finite position limits, or if a
    has_* field is set without its number.
    """
    joints = _in_order(content["joint_limits"], len(low), names)
    ranges = [_range(name, joint, float(a), float(b)) for (name, joint), a, b in zip(joints, low, high)]
    lows, highs = tuple(low for low, _ in ranges), tuple(high for _, high in ranges)
    widest = np.subtract(highs, lows) * rate_hz
    found: dict[str, tuple[float, ...] | None] = {}
    for kind in _KINDS:
        said = [_number(name, joint, f"has_{kind}_limits", f"max_{kind}") for name, joint in joints]
        bound = np.array([wide if value is None else value for value, wide in zip(said, widest)])
        found[kind] = tuple(bound.tolist()) if any(value is not None for value in said) else None
        widest = 2 * bound * rate_hz
    return Limits(lows, highs, velocity=found["velocity"], acceleration=found["acceleration"], jerk=found["jerk"])


def package_limits(low: Array, high: Array) -> Limits:
    """The package's action limits, no others. Raises: ValueError if one is missing."""
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("the package has no action limits for some features; give the robot's own with --limits FILE")
    return Limits(tuple(low.tolist()), tuple(high.tolist()))


def workspace_of(content: dict[str, Any]) -> Box | None:
    """The tool's box, None for none. Raises: ValueError unless it is two corners of three numbers."""
    box = content.get("workspace")
    if box is None:
        return None
    low, high = (box.get("min"), box.get("max")) if isinstance(box, dict) else (None, None)
    if not (isinstance(low, list) and isinstance(high, list) and len(low) == len(high) == 3):
        raise ValueError(f"workspace must be {{min: [x, y, z], max: [x, y, z]}} in metres, got {box}")
    return tuple(map(float, low)), tuple(map(float, high))


def _parsed(file: Path) -> Any:
    try:
        if file.suffix == ".json":
            return json.loads(file.read_text())
        import yaml

        try:
            return yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    except ModuleNotFoundError:
        raise ValueError(f"{file}: YAML needs PyYAML, which is not installed; `pip install pyyaml`, or write the "
                         "limits as JSON in a file that ends in .json") from None


def _in_order(joints: dict[str, dict[str, Any]], size: int, names: Sequence[str] | None
              ) -> list[tuple[str, dict[str, Any]]]:
    if names is not None and set(joints) != set(names):
        raise ValueError(f"the limits are for the joints {', '.join(joints)}, the robot has {', '.join(names)}; every "
                         "joint needs an entry, an empty one ({}) for the package's limits")
    if len(joints) != size:
        raise ValueError(f"the limits are for {len(joints)} joints, a command has {size} features; every one needs an "
                         "entry, an empty one ({}) for the package's limits")
    return [(name, joints[name]) for name in (names or joints)]


def _range(name: str, joint: dict[str, Any], low: float, high: float) -> tuple[float, float]:
    lowest = _number(name, joint, "has_position_limits", "min_position")
    highest = _number(name, joint, "has_position_limits", "max_position")
    found = (low if lowest is None else lowest, high if highest is None else highest)
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has no position limits, neither in the file nor in the package; set "
                         "has_position_limits, min_position and max_position")
    return found


def _number(name: str, joint: dict[str, Any], has: str, field: str) -> float | None:
    if not joint.get(has, False):
        if field in joint:
            raise ValueError(f"{name} has {field} but not `{has}: true`; say whether it counts")
        return None
    value = joint.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: {field} must be a number where {has} is true, got {value!r}")
    return float(value)
