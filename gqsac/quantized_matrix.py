"""A quantised linear in plain arrays: widths by row, scales and zeros by columns, a mask of 1xG groups.

It is what compression makes, what a checkpoint stores (format version 2) and what weight layouts pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gqsac.bsr import BsrStream, pack_values, unpack_values

# Zeros are counted in sixteenths of the range of a width, so that narrow widths may have a zero between
# two levels: zero = zeros * 2**bits / 16. At 4 bits they are the levels themselves, at 8 bits 8 is 128.
ZERO_STEPS = 16
QUANT_GROUP_SIZES = (128, 64, 32, 16, 8)
ROW_BITS = (1, 2, 3, 4, 8)  # widths that a row may have


@dataclass(frozen=True)
class QuantizedMatrix:
    """weight[r, c] = scales[r, c // Q] * (levels[r, c] - zeros[r, c // Q] * 2**row_bits[r] / 16), or 0 if removed.

    group_size: G, columns that are kept or removed together. quant_group_size: Q, columns that share a scale.
    row_bits: uint8 [rows], of 1, 2, 3, 4, 8. levels: uint8 [rows, columns]. scales: float16 [rows, columns / Q],
    zeros: uint8 [rows, columns / Q], 0 to 15. keep: bool [rows, columns / G], None where nothing is removed.
    """

    group_size: int
    quant_group_size: int
    row_bits: np.ndarray
    levels: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    keep: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return self.levels.shape[0]

    @property
    def columns(self) -> int:
        return self.levels.shape[1]

    @property
    def n_groups(self) -> int:
        """Kept groups."""
        return self.rows * (self.columns // self.group_size) if self.keep is None else int(self.keep.sum())

    def dequantize(self) -> np.ndarray:
        """float32 [rows, columns]."""
        steps = self.zeros * np.exp2(self.row_bits.astype(np.float32))[:, None] / ZERO_STEPS
        blocks = self.levels.reshape(self.rows, -1, self.quant_group_size).astype(np.float32)
        dense = (blocks - steps[..., None]) * self.scales.astype(np.float32)[..., None]
        dense = dense.reshape(self.rows, self.columns)
        return dense if self.keep is None else np.where(np.repeat(self.keep, self.group_size, axis=1), dense, 0)

    def to_stream(self) -> BsrStream:
        """The same weights as one BSR stream, scales repeated for each group.

        Raises ValueError for rows of different widths, a zero between two levels, and scales of less than a group.
        """
        bits = int(self.row_bits[0])
        if (self.row_bits != bits).any():
            raise ValueError("a BSR stream has one width")
        zeros = self.zeros.astype(np.int64) << bits
        if (zeros % ZERO_STEPS).any():
            raise ValueError("a BSR stream's zeros are levels")
        if self.quant_group_size % self.group_size:
            raise ValueError("a BSR stream's groups have one scale")
        n_groups, repeats = self.columns // self.group_size, self.quant_group_size // self.group_size
        keep = np.ones((self.rows, n_groups), bool) if self.keep is None else self.keep
        return BsrStream(
            rows=self.rows,
            columns=self.columns,
            group_size=self.group_size,
            bits=bits,
            crow_indices=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32),
            col_indices=np.nonzero(keep)[1].astype(np.int32),
            values=pack_values(self.levels.reshape(-1, self.group_size)[keep.ravel()], bits),
            scales=np.repeat(self.scales, repeats, axis=1)[keep],
            zeros=np.repeat((zeros // ZERO_STEPS).astype(np.uint8), repeats, axis=1)[keep],
        )

    @classmethod
    def stack(cls, matrices: list[QuantizedMatrix]) -> QuantizedMatrix:
        """The rows of several matrices of equal columns, one below another. Their finest groups become everyone's."""
        group_size = min(matrix.group_size for matrix in matrices)
        quant_group_size = min(matrix.quant_group_size for matrix in matrices)
        keep = None
        if any(matrix.keep is not None for matrix in matrices):
            keep = np.concatenate([
                np.ones((m.rows, m.columns // group_size), bool) if m.keep is None
                else np.repeat(m.keep, m.group_size // group_size, axis=1)
                for m in matrices
            ])  # fmt: skip
        scales, zeros = (
            np.concatenate(
                [np.repeat(getattr(m, name), m.quant_group_size // quant_group_size, axis=1) for m in matrices]
            )
            for name in ("scales", "zeros")
        )
        return cls(
            group_size=group_size,
            quant_group_size=quant_group_size,
            row_bits=np.concatenate([matrix.row_bits for matrix in matrices]),
            levels=np.concatenate([matrix.levels for matrix in matrices]),
            scales=scales,
            zeros=zeros,
            keep=keep,
        )

    @classmethod
    def from_stream(cls, stream: BsrStream) -> QuantizedMatrix:
        """The same weights as a BSR stream's, with the widest scale groups that its kept groups allow."""
        group_size, n_groups = stream.group_size, stream.columns // stream.group_size
        where = (stream.row_indices(), stream.col_indices)
        keep = np.zeros((stream.rows, n_groups), bool)
        keep[where] = True
        levels = np.zeros((stream.rows, n_groups, group_size), np.uint8)
        levels[where] = unpack_values(stream.values, stream.bits, group_size)
        # Scale and zero as one number, -1 where a group is removed and any will do.
        words = np.full((stream.rows, n_groups), -1, np.int64)
        words[where] = stream.scales.view(np.uint16).astype(np.int64) << 8 | stream.zeros
        shared = group_size
        for size in QUANT_GROUP_SIZES:
            if size > group_size and stream.columns % size == 0:
                blocks = words.reshape(stream.rows, -1, size // group_size)
                most = blocks.max(axis=2, keepdims=True)
                if ((blocks == most) | (blocks < 0)).all():
                    words, shared = most[..., 0], size
                    break
        kept = np.maximum(words, 0)
        return cls(
            group_size=group_size,
            quant_group_size=shared,
            row_bits=np.full(stream.rows, stream.bits, np.uint8),
            levels=levels.reshape(stream.rows, stream.columns),
            scales=(kept >> 8).astype(np.uint16).view(np.float16),
            zeros=in_steps(kept & 0xFF, stream.bits),
            keep=None if keep.all() else keep,
        )


def in_steps(zeros: np.ndarray, bits: int) -> np.ndarray:
    """uint8 zeros of a matrix, from zeros that are levels of a width of at most 4 bits, or 16 levels apart at 8."""
    return (zeros.astype(np.int64) * ZERO_STEPS >> bits).astype(np.uint8)


def scales_in_use(keep: np.ndarray, group_size: int, quant_group_size: int) -> np.ndarray:
    """bool [rows, columns / Q]: scale groups in which something is kept. keep: bool [rows, columns / G]."""
    if quant_group_size < group_size:
        return np.repeat(keep, group_size // quant_group_size, axis=1)
    return keep.reshape(len(keep), -1, quant_group_size // group_size).any(axis=2)
