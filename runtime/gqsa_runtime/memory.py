"""How much memory a program needs on a family of targets at a context, and how much of it there is."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from gqsa_runtime.program import Program

# Left free beside what is counted: graphs, modules, threads, Python itself.
CPU_HEADROOM_BYTES = 128 << 20
CUDA_HEADROOM_BYTES = 384 << 20
# Of free memory, what a context that nobody has sized may take: RAM is everybody's, a GPU's memory the model's.
AUTO_SHARE = {"cpu": 0.5, "cuda": 1.0}
SHOWN_CONTEXTS = (2048, 8192, 32768)  # whose memory is told beside that of a model's longest


class Sized(Protocol):
    """A tensor of a file, or one that goes into it."""

    @property
    def size(self) -> int:
        """In bytes."""


@dataclass(frozen=True)
class ContextCost:
    """Bytes of device memory that a context of so many positions takes, and of what.

    scratch: activations and rotary tables. total: of all three.
    """

    context: int
    weights: int
    kv_cache: int
    scratch: int
    total: int


def weight_bytes(program: Program, tensors: Mapping[str, Sized], family: str) -> int:
    """Bytes of the tensors that a device of the family reads, its kernels' code not counted."""
    return sum(tensors[name].size for name in program.plans[family].tensors(program.ropes))


def context_bytes(program: Program, context: int) -> int:
    """Bytes that a context takes: its KV cache and its rotary tables. Layers with a window take no more beyond it."""
    return program.kv_bytes(context) + context * sum(4 * rope.rotary_dim for rope in program.ropes.values())


def needed_bytes(program: Program, tensors: Mapping[str, Sized], family: str, context: int) -> int:
    """Bytes of device memory for weights, activations and a KV cache of one slot of `context` positions."""
    fixed = weight_bytes(program, tensors, family) + program.plans[family].arena_bytes
    return fixed + context_bytes(program, context)


def largest_context(program: Program, tensors: Mapping[str, Sized], family: str, available_bytes: int) -> int:
    """Most positions that fit in available_bytes, at most the program's max_context; 0 where none fits."""
    rest = available_bytes - needed_bytes(program, tensors, family, 0)
    if rest <= 0:
        return 0
    lengths = range(program.max_context + 1)
    return bisect.bisect_right(lengths, rest, key=lambda context: context_bytes(program, context)) - 1


def context_costs(program: Program, tensors: Mapping[str, Sized], family: str) -> list[ContextCost]:
    """What a family needs at a context of 2k, 8k and 32k, as far as the program has them, and at its longest."""
    weights = weight_bytes(program, tensors, family)
    rows = []
    for context in sorted({min(context, program.max_context) for context in (*SHOWN_CONTEXTS, program.max_context)}):
        kv_cache = program.kv_bytes(context)
        scratch = program.plans[family].arena_bytes + context_bytes(program, context) - kv_cache
        rows.append(ContextCost(context, weights, kv_cache, scratch, weights + kv_cache + scratch))
    return rows


def free_cpu_bytes() -> int | None:
    """Memory that this process can have without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    # A container's own limit. Its count includes cached files, which the kernel gives up when asked.
    with contextlib.suppress(OSError, ValueError, KeyError):  # no limit is spelled "max"
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.current") as file:
            used = int(file.read())
        with open("/sys/fs/cgroup/memory.stat") as lines:
            used -= int(dict(line.split() for line in lines)["inactive_file"])
        free = min(free, limit - used)
    return max(free, 0)
