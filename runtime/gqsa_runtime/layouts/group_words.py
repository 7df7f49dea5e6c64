"""Layout of one BSR stream of 1xG groups: packed levels and one 32-bit word for each kept group.

A group word holds the fp16 scale in its low half, then the column in groups, then the zero. 8-bit groups
are symmetric: their zero does not fit the word and is always 128. Rows are cut into tasks of nearly
equal numbers of groups, one warp's work each, before anything runs (task-centric, as in Stream-K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gqsa_runtime.constants import FLAG, SIZE, Params
from gqsa_runtime.errors import ModelError
from gqsa_runtime.layouts.base import ContentRule, Layout, Part

ZERO_OF_8_BIT = 128
MAX_COLUMNS = 1 << 12  # groups in a row
_COLUMN_SHIFT, _ZERO_SHIFT = 16, 28
_SCALE_MASK = 0xFFFF

# Enough tasks to fill the largest GPU once with two 512-thread CTAs an SM (132 * 2 * 16), and, where there
# is less work than that, no task smaller than four 32-lane steps.
_MAX_TASKS = 132 * 2 * 16
_MIN_TASKS = 132 * 8
_MIN_UNITS_PER_TASK = 128  # a unit is what one lane takes at a time: min(group_size, 16) weights


class GroupWords(Layout):
    """values i8 [nnz, G * bits / 8], groups i32 [nnz], crow_indices i32 [rows + 1], tasks i32 [n_tasks + 1].

    pack's source: a BSR stream, that is an object with rows, columns, group_size, bits, crow_indices,
    col_indices, values, scales and zeros as checkpoints hold them (gqsac.bsr.BsrStream).
    """

    op = "linear_sparse"
    parts = (Part("values", "i8"), Part("groups", "i32"), Part("crow_indices", "i32"), Part("tasks", "i32"))
    constants = {"group_size": (8, 16, 32, 64, 128), "bits": (2, 3, 4, 8), "n_tasks": SIZE, "accumulate": FLAG}
    headers = {"cuda": "linear_sparse.cuh", "cpu": "linear_sparse.h"}
    compressed = True
    kernel_bits = (2, 4, 8)  # widths that kernels are built for

    def shapes(self, params: Params, n_groups: int) -> dict[str, tuple[int, ...]]:
        """See Layout."""
        return {
            "values": (n_groups, params["group_size"] * params["bits"] // 8),
            "groups": (n_groups,),
            "crow_indices": (params["rows"] + 1,),
            "tasks": (params["n_tasks"] + 1,),
        }

    def count_groups(self, params: Params, elements: Mapping[str, int]) -> int:
        """See Layout."""
        return int(elements["groups"])

    def n_weights(self, params: Params, n_groups: int) -> int:
        """See Layout."""
        return n_groups * int(params["group_size"])

    def check_constants(self, params: Params) -> str | None:
        """See Layout."""
        k, group_size = params["k"], params["group_size"]
        if k % group_size or k // group_size > MAX_COLUMNS:
            return f"k is {k}, expected at most {MAX_COLUMNS} whole groups of {group_size}"
        return None

    def rules(self, params: Params, n_groups: int) -> dict[str, ContentRule]:
        """See Layout."""
        return {
            "groups": ColumnsBelow(params["k"] // params["group_size"]),
            "crow_indices": RisesTo(n_groups),
            "tasks": RisesTo(params["rows"]),
        }

    def pack(self, part: str, source: Any, params: Params) -> np.ndarray:
        """See Layout. Raises ModelError for an 8-bit zero other than 128."""
        if not len(source.col_indices):
            return self._pack_empty(part, params)
        if part == "values":
            values: np.ndarray = source.values.view(np.int8)
            return values
        if part == "groups":
            return _words(source)
        if part == "crow_indices":
            crow_indices: np.ndarray = source.crow_indices.astype(np.int32, copy=False)
            return crow_indices
        return cut_tasks(source.crow_indices, params["n_tasks"])

    def _pack_empty(self, part: str, params: Params) -> np.ndarray:
        # Kernels load the first group ahead of asking whose it is, so one must be there: the last row's,
        # with scale 0, which adds nothing.
        crow_indices = np.zeros(params["rows"] + 1, np.int32)
        crow_indices[-1] = 1
        if part == "crow_indices":
            return crow_indices
        if part == "tasks":
            return cut_tasks(crow_indices, params["n_tasks"])
        return np.zeros(self.shapes(params, 1)[part], np.int8 if part == "values" else np.int32)

    def unpack(self, arrays: Mapping[str, np.ndarray], params: Params) -> np.ndarray:
        """See Layout."""
        rows, group_size, bits = params["rows"], params["group_size"], params["bits"]
        crow_indices = arrays["crow_indices"].reshape(-1)[: rows + 1]
        nnz = int(crow_indices[-1])
        words = arrays["groups"].reshape(-1)[:nnz].view(np.uint32)
        scales = (words & _SCALE_MASK).astype(np.uint16).view(np.float16).astype(np.float32)
        zeros = np.full(nnz, ZERO_OF_8_BIT) if bits == 8 else (words >> _ZERO_SHIFT).astype(np.int64)
        packed = arrays["values"].reshape(-1).view(np.uint8)[: nnz * group_size * bits // 8]
        unpacked = np.unpackbits(packed.reshape(nnz, group_size * bits // 8), axis=1, bitorder="little")
        levels = unpacked.reshape(nnz, group_size, bits) @ (1 << np.arange(bits))
        dense = np.zeros((rows, params["k"] // group_size, group_size), np.float32)
        row = np.repeat(np.arange(rows), np.diff(crow_indices))
        dense[row, _columns(words)] = (levels - zeros[:, None]).astype(np.float32) * scales[:, None]
        return dense.reshape(rows, params["k"])

    def stored_groups(self, nnz: int) -> int:
        """Groups in the file for a stream that keeps nnz of them."""
        return max(nnz, 1)

    def count_tasks(self, rows: int, nnz: float, group_size: int) -> int:
        """Into how many tasks a stream of so many kept groups is cut."""
        units = nnz * max(1, group_size // 16)
        wanted = max(_MIN_TASKS, math.ceil(units / _MIN_UNITS_PER_TASK))
        return min(rows, wanted, _MAX_TASKS)

    def stream_bytes(self, rows: int, nnz: int, bits: int, group_size: int) -> int:
        """Bytes of a stream that is stored by itself."""
        n_groups = self.stored_groups(nnz)
        n_tasks = self.count_tasks(rows, n_groups, group_size)
        return self.n_bytes({"rows": rows, "bits": bits, "group_size": group_size, "n_tasks": n_tasks}, n_groups)


@dataclass(frozen=True)
class RisesTo(ContentRule):
    """Numbers that never fall, from 0 to `last`."""

    last: int

    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """See ContentRule."""
        flat = array.reshape(-1)
        if flat.size < 2 or flat[0] != 0 or flat[-1] != self.last or (flat[1:] < flat[:-1]).any():
            return f"does not rise from 0 to {self.last}"
        return None


@dataclass(frozen=True)
class ColumnsBelow(ContentRule):
    """Group words whose columns are below `n_columns`."""

    n_columns: int

    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """See ContentRule."""
        columns = _columns(array.reshape(-1).view(np.uint32))
        if columns.size and int(columns.max()) >= self.n_columns:
            return f"holds column {int(columns.max())}, expected below {self.n_columns}"
        return None


def cut_tasks(crow_indices: np.ndarray, n_tasks: int) -> np.ndarray:
    """Row boundaries, int32 [n_tasks + 1], of runs of rows with nearly equal numbers of groups.

    crow_indices: int32 [rows + 1]. Boundary i is the row whose start lies nearest to i / n_tasks of
    all groups; an empty row counts as a sliver of work so that rows without groups are spread too.
    """
    rows = len(crow_indices) - 1
    # Every row costs its reduction and its store beside its groups: about one group's worth.
    work = crow_indices.astype(np.int64) + np.arange(rows + 1)
    targets = np.arange(n_tasks + 1) * (int(work[-1]) / n_tasks)
    right = np.clip(np.searchsorted(work, targets), 1, rows)
    nearest = np.where(targets - work[right - 1] < work[right] - targets, right - 1, right)
    nearest[0], nearest[-1] = 0, rows
    return np.maximum.accumulate(nearest).astype(np.int32)


def _words(stream: Any) -> np.ndarray:
    zeros = np.uint32(0)
    if stream.bits != 8:
        zeros = stream.zeros.astype(np.uint32)
    elif (stream.zeros != ZERO_OF_8_BIT).any():
        raise ModelError(f"an 8-bit group has a zero other than {ZERO_OF_8_BIT}; compress the model again")
    words = stream.scales.astype(np.float16).view(np.uint16).astype(np.uint32)
    words |= stream.col_indices.astype(np.uint32) << np.uint32(_COLUMN_SHIFT)
    words |= zeros << np.uint32(_ZERO_SHIFT)
    packed: np.ndarray = words.view(np.int32)
    return packed


def _columns(words: np.ndarray) -> np.ndarray:
    columns: np.ndarray = (words >> np.uint32(_COLUMN_SHIFT)) & np.uint32(MAX_COLUMNS - 1)
    return columns
