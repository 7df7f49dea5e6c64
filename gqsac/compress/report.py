"""The report of a compression: report.json and report.png in the output folder, and the words for a terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gqsa_runtime.inspect_ import size as in_words

from gqsac.compiler.passes.choose_layouts import stored_bytes
from gqsac.compress.allot_widths import Allotment
from gqsac.compress.options import Options
from gqsac.compress.write import write_json
from gqsac.quantized_matrix import QuantizedMatrix, scales_in_use

_SCALE_BITS, _ZERO_BITS = 16, 4


@dataclass(frozen=True)
class Counts:
    """Of a linear: kept groups and the bits of their levels, quantisation groups of which something is kept, bytes in a
    built file if it is stored by itself, and widths, uint8 [rows]."""

    kept: int
    level_bits: int
    scales: int
    n_bytes: int
    row_bits: np.ndarray


def stored_counts(matrix: QuantizedMatrix) -> Counts:
    """What a linear takes."""
    kept, n_scales = np.full(matrix.rows, matrix.columns // matrix.group_size), matrix.scales.size
    if matrix.keep is not None:
        kept = matrix.keep.sum(1)
        n_scales = np.count_nonzero(scales_in_use(matrix.keep, matrix.group_size, matrix.quant_group_size))
    return Counts(
        kept=matrix.n_groups,
        level_bits=int(kept @ matrix.row_bits.astype(np.int64)) * matrix.group_size,
        scales=int(n_scales),
        n_bytes=stored_bytes(matrix),
        row_bits=matrix.row_bits,
    )


def sizes(
    shapes: dict[str, tuple[int, int]],
    counts: dict[str, Counts],
    options: Options,
    allotment: Allotment | None = None,
) -> dict:
    """Numbers of linears, parameters, groups and bits. counts: of each linear, see `stored_counts`.

    bits_per_weight: as `gqsac build` packs; with a target exactly, as compiler/stacks.py defines it, otherwise each
    linear by itself. coded_bits_per_weight: what the method itself needs, by the usual count: the kept weights, a
    float16 scale and a zero for each quantisation group of which something is kept, and one bit for each group if any
    is removed, or two bits for each kept weight of 2:4. sparsity: share of the weights removed, by linear. With a
    target also mean_width, bits of a weight's level, row_widths: by linear, width -> share of its rows, and
    all_row_widths: the same of all rows together.
    """
    parameters = sum(rows * columns for rows, columns in shapes.values())
    groups = parameters // options.group_size
    stored = sum(count.kept for count in counts.values())
    packed = sum(count.n_bytes for count in counts.values())
    of_four = options.pattern == "2:4"
    weights = stored * options.group_size * (0.5 if of_four else 1)
    index = 2 * weights if of_four else groups if stored < groups else 0
    levels = sum(count.level_bits for count in counts.values()) * (0.5 if of_four else 1)
    zero_bits = options.bits if allotment is None else _ZERO_BITS
    scales = sum(count.scales for count in counts.values()) * (_SCALE_BITS + zero_bits)
    removed = {
        path: 1 - count.kept * options.group_size / (shapes[path][0] * shapes[path][1]) * (0.5 if of_four else 1)
        for path, count in counts.items()
    }
    by_rows = {}
    if allotment is not None:
        row_bits = {path: count.row_bits for path, count in counts.items()}
        packed = allotment.budget.n_bytes(row_bits)
        by_rows = {
            "mean_width": round(levels / parameters, 4),
            "row_widths": {path: _shares(widths) for path, widths in row_bits.items()},
            "all_row_widths": _shares(np.concatenate(list(row_bits.values()))),
        }
    return {
        "linears": len(shapes),
        "parameters": parameters,
        "groups": groups,
        "kept_groups": stored,
        "bits_per_weight": round(8 * packed / parameters, 4),
        "coded_bits_per_weight": round((levels + scales + index) / parameters, 4),
        "sparsity": {path: round(share, 5) for path, share in removed.items()},
        **by_rows,
    }


def _shares(row_bits: np.ndarray) -> dict[str, float]:
    """Width -> share of the rows."""
    widths, rows = np.unique(row_bits, return_counts=True)
    return {str(width): round(n / len(row_bits), 5) for width, n in zip(widths.tolist(), rows.tolist(), strict=True)}


def write_report(folder: Path, report: dict) -> None:
    """Writes report.json and its plots, report.png."""
    write_json(folder / "report.json", report)
    _plot(report, folder / "report.png")


def summary(report: dict) -> str:
    """The report in a few lines, for a terminal."""
    options = report["options"]
    bits = f"{report['bits_per_weight']:.2f} bits per weight as built"
    removed = 1 - report["kept_groups"] / report["groups"] if options["pattern"] != "2:4" else 0.5
    weights = _widths_in_words(report)
    if "row_widths" not in report:
        weights += f", {options['pattern']}, {removed:.1%} removed"
    lines = [
        f"{report['model']}: {report['linears']} linears of {report['parameters'] / 1e6:.1f} M weights",
        f"  calibrated on   {report['calibration']}",
        f"  weights         {weights}: {bits}",
    ]
    for key in ("file_bytes", "memory_bytes"):
        if key in report:
            lines.append(f"  as built        {in_words(report[key])}: {report['counted']}")
    if report["measured"]:
        found = report["measured"]
        lines.append(
            f"  quality         KL {found['kl']:.4f} nats a token, {found['flips']:.1%} of likeliest tokens flip, "
            f"perplexity {found['perplexity']:.2f} (uncompressed {found['reference_perplexity']:.2f})"
        )
    for name, facts in report["stages"].items():
        lines.append(f"  {name:15s} {_outcome(facts)}{facts['seconds']:.0f} s, peak {_peak(facts)}")
    size = f"{report['bytes'] / 1e6:.1f} MB, {report['seconds']:.0f} s in all"
    lines.append(f"  written to      {report['out']} ({size})")
    return "\n".join(lines)


def rounded_in_words(rounded: dict[str, float]) -> str:
    """What to say of a source whose weights are rounded ones already. rounded: see Source."""
    types = ", ".join(f"{share:.0%} {name}" for name, share in rounded.items())
    return (
        f"the weights of the source were rounded before ({types}) and are rounded a second time: what they lost stays "
        "lost, and the float16 or bfloat16 model they were made from would give a better result"
    )


def _widths_in_words(report: dict) -> str:
    if "row_widths" not in report:
        return f"{report['options']['bits']} bits"
    widths = report["all_row_widths"]
    shares = ", ".join(f"{share:.0%} {width}" for width, share in widths.items())
    return f"rows of {' '.join(widths)} bits ({shares})"


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

    panels = [_plot_widths if "row_widths" in report else _plot_sparsity]
    if any("after" in block for facts in report["stages"].values() for block in facts.get("blocks", ())):
        panels.append(_plot_blocks)
    panels += [_curve_of(name) for name, facts in report["stages"].items() if facts.get("curve")]
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, report)
    options, bits = report["options"], f"{report['bits_per_weight']:.2f} bits per weight"
    what = f"{_widths_in_words(report)}, {options['pattern']}, groups of {options['group_size']}, {bits}"
    if "row_widths" in report:  # longer, and nothing is removed
        what = f"{_widths_in_words(report)}\n{bits}"
    figure.suptitle(f"{report['model']}\n{what}", fontsize="medium")
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


def _plot_widths(axes, report: dict) -> None:
    from matplotlib import colormaps

    linears, widths = list(report["row_widths"]), list(report["all_row_widths"])
    below, colors = np.zeros(len(linears)), colormaps["viridis"].resampled(len(widths))
    for number, width in enumerate(widths):
        shares = np.array([report["row_widths"][path].get(width, 0.0) for path in linears])
        label = f"{width} bit" + "s" * (width != "1")
        axes.bar(range(len(linears)), shares, 1.0, below, label=label, color=colors(number))
        below += shares
    axes.set(xlabel="linear, in the model's order", ylabel="share of the rows", title="Widths of rows", ylim=(0, 1.15))
    axes.legend(fontsize="small", ncols=len(widths), loc="upper center")


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
