"""Quantised matrices with random widths, levels, scales, zeros and masks."""

import numpy as np

from gqsac.quantized_matrix import QuantizedMatrix


def random_matrix(rows, columns, widths, keep=None, quant_group_size=64, seed=0, scale=None) -> QuantizedMatrix:
    """widths: one, or one per row. keep: bool [rows, columns / 16] or None. scale: of the weights, default about 1."""
    rng = np.random.default_rng(seed)
    row_bits = np.broadcast_to(np.asarray(widths, np.uint8), (rows,)).copy()
    range_of_row = np.exp2(row_bits.astype(np.float32))[:, None]
    shape = (rows, columns // quant_group_size)
    return QuantizedMatrix(
        group_size=16,
        quant_group_size=quant_group_size,
        row_bits=row_bits,
        levels=(rng.integers(0, 256, (rows, columns)) % range_of_row).astype(np.uint8),
        scales=((rng.random(shape) + 0.5) * (scale or 1) * 4 / range_of_row).astype(np.float16),
        # Removed groups need zeros that are levels.
        zeros=rng.integers(4, 12, shape, dtype=np.uint8) & (0xFF if keep is None else 0xFC),
        keep=keep,
    )


def random_keep(rows, columns, pattern, seed=0) -> np.ndarray | None:
    """bool [rows, columns / 16]: "all" (None), "groups", "tiles" of 16 rows by 64 columns, "empty" or "skewed"."""
    rng = np.random.default_rng(seed)
    shape = (rows, columns // 16)
    if pattern == "all":
        return None
    if pattern == "tiles":
        tiles = rng.random((-(-rows // 16), columns // 64)) < 0.5
        return np.repeat(np.repeat(tiles, 16, 0)[:rows], 4, 1)
    keep = rng.random(shape) < {"groups": 0.5, "empty": 0, "skewed": 0.1}[pattern]
    if pattern == "skewed":
        keep[rows // 2 :: 7] = True
        keep[:, :4] = True
    return keep
