"""SVG figures: contrasts (a dot for each run, means, intervals, margins), and curves over samples.

No plotting library is used, which keeps the files small. Equal numbers give equal bytes.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence

from benchmarks.lab.experiments import Contrast
from benchmarks.lab.statistics import (
    GAIN,
    HARM,
    LARGE_GAIN,
    LARGE_HARM,
    SMALL_GAIN,
    SMALL_HARM,
    Estimate,
)

_WIDTH, _LABELS, _ROW, _TOP, _BOTTOM = 860, 400, 30, 34, 40
_COLORS = {
    **dict.fromkeys((LARGE_GAIN, GAIN, SMALL_GAIN), "#1a7f37"),
    **dict.fromkeys((LARGE_HARM, HARM, SMALL_HARM), "#cf222e"),
}
_OTHER = "#57606a"
_SERIES = ("#8250df", "#0969da", "#1a7f37", "#bc4c00")  # colours of curves
_STEPS = (0.25, 0.5, 1, 2, 5, 10, 20, 50)  # between ticks of the axis, in points
_LINE_CHARACTERS = 64


def draw_contrasts(rows: Sequence[tuple[Contrast, Estimate, str]], title: str) -> str:
    """Returns a figure of contrasts as SVG.

    Args:
        rows: contrasts that have runs, with their estimates and labels.
        title: text alternative, for readers who do not see the figure.
    """
    low, high, step = _axis([(c, e) for c, e, _ in rows])
    plot = _WIDTH - _LABELS - 20

    def x(points: float) -> float:
        return _LABELS + plot * (min(max(points, low), high) - low) / (high - low)

    bottom = _TOP + _ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {bottom + _BOTTOM}" '
        f'font-family="sans-serif" font-size="12" role="img"><title>{html.escape(title)}</title>',
        f'<rect width="{_WIDTH}" height="{bottom + _BOTTOM}" fill="#ffffff"/>',
    ]
    for number in range(round((high - low) / step) + 1):
        points = low + number * step
        color = "#24292f" if abs(points) < 1e-9 else "#d0d7de"
        parts += [
            f'<line x1="{x(points):.1f}" x2="{x(points):.1f}" y1="{_TOP - 8}" y2="{bottom}" '
            f'stroke="{color}"/>',
            f'<text x="{x(points):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{_number(points)}</text>",
        ]
    parts.append(
        f'<text x="{_LABELS + plot / 2:.0f}" y="{bottom + 34}" text-anchor="middle">'
        "difference in points; dots are runs, bars 95% intervals, dashed ticks margins</text>"
    )
    for number, (contrast, found, label) in enumerate(rows):
        parts += _draw_row(contrast, found, label, _TOP + _ROW * number + 10, x)
    return "\n".join([*parts, "</svg>", ""])


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Returns curves of R@10 over samples seen as SVG: solid for CAT, dashed for raw pairs.

    Args:
        curves: name of an arm, amount_SIZE_ARM -> its points (samples, R@10 in shares of 1).
    """
    sizes = sorted({int(name.split("_")[1]) for name in curves})
    points = [point for curve in curves.values() for point in curve]
    least, most = (math.log2(end(samples for samples, _ in points)) for end in (min, max))
    top = 10 * math.ceil(10 * max(value for _, value in points))
    left, right, height = 60, 620, 300

    def x(samples: int) -> float:
        return left + (right - left) * (math.log2(samples) - least) / max(most - least, 1)

    def y(points: float) -> float:
        return _TOP + height * (1 - points / top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_TOP + height + _BOTTOM}" '
        'font-family="sans-serif" font-size="12" role="img"><title>R@10 over samples seen</title>',
        f'<rect width="{_WIDTH}" height="{_TOP + height + _BOTTOM}" fill="#ffffff"/>',
        f'<text x="{left}" y="{_TOP - 12}">R@10 in %, over samples seen; CAT solid, raw pairs '
        "dashed</text>",
    ]
    for value in range(0, top + 1, 10):
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
            f'stroke="#d0d7de"/><text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{value}</text>"
        )
    for samples in sorted({samples for samples, _ in points}):
        parts.append(
            f'<text x="{x(samples):.1f}" y="{_TOP + height + 18}" text-anchor="middle">'
            f"{samples:,}</text>"
        )
    for number, size in enumerate(sizes):
        color = _SERIES[number % len(_SERIES)]
        for arm, dashes in (("cat", ""), ("raw", ' stroke-dasharray="6 4"')):
            curve = curves.get(f"amount_{size}_{arm}", ())
            path = " ".join(f"{x(samples):.1f},{y(100 * share):.1f}" for samples, share in curve)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>'
            )
        parts.append(
            f'<text x="{right + 20}" y="{_TOP + 16 + 18 * number}" fill="{color}">'
            f"of {size:,} pairs</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def _draw_row(contrast: Contrast, found: Estimate, label: str, y: int, x) -> list[str]:
    color = _COLORS.get(label, _OTHER)
    lines = textwrap.wrap(contrast.claim, _LINE_CHARACTERS, max_lines=2, placeholder="…")
    parts = [
        f'<text x="{_LABELS - 12}" y="{y + 4 + 13 * (number - (len(lines) - 1) / 2):g}" '
        f'text-anchor="end">{html.escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    parts += [
        f'<line x1="{x(margin):.1f}" x2="{x(margin):.1f}" y1="{y - 9}" y2="{y + 9}" '
        'stroke="#57606a" stroke-dasharray="2 2"/>'
        for margin in (-100 * contrast.margin, 100 * contrast.margin)
    ]
    if math.isfinite(found.low):
        parts.append(
            f'<line x1="{x(100 * found.low):.1f}" x2="{x(100 * found.high):.1f}" y1="{y}" '
            f'y2="{y}" stroke="{color}" stroke-width="3"/>'
        )
    parts += [
        f'<circle cx="{x(100 * each):.1f}" cy="{y + 7}" r="2" fill="{color}" opacity="0.6"/>'
        for each in found.differences
    ]
    parts.append(f'<circle cx="{x(100 * found.mean):.1f}" cy="{y}" r="5" fill="{color}"/>')
    return parts


def _axis(rows: Sequence[tuple[Contrast, Estimate]]) -> tuple[float, float, float]:
    """Returns (low, high, step) in points; cuts intervals at twice the farthest run or margin."""
    dots = [100 * each for _, found in rows for each in found.differences]
    dots += [100 * sign * contrast.margin for contrast, _ in rows for sign in (-1, 1)]
    reach = 2 * max(abs(each) for each in dots)
    ends = [100 * end for _, found in rows for end in (found.low, found.high) if math.isfinite(end)]
    low = max(min([*dots, *ends]), -reach)
    high = min(max([*dots, *ends]), reach)
    step = next((each for each in _STEPS if (high - low) / each <= 8), _STEPS[-1])
    return step * math.floor(low / step), step * math.ceil(high / step), step


def _number(points: float) -> str:
    return "0" if abs(points) < 1e-9 else f"{points:+g}"
