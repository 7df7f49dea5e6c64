"""Plan memory: gives every activation a fixed place in one arena, shared by values that never meet.

The plan is made for a full prefill chunk; decode uses the first row of the same buffers.
"""

from dataclasses import dataclass

from gqsa_runtime.format import ALIGNMENT
from gqsa_runtime.operators import state_elements
from gqsa_runtime.program import DTYPE_BYTES, Buffer

from gqsac.compiler.passes.specialize import RESERVED, Launches, ValueRef


@dataclass(frozen=True)
class MemoryPlan:
    """buffers with their byte offsets; arena_bytes: size of the arena they lie in."""

    buffers: tuple[Buffer, ...]
    arena_bytes: int


def plan_memory(launches: Launches, prefill_chunk: int) -> MemoryPlan:
    """Places buffers by greatest size first, each at the lowest offset free during its lifetime.

    Reserved buffers live throughout: the runtime reads and writes them between launches.
    """
    sizes = {name: (dtype, elements) for name, dtype, elements in _reserved_buffers(launches, prefill_chunk)}
    lifetimes = _lifetimes(launches)
    for storage in lifetimes:
        sizes[storage] = ("f32", launches.widths[storage] * prefill_chunk)
    forever = (-1, 1 << 30)

    placed: list[tuple[int, int, tuple[int, int]]] = []  # (start, end, lifetime)
    buffers = []
    order = sorted(sizes, key=lambda name: (-sizes[name][1] * DTYPE_BYTES[sizes[name][0]], name))
    for name in order:
        dtype, elements = sizes[name]
        size = -(-elements * DTYPE_BYTES[dtype] // ALIGNMENT) * ALIGNMENT
        lifetime = lifetimes.get(name, forever)
        offset = 0
        for start, end, other in sorted(placed):
            if other[0] <= lifetime[1] and lifetime[0] <= other[1] and offset + size > start:
                offset = max(offset, end)
        placed.append((offset, offset + size, lifetime))
        buffers.append(Buffer(name, dtype, elements, offset))
    arena_bytes = max(end for _, end, _ in placed)
    return MemoryPlan(tuple(sorted(buffers, key=lambda buffer: (buffer.offset, buffer.name))), arena_bytes)


def _reserved_buffers(launches: Launches, chunk: int) -> list[tuple[str, str, int]]:
    return [
        ("tokens", "i32", chunk),
        ("targets", "i32", chunk),
        ("state", "i32", state_elements(chunk)),
        ("logits", "f32", chunk * launches.widths["logits"]),
        ("log_probs", "f32", chunk),
        ("argmax", "i32", chunk),
        ("last", "f32", launches.widths["last"]),
    ]


def _lifetimes(launches: Launches) -> dict[str, tuple[int, int]]:
    """Storage -> (first, last) launch that touches it, over the prefill body and what may follow it.

    The decode phase launches the same operators in the same order, so its lifetimes are these.
    """
    body = launches.phases["prefill_body"]
    lifetimes: dict[str, tuple[int, int]] = {}
    for index, launch in enumerate(body):
        touched = [arg.storage for arg in launch.args if isinstance(arg, ValueRef)] + [launch.writes]
        for storage in touched:
            if storage not in RESERVED:
                first, _ = lifetimes.get(storage, (index, index))
                lifetimes[storage] = (first, index)
    for phase in ("last_logits", "all_log_probs"):
        for launch in launches.phases[phase]:
            for arg in launch.args:
                if isinstance(arg, ValueRef) and arg.storage in lifetimes:
                    lifetimes[arg.storage] = (lifetimes[arg.storage][0], len(body))
    return lifetimes
