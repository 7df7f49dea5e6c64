"""An uncompressed checkpoint seen as a compressed one: rounding without data, to try things out."""

from dataclasses import asdict, dataclass

import numpy as np
from gqsa_runtime.layouts.group_words import ZERO_OF_8_BIT

from gqsac.bsr import BITS, GROUP_SIZES, BsrStream
from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.errors import InputError, ModelError
from gqsac.quantized_matrix import QuantizedMatrix, in_steps
from gqsac.stored_streams import StreamHeader


@dataclass(frozen=True)
class Rounding:
    """bits: 2, 3, 4 or 8, or 16 to leave all linears dense. sparsity: share of groups dropped, by
    smallest norm, the same number in each row."""

    bits: int = 4
    group_size: int = 16
    sparsity: float = 0.0

    def __post_init__(self):
        if self.bits not in (*BITS, 16):
            raise InputError(f"--bits is {self.bits}; choose 2, 3, 4, 8, or 16 for dense fp16")
        if self.group_size not in GROUP_SIZES:
            raise InputError(f"--group-size is {self.group_size}; choose from {', '.join(map(str, GROUP_SIZES))}")
        if not 0 <= self.sparsity < 1:
            raise InputError(f"--sparsity is {self.sparsity}; give a share from 0 up to, but not including, 1")

    def as_dict(self) -> dict:
        return asdict(self)


class RoundedCheckpoint(Checkpoint):
    """Wraps a dense Checkpoint; linears inside the transformer blocks are rounded when read."""

    def __init__(self, dense: Checkpoint, rounding: Rounding):
        self.__dict__.update(dense.__dict__)
        self._dense, self._rounding = dense, rounding

    def is_compressed(self, module: str) -> bool:
        # Blocks have a number in their path; embeddings and heads have none and stay dense.
        weight = f"{module}.weight"
        numbered = any(part.isdigit() for part in module.split("."))
        return self._rounding.bits != 16 and numbered and len(self._dense.shape(weight)) == 2

    def is_one_matrix(self, module: str) -> bool:
        return True

    def matrix_header(self, module: str) -> MatrixHeader:
        rows, columns = self._dense.shape(f"{module}.weight")
        self._check_divides(module, columns)
        group_size, bits = self._rounding.group_size, self._rounding.bits
        return MatrixHeader(rows, columns, group_size, group_size, (bits,), rows * self._kept(columns))

    def pattern(self, module: str) -> tuple[np.ndarray, np.ndarray | None]:
        matrix = self.matrix(module)
        return matrix.row_bits, matrix.keep

    def matrix(self, module: str) -> QuantizedMatrix:
        weight = self._dense.read(f"{module}.weight").astype(np.float32)
        if not np.isfinite(weight).all():
            raise ModelError(f"{module}.weight: the checkpoint holds NaN or infinite weights; convert the model again")
        rows, columns = weight.shape
        self._check_divides(module, columns)
        group_size, bits = self._rounding.group_size, self._rounding.bits
        groups = weight.reshape(rows, -1, group_size)
        n_groups, kept = groups.shape[1], self._kept(columns)
        order = np.argsort(-np.square(groups).sum(axis=2), axis=1, kind="stable")[:, :kept]
        keep = np.zeros((rows, n_groups), bool)
        np.put_along_axis(keep, order, True, axis=1)
        scales, zeros, levels = round_groups(groups.reshape(-1, group_size), bits)
        if not np.isfinite(scales).all():
            raise ModelError(
                f"{module}.weight: its largest weight is {np.abs(weight).max():g}, and at {bits} bits that is beyond "
                "the range of fp16 scales; the model cannot be rounded"
            )
        return QuantizedMatrix(
            group_size=group_size,
            quant_group_size=group_size,
            row_bits=np.full(rows, bits, np.uint8),
            levels=levels.reshape(rows, columns),
            scales=scales.reshape(rows, n_groups),
            zeros=in_steps(zeros, bits).reshape(rows, n_groups),
            keep=None if kept == n_groups else keep,
        )

    def stream_headers(self, module: str) -> tuple[StreamHeader, ...]:
        h = self.matrix_header(module)
        return (StreamHeader(h.rows, h.columns, h.group_size, h.widths[0], h.nnz),)

    def streams(self, module: str) -> tuple[BsrStream, ...]:
        return (self.matrix(module).to_stream(),)

    def _kept(self, columns: int) -> int:
        n_groups = columns // self._rounding.group_size
        return n_groups - round(n_groups * self._rounding.sparsity)

    def _check_divides(self, module: str, columns: int) -> None:
        if columns % self._rounding.group_size:
            raise ModelError(
                f"{module}: its {columns} columns do not divide into groups of {self._rounding.group_size}; "
                f"choose another --group-size"
            )


def round_matrix(weight: np.ndarray, bits: int, quant_group_size: int) -> QuantizedMatrix:
    """Min-max rounding of float32 [rows, columns]; nothing is removed. Raises ModelError beyond fp16 scales."""
    rows, columns = weight.shape
    scales, zeros, levels = round_groups(weight.reshape(-1, quant_group_size), bits)
    if not np.isfinite(scales).all():
        raise ModelError(
            f"the largest weight is {np.abs(weight).max():g}, and at {bits} bits that is beyond fp16 scales"
        )
    return QuantizedMatrix(
        group_size=quant_group_size,
        quant_group_size=quant_group_size,
        row_bits=np.full(rows, bits, np.uint8),
        levels=levels.reshape(rows, columns),
        scales=scales.reshape(rows, -1),
        zeros=in_steps(zeros, bits).reshape(rows, -1),
    )


def round_groups(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Min-max rounding of float32 groups [n, G]: scales f16 [n], zeros uint8 [n], levels uint8 [n, G].

    8-bit groups are symmetric about their zero of 128.
    """
    top = 2**bits - 1
    if bits == 8:
        spread = np.abs(groups).max(axis=1) / 127
    else:
        low, high = np.minimum(groups.min(axis=1), 0), np.maximum(groups.max(axis=1), 0)
        spread = (high - low) / top
    with np.errstate(over="ignore"):
        scales = np.maximum(spread, np.finfo(np.float16).tiny).astype(np.float16)
    step = scales.astype(np.float32)[:, None]
    if bits == 8:
        zeros = np.full(len(groups), ZERO_OF_8_BIT, np.uint8)
    else:
        zeros = np.clip(np.rint(-low / step[:, 0]), 0, top).astype(np.uint8)
    levels = np.clip(np.rint(groups / step) + zeros[:, None], 0, top).astype(np.uint8)
    return scales, zeros, levels
