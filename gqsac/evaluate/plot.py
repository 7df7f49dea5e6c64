"""The plot of a comparison: perplexity against bits per weight, both logarithmic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from gqsa_runtime.errors import DeviceError, InputError

from gqsac.evaluate.compare import REFERENCE, Row

_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8, 10, 12, 16)
_MARKERS = "osD^vP*X"
_LINE_STEPS = 100  # places along a line that labels keep clear of
# Where a label may stand, in points from its own: (right, up, which side of the label is there).
_PLACES = (
    (7, 5, "left"), (7, -12, "left"), (-7, 5, "right"), (9, 16, "left"), (-7, -12, "right"), (0, 10, "center"),
    (0, -16, "center"), (-9, 16, "right"), (14, 28, "left"), (9, -24, "left"), (-9, -24, "right"), (20, 44, "left"),
)  # fmt: skip


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Writes a PNG. Reference rows become horizontal lines; rows without a finite perplexity are left out.

    Raises InputError where no row is left, DeviceError where matplotlib is missing.
    """
    drawn = [row for row in rows if row.bits_per_weight and row.perplexity]
    drawn = [row for row in drawn if math.isfinite(row.perplexity["perplexity"])]
    if not drawn:
        raise InputError(f"no row has a perplexity, so there is nothing to draw in {path}")
    figure = _figure(path)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    references = [row for row in drawn if row.series == REFERENCE]
    points = [row for row in drawn if row.series != REFERENCE]
    for row in references:
        value = row.perplexity["perplexity"]
        axes.axhline(value, color="0.35", linestyle="--", linewidth=1, label=f"{row.label}: {value:.1f}")
    for number, series in enumerate(dict.fromkeys(row.series for row in points)):
        members = sorted((row for row in points if row.series == series), key=lambda row: row.bits_per_weight)
        axes.plot(
            [row.bits_per_weight for row in members], [row.perplexity["perplexity"] for row in members],
            marker=_MARKERS[number % len(_MARKERS)], markersize=6, linewidth=1.2, color=f"C{number}", label=series,
        )  # fmt: skip
    _scale(axes, points or references, drawn)
    _annotate(figure, axes, points)
    axes.set_xlabel("bits per weight of the linears, scales and indices counted")
    axes.set_ylabel("perplexity (lower is better)")
    axes.set_title(title, fontsize=11)
    axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=9)
    figure.savefig(path)


def plot_sizes(rows: Sequence[Row], path: Path, title: str) -> None:
    """Writes a PNG: perplexity, and KL to the uncompressed model, over bits per weight and the bytes of built files.

    Rows without a divergence are left out; at least one must have it. Raises DeviceError where matplotlib is missing.
    """
    figure = _figure(path)
    figure.set_size_inches(10, 8)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = sorted((row for row in rows if row.divergence), key=lambda row: row.file_bytes)
    bits = [row.bits_per_weight for row in drawn], "bits per weight of the linears, as built"
    megabytes = [row.file_bytes / 1e6 for row in drawn], "MB of the built file; labels: target in bits per weight"
    measures = [("perplexity", "perplexity"), ("kl", "KL, nats a token")]
    panels = [(*measure, *size) for measure in measures for size in (bits, megabytes)]
    for axes, (key, words, sizes, of_sizes) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        values = [row.divergence[key] for row in drawn]
        axes.plot(sizes, values, marker="o", markersize=6, linewidth=1.2)
        if min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.1)  # room for labels on the right
        for row, size, value in zip(drawn, sizes, values, strict=True):
            axes.annotate(row.label, (size, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
        axes.set_xlabel(of_sizes)
        axes.set_ylabel(f"{words} (lower is better)")
        axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
    reference = drawn[0].divergence["reference_perplexity"]
    for axes in figure.axes[:2]:
        axes.axhline(reference, color="0.35", linestyle="--", linewidth=1, label=f"uncompressed: {reference:.1f}")
        axes.legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _figure(path: Path):
    """An empty figure. path: where it will go, for the error."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # no pyplot: no display and no global state
    except ImportError as error:
        raise DeviceError(
            f"the plot {path} needs matplotlib ({error}); install it with pip install matplotlib"
        ) from None
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _scale(axes, points: Sequence[Row], drawn: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    bits = [row.bits_per_weight for row in points]
    values = [row.perplexity["perplexity"] for row in drawn]
    spread = max(1.0, 2 * min(bits) / max(bits)) ** 0.5  # points that lie close are not torn apart
    axes.set_xlim(min(bits) / spread / 1.12, max(bits) * spread * 1.18)  # room for labels on the right
    axes.set_ylim(min(values) / 1.15, max(values) * 1.25)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    # A short range needs more ticks than powers of ten to be read.
    narrow = max(values) < 100 * min(values)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 4, 5, 7) if narrow else (1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _annotate(figure, axes, points: Sequence[Row]) -> None:
    """Labels beside their points, each at the first of some places where it covers no label, point or line.

    Of points with one label, which are one above the other, the lowest has it.
    """
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer).extents
    taken = [(inside[2], inside[1], math.inf, inside[3])]  # right of the axes
    for row in points:
        x, y = axes.transData.transform((row.bits_per_weight, row.perplexity["perplexity"]))
        taken.append((x - 5, y - 5, x + 5, y + 5))
    for line in axes.get_lines():
        corners = line.get_transform().transform(line.get_xydata())
        for (x0, y0), (x1, y1) in itertools.pairwise(corners):
            for step in range(_LINE_STEPS):
                x, y = x0 + (x1 - x0) * step / _LINE_STEPS, y0 + (y1 - y0) * step / _LINE_STEPS
                taken.append((x, y, x + 1, y + 1))
    points = sorted(points, key=lambda row: (-row.bits_per_weight, row.perplexity["perplexity"]))
    labelled = {row.label: row for row in reversed(points)}
    for row in sorted(labelled.values(), key=points.index):
        point = (row.bits_per_weight, row.perplexity["perplexity"])
        for dx, dy, side in _PLACES:
            leader = {"arrowstyle": "-", "linewidth": 0.6, "color": "0.6"} if abs(dy) > 12 else None
            text = axes.annotate(
                row.label, point, xytext=(dx, dy), textcoords="offset points", ha=side, fontsize=8, color="0.15",
                arrowprops=leader,
            )  # fmt: skip
            box = text.get_window_extent(renderer).extents
            if not any(_overlap(box, other) for other in taken):
                break
            if (dx, dy, side) != _PLACES[-1]:
                text.remove()
        taken.append(tuple(box))


def _overlap(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
