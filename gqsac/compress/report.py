"""The report of a compression: report.json and report.png in the output folder, and the words for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gqsac.compiler.passes.choose_layouts import stored_bytes
from gqsac.compress.options import Options
from gqsac.compress.write import write_json
from gqsac.quantized_matrix import QuantizedMatrix, scales_in_use

_SCALE_BITS = 16


@dataclass(frozen=True)
class Counts:
    """Of a linear: kept groups, quantisation groups of which something is kept, and bytes in a built file."""

    kept: int
    scales: int
    n_bytes: int


def stored_counts(matrix: QuantizedMatrix) -> Counts:
    """What a linear takes."""
    n_scales = matrix.scales.size
    if matrix.keep is not None:
        used = scales_in_use(matrix.keep, matrix.group_size, matrix.quant_group_size)
        n_scales = int(np.count_nonzero(used))
    return Counts(matrix.n_groups, n_scales, stored_bytes(matrix))


def sizes(shapes: dict[str, tuple[int, int]], counts: dict[str, Counts], options: Options) -> dict:
    """Numbers of linears, parameters, groups and bits. counts: of each linear, see `stored_counts`.

    bits_per_weight: as `gqsac build` packs, each linear by itself.
    coded_bits_per_weight: what the method itself needs, by the usual count: the kept weights, a float16 scale and
    a zero for each quantisation group of which something is kept, and one bit for each group if any is removed,
    or two bits for each kept weight of 2:4. sparsity: share of the weights removed, by linear.
    """
    parameters = sum(rows * columns for rows, columns in shapes.values())
    groups = parameters // options.group_size
    stored = sum(count.kept for count in counts.values())
    packed = sum(count.n_bytes for count in counts.values())
    of_four = options.pattern == "2:4"
    weights = stored * options.group_size * (0.5 if of_four else 1)
    index = 2 * weights if of_four else groups if stored < groups else 0
    scales = sum(count.scales for count in counts.values())
    coded = weights * options.bits + scales * (_SCALE_BITS + options.bits) + index
    removed = {
        path: 1 - count.kept * options.group_size / (shapes[path][0] * shapes[path][1]) * (0.5 if of_four else 1)
        for path, count in counts.items()
    }
    return {
        "linears": len(shapes),
        "parameters": parameters,
        "groups": groups,
        "kept_groups": stored,
        "bits_per_weight": round(8 * packed / parameters, 4),
        "coded_bits_per_weight": round(coded / parameters, 4),
        "sparsity": {path: round(share, 5) for path, share in removed.items()},
    }


def write_report(folder: Path, report: dict) -> None:
    """Writes report.json and its plots, report.png."""
    write_json(folder / "report.json", report)
    _plot(report, folder / "report.png")


def summary(report: dict) -> str:
    """The report in a few lines, for a terminal."""
    options = report["options"]
    bits = f"{report['bits_per_weight']:.2f} bits per weight as built"
    removed = 1 - report["kept_groups"] / report["groups"] if options["pattern"] != "2:4" else 0.5
    lines = [
        f"{report['model']}: {report['linears']} linears of {report['parameters'] / 1e6:.1f} M weights",
        f"  calibrated on   {report['calibration']}",
        f"  weights         {options['bits']} bits, {options['pattern']}, {removed:.1%} removed: {bits}",
    ]
    for name, facts in report["stages"].items():
        lines.append(f"  {name:15s} {_outcome(facts)}{facts['seconds']:.0f} s, peak {_peak(facts)}")
    size = f"{report['bytes'] / 1e6:.1f} MB, {report['seconds']:.0f} s in all"
    lines.append(f"  written to      {report['out']} ({size})")
    return "\n".join(lines)


def _outcome(facts: dict) -> str:
    blocks = facts.get("blocks", [])
    if blocks and "after" in blocks[0]:
        before, after = (np.mean([block[key] for block in blocks]) for key in ("before", "after"))
        return f"relative error of a block {before:.4f} -> {after:.4f}, "
    if facts.get("curve"):
        return f"loss {facts['curve'][0][1]:.4f} -> {facts['curve'][-1][1]:.4f} in {facts['steps']} steps, "
    return ""


def _peak(facts: dict) -> str:
    gpu = f" (GPU {facts['peak_gpu_gib']:.1f})" if "peak_gpu_gib" in facts else ""
    return f"{facts['peak_gib']:.1f} GiB{gpu}"


def _plot(report: dict, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    panels = [_plot_sparsity]
    if any("after" in block for facts in report["stages"].values() for block in facts.get("blocks", ())):
        panels.append(_plot_blocks)
    panels += [_curve_of(name) for name, facts in report["stages"].items() if facts.get("curve")]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, report)
    options = report["options"]
    figure.suptitle(
        f"{report['model']}\n{options['bits']} bits, {options['pattern']}, groups of {options['group_size']}, "
        f"{report['bits_per_weight']:.2f} bits per weight",
        fontsize="medium",
    )
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _plot_sparsity(axes, report: dict) -> None:
    by_kind: dict[str, list[tuple[int, float]]] = {}
    for path, share in report["sparsity"].items():
        numbers = [part for part in path.split(".") if part.isdigit()]
        by_kind.setdefault(path.rsplit(".", 1)[-1], []).append((int(numbers[0]), share))
    for kind, points in by_kind.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    axes.set(xlabel="block", ylabel="share of the weights removed", title="Sparsity per linear")
    axes.set_ylim(0, max(0.05, 1.4 * max(report["sparsity"].values())))  # room for the legend
    axes.legend(fontsize="small", ncols=3, loc="upper center")


def _plot_blocks(axes, report: dict) -> None:
    (blocks,) = (facts["blocks"] for facts in report["stages"].values() if "after" in (facts.get("blocks") or [{}])[0])
    for key, label in (("before", "one-shot"), ("after", "after BQPO")):
        axes.plot([block[key] for block in blocks], marker=".", label=label)
    axes.set(xlabel="block", ylabel="relative error of the output", title="BQPO: error of each block", yscale="log")
    axes.legend()


def _curve_of(name: str):
    def draw(axes, report: dict) -> None:
        curve = report["stages"][name]["curve"]
        axes.plot(*zip(*curve, strict=True), marker="." if len(curve) < 50 else "")
        axes.set(xlabel="step", ylabel="loss (nats per token)", title=f"{name}: training loss", yscale="log")

    return draw
