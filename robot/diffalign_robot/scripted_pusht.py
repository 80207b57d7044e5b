"""A scripted controller for gym-pusht's state observation: one push at a time, chosen by a model of the block.

The table damps all motion, so that a push at a point r from the centre of mass along the inward normal n moves the
block along n and turns it (r x n) m / I as much. The push after which the block's corners lie nearest to the goal's is
made; then another is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffalign_robot.envs import Array

Points = NDArray[np.floating[Any]]

_CORNERS = np.array([(-60, 0), (60, 0), (60, 30), (15, 30), (15, 120), (-15, 120), (-15, 30), (-60, 30)], float)
_CENTRE, _INERTIA = np.array([0.0, 45.0]), 7875.0  # of the block in its own frame; I / m, pixels squared
_GOAL = (np.array([256.0, 256.0]), np.pi / 4)
_RADIUS, _GAP, _CELL = 15.0, 6.0, 16.0  # pixels: the agent, its distance from where it will push, a cell of the grid
_GRID = np.stack(np.meshgrid(*2 * [np.arange(20.0, 493.0, _CELL)], indexing="ij"), -1)
_LENGTHS = np.array([3.0, 6.0, 12.0, 24.0, 40.0])  # pixels: pushes that are tried
_PATIENCE = 60  # control steps until another push is chosen


def push() -> Callable[[Array], Array]:
    """A controller for one episode: observation [5] (agent, block, angle) -> target position [2] in pixels."""
    plan: list[tuple[int, float]] = []
    begun: list[Points] = []  # where the push began
    waited = 0

    def act(obs: Array) -> Array:
        nonlocal waited
        agent, block, angle = obs[0:2].astype(float), obs[2:4].astype(float), float(obs[4])
        left = plan[0][1] + _GAP - float(np.linalg.norm(agent - begun[0])) if begun else np.inf
        if not plan or waited >= _PATIENCE or left < 1:
            plan[:] = [_best(block, angle, agent)]
            begun.clear()
            waited, left = 0, np.inf
        waited += 1
        number, length = plan[0]
        point, normal = (part[number] for part in _world(block, angle))
        start = point - (_RADIUS + _GAP) * normal
        if not begun and np.linalg.norm(agent - start) > 4:
            return _way(agent, start, block, angle)
        if not begun:
            begun.append(agent)
            left = length + _GAP
        return np.asarray(np.clip(agent + min(16, left + 2) * normal, 0, 512), np.float32)

    return act


def _outline() -> tuple[Points, Points]:
    """Points along the block's edges in its frame, and the inward normals there."""
    points, normals = [], []
    for a, b in zip(_CORNERS, np.roll(_CORNERS, -1, 0), strict=True):
        along = b - a
        count = max(int(np.linalg.norm(along) // 10), 2)
        points.append(a + along * ((np.arange(count) + 0.5) / count)[:, None])
        normals.append(np.tile(np.array([-along[1], along[0]]) / np.linalg.norm(along), (count, 1)))
    return np.concatenate(points), np.concatenate(normals)


_OUTLINE = _outline()


def _turned(points: Points, angle: Any) -> Points:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * points[..., 0] - sin * points[..., 1], sin * points[..., 0] + cos * points[..., 1]], -1)


def _world(block: Points, angle: float) -> tuple[Points, Points]:
    return block + _turned(_OUTLINE[0], angle), _turned(_OUTLINE[1], angle)


def _best(block: Points, angle: float, agent: Points) -> tuple[int, float]:
    """Which outline point to push at and how far."""
    points, normals = _world(block, angle)
    centre = block + _turned(_CENTRE, angle)
    arm = points - centre
    turn = (arm[:, 0] * normals[:, 1] - arm[:, 1] * normals[:, 0]) / _INERTIA
    shares = 1 / (1 + turn**2 * _INERTIA)  # the pushed point moves by d: translation and turn share it
    moved = centre + (shares[:, None] * _LENGTHS)[..., None] * normals[:, None]
    angles = angle + (shares * turn)[:, None] * _LENGTHS
    corners = moved[..., None, :] + _turned(_CORNERS - _CENTRE, angles[..., None])
    goal = _GOAL[0] + _turned(_CORNERS, _GOAL[1])
    cost = np.sqrt(((corners - goal) ** 2).sum(-1).mean(-1))
    starts = points - (_RADIUS + _GAP) * normals
    cells = np.linalg.norm(_GRID[None] - starts[:, None, None], axis=-1).reshape(len(starts), -1).argmin(1)
    ways = _steps_to(agent, _clearance(_GRID, points) > _RADIUS + 2).flatten()[cells]  # infinite: not to be reached
    cost += 0.2 * ways[:, None]
    cost[((starts < 20) | (starts > 492)).any(1) | (_clearance(starts, points) < _RADIUS + 2)] = np.inf
    number, length = np.unravel_index(int(cost.argmin()), cost.shape)
    return int(number), float(_LENGTHS[length])


def _way(agent: Points, start: Points, block: Points, angle: float) -> Array:
    """The next target on the way to `start`: straight if the block is not there, else the shortest way on a grid."""
    outline = _world(block, angle)[0]
    if _sees(agent, start[None], outline)[0]:
        return np.asarray(start, np.float32)
    steps = _steps_to(start, _clearance(_GRID, outline) > _RADIUS + 2)
    near = np.linalg.norm(_GRID - agent, axis=-1) / _CELL
    cost = np.where(near < 6, steps + 0.9 * near, np.inf)  # of equal ways the farthest cell: the agent must not stay
    shown = cost < np.inf
    cost[shown] = np.where(_sees(agent, _GRID[shown], outline) | (near[shown] < 1.5), cost[shown], np.inf)
    return np.asarray(_GRID[np.unravel_index(int(cost.argmin()), cost.shape)], np.float32)


def _clearance(places: Points, outline: Points) -> Points:
    return np.asarray(np.linalg.norm(places[..., None, :] - outline, axis=-1).min(-1))


def _sees(agent: Points, targets: Points, outline: Points) -> NDArray[np.bool_]:
    """Whether the agent could go straight to each target [n, 2]; it may leave a block that it touches."""
    lines = agent + np.linspace(0.1, 1, 12)[:, None, None] * (targets - agent)
    margin = min(_RADIUS + 1, float(_clearance(agent, outline)) - 0.5)
    return np.asarray(_clearance(lines, outline).min(0) > margin)


def _steps_to(start: Points, free: NDArray[np.bool_]) -> Points:
    """How many cells every free cell is from the one nearest to start, infinity where there is no way."""
    steps = np.full(np.add(free.shape, 2), np.inf)  # a border of walls
    inner = steps[1:-1, 1:-1]
    apart = np.where(free, np.linalg.norm(_GRID - start, axis=-1), np.inf)
    inner[np.unravel_index(int(apart.argmin()), free.shape)] = 0
    for _ in range(2 * len(free)):
        around = [steps[1 + dx : steps.shape[0] - 1 + dx, 1 + dy : steps.shape[1] - 1 + dy] + np.hypot(dx, dy)
                  for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        inner[free] = np.min(around, 0)[free]
    return inner
