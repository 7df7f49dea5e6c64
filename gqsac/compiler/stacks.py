"""Which linears of a model a file stores as one matrix, and how many bytes the widths of its rows make.

Bits per weight, everywhere in gqsac: eight times the bytes that the compressed linears take in a built file (levels,
scales, zeros, headers, padding, and the tables by which kernels find them), over the weights of the dense linears.
Embeddings, heads, norms and biases are counted in the size of the file alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gqsa_runtime.layouts.records import ROWS, make_plan

from gqsac.compiler import ir
from gqsac.compiler.passes.choose_layouts import module_of
from gqsac.compiler.passes.fuse import fuse
from gqsac.compiler.passes.fuse_records import fuse_gates
from gqsac.compiler.passes.legalize import legalize
from gqsac.compiler.passes.trace import trace
from gqsac.errors import ModelError


@dataclass(frozen=True)
class Stack:
    """Linears that read the same input and are stored as one matrix, a block of 16 rows having one width.

    modules: their paths, one below another. rows: of each. paired: row r of the first half (a gate) and of the second
    (what it gates) stand in one block and must have one width, or the two cannot share a kernel.
    """

    modules: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    paired: bool

    @property
    def n_rows(self) -> int:
        return sum(self.rows)

    @property
    def n_weights(self) -> int:
        return self.n_rows * self.columns

    def n_bytes(self, row_bits: np.ndarray) -> int:
        """Bytes in a file. row_bits: uint8 [n_rows]."""
        pairs = np.arange(self.n_rows, dtype=np.int32).reshape(2, -1).T if self.paired else None
        return make_plan(row_bits, self.columns, None, pairs).n_bytes

    def block_bytes(self, width: int) -> int:
        """Bytes that one more block of 16 rows of a width takes, where a stack has other widths too."""
        other = 4 if width == 8 else 8  # records of one width alone may be bare
        one, two = (
            make_plan(np.repeat(np.array([other, width], np.uint8), [ROWS, n * ROWS]), self.columns).n_bytes
            for n in (1, 2)
        )
        return two - one


def stacks_of(config: dict, shapes: dict[str, tuple[int, int]]) -> tuple[Stack, ...]:
    """How a file stores linears in records, from the model's config.json alone.

    shapes: path -> (rows, columns) of every linear to compress. Raises UnsupportedError for a model that cannot be
    compiled, ModelError for a linear that the compiled model does not have.
    """
    graph = legalize(trace(config))

    def compressed(weight: str) -> bool:
        return module_of(graph.aliases.get(weight, weight)) in shapes

    graph = fuse(graph, lambda names: len(set(map(compressed, names))) == 1)
    graph = fuse_gates(graph, lambda linear: all(map(compressed, linear.weights)))
    found = []
    for op in graph.ops:
        if isinstance(op, ir.Linear) and compressed(op.weights[0]):
            modules = tuple(module_of(graph.aliases.get(weight, weight)) for weight in op.weights)
            found.append(Stack(modules, tuple(shapes[module][0] for module in modules), op.k, op.gated))
    missing = set(shapes) - {module for stack in found for module in stack.modules}
    if missing:
        raise ModelError(f"{sorted(missing)[0]} is no linear of the compiled model; leave it dense with --skip")
    return tuple(found)
