"""Checkpoint format version 1: a compressed linear as one or more BSR streams, read and checked.

`MODULE.streams.<i>.{crow_indices, col_indices, values, scales, zeros}`, see gqsac.bsr.BsrStream; the linear is the
sum of its streams. `values` names the width of a stream by its shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from gqsa_runtime.errors import FormatError
from gqsa_runtime.layouts.group_words import ZERO_OF_8_BIT

from gqsac.bsr import BITS, BsrStream
from gqsac.codec import array_headers

# Names of a module's tensors, to tell them from its bias.
TENSORS = re.compile(r"streams\.\d+\.(crow_indices|col_indices|values|scales|zeros)")
_DTYPES = {
    "crow_indices": ("I32",),
    "col_indices": ("I16", "I32"),
    "values": ("U8",),
    "scales": ("F16",),
    "zeros": ("U8",),
}
_NDIM = {"values": 2}


@dataclass(frozen=True)
class StreamHeader:
    """What a stream is, without its contents. rows, columns: of the linear. nnz: kept groups."""

    rows: int
    columns: int
    group_size: int
    bits: int
    nnz: int


def headers(
    stored: dict[str, tuple[str, tuple[int, ...]]], shape: tuple[int, int], group_size: int, where: str
) -> tuple[StreamHeader, ...]:
    """Checks types and shapes. The arguments are as in gqsac.codec.header. Raises FormatError that names the tensor."""
    numbers = sorted({int(name.split(".")[1]) for name in stored})
    if numbers != list(range(len(numbers))):
        raise FormatError(f"{where}.streams are {numbers}, expected 0, 1, … without gaps")
    found = []
    for number in numbers:
        for tensor, dtypes in _DTYPES.items():
            name = f"streams.{number}.{tensor}"
            if name not in stored:
                raise FormatError(f"{where}.{name} is missing; is the checkpoint complete?")
            dtype, size = stored[name]
            if dtype not in dtypes:
                raise FormatError(f"{where}.{name} is of type {dtype}, expected {' or '.join(dtypes)}")
            if len(size) != _NDIM.get(tensor, 1):
                raise FormatError(f"{where}.{name} has shape {list(size)}, expected {_NDIM.get(tensor, 1)} dimensions")
        values = stored[f"streams.{number}.values"][1]
        bits = values[1] * 8 // group_size
        if bits not in BITS or values[1] * 8 != bits * group_size:
            raise FormatError(
                f"{where}.streams.{number}.values has shape {list(values)}, expected [nnz, bytes of a group of "
                f"{group_size} at {', '.join(map(str, BITS))} bits]"
            )
        found.append(StreamHeader(*shape, group_size, bits, values[0]))
    return tuple(found)


def unpack(
    tensors: dict[str, np.ndarray], shape: tuple[int, int], group_size: int, where: str
) -> tuple[BsrStream, ...]:
    """The streams of a linear, every index, count and value checked. tensors: by their names after `MODULE.`.

    The other arguments are as in `headers`. Raises FormatError that names the tensor.
    """
    found = headers(array_headers(tensors), shape, group_size, where)
    return tuple(_unpack(tensors, header, number, where) for number, header in enumerate(found))


def _unpack(tensors: dict[str, np.ndarray], header: StreamHeader, number: int, where: str) -> BsrStream:
    where = f"{where}.streams.{number}"
    crow, col, values, scales, zeros = (tensors[f"streams.{number}.{tensor}"] for tensor in _DTYPES)
    n_groups, bits = header.columns // header.group_size, header.bits
    if len(crow) != header.rows + 1:
        raise FormatError(f"{where}.crow_indices has {len(crow)} entries, expected rows + 1 = {header.rows + 1}")
    counts = np.diff(crow.astype(np.int64))
    if crow[0] != 0 or (counts < 0).any() or (counts > n_groups).any():
        raise FormatError(
            f"{where}.crow_indices is not a list of row starts: expected 0 first, then rises of 0 to {n_groups}"
        )
    if len(col) != crow[-1]:
        raise FormatError(f"{where}.crow_indices ends at {crow[-1]}, but col_indices has shape [{len(col)}]")
    col = col.astype(np.int32)
    if len(col) and (col.min() < 0 or col.max() >= n_groups):
        raise FormatError(f"{where}.col_indices leaves the range 0 to {n_groups - 1}")
    rising = np.diff(col) > 0
    starts = crow[1:-1]
    rising[starts[(starts > 0) & (starts < len(col))] - 1] = True  # a new row may start lower
    if not rising.all():
        row = int(np.searchsorted(crow, rising.argmin() + 1, side="right")) - 1
        raise FormatError(f"{where}.col_indices is not ascending within row {row}")
    for tensor, array in (("values", values), ("scales", scales), ("zeros", zeros)):
        if len(array) != len(col):
            raise FormatError(f"{where}.{tensor} has {len(array)} entries, expected one per group: {len(col)}")
    if not np.isfinite(scales).all():
        raise FormatError(f"{where}.scales holds a NaN or an infinity")
    if bits == 8 and (zeros != ZERO_OF_8_BIT).any():
        raise FormatError(f"{where}.zeros is not {ZERO_OF_8_BIT} throughout, as 8-bit groups must be")
    if len(zeros) and zeros.max() >= 1 << bits:
        raise FormatError(f"{where}.zeros reaches {zeros.max()}, expected at most {(1 << bits) - 1}")
    return BsrStream(header.rows, header.columns, header.group_size, bits, crow, col, values, scales, zeros)
