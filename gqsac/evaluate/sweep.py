"""A model at several sizes: compressed, built and compared with what it was made of, point by point."""

from __future__ import annotations

import csv
import io
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from gqsa_runtime.errors import GqsaError, InputError
from safetensors import SafetensorError

from gqsac.compiler.pipeline import BuildOptions, build
from gqsac.compress.options import Options, checked
from gqsac.compress.run import compress
from gqsac.evaluate import compare
from gqsac.evaluate.compare import Row
from gqsac.evaluate.divergence import compare as diverge
from gqsac.evaluate.plot import plot_sizes

RESULTS, TABLE, CSV, PLOT = "sweep.json", "sweep.md", "sweep.csv", "sweep.png"
OWN_TEXT = "own-text"  # of the model, if it is to be trained on: one for all points
_SERIES = "widths by row"


def sweep(
    model: str,
    targets: Sequence[float],
    out: Path,
    text: str,
    *,
    calibration: Sequence[str | Path] = (),
    build_targets: Sequence[str] = (),
    window: int = 2048,
    max_windows: int | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    progress: Callable | None = None,
    show: bool = True,
    **options,
) -> list[Row]:
    """Writes to the folder `out` a checkpoint and a .gqsa file for each target, and, anew after each of them,
    sweep.json, sweep.md, sweep.csv and sweep.png.

    model: folder, hub id or .gguf file. targets: bits per weight as built, see target_bpw of `compress`. text: to
    score. calibration, device, options: of `compress`. build_targets: of `gqsac build`. window, max_windows,
    progress: see gqsac.evaluate.divergence. show: whether `compress` shows its progress.

    A point that is in sweep.json is not made again, one that was stopped goes on, and one that fails has its error in
    the row's `errors` and leaves the others alone. Returns a row for each target, ascending. Raises InputError for
    options that no point could be made with, and for a folder whose points were made with others.
    """
    targets = sorted(set(targets))
    if not targets:
        raise InputError("no target is given; give bits per weight, such as 2.6")
    for target in targets:
        checked(Options(**options, target_bpw=target))  # all of them before the first is made
    settings = _settings(model, text, calibration, build_targets, window, max_windows, options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the output folder {out} cannot be made: {error.strerror}; choose another") from None
    known = compare.load(out / RESULTS, settings)

    def saved() -> None:
        """All that is known; sweep.json first, since the rest can be made of it."""
        compare.save(out / RESULTS, settings, list(known.values()))
        points = sorted(known.values(), key=lambda row: float(row.label))
        for name, content in ((TABLE, table(points) + "\n"), (CSV, as_csv(points))):
            _replace(out / name, lambda part, content=content: part.write_text(content, encoding="utf-8"))
        if any(row.divergence for row in points):
            title = f"{Path(model).name}: {settings['scored']}"
            _replace(out / PLOT, lambda part: plot_sizes(points, part, title))

    saved()  # so that what is made from here on belongs to these settings
    rows, begun, done, to_do = [], time.monotonic(), 0, 0
    for target in targets:
        row = known.get(_label(target))
        to_do += row is None or row.divergence is None
    for number, target in enumerate(targets, 1):
        label = _label(target)
        row = known.setdefault(label, Row(label, str(out / f"{label}bpw"), _SERIES, ""))
        rows.append(row)
        left = _left(time.monotonic() - begun, done, to_do) if row.divergence is None else ""
        tell(f"[{number}/{len(targets)}] {label} bits per weight{left}")
        if row.divergence is not None:
            tell("  finished before")
            continue
        row.errors.clear()
        try:
            if not Path(row.path).exists():
                compress(
                    model, row.path, calibration=list(calibration), device=device, progress=show, target_bpw=target,
                    own_text=out / OWN_TEXT, **options,
                )  # fmt: skip
            summary = build(row.path, f"{row.path}.gqsa", BuildOptions(targets=tuple(build_targets)))
            found = diverge(row.path, model, text, window, None, max_windows, device, progress=progress)
        except (GqsaError, SafetensorError) as error:  # the latter of a full disk
            row.errors["sweep"] = str(error)
            tell(f"  failed: {error}")
        else:
            row.bits_per_weight, row.file_bytes = summary.counts.bits_per_weight, summary.file_bytes
            row.divergence, row.perplexity = vars(found), {"perplexity": found.perplexity}
            done += 1
        to_do -= bool(row.errors)
        saved()
    return rows


def _label(target: float) -> str:
    return str(float(target)).removesuffix(".0")


def _left(spent_s: float, done: int, to_do: int) -> str:
    """What is known of the time, once a point is made: points take about the same."""
    if not done:
        return ""
    return f"; {spent_s / 60:.0f} min so far, about {spent_s / done * (to_do - done) / 60:.0f} min left"


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Writes a file, whole or not at all. The temporary one keeps the ending, which says what is to be drawn."""
    part = file.with_name(f".part-{file.name}")
    write(part)
    part.replace(file)


def as_csv(rows: Sequence[Row]) -> str:
    """The points that are made, a line each."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    measures = ("perplexity", "reference_perplexity", "kl", "kl_99", "flips", "n_tokens", "n_windows")
    writer.writerow(("target", "bits_per_weight", "file_bytes", *measures))
    for row in rows:
        if row.divergence:
            figures = (row.divergence[key] for key in measures)
            writer.writerow((row.label, row.bits_per_weight, row.file_bytes, *figures))
    return content.getvalue()


def table(rows: Sequence[Row]) -> str:
    """The points in Markdown, ascending; perplexity beside its ratio to the uncompressed model's."""
    lines = [
        "| target | bits per weight, built | file, MB | perplexity | relative | KL | 99 % | flips |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.label, *["-"] * 7]
        if row.errors:
            cells[1] = "failed"
        if row.divergence:
            d = row.divergence
            cells[1:] = [
                f"{row.bits_per_weight:.3f}", f"{row.file_bytes / 1e6:.2f}", f"{d['perplexity']:.2f}",
                f"{d['perplexity'] / d['reference_perplexity']:.3f}", f"{d['kl']:.4f}", f"{d['kl_99']:.2f}",
                f"{d['flips']:.1%}",
            ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(model, text, calibration, build_targets, window, max_windows, options) -> dict:
    """What all points of a folder have in common. Learning rates may differ: a point that diverged goes on with lower
    ones, and its report.json has them."""
    options = {key: value for key, value in options.items() if key not in ("weight_lr", "scale_lr")}
    windows = f"first {max_windows} windows" if max_windows else "windows"
    return {
        "model": f"{model} {compare.fingerprint(model)}".strip(),
        "text": f"{len(text):,} characters, CRC-32 {zlib.crc32(text.encode()):08x}",
        "scored": f"{windows} of {window} tokens",
        "calibration": [_contents(file) for file in calibration],
        "build targets": list(build_targets),
        # As they come back from JSON.
        "options": {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
    }


def _contents(file: str | Path) -> str:
    """A calibration text, by what is in it where it is a file."""
    path = Path(file)
    return f"{path.name}, CRC-32 {zlib.crc32(path.read_bytes()):08x}" if path.is_file() else str(file)
