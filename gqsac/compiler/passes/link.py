"""Link: gathers the machine code of each target, stores it in one tensor, and names what the program refers to."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gqsa_runtime import machine_code
from gqsa_runtime.program import Binary, KVLayer, Rope

from gqsac.compiler import ir
from gqsac.compiler.passes.compile import CPU_TARGETS, Compiled
from gqsac.compiler.passes.pack import PackedTensor, Packing
from gqsac.errors import UnsupportedError

Linked = tuple[Binary, bytes]  # and its code


def link(compiled: list[Compiled], targets: tuple[str, ...]) -> tuple[Linked, ...]:
    """One Binary per target with its code: its kernels one behind another, 16-byte aligned.

    Raises UnsupportedError for more code than a file may hold for a target.
    """
    linked = []
    for target in targets:
        parts, places, offset = [], {}, 0
        for item in compiled:
            if item.target == target:
                places[item.kernel] = (offset, len(item.data))
                padding = -len(item.data) % 16
                parts += [item.data, b"\0" * padding]
                offset += len(item.data) + padding
        code = b"".join(parts)
        if len(code) > machine_code.MAX_BYTES:
            raise UnsupportedError(
                f"the kernels for {target} have {len(code)} bytes, a file may hold {machine_code.MAX_BYTES}; leave the "
                "target out, or compress the model with fewer widths"
            )
        digest = hashlib.sha256(code).hexdigest()
        linked.append((Binary(target, kind_of(target), f"binary.{target}", len(code), digest, places), code))
    return tuple(linked)


def code_tensors(linked: Sequence[Linked]) -> tuple[PackedTensor, ...]:
    """One I8 tensor per target: its code, compressed."""
    with ThreadPoolExecutor() as pool:
        packed = list(pool.map(lambda item: np.frombuffer(machine_code.pack(item[1]), np.int8), linked))
    return tuple(
        PackedTensor(binary.tensor, "i8", data.shape, lambda data=data: data)
        for (binary, _), data in zip(linked, packed, strict=True)
    )


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
