"""The plot of a benchmark: how fast each decode step works against what the memory's bandwidth allows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gqsa_runtime.errors import InputError


def check(path: str) -> None:
    """Raises InputError where `plot` could not write: another kind of file, no such folder, no matplotlib."""
    if Path(path).suffix.lower() != ".png":
        raise InputError(f"{path}: the plot is a PNG file, expected a name that ends with .png")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"{path}: there is no folder to write the plot to; make it first")
    _matplotlib()


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # no pyplot: no display and no global state
    except ImportError as error:
        raise InputError(f"--plot needs matplotlib ({error}); install it with `pip install matplotlib`") from None
    return Figure, FigureCanvasAgg


def plot(found: Mapping[str, Any], path: str) -> None:
    """Draws what `bench.bench` found, with its "name" and "device", as a PNG file, whole or not at all.

    Operations per byte, across, and GFLOP/s, up: the line is the bandwidth measured in the same run, and a point that
    touches it is as fast as the memory.
    """
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(7, 4.6), dpi=150, layout="constrained")
    canvas_class(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    bandwidth = found["bandwidth_gb_per_s"]
    intensities = [1e3 * row["gflop"] / row["mb"] for row in found["decode"]]
    ends = [min(intensities) / 2, max(intensities) * 2]
    axes.plot(ends, [bandwidth * x for x in ends], color="0.35", label=f"memory, {bandwidth:,.0f} GB/s")
    for intensity, row in zip(intensities, found["decode"], strict=True):
        rate = 1e3 * row["gflop"] / row["ms"]
        axes.plot([intensity], [rate], "o", label=f"context {row['context']}: {row['share']:.0%} of it")
    axes.set_xlabel("operations per byte read, removed weights counted")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{found['name']} on {found['device']}: decode", fontsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("{x:,g}")
    axes.grid(True, which="both", linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=9)
    partial = f"{path}.partial"
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
