"""Plan memory: gives every storage a fixed place in one arena, shared by those that never meet."""

from dataclasses import dataclass

from gqsa_runtime.format import ALIGNMENT
from gqsa_runtime.operators import FEW_TOKENS
from gqsa_runtime.program import DTYPE_BYTES, PHASES, Buffer

from gqsac.compiler.passes.specialize import RESERVED, Calls, ValueRef


@dataclass(frozen=True)
class MemoryPlan:
    """buffers with their byte offsets; arena_bytes: size of the arena they lie in. The chunks: see program.Plan."""

    prefill_chunk: int
    score_chunk: int
    buffers: tuple[Buffer, ...]
    arena_bytes: int


def plan_memory(calls: Calls, prefill_chunk: int, score_chunk: int) -> MemoryPlan:
    """Places buffers by greatest size first, each at the lowest offset free during its lifetime.

    What decode alone touches holds one token, few_body's a few, what scores need theirs, everything else the
    prefill's. Reserved buffers live throughout: the runtime reads and writes them between launches.
    """
    lifetimes = _lifetimes(calls)
    forever = (-1, 1 << 30)
    most = dict.fromkeys(RESERVED, prefill_chunk)  # tokens
    for phase in PHASES:
        held = {"decode": 1, "few_body": min(FEW_TOKENS, prefill_chunk)}.get(phase, prefill_chunk)
        most |= {name: max(held, most.get(name, 0)) for name in _touched(calls, phase)}
    buffers = []
    for name in {*RESERVED, *lifetimes}:
        storage = calls.storages[name]
        n_tokens = score_chunk if storage.scored else most[name]
        buffers.append((name, storage.dtype, storage.elements(n_tokens)))

    def size_of(buffer) -> int:
        _, dtype, elements = buffer
        return -(-elements * DTYPE_BYTES[dtype] // ALIGNMENT) * ALIGNMENT

    placed: list[tuple[int, int, tuple[int, int]]] = []  # (start, end, lifetime)
    results = []
    for buffer in sorted(buffers, key=lambda buffer: (-size_of(buffer), buffer[0])):
        lasting = buffer[0] in RESERVED or calls.storages[buffer[0]].lasting
        size, lifetime = size_of(buffer), forever if lasting else lifetimes[buffer[0]]
        offset = 0
        for start, end, other in sorted(placed):
            if other[0] <= lifetime[1] and lifetime[0] <= other[1] and offset + size > start:
                offset = max(offset, end)
        placed.append((offset, offset + size, lifetime))
        results.append(Buffer(*buffer, offset))
    arena_bytes = max(end for _, end, _ in placed)
    return MemoryPlan(
        prefill_chunk, score_chunk, tuple(sorted(results, key=lambda buffer: (buffer.offset, buffer.name))), arena_bytes
    )


def _touched(calls: Calls, phase: str) -> set[str]:
    """Storages that the calls of a phase read or write."""
    return {arg.storage for call in calls.phases[phase] for arg in call.args if isinstance(arg, ValueRef)}


def _lifetimes(calls: Calls) -> dict[str, tuple[int, int]]:
    """Storage -> (first, last) call that touches it, all phases counted one behind another.

    That is the order in which they run, but for what may be left out or come again: a text is scored without
    last_logits, and decode runs before a prefill body or after what follows it, never in between.
    """
    lifetimes: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(call for phase in PHASES for call in calls.phases[phase]):
        for arg in call.args:
            if isinstance(arg, ValueRef) and arg.storage not in RESERVED:
                first, _ = lifetimes.get(arg.storage, (index, index))
                lifetimes[arg.storage] = (first, index)
    return lifetimes
