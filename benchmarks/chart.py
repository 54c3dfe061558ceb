"""The chart: CPU microseconds a token of each contender, as a small SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT = 860, 230, 90
BAR, GAP, GROUP_GAP, TOP, BOTTOM = 20, 8, 34, 62, 46
FILL = {True: "#1f6f8b", False: "#b8bcc2"}


class Bar(NamedTuple):
    """One contender: what all its processes take, and the worker's part."""

    name: str
    whole_us: float
    worker_us: float
    ours: bool


def draw(groups: Sequence[tuple[str, Sequence[Bar]]]) -> str:
    """Groups of horizontal bars on a logarithmic axis; the darker line in a bar is the worker."""
    values = [each for _, bars in groups for bar in bars for each in (bar.whole_us, bar.worker_us)]
    low = 10 ** math.floor(math.log10(min(values, default=10)))
    high = 10 ** math.ceil(math.log10(max(values, default=100) * 1.001))

    def x(value: float) -> float:
        span = math.log10(high / low)
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(max(value, low) / low) / span

    parts: list[str] = []
    y = TOP
    for title, bars in groups:
        parts.append(_text(16, y + 12, title, weight="600"))
        y += 24
        for bar in bars:
            label = f"{_number(bar.whole_us)} µs"
            parts += [
                _text(LEFT - 10, y + 15, bar.name, anchor="end"),
                _rect(LEFT, y, x(bar.whole_us) - LEFT, FILL[bar.ours]),
                _line(x(bar.worker_us), y, y + BAR, "#14181d", 2),
                _text(x(bar.whole_us) + 6, y + 15, label),
            ]
            y += BAR + GAP
        y += GROUP_GAP - GAP
    foot = y - 10
    axis: list[str] = []
    decade = low
    while decade <= high:
        at = x(decade)
        axis += [
            _line(at, TOP - 6, foot, "#e3e6ea", 1),
            _text(at, foot + 16, f"{_number(decade)} µs", anchor="middle", fill="#5a6270"),
        ]
        decade *= 10
    height = foot + BOTTOM
    head = [
        _text(16, 24, "CPU time a streamed token", size=17, weight="600"),
        _text(
            16,
            43,
            "User and system, all processes but the provider; logarithmic. "
            "The dark line ends the part of the worker.",
            fill="#5a6270",
        ),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" role="img" '
        f'aria-label="CPU time a streamed token of each contender">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n'
        + "\n".join([*axis, *head, *parts])
        + "\n</svg>\n"
    )


def _rect(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{BAR}" rx="2" fill="{fill}"/>'


def _line(x: float, top: float, bottom: float, stroke: str, width: int) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{stroke}" '
        f'stroke-width="{width}"/>'
    )


def _text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    fill: str = "#14181d",
    size: int = 13,
    weight: str = "400",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{fill}" '
        f'font-size="{size}" font-weight="{weight}">{escape(words)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
