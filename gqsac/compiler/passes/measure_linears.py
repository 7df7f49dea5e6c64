"""Measure linears: the sizes of each linear's weights in the file, from shapes, masks and counts; no weight is read.

Linears of one shape, layout and density share the constants of their kernel, the cut of the work too. Of group
words a task is a run of whole rows with nearly the same number of kept groups as every other task, whatever the
rows look like. The counts are known here, so the cut is made ahead of time.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, RECORDS, Layout
from gqsa_runtime.layouts.group_words import MAX_COLUMNS
from gqsa_runtime.layouts.records import GROUP

from gqsac.checkpoint import Checkpoint
from gqsac.compiler import ir
from gqsac.compiler.passes.choose_layouts import Weights, module_of
from gqsac.errors import UnsupportedError


@dataclass(frozen=True)
class StoredPart:
    """One addend of a (possibly stacked) linear, as the file holds it.

    constants: what the layout adds to the kernel's constants, the same for the whole cluster. nnz: groups that the
    checkpoint keeps, as the layout counts them. n_groups: what Layout.shapes takes.
    """

    layout: Layout
    constants: dict
    nnz: int = 0
    n_groups: int | tuple = 0


@dataclass(frozen=True)
class StoredParts:
    """linear output value -> its addends, at least one; table -> its rows, if they are not fp16.

    n_clusters: sets of linears with the same constants, for the summary.
    """

    linears: dict[str, tuple[StoredPart, ...]]
    tables: dict[str, StoredPart]
    n_clusters: int


def measure_linears(graph: ir.Graph, weights: Weights) -> StoredParts:
    """Sizes and constants of all weights; linears of like shape, bits, group size and density get the same constants.

    Raises UnsupportedError for a bit width or a row length that the kernels do not cover.
    """
    linears: dict[str, tuple[StoredPart, ...]] = {}
    in_words: list[ir.Linear] = []
    in_records: dict[str, list[tuple[str, StoredPart]]] = defaultdict(list)  # cluster -> (output, addend)
    for op in graph.ops:
        if not isinstance(op, ir.Linear):
            continue
        layout = weights.layout(op.weights)
        if layout is DENSE_F16:
            linears[op.output] = (StoredPart(DENSE_F16, {}),)
        elif layout is GROUP_WORDS:
            in_words.append(op)
        else:
            part = _in_records(weights, op.weights, op.gated)
            alike = {name: value for name, value in part.constants.items() if name != "record_bytes"}
            in_records[repr((op.n_rows, op.k, alike))].append((op.output, part))
    for members in in_records.values():
        largest = max(part.constants["record_bytes"] for _, part in members)
        for output, part in members:
            linears[output] = (replace(part, constants={**part.constants, "record_bytes": largest}),)
    words, n_clusters = _in_words(in_words, weights.checkpoint, weights)
    tables = {
        op.table: _in_records(weights, (op.table,), False)
        for op in graph.ops
        if isinstance(op, ir.Embedding) and weights.layout((op.table,)) is RECORDS
    }
    return StoredParts({**linears, **words}, tables, n_clusters + len(in_records))


def _in_records(weights: Weights, names: tuple[str, ...], paired: bool) -> StoredPart:
    plan = weights.plan(names, paired)
    rows = int((plan.order >= 0).sum())
    kept = plan.kept.sum() if plan.kept is not None else rows * plan.columns // GROUP
    return StoredPart(RECORDS, plan.constants, int(kept), (len(plan.block), int(plan.sizes.sum())))


def _in_words(
    ops: list[ir.Linear], checkpoint: Checkpoint, weights: Weights
) -> tuple[dict[str, tuple[StoredPart, ...]], int]:
    found: dict[str, list[tuple[_Cluster, int]]] = {}  # linear -> its streams' clusters and kept groups
    members: dict[_Cluster, list[int]] = defaultdict(list)
    for op in ops:
        modules = [module_of(weights.stored(weight)) for weight in op.weights]
        found[op.output] = []
        for stream in zip(*map(checkpoint.stream_headers, modules), strict=True):
            bits, group_size = stream[0].bits, stream[0].group_size
            _check_kernel_covers(op, bits, group_size)
            nnz = sum(part.nnz for part in stream)
            cluster = _Cluster(op.width, op.k, bits, group_size, _density_bucket(nnz, op.width * op.k // group_size))
            found[op.output].append((cluster, nnz))
            members[cluster].append(nnz)

    n_tasks = {
        cluster: GROUP_WORDS.count_tasks(cluster.rows, sum(nnz) / len(nnz), cluster.group_size)
        for cluster, nnz in members.items()
    }
    linears = {
        output: tuple(
            StoredPart(
                GROUP_WORDS,
                {"bits": c.bits, "group_size": c.group_size, "n_tasks": n_tasks[c], "accumulate": index > 0},
                nnz,
                GROUP_WORDS.stored_groups(nnz),
            )
            for index, (c, nnz) in enumerate(parts)
        )
        for output, parts in found.items()
    }
    return linears, len(members)


@dataclass(frozen=True)
class _Cluster:
    """Streams that share a kernel and a cut of the work."""

    rows: int
    k: int
    bits: int
    group_size: int
    density_bucket: int | None


def _density_bucket(nnz: int, n_groups: int) -> int | None:
    # Half an octave: layers of one sparsity fall together, a layer kept twice as dense does not.
    return round(2 * math.log2(nnz / n_groups)) if nnz else None


def _check_kernel_covers(op: ir.Linear, bits: int, group_size: int) -> None:
    if bits not in GROUP_WORDS.kernel_bits:
        raise UnsupportedError(
            f"{op.name}: {bits}-bit kernels are not built; compress with --bits 2, 4 or 8, "
            f"or evaluate this model in PyTorch"
        )
    if op.k // group_size > MAX_COLUMNS:
        raise UnsupportedError(
            f"{op.name}: {op.k} columns make {op.k // group_size} groups of {group_size} in a row and at most "
            f"{MAX_COLUMNS} can be indexed; compress with a larger --group-size"
        )
