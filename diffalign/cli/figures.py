"""Curves of a report as small inline SVG, drawn directly: a page of thirty takes milliseconds."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

_WIDTH, _HEIGHT = 360.0, 206.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 350.0, 26.0, 182.0
_MAX_POINTS = 300
Point = tuple[float, float]


def curve(points: Sequence[Point], label: str) -> str:
    """One train metric over steps; beyond 60 points the raw values go pale under a running mean.

    Non-finite values are left out, and the label says how many.
    """
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return _frame(f"{label}: no finite values", [0.0, 1.0], [0.0, 1.0], lambda x, y: "")
    missing = len(points) - len(finite)
    smooth = running_mean([y for _, y in finite], len(finite) // 40 + 1)
    means = [(x, y) for (x, _), y in zip(finite, smooth, strict=True)]

    def marks(px: Callable[[float], float], py: Callable[[float], float]) -> str:
        raw = _line(_thin(finite), px, py, "raw") if len(finite) > 60 else ""
        dot = _dot(means[0], px, py) if len(means) == 1 else ""
        return raw + _line(_thin(means) if raw else finite, px, py, "line") + dot

    note = f" ({missing} not finite)" if missing else ""
    return _frame(label + note, [x for x, _ in finite], [y for _, y in finite], marks)


def interval_curve(points: Sequence[Point], intervals: Sequence[Point], label: str) -> str:
    """Evaluations (step, value) with their (low, high) as bars."""

    def marks(px: Callable[[float], float], py: Callable[[float], float]) -> str:
        bars = "".join(
            f'<path class="bar" d="M{px(x):.1f} {py(low):.1f}V{py(high):.1f}"/>'
            for (x, _), (low, high) in zip(points, intervals, strict=True)
        )
        return bars + _line(points, px, py, "line") + "".join(_dot(point, px, py) for point in points)

    return _frame(label, [x for x, _ in points], [bound for interval in intervals for bound in interval], marks)


def histogram(values: Sequence[float], label: str, bins: int = 40) -> str:
    """How many of the values fall into each of equal bins from the least to the greatest."""
    low, high = _range(values, 0.0)
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / (high - low) * bins), bins - 1)] += 1
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]

    def marks(px: Callable[[float], float], py: Callable[[float], float]) -> str:
        steps = [(edges[i + side], float(count)) for i, count in enumerate(counts) for side in (0, 1)]
        return _line([(low, 0.0), *steps, (high, 0.0)], px, py, "line")

    return _frame(label, edges, [0.0, *map(float, counts)], marks)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at every point."""
    return [math.fsum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)
    first = math.ceil(low / gap - 1e-9)
    return [index * gap for index in range(first, math.floor(high / gap + 1e-9) + 1)]


def _frame(
    label: str,
    xs: Sequence[float],
    ys: Sequence[float],
    marks: Callable[[Callable[[float], float], Callable[[float], float]], str],
) -> str:
    (x0, x1), (y0, y1) = _range(xs, 0.02), _range(ys, 0.06)

    def px(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (_RIGHT - _LEFT)

    def py(y: float) -> float:
        return _BOTTOM - (y - y0) / (y1 - y0) * (_BOTTOM - _TOP)

    name = html.escape(label, quote=True)
    rows = "".join(
        f'<path class="grid" d="M{_LEFT} {py(y):.1f}H{_RIGHT}"/>'
        f'<text x="{_LEFT - 5}" y="{py(y) + 3:.1f}" text-anchor="end">{_number(y)}</text>'
        for y in ticks(y0, y1)
    )
    columns = "".join(
        f'<text x="{px(x):.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{_number(x)}</text>' for x in ticks(x0, x1, 6)
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}"><text class="name" x="{_LEFT}" y="14">'
        f'{name}</text>{rows}{columns}{marks(px, py)}<path class="axis" d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}"/></svg>'
    )


def _range(values: Sequence[float], margin: float) -> Point:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
        return low - max(abs(low), 1.0) * 0.5, high + max(abs(high), 1.0) * 0.5
    return low - margin * (high - low), high + margin * (high - low)


def _number(value: float) -> str:
    size = abs(value)
    if size >= 1e4:
        for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
            if size >= scale:
                return f"{value / scale:g}{unit}"
    return f"{value:.6g}" if size >= 1e-3 or size < 1e-12 else f"{value:.1e}".replace("e-0", "e-")


def _line(points: Sequence[Point], px: Callable[[float], float], py: Callable[[float], float], style: str) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)}"/>'


def _dot(point: Point, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    return f'<circle class="dot" cx="{px(point[0]):.1f}" cy="{py(point[1]):.1f}" r="3"/>'


def _thin(points: Sequence[Point]) -> list[Point]:
    stride = -(-len(points) // _MAX_POINTS)
    return [*points[:-1:stride], points[-1]]
