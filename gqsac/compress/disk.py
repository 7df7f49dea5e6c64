"""The disk that a compression needs: its stages' results in OUT.partial, and the checkpoint beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

from gqsa_runtime.errors import DeviceError

from gqsac.compress.options import Options


def stored_bytes(compressed: int, parameters: int, options: Options) -> int:
    """Least bytes of all files at once. compressed: parameters that become groups, of all `parameters`."""
    groups = compressed // options.group_size
    removed = 0.0 if options.pattern == "2:4" else options.sparsity  # of 2:4 every group is stored
    each = int(options.group_size * options.mean_bits) // 8 + 5  # scale, zero, column
    stages = 1 + sum(stage in ("distill", "e2e-oqp") for stage in options.training)
    streams = int(groups * (1 - removed)) * each
    masters = 4 * compressed if "distill" in options.training else 0
    return (stages + 1) * streams + 2 * (parameters - compressed) + masters


def check_disk(out: Path, needed: int) -> None:
    """Raises DeviceError if the disk of the output folder has less than `needed` bytes free.

    What an earlier run has left in OUT.partial counts as free: it is part of what is needed.
    """
    partial = out.parent / f"{out.name}.partial"
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    folder = next(folder for folder in out.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free + there:
        raise DeviceError(
            f"compressing to {out} needs at least {(needed - there) / 1e6:,.1f} MB of disk, and {folder} has "
            f"{free / 1e6:,.0f} MB free; free some space, or choose an output folder on another disk"
        )
