"""The launch plans inside a .gqsa file, one for each family of targets: buffers, kernels and, per phase, the
steps to launch.

Every activation is f32 `[n_tokens, width]`, a row per token, stored with a row stride that is a
constant of the kernel. A kernel takes only pointers; all numbers are stamped into its code, except
`state` = i32 [8 + 2 * n] {n_tokens, context, draw, slot and position of each token}: how many tokens this
launch holds, how many positions a slot of the KV cache has, how the next token is chosen (`sampling.py`), and
where in the cache each token belongs. A slot holds one sequence; the tokens of a launch may be of any slots.
`operators.OPERATORS` gives each operator's operands in order, and `validate` checks every argument of every step
against it, so that no kernel can be pointed outside its memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from gqsa_runtime.errors import FormatError
from gqsa_runtime.format import MAX_PROGRAM_CHARACTERS, canonical_json
from gqsa_runtime.kv_cache import KV_ELEMENTS, row_elements, slot_rows

NUMPY_DTYPES = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "i16": np.int16, "i8": np.int8}
DTYPE_BYTES = {"f32": 4, "f16": 2, "i32": 4, "i16": 2, "i8": 1}

# Phases: prefill_body then last_logits make a prompt's next-token logits; prefill_body then
# all_log_probs score a text; few_body is in the place of prefill_body for operators.FEW_TOKENS or fewer; decode is one
# token from embedding to logits.
PHASES = ("decode", "prefill_body", "few_body", "last_logits", "all_log_probs")

# Kind of binary -> family of its target. The targets of a family share a plan.
FAMILIES = {"cubin": "cuda", "ptx": "cuda", "shared_object": "cpu"}


# Where a device holds something: (kind of an argument, its name).
Place = tuple[str, str | int | None]


@dataclass(frozen=True)
class Argument:
    """Where a kernel's pointer points. kind: "buffer", "tensor", "k_cache", "v_cache", "rope", "null".

    name: of the buffer or tensor, the layer number for caches, the rope table's name.
    offset: in elements, buffers only.
    """

    kind: str
    name: str | int | None = None
    offset: int = 0

    @property
    def named(self) -> str:
        """The name of a buffer, tensor or rotary table, in a plan that was validated."""
        assert isinstance(self.name, str)
        return self.name


@dataclass(frozen=True)
class Buffer:
    """Activation memory: `elements` of dtype at byte `offset` of the activation arena."""

    name: str
    dtype: str
    elements: int
    offset: int


@dataclass(frozen=True)
class Launch:
    """How CUDA launches a kernel: grid (x, y, z) in blocks, block in threads, dynamic shared memory in bytes."""

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its operator and the constants stamped into it.

    launches: target -> how it is launched there; "" stands for all targets that are not named. CUDA only.
    """

    name: str
    op: str
    params: dict[str, Any]
    launches: dict[str, Launch]

    def launch(self, target: str) -> Launch:
        """How a CUDA target launches it."""
        return self.launches.get(target, self.launches[""])


@dataclass(frozen=True)
class Step:
    """One kernel launch; args in the order of OPERATORS[kernel.op].operands."""

    kernel: str
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class KVLayer:
    """The KV cache of one attention layer: k and v are each [slots, slot_rows(window, context)] rows, see kv_cache.py.

    window: how many positions a token sees, itself among them; 0: all.
    """

    kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True)
class Rope:
    """A rotary table that the runtime fills at open: scaling * cos/sin(position * inv_freq), in f32.

    A sequence of more than original_context tokens has long_inv_freq at all of its positions (longrope), where it is
    not None.
    """

    inv_freq: str  # tensor name, f32 [rotary_dim / 2]
    rotary_dim: int
    scaling: float
    long_inv_freq: str | None = None
    original_context: int | None = None

    @property
    def tensors(self) -> set[str]:
        """Names of its tensors of frequencies."""
        return {name for name in (self.inv_freq, self.long_inv_freq) if name is not None}


@dataclass(frozen=True)
class Binary:
    """The compiled kernels of one target, one behind another, compressed (`machine_code.py`) in one I8 tensor.

    kind: "cubin" (target sm_XX), "ptx" (target compute_XX) or "shared_object" (target x86_64_v3, …).
    n_bytes, sha256: of the code, not compressed; the digest in hexadecimal digits.
    kernels: kernel name -> (offset, size) in bytes of the code. A shared object holds all kernels: key "".
    """

    target: str
    kind: str
    tensor: str
    n_bytes: int
    sha256: str
    kernels: dict[str, tuple[int, int]]

    @property
    def family(self) -> str:
        """Key of Program.plans."""
        return FAMILIES[self.kind]


@dataclass(frozen=True)
class Plan:
    """What the targets of one family run. phases: those of PHASES, each with its steps in order.

    prefill_chunk: most tokens in one launch. score_chunk: most of a launch that all_log_probs follows, whose logits
    are all held.
    """

    prefill_chunk: int
    score_chunk: int
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    kernels: tuple[Kernel, ...]
    phases: dict[str, tuple[Step, ...]]

    def steps(self) -> Iterator[Step]:
        """The steps of all phases."""
        return itertools.chain.from_iterable(self.phases.values())

    @cached_property
    def chooses(self) -> bool:
        """Whether decode and last_logits end by leaving the next token in argmax[0], or -1 (operator choose)."""
        operators = {kernel.name: kernel.op for kernel in self.kernels}
        ends = [self.phases[phase][-1:] for phase in ("decode", "last_logits")]
        return all(operators[step.kernel] == "choose" for steps in ends for step in steps) and all(ends)

    def tensors(self, ropes: Mapping[str, Rope]) -> set[str]:
        """Names of the tensors that a device reads: those of the steps, and the frequencies of the rotary tables."""
        named = {arg.named for step in self.steps() for arg in step.args if arg.kind == "tensor"}
        return named.union(*(rope.tensors for rope in ropes.values()))

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> Plan:
        """From parsed JSON."""
        return cls(
            prefill_chunk=raw["prefill_chunk"],
            score_chunk=raw["score_chunk"],
            buffers=tuple(Buffer(**buffer) for buffer in raw["buffers"]),
            arena_bytes=raw["arena_bytes"],
            kernels=tuple(_kernel(kernel) for kernel in raw["kernels"]),
            phases={phase: tuple(map(_step, steps)) for phase, steps in raw["phases"].items()},
        )


def _kernel(raw: dict[str, Any]) -> Kernel:
    launches = {
        target: Launch(**{**launch, "grid": tuple(launch["grid"])}) for target, launch in raw["launches"].items()
    }
    return Kernel(**{**raw, "launches": launches})


def _step(raw: dict[str, Any]) -> Step:
    return Step(raw["kernel"], tuple(Argument(**arg) for arg in raw["args"]))


@dataclass(frozen=True)
class Program:
    """All that the runtime needs beside weights and tokenizer. plans: by family, "cuda" and "cpu"."""

    name: str  # of the model, for people
    model_class: str  # Hugging Face architecture, for people
    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kv_dtype: str  # of kv_cache.KV_ELEMENTS
    kv_layers: tuple[KVLayer, ...]
    ropes: dict[str, Rope]
    plans: dict[str, Plan]
    binaries: tuple[Binary, ...] = ()

    @property
    def kv_element(self) -> str:
        """dtype of the KV caches' elements."""
        return KV_ELEMENTS[self.kv_dtype]

    def kv_row(self, layer: int) -> int:
        """Elements of a row of a layer's k or v cache."""
        return row_elements(self.kv_dtype, self.kv_layers[layer].kv_heads, self.kv_layers[layer].head_dim)

    def kv_row_bytes(self, layer: int) -> int:
        """Bytes of such a row."""
        return self.kv_row(layer) * DTYPE_BYTES[self.kv_element]

    def slot_rows(self, layer: int, context: int) -> int:
        """Rows of a slot of a layer's k or v cache."""
        return slot_rows(self.kv_layers[layer].window, context)

    def kv_bytes(self, context: int) -> int:
        """Bytes of KV cache that a slot takes over all layers."""
        layers = range(len(self.kv_layers))
        return sum(2 * self.kv_row_bytes(layer) * self.slot_rows(layer, context) for layer in layers)

    def to_json(self) -> str:
        """Canonical JSON: the same program always gives the same bytes."""
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Parses what to_json wrote. Raises FormatError where the text has another shape."""
        if len(text) > MAX_PROGRAM_CHARACTERS:
            raise FormatError(
                f"the file's program has {len(text)} characters, expected at most {MAX_PROGRAM_CHARACTERS}; "
                "rebuild the file with `gqsac build`"
            )
        try:
            raw = json.loads(text)
            return cls(
                **{
                    **raw,
                    "eos_token_ids": tuple(raw["eos_token_ids"]),
                    "kv_layers": tuple(KVLayer(**layer) for layer in raw["kv_layers"]),
                    "ropes": {name: Rope(**rope) for name, rope in raw["ropes"].items()},
                    "plans": {family: Plan.from_raw(plan) for family, plan in raw["plans"].items()},
                    "binaries": tuple(
                        Binary(**{**b, "kernels": {k: tuple(v) for k, v in b["kernels"].items()}})
                        for b in raw["binaries"]
                    ),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"the file's program is not one that this runtime understands ({error!r}); "
                "rebuild the file with `gqsac build`"
            ) from error
