"""Draws curves as an SVG that a page of the docs can show; no library needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 720
HEIGHT: Final = 360
#: Room for the labels, in pixels: left and below, and on the other sides.
LABELS: Final = 48
EDGE: Final = 16
#: Told apart by those who see few colours too (Okabe and Ito).
COLOURS: Final = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00")
NUM_LINES: Final = 5


def write_plot(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    """Write curves of (x, y) points, by name, on common axes."""
    points = [point for curve in curves.values() for point in curve]
    xs, ys = zip(*points, strict=True)
    frame = _Frame(min(xs), max(xs), min(ys), max(ys))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f"<title>{escape(title)}</title>",
        *frame.grid(),
    ]
    for place, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[place % len(COLOURS)]
        line = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in curve)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" '
            'stroke-width="1.5"/>'
        )
        at = f'x="{WIDTH - EDGE}" y="{EDGE + 16 * (place + 1)}" text-anchor="end"'
        parts.append(f'<text {at} fill="{colour}">{escape(name)}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]))


class _Frame:
    """Where numbers are on the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self._left, self._width = left, (right - left) or 1.0
        self._low, self._height = low, (high - low) or 1.0

    def x(self, value: float) -> float:
        share = (value - self._left) / self._width
        return LABELS + share * (WIDTH - LABELS - EDGE)

    def y(self, value: float) -> float:
        share = (value - self._low) / self._height
        return HEIGHT - LABELS - share * (HEIGHT - LABELS - EDGE)

    def grid(self) -> list[str]:
        """Return lines across with the loss, and the steps below."""
        found = []
        for line in range(NUM_LINES):
            share = line / (NUM_LINES - 1)
            x, y = (
                self._left + share * self._width,
                self._low + share * self._height,
            )
            found += [
                f'<line x1="{LABELS}" x2="{WIDTH - EDGE}" y1="{self.y(y):.1f}" '
                f'y2="{self.y(y):.1f}" stroke="#dddddd"/>',
                f'<text x="{LABELS - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">'
                f"{y:.2f}</text>",
                f'<text x="{self.x(x):.1f}" y="{HEIGHT - LABELS + 18}" '
                f'text-anchor="middle">{x:.0f}</text>',
            ]
        return found
