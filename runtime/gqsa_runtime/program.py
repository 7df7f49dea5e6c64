"""The launch plan inside a .gqsa file: buffers, kernels and, per phase, the steps to launch.

Every activation is f32 `[n_tokens, width]`, a row per token, stored with a row stride that is a
constant of the kernel. A kernel takes only pointers; all numbers are stamped into its code, except
`state` = i32 [2] {n_tokens, position}: how many tokens this launch holds and how many the KV cache
held before it. `OPERATORS` gives each operator's arguments in order, and `validate` checks every
argument of every step against it, so that no kernel can be pointed outside its memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gqsa_runtime.errors import FormatError
from gqsa_runtime.format import canonical_json
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, Layout

DTYPE_BYTES = {"f32": 4, "f16": 2, "i32": 4, "i16": 2, "i8": 1}

# Phases: prefill_body then last_logits make a prompt's next-token logits; prefill_body then
# all_log_probs score a text; decode is one token from embedding to logits.
PHASES = ("decode", "prefill_body", "last_logits", "all_log_probs")

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Parameter:
    """One argument of an operator.

    dtype: of the memory pointed to, or None for `param:NAME`-typed (given by params[NAME]).
    elements: fewest elements the memory must hold, from (params, max_tokens, context).
    access: "in", "out", "inout" or "weight".
    present: whether the argument is non-null for these params.
    """

    name: str
    dtype: str
    elements: Callable[[Mapping, int, int], int]
    access: str = "in"
    present: Callable[[Mapping], bool] = lambda params: True


def _rows(stride: str, width: str, per_token: str | None = None):
    def elements(p, max_tokens, context):
        n_tokens = 1 if p.get("tokens", 1) == 1 else max_tokens
        return (n_tokens - 1) * p[stride] + p[width] * (p[per_token] if per_token else 1)

    return elements


_STATE = Parameter("state", "i32", lambda p, t, c: 2)
_IDS = lambda p, t, c: 1 if p["tokens"] == 1 else t  # noqa: E731
_KV = lambda p, t, c: c * p["kv_heads"] * p["head_dim"]  # noqa: E731


def _head_rows(stride: str, heads: str):
    def elements(p, max_tokens, context):
        n_tokens = 1 if p["tokens"] == 1 else max_tokens
        return (n_tokens - 1) * p[stride] + p[heads] * p["head_dim"]

    return elements


def _linear(layout: Layout, out: str) -> tuple[Parameter, ...]:
    """Arguments of a linear whose weights are stored in a layout. Where the content decides a part's size,
    the reader checks it by `Layout.check_sizes`."""

    def part_elements(name: str):
        return lambda p, max_tokens, context: layout.elements(p, 0)[name]

    weights = (Parameter(part.name, part.dtype, part_elements(part.name), "weight") for part in layout.parts)
    return (
        Parameter("x", "f32", _rows("x_stride", "k")),
        *weights,
        Parameter("bias", "f32", lambda p, t, c: p["rows"], "weight", lambda p: p["bias"]),
        Parameter("residual", "f32", _rows("residual_stride", "rows"), "in", lambda p: p["residual"]),
        Parameter("out", "f32", _rows("out_stride", "rows"), out),
        _STATE,
    )


OPERATORS: dict[str, tuple[Parameter, ...]] = {
    # out[t] (+)= scale * table[ids[t]]  or, for source "positions", table[position + t + position_offset]
    # params: tokens width vocab source position_offset scale accumulate out_stride
    "embedding": (
        Parameter("ids", "i32", _IDS),
        Parameter("table", "f16", lambda p, t, c: p["vocab"] * p["width"], "weight"),
        Parameter("out", "f32", _rows("out_stride", "width"), "out"),
        _STATE,
    ),
    # out[t, h] = x[t, h] / sqrt(mean(x[t, h]^2) + eps) * weight, for h in range(heads) slices of width
    # params: tokens width heads eps x_stride out_stride
    "rms_norm": (
        Parameter("x", "f32", _rows("x_stride", "width", "heads")),
        Parameter("weight", "f32", lambda p, t, c: p["width"], "weight"),
        Parameter("out", "f32", _rows("out_stride", "width", "heads"), "out"),
        _STATE,
    ),
    # params: tokens width eps x_stride out_stride
    "layer_norm": (
        Parameter("x", "f32", _rows("x_stride", "width")),
        Parameter("weight", "f32", lambda p, t, c: p["width"], "weight"),
        Parameter("bias", "f32", lambda p, t, c: p["width"], "weight"),
        Parameter("out", "f32", _rows("out_stride", "width"), "out"),
        _STATE,
    ),
    # s = W x, W stored in the layout; s += out if accumulate; s += bias; s = activation(s); s += residual; out = s
    # params: tokens rows k x_stride out_stride bias activation residual residual_stride, the layout's constants
    "linear_sparse": _linear(GROUP_WORDS, "inout"),
    "linear_dense": _linear(DENSE_F16, "out"),
    # Rotates q in place and k on its way into the cache (rotary_dim 0: no rotation); stores k and v
    # at cache rows position .. position + n_tokens - 1. Pairs are (i, i + rotary_dim / 2).
    # rope: [context, rotary_dim] f32, a row is cos[rotary_dim / 2] then sin[rotary_dim / 2].
    # params: tokens heads kv_heads head_dim rotary_dim kv_dtype q_stride k_stride v_stride
    "kv_append": (
        Parameter("q", "f32", _head_rows("q_stride", "heads"), "inout"),
        Parameter("k", "f32", _head_rows("k_stride", "kv_heads")),
        Parameter("v", "f32", _head_rows("v_stride", "kv_heads")),
        Parameter("rope", "f32", lambda p, t, c: c * p["rotary_dim"], "in", lambda p: p["rotary_dim"] > 0),
        Parameter("k_cache", "param:kv_dtype", _KV, "out"),  # [context, kv_heads, head_dim]
        Parameter("v_cache", "param:kv_dtype", _KV, "out"),
        _STATE,
    ),
    # Causal softmax(scale * q k^T) v over cache rows 0 .. position + t (window > 0: the last window
    # rows only). Head h reads KV head h // (heads / kv_heads).
    # params: tokens heads kv_heads head_dim scale window kv_dtype q_stride out_stride
    "attention": (
        Parameter("q", "f32", _head_rows("q_stride", "heads")),
        Parameter("k_cache", "param:kv_dtype", _KV),
        Parameter("v_cache", "param:kv_dtype", _KV),
        Parameter("out", "f32", _head_rows("out_stride", "heads"), "out"),
        _STATE,
    ),
    # out = activation(gate) * up
    # params: tokens width activation gate_stride up_stride out_stride
    "gated_activation": (
        Parameter("gate", "f32", _rows("gate_stride", "width")),
        Parameter("up", "f32", _rows("up_stride", "width")),
        Parameter("out", "f32", _rows("out_stride", "width"), "out"),
        _STATE,
    ),
    # function "add" a + b, "mul" a * b, "scale" a * scalar, or an activation's name: activation(a)
    # params: tokens width function scalar a_stride b_stride out_stride
    "elementwise": (
        Parameter("a", "f32", _rows("a_stride", "width")),
        Parameter("b", "f32", _rows("b_stride", "width"), "in", lambda p: p["function"] in ("add", "mul")),
        Parameter("out", "f32", _rows("out_stride", "width"), "out"),
        _STATE,
    ),
    # out[0] = x[n_tokens - 1]
    # params: width x_stride
    "last_row": (
        Parameter("x", "f32", lambda p, t, c: (t - 1) * p["x_stride"] + p["width"]),
        Parameter("out", "f32", lambda p, t, c: p["width"], "out"),
        _STATE,
    ),
    # log_probs[t] = log softmax(logits[t])[targets[t]]; argmax[t] = first index of the largest logit
    # params: tokens vocab x_stride
    "log_probs": (
        Parameter("logits", "f32", _rows("x_stride", "vocab")),
        Parameter("targets", "i32", _IDS),
        Parameter("log_probs", "f32", _IDS, "out"),
        Parameter("argmax", "i32", _IDS, "out"),
        _STATE,
    ),
}


@dataclass(frozen=True)
class Argument:
    """Where a kernel's pointer points. kind: "buffer", "tensor", "k_cache", "v_cache", "rope", "null".

    name: of the buffer or tensor, the layer number for caches, the rope table's name.
    offset: in elements, buffers only.
    """

    kind: str
    name: str | int | None = None
    offset: int = 0


@dataclass(frozen=True)
class Buffer:
    """Activation memory: `elements` of dtype at byte `offset` of the activation arena."""

    name: str
    dtype: str
    elements: int
    offset: int


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel: its operator, the constants stamped into it, and how CUDA launches it."""

    name: str
    op: str
    params: dict
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int


@dataclass(frozen=True)
class Step:
    """One kernel launch; args in the order of OPERATORS[kernel.op]."""

    kernel: str
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class KVLayer:
    """The KV cache of one attention layer: k and v are each [context, kv_heads, head_dim]."""

    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Rope:
    """A rotary table that the runtime fills at open: scaling * cos/sin(position * inv_freq), in f32."""

    inv_freq: str  # tensor name, f32 [rotary_dim / 2]
    rotary_dim: int
    scaling: float


@dataclass(frozen=True)
class Binary:
    """The compiled kernels of one target, concatenated in one I8 tensor.

    kind: "cubin" (target sm_XX), "ptx" (target compute_XX) or "shared_object" (target x86_64_v3, …).
    kernels: kernel name -> (offset, size) in bytes. A shared object holds all kernels: key "".
    """

    target: str
    kind: str
    tensor: str
    kernels: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Program:
    """All that the runtime needs beside weights and tokenizer."""

    name: str  # of the model, for people
    model_class: str  # Hugging Face architecture, for people
    vocab_size: int
    max_context: int
    prefill_chunk: int  # most tokens in one launch
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kv_dtype: str  # "f16" or "f32"
    kv_layers: tuple[KVLayer, ...]
    ropes: dict[str, Rope]
    buffers: tuple[Buffer, ...]
    arena_bytes: int
    kernels: tuple[Kernel, ...]
    phases: dict[str, tuple[Step, ...]]
    binaries: tuple[Binary, ...] = ()

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that one position takes over all layers."""
        per_layer = sum(2 * layer.kv_heads * layer.head_dim for layer in self.kv_layers)
        return per_layer * DTYPE_BYTES[self.kv_dtype]

    def to_json(self) -> str:
        """Canonical JSON: the same program always gives the same bytes."""
        return canonical_json(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Program:
        """Parses what to_json wrote. Raises FormatError where the text has another shape."""
        try:
            raw = json.loads(text)
            return cls(
                **{
                    **raw,
                    "eos_token_ids": tuple(raw["eos_token_ids"]),
                    "kv_layers": tuple(KVLayer(**layer) for layer in raw["kv_layers"]),
                    "ropes": {name: Rope(**rope) for name, rope in raw["ropes"].items()},
                    "buffers": tuple(Buffer(**buffer) for buffer in raw["buffers"]),
                    "kernels": tuple(Kernel(**{**k, "grid": tuple(k["grid"])}) for k in raw["kernels"]),
                    "phases": {
                        phase: tuple(
                            Step(step["kernel"], tuple(Argument(**arg) for arg in step["args"])) for step in steps
                        )
                        for phase, steps in raw["phases"].items()
                    },
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
