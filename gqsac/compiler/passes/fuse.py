"""Fuse: fewer, larger operators, because a decode step pays about a microsecond for each launch.

Every fusion is a pure function from graph to graph that keeps what the graph computes. Values keep
their names: an operator that replaces another defines the same value.
"""

from collections.abc import Callable
from dataclasses import replace

from gqsac.compiler import ir

CanStack = Callable[[tuple[str, ...]], bool]


def fuse(graph: ir.Graph, can_stack: CanStack) -> ir.Graph:
    """Applies all fusions. can_stack(weight names): whether one kernel can read these weights as one matrix."""
    # First, while an activation and its product still stand side by side: a gate's activation must not
    # go into its linear's epilogue, or gate and up could not be stacked.
    graph = fuse_gated_activations(graph)
    # Before the epilogues, since only bare linears can be stacked.
    graph = stack_siblings(graph, can_stack)
    # Before the residuals, since an epilogue applies its activation first and then adds.
    graph = fuse_activations(graph)
    graph = fuse_residuals(graph)
    # Last, to clear what tracing left unread.
    return remove_dead(graph)


def fuse_gated_activations(graph: ir.Graph) -> ir.Graph:
    """activation(gate) * up becomes one GatedActivation where the product alone reads the activation."""
    readers, makers = readers_of(graph), _makers(graph)

    def fused(op: ir.Op) -> ir.Op:
        if not (isinstance(op, ir.Elementwise) and op.function == "mul"):
            return op
        for activated, up in ((op.a, op.b), (op.b, op.a)):
            maker = makers[activated]
            if _is_activation(maker) and len(readers[activated]) == 1:
                return ir.GatedActivation(op.name, op.output, maker.a, up, op.width, maker.function)
        return op

    return remove_dead(replace(graph, ops=tuple(fused(op) for op in graph.ops)))


def stack_siblings(graph: ir.Graph, can_stack: CanStack) -> ir.Graph:
    """Bare linears of one module that read the same value (q, k, v; gate, up) become one and Slices of it.

    Siblings join, in program order, for as long as can_stack allows; the next one begins a new stack.
    """
    families: dict[tuple[str, str], list[ir.Linear]] = {}
    for op in graph.ops:
        if isinstance(op, ir.Linear) and _is_bare(op) and op.output != graph.logits:
            families.setdefault((op.x, op.name.rpartition(".")[0]), []).append(op)
    replacements: dict[str, list[ir.Op]] = {}  # by the value that the replaced operator made
    for family in families.values():
        for stack in _stacks(family, can_stack):
            if len(stack) > 1:
                replacements.update({part.output: [] for part in stack})
                replacements[stack[0].output] = _stacked(stack)
    ops = [new for op in graph.ops for new in replacements.get(op.output, [op])]
    return replace(graph, ops=tuple(ops))


def fuse_activations(graph: ir.Graph) -> ir.Graph:
    """An activation that alone reads a bare linear moves into its epilogue."""
    readers, makers = readers_of(graph), _makers(graph)

    def fused(op: ir.Op) -> ir.Op:
        if not _is_activation(op):
            return op
        linear = makers[op.a]
        if isinstance(linear, ir.Linear) and _is_bare(linear) and len(readers[op.a]) == 1:
            return replace(linear, output=op.output, activation=op.function)
        return op

    return remove_dead(replace(graph, ops=tuple(fused(op) for op in graph.ops)))


def fuse_residuals(graph: ir.Graph) -> ir.Graph:
    """An addition that alone reads a linear moves into its epilogue.

    The linear moves to the addition's place, where the other addend surely exists. Of two linears the
    later one takes the addition, since it would run last anyway.
    """
    readers, makers = readers_of(graph), _makers(graph)
    order = {op.output: i for i, op in enumerate(graph.ops)}

    def fused(op: ir.Op) -> ir.Op:
        if not (isinstance(op, ir.Elementwise) and op.function == "add") or op.a == op.b:
            return op
        for name in sorted((op.a, op.b), key=order.__getitem__, reverse=True):
            linear = makers[name]
            if isinstance(linear, ir.Linear) and linear.residual is None and len(readers[name]) == 1:
                return replace(linear, output=op.output, residual=op.b if name == op.a else op.a)
        return op

    return remove_dead(replace(graph, ops=tuple(fused(op) for op in graph.ops)))


def remove_dead(graph: ir.Graph) -> ir.Graph:
    """Drops operators whose values nobody reads."""
    needed = {graph.logits}
    kept: list[ir.Op] = []
    for op in reversed(graph.ops):
        if op.output in needed:
            needed.update(ir.inputs(op))
            kept.append(op)
    return replace(graph, ops=tuple(reversed(kept)))


def _is_activation(op: ir.Op) -> bool:
    return isinstance(op, ir.Elementwise) and op.function in ir.ACTIVATIONS


def _is_bare(linear: ir.Linear) -> bool:
    return linear.activation == "none" and linear.residual is None


def _stacks(family: list[ir.Linear], can_stack: CanStack) -> list[list[ir.Linear]]:
    stacks: list[list[ir.Linear]] = []
    for linear in family:
        joined = [*stacks[-1], linear] if stacks else []
        if joined and can_stack(tuple(name for part in joined for name in part.weights)):
            stacks[-1] = joined
        else:
            stacks.append([linear])
    return stacks


def _stacked(parts: list[ir.Linear]) -> list[ir.Op]:
    """One linear named for all of its parts, and a Slice under each part's own name and value."""
    first = parts[0]
    parent = first.name.rpartition(".")[0]
    names = "+".join(part.name.rpartition(".")[2] for part in parts)
    whole = ir.Linear(
        name=f"{parent}.{names}" if parent else names,
        output=f"{first.output}_stacked",
        x=first.x,
        weights=tuple(name for part in parts for name in part.weights),
        biases=tuple(name for part in parts for name in part.biases),
        rows=tuple(rows for part in parts for rows in part.rows),
        k=first.k,
    )
    ops: list[ir.Op] = [whole]
    start = 0
    for part in parts:
        ops.append(ir.Slice(part.name, part.output, whole.output, start, part.width))
        start += part.width
    return ops


def readers_of(graph: ir.Graph) -> dict[str, list[ir.Op]]:
    """Who reads each value; an operator that reads it twice counts twice."""
    readers: dict[str, list[ir.Op]] = {op.output: [] for op in graph.ops}
    for op in graph.ops:
        for name in ir.inputs(op):
            readers[name].append(op)
    return readers


def _makers(graph: ir.Graph) -> dict[str, ir.Op]:
    return {op.output: op for op in graph.ops}
