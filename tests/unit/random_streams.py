"""BSR streams with random groups, levels, scales and zeros."""

import numpy as np

from gqsac.bsr import BsrStream, pack_values


def random_stream(rows: int, columns: int, group_size: int, bits: int, kept: float = 0.6, seed: int = 0) -> BsrStream:
    rng = np.random.default_rng(seed)
    keep = rng.random((rows, columns // group_size)) < kept
    row, col = np.nonzero(keep)
    top = 2**bits
    return BsrStream(
        rows, columns, group_size, bits,
        crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
        col_indices=col.astype(np.int32),
        values=pack_values(rng.integers(0, top, (len(row), group_size)).astype(np.uint8), bits),
        scales=rng.normal(size=len(row)).astype(np.float16),
        zeros=rng.integers(0, top, len(row)).astype(np.uint8) if bits < 8 else np.full(len(row), 128, np.uint8),
    )  # fmt: skip
