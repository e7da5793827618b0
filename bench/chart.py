"""One small SVG: how many times longer than fasttrain each side takes, on a logarithmic axis, the losing cases on top."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.report import Row

COLOURS = {
    "plain": "#7f7f7f", "plain-1thread": "#a6a6a6", "plain-fused": "#c49c94", "plain-compiled": "#1f77b4",
    "plain-compiled-threads": "#6baed6", "captured-by-hand": "#d62728", "lightning": "#9467bd", "lightning-compile": "#c5b0d5",
    "fabric": "#e377c2", "accelerate": "#ff7f0e", "keras-torch": "#8c564b", "ignite": "#17becf",
}  # fmt: skip
LEFT, WIDTH, STEP, TOP = 210, 560, 20, 54
TICKS = (0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50)


def svg(rows: Sequence[Row]) -> str:
    """A line a workload, in the order of ``rows``; a dot a side, left of the line at 1.0 where that side is the quicker one."""
    shown = [r for r in rows if r.ratio is not None and r.side in COLOURS]
    names = list(dict.fromkeys(r.workload for r in shown))
    ratios = [r.ratio for r in shown if r.ratio is not None]
    low, high = math.log(min([0.8, *ratios]) * 0.95), math.log(max([1.5, *ratios]) * 1.05)

    def x(ratio: float) -> float:
        return LEFT + WIDTH * (math.log(ratio) - low) / (high - low)

    bottom = TOP + STEP * len(names)
    sides = [s for s in COLOURS if any(r.side == s for r in shown)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{bottom + 44 + 16 * math.ceil(len(sides) / 4)}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        '<text x="10" y="18" font-size="13">Time of a step, in fasttrain\'s (left of 1: quicker than we are)</text>',
    ]
    for tick in (t for t in TICKS if low <= math.log(t) <= high):
        stroke = "#333" if tick == 1 else "#ddd"
        parts.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="{stroke}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{TOP - 12}" text-anchor="middle">{tick:g}</text>')
    for i, name in enumerate(names):
        y = TOP + STEP * (i + 0.5)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        for r in (r for r in shown if r.workload == name and r.ratio is not None):
            title = escape(f"{r.side}: {r.ratio:.2f}x")
            parts.append(f'<circle cx="{x(r.ratio or 1):.1f}" cy="{y}" r="4" fill="{COLOURS[r.side]}"><title>{title}</title></circle>')
    for i, side in enumerate(sides):
        cx, cy = 20 + 190 * (i % 4), bottom + 24 + 16 * (i // 4)
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="4" fill="{COLOURS[side]}"/><text x="{cx + 8}" y="{cy + 4}">{escape(side)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
