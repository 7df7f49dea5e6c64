"""Group patterns: finds the linears whose sparsity patterns are alike, and cuts each cluster's work.

Linears of one shape, block layout and density share one kernel. Work is cut task-centric (as in
Stream-K): a task is a run of whole rows with nearly the same number of kept groups as every other
task, whatever the rows look like. The counts are known here, so the cut is made ahead of time.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from gqsa_runtime.format import MAX_GROUP_COLUMNS

from gqsac.checkpoint import Checkpoint
from gqsac.compiler import ir
from gqsac.errors import UnsupportedError

KERNEL_BITS = (2, 4, 8)

# A task is one warp's work. Enough tasks to fill the largest GPU once with two 512-thread CTAs an SM
# (132 * 2 * 16), and, where there is less work than that, no task smaller than four 32-lane steps.
MAX_TASKS = 132 * 2 * 16
MIN_TASKS = 132 * 8
MIN_UNITS_PER_TASK = 128  # a unit is what one lane takes at a time: min(group_size, 16) weights


@dataclass(frozen=True)
class StreamPattern:
    """How one BSR stream of a (possibly stacked) linear is stored and cut.

    nnz: kept groups. n_tasks: row runs that the work is cut into, the same for the whole cluster.
    """

    bits: int
    group_size: int
    nnz: int
    n_tasks: int


@dataclass(frozen=True)
class Patterns:
    """linear output value -> its streams; dense linears have none. n_clusters: for the summary."""

    streams: dict[str, tuple[StreamPattern, ...]]
    n_clusters: int


def module_of(weight: str) -> str:
    """Path of the module that owns a weight: "a.b.weight" -> "a.b"."""
    return weight.removesuffix(".weight")


def group_patterns(graph: ir.Graph, checkpoint: Checkpoint) -> Patterns:
    """Clusters the graph's linears by shape, bits, group size and density.

    Raises UnsupportedError for a bit width or a row length that the kernels do not cover.
    """
    found: dict[str, list[tuple[_Cluster, int]]] = {}  # linear -> its streams' clusters and kept groups
    members: dict[_Cluster, list[int]] = defaultdict(list)
    for op in graph.ops:
        if not isinstance(op, ir.Linear):
            continue
        found[op.output] = []
        modules = [module_of(graph.aliases.get(weight, weight)) for weight in op.weights]
        if not checkpoint.is_compressed(modules[0]):
            continue
        for stream in zip(*map(checkpoint.stream_headers, modules), strict=True):
            bits, group_size = stream[0].bits, stream[0].group_size
            _check_kernel_covers(op, bits, group_size)
            nnz = sum(part.nnz for part in stream)
            cluster = _Cluster(op.width, op.k, bits, group_size, _density_bucket(nnz, op.width * op.k // group_size))
            found[op.output].append((cluster, nnz))
            members[cluster].append(nnz)

    n_tasks = {cluster: cluster.count_tasks(sum(nnz) / len(nnz)) for cluster, nnz in members.items()}
    streams = {
        output: tuple(StreamPattern(c.bits, c.group_size, nnz, n_tasks[c]) for c, nnz in parts)
        for output, parts in found.items()
    }
    return Patterns(streams, len(members))


@dataclass(frozen=True)
class _Cluster:
    """Streams that share a kernel and a cut of the work."""

    rows: int
    k: int
    bits: int
    group_size: int
    density_bucket: int | None

    def count_tasks(self, mean_nnz: float) -> int:
        units = mean_nnz * max(1, self.group_size // 16)
        wanted = max(MIN_TASKS, math.ceil(units / MIN_UNITS_PER_TASK))
        return min(self.rows, wanted, MAX_TASKS)


def _density_bucket(nnz: int, n_groups: int) -> int | None:
    # Half an octave: layers of one sparsity fall together, a layer kept twice as dense does not.
    return round(2 * math.log2(nnz / n_groups)) if nnz else None


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


def _check_kernel_covers(op: ir.Linear, bits: int, group_size: int) -> None:
    if bits not in KERNEL_BITS:
        raise UnsupportedError(
            f"{op.name}: {bits}-bit kernels are not built; compress with --bits 2, 4 or 8, "
            f"or evaluate this model in PyTorch"
        )
    if op.k // group_size > MAX_GROUP_COLUMNS:
        raise UnsupportedError(
            f"{op.name}: {op.k} columns make {op.k // group_size} groups of {group_size} in a row and at most "
            f"{MAX_GROUP_COLUMNS} can be indexed; compress with a larger --group-size"
        )
