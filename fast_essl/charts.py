"""Line charts and bars as inline SVG: no library, no script, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 250
"""Of a chart, in SVG units; the page scales it to its column."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 16, 28
_MAX_POINTS = 240
_MIN_LABEL_DISTANCE = 15.0


@dataclass(frozen=True, kw_only=True)
class Series:
    """One run's curve."""

    label: str
    """Written at the curve's end and in its tooltip."""
    color: int
    """Which of the page's colours: CSS class `run0`, `run1`, …"""
    x: Sequence[float]
    """Rising."""
    y: Sequence[float]
    """As many as `x`, finite."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A dashed horizontal line to compare the curves with."""

    label: str
    y: float


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    tick_format: Callable[[float], str],
    value_format: Callable[[float], str],
    level: Level | None = None,
    dots: bool = False,
) -> str:
    """Overlaid curves as one `<svg>`; curves of more than 240 points are averaged over stretches of equal length.

    Args: `tick_format` writes the axis, `value_format` the curves' ends and the tooltips; `dots` marks each point.
    """
    drawn = [Series(label=s.label, color=s.color, x=xs, y=ys) for s in series for xs, ys in [_thin(s.x, s.y)]]
    values = [value for s in drawn for value in s.y] + ([level.y] if level else [])
    y_ticks = nice_ticks(min(values), max(values), 5)
    x_end = max(s.x[-1] for s in drawn)
    x_ticks = [tick for tick in nice_ticks(0, x_end, 5) if tick <= x_end]
    low, high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (WIDTH - _LEFT - _RIGHT) * x / x_end
        return across, HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (y - low) / (high - low)

    parts = []
    for tick in y_ticks:
        _, y = at(0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 7, y + 4, tick_format(tick), "tick end"))
    for tick in x_ticks:
        x, y = at(tick, low)
        parts.append(_text(x, y + 18, f"{tick:,.0f}", "tick middle"))
    parts.append(_text(_LEFT - 12, HEIGHT - _BOTTOM + 18, x_label, "tick end"))
    if level:
        (left, y), (right, _) = at(0, level.y), at(x_end, level.y)
        parts.append(f'<line class="level" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left + 4, y - 5, level.label, "note"))
    for s in drawn:
        points = [at(x, y) for x, y in zip(s.x, s.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="curve run{s.color}" points="{path}"/>')
        for (x, y), step, value in zip(points, s.x, s.y, strict=True) if dots else ():
            tooltip = escape(f"{s.label}, {x_label} {step:,.0f}: {value_format(value)}")
            parts.append(
                f'<circle class="run{s.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{tooltip}</title>'
            )
            parts.append("</circle>")
    parts.extend(_end_labels(drawn, at, value_format))
    names = escape(", ".join(s.label for s in drawn))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{names}">{"".join(parts)}</svg>'


def nice_ticks(low: float, high: float, num: int) -> list[float]:
    """About `num` round numbers, at least two, from at or below `low` to at or above `high`."""
    if low == high:
        return nice_ticks(low - max(abs(low), 1.0) / 10, high + max(abs(high), 1.0) / 10, num)
    span = high - low
    magnitude = 10.0 ** math.floor(math.log10(span / num))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if span / (magnitude * factor) <= num)
    first = math.floor(low / step + 1e-6)
    return [step * k for k in range(first, math.ceil(high / step - 1e-6) + 1)]


def _thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    num_bins = min(len(x), _MAX_POINTS)
    xs, ys = ([float(part.mean()) for part in np.array_split(np.asarray(v), num_bins)] for v in (x, y))
    return xs, ys


def _end_labels(
    drawn: Sequence[Series],
    at: Callable[[float, float], tuple[float, float]],
    value_format: Callable[[float], str],
) -> list[str]:
    """Each curve's name and last value above or below its end, pushed apart where they would overlap."""
    ends = sorted(((at(s.x[-1], s.y[-1]), s) for s in drawn), key=lambda end: end[0][1])
    parts, last_y = [], -math.inf
    for (x, y), s in ends:
        y_text = max(y - 8, last_y + _MIN_LABEL_DISTANCE, _TOP)
        last_y = y_text
        parts.append(_text(x, y_text, f"{s.label} {value_format(s.y[-1])}", f"name end run{s.color}"))
    return parts


def _text(x: float, y: float, content: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'
