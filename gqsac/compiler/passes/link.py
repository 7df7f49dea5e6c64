"""Link: gathers machine code into one tensor per target and names what the program refers to."""

import numpy as np
from gqsa_runtime.program import Binary, KVLayer, Rope

from gqsac.compiler import ir
from gqsac.compiler.passes.compile import CPU_TARGETS, Compiled
from gqsac.compiler.passes.pack import PackedTensor, Packing


def link(compiled: list[Compiled], targets: tuple[str, ...]) -> tuple[tuple[Binary, ...], tuple[PackedTensor, ...]]:
    """One Binary and one I8 tensor per target, its kernels one behind another, 16-byte aligned."""
    binaries, tensors = [], []
    for target in targets:
        parts, places, offset = [], {}, 0
        for item in compiled:
            if item.target == target:
                places[item.kernel] = (offset, len(item.data))
                padding = -len(item.data) % 16
                parts += [item.data, b"\0" * padding]
                offset += len(item.data) + padding
        data = np.frombuffer(b"".join(parts), np.int8)
        name = f"binary.{target}"
        tensors.append(PackedTensor(name, "i8", data.shape, lambda data=data: data))
        binaries.append(Binary(target, kind_of(target), name, places))
    return tuple(binaries), tuple(tensors)


def kv_layers(graph: ir.Graph) -> tuple[KVLayer, ...]:
    """The KV caches in the order of their layer numbers."""
    attentions = sorted((op for op in graph.ops if isinstance(op, ir.Attention)), key=lambda op: op.layer)
    return tuple(KVLayer(op.kv_heads, op.head_dim, op.window) for op in attentions)


def ropes(graph: ir.Graph, packing: Packing) -> dict[str, Rope]:
    """The rotary tables that the runtime fills when it opens the file."""
    return {
        key: Rope(
            packing.ropes[key, "inv_freq"],
            table.rotary_dim,
            float(table.scaling),
            packing.ropes.get((key, "long_inv_freq")),
            table.original_context,
        )
        for key, table in graph.ropes.items()
    }


def kind_of(target: str) -> str:
    """The kind of a target's binary, see program.Binary."""
    if target in CPU_TARGETS:
        return "shared_object"
    return "ptx" if target.startswith("compute_") else "cubin"
