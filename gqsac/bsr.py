"""Group-sparse quantised matrices in the checkpoint's natural form: BSR streams with 1xG blocks.

Names follow torch.sparse_bsr. A matrix is the sum of one or more streams, each with its own bit width
(GQSA as published, arXiv 2412.17560, is one 4-bit stream).
"""

from dataclasses import dataclass

import numpy as np

GROUP_SIZES = (8, 16, 32, 64, 128)
BITS = (2, 3, 4, 8)
_WORDS = {2: "<u4", 4: "<u2"}  # words of as many levels as a byte takes, a level in each byte


@dataclass(frozen=True)
class BsrStream:
    """The kept 1xG groups of a [rows, columns] matrix, row by row, columns ascending in a row.

    crow_indices: int32 [rows + 1], group g of row r has crow_indices[r] <= g < crow_indices[r + 1].
    col_indices: int32 [nnz], in groups: group g covers columns [G * col, G * col + G).
    values: uint8 [nnz, G * bits / 8], see `pack_values`.
    scales: float16 [nnz]. zeros: uint8 [nnz], in 0 .. 2**bits - 1.
    """

    rows: int
    columns: int
    group_size: int
    bits: int
    crow_indices: np.ndarray
    col_indices: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def nnz(self) -> int:
        """Number of kept groups."""
        return len(self.col_indices)

    def row_indices(self) -> np.ndarray:
        """Row of each kept group, int64 [nnz]."""
        return np.repeat(np.arange(self.rows), np.diff(self.crow_indices))

    def dequantize(self) -> np.ndarray:
        """float32 [rows, columns]: (values - zero) * scale where a group is kept, else 0."""
        levels = unpack_values(self.values, self.bits, self.group_size).astype(np.float32)
        groups = (levels - self.zeros[:, None].astype(np.float32)) * self.scales[:, None].astype(np.float32)
        dense = np.zeros((self.rows, self.columns // self.group_size, self.group_size), np.float32)
        dense[self.row_indices(), self.col_indices] = groups
        return dense.reshape(self.rows, self.columns)


def pack_values(levels: np.ndarray, bits: int) -> np.ndarray:
    """Packs uint8 levels [n, G] into uint8 [n, G * bits / 8].

    1, 2, 4, 8 bits: element i stands at bit i * bits of the little-endian group, lowest first.
    3 bits: the plane of the low two bits, packed as 2-bit values, then the plane of the high bit.
    """
    if bits == 3:
        return np.concatenate([pack_values(levels & 3, 2), pack_values(levels >> 2, 1)], axis=1)
    levels = np.ascontiguousarray(levels, np.uint8)
    if bits == 8:
        return levels
    if bits == 1:
        return np.packbits(levels.ravel(), bitorder="little").reshape(len(levels), levels.shape[1] // 8)
    # As many levels as a byte takes are one little-endian word: each is shifted down to its place in the lowest byte.
    words = levels.view(_WORDS[bits])
    packed = words.astype(np.uint8)
    for i in range(1, 8 // bits):
        packed |= (words >> (8 - bits) * i).astype(np.uint8)
    return packed


def unpack_values(values: np.ndarray, bits: int, group_size: int) -> np.ndarray:
    """Inverse of pack_values: uint8 [n, G]."""
    if bits == 3:
        low_bytes = group_size // 4
        high = unpack_values(np.ascontiguousarray(values[:, low_bytes:]), 1, group_size)
        return unpack_values(np.ascontiguousarray(values[:, :low_bytes]), 2, group_size) | (high << 2)
    if bits == 8:
        return values
    if bits == 1:
        return np.unpackbits(values.ravel(), bitorder="little").reshape(len(values), group_size)
    words = spread = values.astype(_WORDS[bits])
    for i in range(1, 8 // bits):
        spread = spread | words << (8 - bits) * i
    spread &= words.dtype.type(int.from_bytes([(1 << bits) - 1] * (8 // bits), "little"))
    return spread.view(np.uint8)
