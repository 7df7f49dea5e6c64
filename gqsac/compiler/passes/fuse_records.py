"""Fuse records: linears over records take the norm before them and the gate behind them into their kernels.

Such a kernel reads its activations as integers that it makes itself, so a norm costs it a factor; and it holds
both halves of a gated linear at once, so their product never passes through memory as two.
"""

from collections.abc import Callable
from dataclasses import replace

from gqsac.compiler import ir
from gqsac.compiler.passes.fuse import readers_of, remove_dead

Asks = Callable[[ir.Linear], bool]


def fuse_records(graph: ir.Graph, in_records: Asks, can_pair: Asks) -> ir.Graph:
    """Applies both fusions. in_records(linear): whether its weights are stored as records. can_pair(linear), of one
    that is: whether row r of both of its halves fit one block."""
    return fuse_norms(fuse_gates(graph, lambda linear: in_records(linear) and can_pair(linear)), in_records)


def fuse_gates(graph: ir.Graph, may_gate: Asks) -> ir.Graph:
    """A gated activation over the two halves of one linear moves into that linear, if it may."""
    readers, makers = readers_of(graph), {op.output: op for op in graph.ops}

    def fused(op: ir.Op) -> ir.Op:
        if not isinstance(op, ir.GatedActivation):
            return op
        gate, up = makers[op.gate], makers[op.up]
        if not (isinstance(gate, ir.Slice) and isinstance(up, ir.Slice) and gate.x == up.x):
            return op
        linear = makers[gate.x]
        halves = gate.start == 0 and up.start == gate.width == up.width and linear.width == 2 * gate.width
        if not (isinstance(linear, ir.Linear) and halves):
            return op
        if any(reader not in (gate, up) for reader in readers[linear.output]) or not may_gate(linear):
            return op
        return replace(linear, output=op.output, gated=True, activation=op.activation)

    return remove_dead(replace(graph, ops=tuple(fused(op) for op in graph.ops)))


def fuse_norms(graph: ir.Graph, in_records: Asks) -> ir.Graph:
    """A norm that only linears over records read moves into each of them."""
    readers, makers = readers_of(graph), {op.output: op for op in graph.ops}

    def fused(op: ir.Op) -> ir.Op:
        if not (isinstance(op, ir.Linear) and in_records(op)):
            return op
        norm = makers.get(op.x)
        if not isinstance(norm, (ir.RMSNorm, ir.LayerNorm)) or ir.width(norm) != norm.width:
            return op
        if not all(_takes(reader, norm.output, in_records) for reader in readers[norm.output]):
            return op
        return replace(op, x=norm.x, norm=norm)

    return remove_dead(replace(graph, ops=tuple(fused(op) for op in graph.ops)))


def _takes(op: ir.Op, value: str, in_records: Asks) -> bool:
    return isinstance(op, ir.Linear) and in_records(op) and op.x == value and op.residual != value
