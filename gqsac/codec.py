"""A QuantizedMatrix as tensors and back: how checkpoint format version 2 stores a compressed linear.

A linear MODULE of R rows and K columns has groups of G columns that are kept or removed together, and groups
of Q columns that share a scale and a zero. config.json gives R, K, G and Q, the tensors all else:

    MODULE.levels.<b>  uint8 [n, G * b / 8]: the n kept groups of the rows of width b (1, 2, 3, 4 or 8 bits), row
                       after row, columns ascending in a row, each group packed by `gqsac.bsr.pack_values`.
                       One tensor for each width that a row has, also where n is 0.
    MODULE.row_bits    uint8 [R]: the width of each row. Absent where there is one, which `levels` names.
    MODULE.keep        uint8 [ceil(R * K / G / 8)]: bit i % 8 of byte i // 8, counted from the lowest, is set where
                       group i is kept; group g of row r is i = r * K / G + g. Unused bits of the last byte are 0.
                       Absent where nothing is removed.
    MODULE.scales      float16 [m]: of the m scale groups in which something is kept, row after row. All finite.
    MODULE.zeros       uint8 [ceil(m / 2)]: of the same scale groups, 4 bits each, the first in the low half of a
                       byte, in sixteenths of the range of the row's width. The unused half of the last byte is 0.

So nothing is stored for what is removed but its bit in the mask, and a matrix has exactly one stored form.
A removed group reads back as levels of 0, and a scale group of removed groups as a scale and a zero of 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from gqsa_runtime.errors import FormatError

from gqsac.bsr import pack_values, unpack_values
from gqsac.quantized_matrix import ROW_BITS, QuantizedMatrix, scales_in_use

# Names of a module's tensors, to tell them from its bias.
TENSORS = re.compile(r"levels\.\d+|row_bits|keep|scales|zeros")
_LEVELS = "levels."
_DTYPES = {"float16": "F16", "uint8": "U8", "int16": "I16", "int32": "I32"}  # numpy's names -> those of safetensors


@dataclass(frozen=True)
class MatrixHeader:
    """What a compressed linear is, without its contents. widths: bits that rows have, ascending. nnz: kept groups."""

    rows: int
    columns: int
    group_size: int
    quant_group_size: int
    widths: tuple[int, ...]
    nnz: int


def pack(matrix: QuantizedMatrix) -> dict[str, np.ndarray]:
    """The tensors of a matrix, by their names after `MODULE.`.

    Raises ValueError for a width, a level or a zero out of range and for a scale that is not finite.
    """
    keep = None if matrix.keep is None or matrix.keep.all() else matrix.keep
    widths = np.unique(matrix.row_bits)
    if not set(widths.tolist()) <= set(ROW_BITS):
        raise ValueError(f"rows have {widths.tolist()} bits, expected {ROW_BITS}")
    tensors = {}
    groups = matrix.levels.reshape(-1, matrix.group_size)
    for bits in widths.tolist():
        mask = _groups_of_width(matrix.row_bits, bits, keep, len(groups))
        kept = groups if mask is None else groups[mask]
        if kept.size and kept.max() >> bits:
            raise ValueError(f"a level of {bits} bits is {kept.max()}")
        tensors[f"{_LEVELS}{bits}"] = pack_values(kept, bits)
    if len(widths) > 1:
        tensors["row_bits"] = matrix.row_bits.astype(np.uint8)
    scales, zeros = matrix.scales.ravel(), matrix.zeros.ravel()
    if keep is not None:
        tensors["keep"] = np.packbits(keep, bitorder="little")
        used = scales_in_use(keep, matrix.group_size, matrix.quant_group_size).ravel()
        scales, zeros = scales[used], zeros[used]
    if not np.isfinite(scales).all():
        raise ValueError("a scale is not finite")
    if len(zeros) and zeros.max() > 15:
        raise ValueError(f"a zero is {zeros.max()} sixteenths")
    tensors["scales"] = scales.astype(np.float16)
    tensors["zeros"] = _pack_halves(zeros)
    return tensors


def header(
    stored: dict[str, tuple[str, tuple[int, ...]]],
    shape: tuple[int, int],
    group_size: int,
    quant_group_size: int,
    where: str,
) -> MatrixHeader:
    """Checks types, shapes and counts. stored: name -> (dtype as safetensors names it, shape). where: begins messages,
    such as "model/: tensor MODULE". Raises FormatError that names the tensor."""
    rows, columns = shape
    for name, (dtype, found) in stored.items():
        expected = "F16" if name == "scales" else "U8"
        if dtype != expected:
            raise FormatError(f"{where}.{name} is of type {dtype}, expected {expected}")
        ndim = 2 if name.startswith(_LEVELS) else 1
        if len(found) != ndim:
            raise FormatError(f"{where}.{name} has shape {list(found)}, expected {ndim} dimensions")
    widths = _widths(stored, group_size, where)
    for name in ("scales", "zeros"):
        if name not in stored:
            raise FormatError(f"{where}.{name} is missing; is the checkpoint complete?")
    counts = {name: found[0] for name, (_, found) in stored.items()}
    nnz = sum(counts[f"{_LEVELS}{bits}"] for bits in widths)
    n_groups, n_scales = rows * (columns // group_size), rows * (columns // quant_group_size)
    expected = {"row_bits": (rows, "one per row"), "keep": (-(-n_groups // 8), f"a bit for each of {n_groups} groups")}
    expected["zeros"] = (-(-counts["scales"] // 2), f"half a byte for each of {counts['scales']} scales")
    if "keep" not in stored:
        expected["scales"] = (n_scales, "one for each scale group")
    for name, (count, why) in expected.items():
        if counts.get(name, count) != count:
            raise FormatError(f"{where}.{name} has {counts[name]} entries, expected {count}: {why}")
    if ("row_bits" in stored) != (len(widths) > 1):
        found = "is there" if "row_bits" in stored else "is missing"
        raise FormatError(f"{where}.row_bits {found}, but the levels are of {len(widths)} width(s)")
    if "keep" in stored and nnz >= n_groups:
        raise FormatError(
            f"{where}.keep is there, but there are levels of {nnz} groups of {n_groups}; expected no mask"
        )
    if "keep" not in stored and nnz != n_groups:
        raise FormatError(f"{where}.levels.* have {nnz} groups, but without {where}.keep all {n_groups} are expected")
    return MatrixHeader(rows, columns, group_size, quant_group_size, widths, nnz)


def _widths(stored: dict, group_size: int, where: str) -> tuple[int, ...]:
    """The widths of the `levels` tensors, ascending."""
    widths = []
    for name, (_, shape) in stored.items():
        if name.startswith(_LEVELS):
            bits = name.removeprefix(_LEVELS)
            if bits not in map(str, ROW_BITS):
                raise FormatError(f"{where}.{name} is of no known width, expected {', '.join(map(str, ROW_BITS))} bits")
            row_bytes = group_size * int(bits) // 8
            if shape[1] != row_bytes:
                raise FormatError(f"{where}.{name} has {shape[1]} bytes a group, expected {row_bytes}")
            widths.append(int(bits))
    if not widths:
        raise FormatError(f"{where}.levels.<bits> is missing; is the checkpoint complete?")
    return tuple(sorted(widths))


def array_headers(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `header` asks of stored tensors, of tensors in memory."""
    return {name: (_DTYPES.get(array.dtype.name, array.dtype.name), array.shape) for name, array in tensors.items()}


def unpack(
    tensors: dict[str, np.ndarray], shape: tuple[int, int], group_size: int, quant_group_size: int, where: str
) -> QuantizedMatrix:
    """Inverse of `pack`. The arguments are as in `header`. Raises FormatError that names the tensor."""
    known = header(array_headers(tensors), shape, group_size, quant_group_size, where)
    rows, columns = shape
    n_groups = rows * (columns // group_size)
    keep = _mask(tensors["keep"], rows, n_groups, where) if "keep" in tensors else None
    row_bits = tensors.get("row_bits")
    if row_bits is None:
        row_bits = np.full(rows, known.widths[0], np.uint8)
    elif set(np.unique(row_bits).tolist()) != set(known.widths):
        raise FormatError(
            f"{where}.row_bits holds {np.unique(row_bits).tolist()}, but the levels are of {list(known.widths)} bits"
        )
    levels = None
    for bits in known.widths:
        values = tensors[f"{_LEVELS}{bits}"]
        mask = _groups_of_width(row_bits, bits, keep, n_groups)
        n_kept = n_groups if mask is None else np.count_nonzero(mask)
        if n_kept != len(values):
            cause = "keep has" if keep is not None else "row_bits asks for"
            raise FormatError(f"{where}.levels.{bits} has {len(values)} groups, but {cause} {n_kept} of that width")
        if mask is None:
            levels = unpack_values(values, bits, group_size)
        else:
            levels = np.zeros((n_groups, group_size), np.uint8) if levels is None else levels
            levels[mask] = unpack_values(values, bits, group_size)
    if not np.isfinite(tensors["scales"]).all():
        raise FormatError(f"{where}.scales holds a NaN or an infinity")
    scales, used = tensors["scales"], None
    if keep is not None:
        used = scales_in_use(keep, group_size, quant_group_size)
        n_used = np.count_nonzero(used)
        if n_used != len(scales):
            raise FormatError(
                f"{where}.scales has {len(scales)} entries, expected {n_used}: one for each scale group in which "
                "something is kept"
            )
    zeros = _unpack_halves(tensors["zeros"], len(scales), where)
    if used is not None:
        scales, zeros = _spread(scales, used), _spread(zeros, used)
    return QuantizedMatrix(
        group_size=group_size,
        quant_group_size=quant_group_size,
        row_bits=row_bits,
        levels=levels.reshape(rows, columns),
        scales=scales.reshape(rows, -1),
        zeros=zeros.reshape(rows, -1),
        keep=keep,
    )


def pattern(tensors: dict[str, np.ndarray], known: MatrixHeader, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(row_bits, keep) of a matrix, as in QuantizedMatrix, from its tensors of those names alone, if there are any.

    Raises FormatError as unpack does.
    """
    rows, columns = known.rows, known.columns
    row_bits = tensors.get("row_bits", np.full(rows, known.widths[0], np.uint8))
    n_groups = rows * (columns // known.group_size)
    keep = _mask(tensors["keep"], rows, n_groups, where) if "keep" in tensors else None
    return row_bits, keep


def _groups_of_width(row_bits: np.ndarray, bits: int, keep: np.ndarray | None, n_groups: int) -> np.ndarray | None:
    """bool [n_groups]: kept groups of the rows of a width; None where that is every group of the matrix."""
    rows = row_bits == bits
    if keep is not None:
        return (keep if rows.all() else keep & rows[:, None]).ravel()
    return None if rows.all() else np.repeat(rows, n_groups // len(rows))


def _mask(packed: np.ndarray, rows: int, n_groups: int, where: str) -> np.ndarray:
    """bool [rows, groups of a row]."""
    bits = np.unpackbits(packed, bitorder="little")
    if bits[n_groups:].any():
        raise FormatError(f"{where}.keep has bits beyond its {n_groups} groups that are not 0")
    return bits[:n_groups].view(bool).reshape(rows, -1)


def _spread(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The values at the places that are used, 0 elsewhere."""
    spread = np.zeros(used.shape, values.dtype)
    spread[used] = values
    return spread


def _pack_halves(values: np.ndarray) -> np.ndarray:
    """uint8 values of 4 bits, two a byte, the first in the low half."""
    even = np.concatenate([values, np.zeros(len(values) % 2, np.uint8)])
    return pack_values(even[None], 4)[0]


def _unpack_halves(packed: np.ndarray, count: int, where: str) -> np.ndarray:
    values = unpack_values(packed[None], 4, 2 * len(packed))[0]
    if values[count:].any():
        raise FormatError(f"{where}.zeros has a last half byte of {values[-1]} that belongs to no scale, expected 0")
    return values[:count]
