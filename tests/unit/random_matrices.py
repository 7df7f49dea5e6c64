"""QuantizedMatrix with random groups, widths, levels, scales and zeros."""

import numpy as np

from gqsac.quantized_matrix import QuantizedMatrix


def random_matrix(rows, columns, group_size, quant_group_size, widths=(4,), kept=0.6, seed=0) -> QuantizedMatrix:
    """widths: bits that rows may have. kept: share of the groups; 1 for no mask."""
    rng = np.random.default_rng(seed)
    row_bits = rng.choice(np.array(widths, np.uint8), rows)
    levels = rng.integers(0, 256, (rows, columns), dtype=np.uint8) >> (8 - row_bits)[:, None]
    shape = (rows, columns // quant_group_size)
    keep = rng.random((rows, columns // group_size)) < kept
    return QuantizedMatrix(
        group_size=group_size,
        quant_group_size=quant_group_size,
        row_bits=row_bits,
        levels=levels.astype(np.uint8),
        scales=rng.normal(size=shape).astype(np.float16),
        zeros=rng.integers(0, 16, shape, dtype=np.uint8),
        keep=None if kept == 1 else keep,
    )
