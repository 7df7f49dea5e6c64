"""Choose layouts: how the file stores each linear and each embedding table.

Records serve whatever they can hold: one scale for 64 columns, whole tiles, widths by row. Group words serve
groups with scales of their own, and everything in a build that asks for f32 activations (`exact`). Heads and
embeddings, which checkpoints hold in fp16, are rounded to 8 or 4 bits here unless asked otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, RECORDS, Layout
from gqsa_runtime.layouts.records import GROUP, MASKED_WIDTHS, TILE, Plan, make_plan

from gqsac.checkpoint import Checkpoint
from gqsac.codec import MatrixHeader
from gqsac.compiler import ir
from gqsac.errors import ModelError
from gqsac.quantized_matrix import ZERO_STEPS, QuantizedMatrix
from gqsac.rounding import round_matrix

# Kernels keep a token's activations as integers in fast memory: about two bytes a column.
MAX_COLUMNS = 32768


def module_of(weight: str) -> str:
    """Path of the module that owns a weight: "a.b.weight" -> "a.b"."""
    return weight.removesuffix(".weight")


@dataclass(frozen=True)
class LayoutOptions:
    """exact: f32 activations and weights as the checkpoint has them. head_bits: of heads and embeddings: 4, 8 or 16."""

    exact: bool = False
    head_bits: int = 8


class Weights:
    """The weights of a graph's linears and tables, and the layouts chosen for them."""

    def __init__(self, graph: ir.Graph, checkpoint: Checkpoint, options: LayoutOptions):
        self.graph, self.checkpoint, self.options = graph, checkpoint, options
        self._layouts: dict[tuple[str, ...], Layout] = {}
        tables = {op.table for op in graph.ops if isinstance(op, ir.Embedding) and op.source == "tokens"}
        heads = {weight for op in graph.ops if op.output == graph.logits for weight in op.weights}
        self._outer = frozenset(map(self.stored, tables | heads))

    def stored(self, parameter: str) -> str:
        """The name under which a parameter is stored."""
        return self.graph.aliases.get(parameter, parameter)

    def is_compressed(self, weight: str) -> bool:
        """Whether the checkpoint holds a weight quantised."""
        return self.checkpoint.is_compressed(module_of(self.stored(weight)))

    def layout(self, weights: tuple[str, ...]) -> Layout:
        """The layout of stacked weights, or of a table: a tuple of one name."""
        key = tuple(map(self.stored, weights))
        if key not in self._layouts:
            self._layouts[key] = self._choose(key)
        return self._layouts[key]

    def _choose(self, stored: tuple[str, ...]) -> Layout:
        modules = list(map(module_of, stored))
        if not self.checkpoint.is_compressed(modules[0]):
            if self.options.head_bits == 16 or self.options.exact or not set(stored) <= self._outer:
                return DENSE_F16
            columns = self.checkpoint.shape(stored[0])[1]
            return RECORDS if columns % TILE == 0 and columns <= MAX_COLUMNS else DENSE_F16
        if self.options.exact:
            return GROUP_WORDS
        return RECORDS if all(map(self._fits_records, modules)) else GROUP_WORDS

    def _fits_records(self, module: str) -> bool:
        if not self.checkpoint.is_one_matrix(module):
            return False
        header = self.checkpoint.matrix_header(module)
        return _fit_records(header, header.nnz < header.rows * (header.columns // header.group_size))

    def matrix(self, weights: tuple[str, ...]) -> QuantizedMatrix:
        """Stacked weights in records, as one matrix. Raises ModelError."""
        parts = []
        for weight in map(self.stored, weights):
            if self.checkpoint.is_compressed(module_of(weight)):
                parts.append(_widened(self.checkpoint.matrix(module_of(weight))))
            else:
                array = self.checkpoint.read(weight).astype(np.float32)
                if not np.isfinite(array).all():
                    raise ModelError(f"{weight}: the checkpoint holds NaN or infinite weights; convert the model again")
                parts.append(round_matrix(array, self.options.head_bits, TILE))
        return parts[0] if len(parts) == 1 else QuantizedMatrix.stack(parts)

    def plan(self, weights: tuple[str, ...], paired: bool) -> Plan:
        """The records of stacked weights. paired: row r of the first half and of the second stand together."""
        row_bits, keep = zip(*map(self._pattern, map(self.stored, weights)), strict=True)
        columns = self._columns(self.stored(weights[0]))
        if all(mask is None for mask in keep):
            return _plan(np.concatenate(row_bits), columns, None, paired)
        masks = [
            np.ones((len(bits), columns // GROUP), bool) if mask is None else mask
            for bits, mask in zip(row_bits, keep, strict=True)
        ]
        return _plan(np.concatenate(row_bits), columns, np.concatenate(masks), paired)

    def can_pair(self, weights: tuple[str, ...]) -> bool:
        """Whether row r of the first half of stacked weights in records has the width of row r of the second."""
        row_bits = np.concatenate([self._pattern(self.stored(weight))[0] for weight in weights])
        first, second = row_bits.reshape(2, -1)
        return bool((first == second).all())

    def _columns(self, weight: str) -> int:
        module = module_of(weight)
        if self.checkpoint.is_compressed(module):
            return self.checkpoint.matrix_header(module).columns
        return self.checkpoint.shape(weight)[1]

    def _pattern(self, weight: str) -> tuple[np.ndarray, np.ndarray | None]:
        """(row_bits, mask of groups of 16 or None), without reading a level where the checkpoint allows it."""
        module = module_of(weight)
        if not self.checkpoint.is_compressed(module):
            return np.full(self.checkpoint.shape(weight)[0], self.options.head_bits, np.uint8), None
        header = self.checkpoint.matrix_header(module)
        if len(header.widths) == 1 and header.nnz == header.rows * (header.columns // header.group_size):
            return np.full(header.rows, header.widths[0], np.uint8), None
        row_bits, keep = self.checkpoint.pattern(module)
        return row_bits if keep is None else _masked_widths(row_bits), _by_16(keep, header.group_size)


def _fit_records(linear: MatrixHeader | QuantizedMatrix, masked: bool) -> bool:
    """Whether records hold a linear of these columns and groups. masked: some groups are removed."""
    whole_tiles = linear.columns % TILE == 0 and linear.quant_group_size % TILE == 0
    return linear.columns <= MAX_COLUMNS and whole_tiles and not (masked and linear.group_size % GROUP)


def stored_bytes(matrix: QuantizedMatrix) -> int:
    """Bytes that a linear takes in a file, if it is stored by itself."""
    if _fit_records(matrix, matrix.keep is not None):
        return plan_of(_widened(matrix), False).n_bytes
    return GROUP_WORDS.stream_bytes(matrix.rows, matrix.n_groups, int(matrix.row_bits[0]), matrix.group_size)


def _masked_widths(row_bits: np.ndarray) -> np.ndarray:
    """The widths at which rows are stored where groups are removed: 1 bit as 2, 3 bits as 4."""
    return np.where(np.isin(row_bits, (0, *MASKED_WIDTHS)), row_bits, row_bits + 1).astype(np.uint8)


def _widened(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """The same weights in widths that masked records hold. Raises ModelError for zeros between levels."""
    if matrix.keep is None:
        return matrix
    row_bits = _masked_widths(matrix.row_bits)
    levels = matrix.zeros.astype(np.int64) << matrix.row_bits[:, None].astype(np.int64)  # sixteenths of a level
    if (levels % ZERO_STEPS).any():
        raise ModelError("where groups are removed, zeros must be levels, and some lie between two")
    return replace(matrix, row_bits=row_bits, zeros=(levels >> row_bits[:, None].astype(np.int64)).astype(np.uint8))


def plan_of(matrix: QuantizedMatrix, paired: bool) -> Plan:
    """The records of a matrix."""
    return _plan(matrix.row_bits, matrix.columns, _by_16(matrix.keep, matrix.group_size), paired)


def _plan(row_bits: np.ndarray, columns: int, keep: np.ndarray | None, paired: bool) -> Plan:
    rows = len(row_bits)
    pairs = np.arange(rows, dtype=np.int32).reshape(2, -1).T if paired else None
    return make_plan(row_bits, columns, keep, pairs)


def _by_16(keep: np.ndarray | None, group_size: int) -> np.ndarray | None:
    return keep if keep is None or group_size == GROUP else np.repeat(keep, group_size // GROUP, axis=1)
