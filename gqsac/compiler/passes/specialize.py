"""Specialize: turns each operator into kernel calls, all of their numbers stamped into a KernelSpec.

A call still names storages; plan_memory gives them addresses. Every operator is specialised for one token (decode) and
for tiles of TOKEN_TILE tokens (prefill and scoring), on CUDA also for a few tokens.
"""

from dataclasses import dataclass

from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import TILE
from gqsa_runtime.operators import (
    CHOOSE_PARTIAL,
    CHOOSE_SLICE,
    FUSED_TOKENS,
    MATMUL_TOKENS,
    MOST_CHOICES,
    OPERATORS,
    partials_elements,
    state_elements,
    tokens_held,
)
from gqsa_runtime.program import Argument

from gqsac.compiler import ir
from gqsac.compiler.cuda_launch import splits_of
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.measure_linears import StoredParts
from gqsac.compiler.passes.pack import Packing

TOKEN_TILE = 8  # tokens that share one pass over the weights: eight f32 accumulators a lane

# Storages beside those of the graph's values, filled or read by the runtime. "last": the last token's hidden state.
RESERVED = ("tokens", "targets", "state", "logits", "log_probs", "argmax", "last")

NULL = Argument("null")


@dataclass(frozen=True)
class Storage:
    """Memory that kernels point into. dtype: key of program.DTYPE_BYTES. per_token, fixed: its elements.

    lasting: what it holds between launches matters. scored: only tokens whose logits are made have elements.
    """

    dtype: str
    per_token: int = 0
    fixed: int = 0
    lasting: bool = False
    scored: bool = False

    def elements(self, n_tokens: int) -> int:
        """How many elements it has where launches hold up to n_tokens."""
        return self.fixed + self.per_token * n_tokens


@dataclass(frozen=True)
class ValueRef:
    """Where a kernel points to: a storage, and the first element in it."""

    storage: str
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel launch; args in the order of OPERATORS[spec.op].operands."""

    spec: KernelSpec
    args: tuple[ValueRef | Argument, ...]


@dataclass(frozen=True)
class Calls:
    """The calls of each phase of program.PHASES, in order, and every storage that they name."""

    phases: dict[str, tuple[Call, ...]]
    storages: dict[str, Storage]


def specialize(
    graph: ir.Graph,
    packing: Packing,
    stored_parts: StoredParts,
    family: str,
    kv_dtype: str = "f16",
    exact: bool = False,
) -> Calls:
    """Calls for the phases of gqsa_runtime.program.PHASES.

    family: "cuda" or "cpu". kv_dtype: of gqsa_runtime.kv_cache.KV_ELEMENTS. exact: products are of f32 activations.
    """
    body, head = graph.ops[:-1], graph.ops[-1]
    # Decode never runs between the phases that pass on a prefill's values: it has storages of its own, which may lie
    # where a prefill's do. So have a few tokens, but for what the head takes from either.
    decode, prefill, few = (_resolve_slices(body, prefix) for prefix in ("decode.", "", "few."))
    few = {value: prefill[head.x] if ref == few[head.x] else ref for value, ref in few.items()}
    hidden_width = next(ir.width(op) for op in body if op.output == prefill[head.x].storage)
    storages = {
        "tokens": Storage("i32", per_token=1),
        "targets": Storage("i32", per_token=1, scored=True),
        "state": Storage("i32", per_token=state_elements(1) - state_elements(0), fixed=state_elements(0)),
        "logits": Storage("f32", per_token=graph.vocab_size, scored=True),
        "log_probs": Storage("f32", per_token=1, scored=True),
        "argmax": Storage("i32", per_token=1, scored=True),
        "last": Storage("f32", per_token=0, fixed=hidden_width),
    }
    for views in (decode, prefill, few):
        for op in body:
            if not isinstance(op, ir.Slice):
                storages[views[op.output].storage] = Storage("f32", per_token=ir.width(op))

    def lower(ops, tokens: int, views: dict[str, ValueRef], scratch: str = "", **renamed: ValueRef) -> tuple[Call, ...]:
        views = views | {graph.logits: ValueRef("logits")} | renamed
        specializer = _Specializer(
            graph, packing, stored_parts, kv_dtype, exact, family, views, storages, tokens, scratch
        )
        return tuple(call for op in ops for call in specializer.calls(op))

    last_row = Call(
        KernelSpec.make("last_row", width=hidden_width, x_stride=hidden_width),
        (prefill[head.x], ValueRef("last"), ValueRef("state")),
    )
    log_probs = Call(
        KernelSpec.make("log_probs", tokens=TOKEN_TILE, vocab=graph.vocab_size, x_stride=graph.vocab_size),
        tuple(ValueRef(name) for name in ("logits", "targets", "log_probs", "argmax", "state")),
    )
    choose: tuple[Call, ...] = ()  # where the vocabulary is too large, the host chooses
    if graph.vocab_size <= MOST_CHOICES:
        storages["choose.partials"] = Storage("i32", fixed=-(-graph.vocab_size // CHOOSE_SLICE) * CHOOSE_PARTIAL)
        storages["choose.counters"] = Storage("i32", fixed=1, lasting=True)
        args = ("logits", "choose.partials", "choose.counters", "argmax", "state")
        choose = (Call(KernelSpec.make("choose", vocab=graph.vocab_size), tuple(map(ValueRef, args))),)
    phases = {
        "decode": (*lower(graph.ops, 1, decode, "decode."), *choose),
        "prefill_body": lower(body, TOKEN_TILE, prefill),
        "few_body": lower(body, FUSED_TOKENS if family == "cuda" else TOKEN_TILE, few, "few."),
        "last_logits": (last_row, *lower([head], 1, prefill, **{head.x: ValueRef("last")}), *choose),
        "all_log_probs": (*lower([head], TOKEN_TILE, prefill), log_probs),
    }
    return Calls(phases, storages)


def _resolve_slices(ops: tuple[ir.Op, ...], prefix: str) -> dict[str, ValueRef]:
    """Every value as a place in the storage of the operator that computes it, whose name begins with the prefix."""
    views: dict[str, ValueRef] = {}
    for op in ops:
        if isinstance(op, ir.Slice):
            base = views[op.x]
            views[op.output] = ValueRef(base.storage, base.offset + op.start)
        else:
            views[op.output] = ValueRef(prefix + op.output)
    return views


class _Specializer:
    def __init__(self, graph, packing, stored_parts, kv_dtype, exact, family, views, storages, tokens, scratch):
        self.graph: ir.Graph = graph
        self.packing: Packing = packing
        self.stored_parts: StoredParts = stored_parts
        self.kv_dtype: str = kv_dtype
        self.exact: bool = exact
        self.views: dict[str, ValueRef] = views
        self.family: str = family
        self.storages: dict[str, Storage] = storages
        self.tokens: int = tokens
        self.scratch: str = scratch  # what the names of storages between two calls of one operator begin with

    def stride(self, value: str) -> int:
        """Elements from row to row."""
        return self.storages[self.views[value].storage].elements(1)

    def call(self, operator: str, args, **params) -> Call:
        spec = KernelSpec.make(operator, **{"tokens": self.tokens, **params})
        resolved = tuple(self.views[arg] if isinstance(arg, str) else arg for arg in args)
        return Call(spec, (*resolved, ValueRef("state")))

    def calls(self, op: ir.Op) -> list[Call]:
        match op:
            case ir.Slice():
                return []
            case ir.Embedding():
                return [self.embedding(op)]
            case ir.RMSNorm():
                return [self.rms_norm(op)]
            case ir.LayerNorm():
                return [self.layer_norm(op)]
            case ir.Linear():
                return self.linear(op)
            case ir.Attention():
                return self.attention(op)
            case ir.GatedActivation():
                return [self.gated_activation(op)]
            case ir.Elementwise():
                return [self.elementwise(op)]
        raise TypeError(f"{op.name}: no kernel for {type(op).__name__}")

    def embedding(self, op: ir.Embedding) -> Call:
        tensors = [Argument("tensor", name) for name in self.packing.tables[op.table]]
        args = (ValueRef("tokens"), *tensors, op.output)
        if op.table in self.stored_parts.tables:
            return self.call(
                "embedding_records", args, rows=op.rows, k=op.width, scale=float(op.scale),
                out_stride=self.stride(op.output), **self.stored_parts.tables[op.table].constants,
            )  # fmt: skip
        return self.call(
            "embedding", args, width=op.width, vocab=op.rows, source=op.source, scale=float(op.scale),
            position_offset=op.position_offset, out_stride=self.stride(op.output),
        )  # fmt: skip

    def rms_norm(self, op: ir.RMSNorm) -> Call:
        args = (op.x, Argument("tensor", self.packing.vectors[op.weight]), op.output)
        return self.call(
            "rms_norm", args, width=op.width, heads=op.heads, eps=float(op.eps),
            x_stride=self.stride(op.x), out_stride=self.stride(op.output),
        )  # fmt: skip

    def layer_norm(self, op: ir.LayerNorm) -> Call:
        weight = Argument("tensor", self.packing.vectors[op.weight])
        bias = Argument("tensor", self.packing.vectors[op.bias or f"{op.output}.no_bias"])
        return self.call(
            "layer_norm", (op.x, weight, bias, op.output), width=op.width, eps=float(op.eps),
            x_stride=self.stride(op.x), out_stride=self.stride(op.output),
        )  # fmt: skip

    def linear(self, op: ir.Linear) -> list[Call]:
        if self.stored_parts.linears[op.output][0].layout is RECORDS:
            return self.linear_records(op)
        names = self.packing.linears[op.output]
        shape = {
            "rows": op.width,
            "k": op.k,
            "x_stride": self.stride(op.x),
            "out_stride": self.stride(op.output),
        }
        bias = Argument("tensor", names.bias) if names.bias else NULL
        epilogue = {
            "bias": names.bias is not None,
            "activation": op.activation,
            "residual": op.residual is not None,
            "residual_stride": self.stride(op.residual) if op.residual else 0,
        }
        residual = op.residual if op.residual else NULL
        # Addends add up in the output; only the last one applies the epilogue.
        no_epilogue = {"bias": False, "activation": "none", "residual": False, "residual_stride": 0}
        parts = self.stored_parts.linears[op.output]
        calls = []
        for index, (tensors, part) in enumerate(zip(names.parts, parts, strict=True)):
            last = index == len(parts) - 1
            weights = [Argument("tensor", tensor) for tensor in tensors]
            args = (op.x, *weights, bias if last else NULL, residual if last else NULL, op.output)
            constants = {**shape, **(epilogue if last else no_epilogue), **part.constants}
            calls.append(self.call(part.layout.op, args, **constants))
        return calls

    def linear_records(self, op: ir.Linear) -> list[Call]:
        """One token, on CUDA a few, is normalised and quantised by the kernel itself; several are by a call of their
        own, on CUDA to halves in place of integers."""
        names, constants = self.packing.linears[op.output], self.stored_parts.linears[op.output][0].constants
        norm = {"norm": "none", "eps": 0.0}
        weight = bias = NULL
        if op.norm is not None:
            weight = Argument("tensor", self.packing.vectors[op.norm.weight])
            norm = {"norm": "rms", "eps": float(op.norm.eps)}
            if isinstance(op.norm, ir.LayerNorm):
                norm["norm"] = "layer"
                bias = Argument("tensor", self.packing.vectors[op.norm.bias or f"{op.norm.output}.no_bias"])
        own = (
            *(Argument("tensor", name) for name in names.parts[0]),
            Argument("tensor", names.bias) if names.bias else NULL,
            op.residual if op.residual else NULL,
            op.output,
        )
        constants = {
            "rows": op.n_rows,
            "k": op.k,
            "out_stride": self.stride(op.output),
            "out_width": op.width,
            "bias": names.bias is not None,
            "activation": op.activation,
            "residual": op.residual is not None,
            "residual_stride": self.stride(op.residual) if op.residual else 0,
            "epilogue": "gated" if op.gated else "rows",
            **constants,
        }
        x = {"x_stride": self.stride(op.x), **norm}
        if self.tokens <= FUSED_TOKENS:
            return [self.call("linear_records", (op.x, NULL, NULL, weight, bias, *own), **x, **constants)]
        if self.family == "cuda":
            made = (
                self.between(op, "halves", Storage("f16", per_token=op.k)),
                self.between(op, "scales", Storage("f32", per_token=1)),
            )
            return [
                self.call("halves", (op.x, weight, bias, *made), k=op.k, **x),
                self.call("matmul_records", (*made, *own), **{**constants, "tokens": MATMUL_TOKENS}),
            ]
        made = (
            self.between(op, "planes", Storage("i8", per_token=2 * op.k)),
            self.between(op, "ranges", Storage("f32", per_token=op.k // TILE * 2)),
        )
        return [
            self.call("quantize", (op.x, weight, bias, *made), k=op.k, **x),
            self.call("linear_records", (NULL, *made, NULL, NULL, *own), **x, **constants),
        ]

    def between(self, op: ir.Op, name: str, storage: Storage) -> ValueRef:
        """What one call of an operator leaves for the next."""
        name = f"{self.scratch}{op.output}.{name}"
        self.storages[name] = storage
        return ValueRef(name)

    def attention(self, op: ir.Attention) -> list[Call]:
        heads = {
            "heads": op.heads,
            "kv_heads": op.kv_heads,
            "head_dim": op.head_dim,
            "kv_dtype": self.kv_dtype,
            "window": op.window,
        }
        caches = (Argument("k_cache", op.layer), Argument("v_cache", op.layer))
        rope = Argument("rope", op.rope) if op.rope is not None else NULL
        rotary_dim = self.graph.ropes[op.rope].rotary_dim if op.rope is not None else 0
        in_halves = self.family == "cuda" and self.kv_dtype != "f32"
        if in_halves and self.tokens <= FUSED_TOKENS and OPERATORS["append_attention"].check(heads) is None:
            return [self.append_attention(op, rope, caches, rotary_dim, heads)]
        q_stride = self.stride(op.q)
        append = self.call(
            "kv_append", (op.q, op.k, op.v, rope, *caches), rotary_dim=rotary_dim, q_stride=q_stride,
            k_stride=self.stride(op.k), v_stride=self.stride(op.v), **heads,
        )  # fmt: skip
        in_halves &= self.tokens > 1 and not self.exact and OPERATORS["attention_halves"].check(heads) is None
        attend = self.call(
            "attention_halves" if in_halves else "attention", (op.q, *caches, op.output), scale=float(op.scale),
            q_stride=q_stride, out_stride=self.stride(op.output), **heads,
        )  # fmt: skip
        return [append, attend]

    def append_attention(self, op: ir.Attention, rope, caches, rotary_dim: int, heads: dict) -> Call:
        """All of it in one launch, its runs of the context side by side."""
        params = {
            **heads, "tokens": self.tokens, "rotary_dim": rotary_dim, "scale": float(op.scale),
            "splits": splits_of(op.heads, op.kv_heads), "q_stride": self.stride(op.q), "k_stride": self.stride(op.k),
            "v_stride": self.stride(op.v), "out_stride": self.stride(op.output),
        }  # fmt: skip
        # All layers share the scratch: they run one after another, and each leaves its counters at 0.
        partials, counters = f"{self.scratch}partials", f"{self.scratch}counters"
        for name, storage in (
            (partials, Storage("f32", fixed=partials_elements(params))),
            (counters, Storage("i32", fixed=tokens_held(params) * op.heads, lasting=True)),
        ):
            self.storages[name] = max(self.storages.get(name, storage), storage, key=lambda storage: storage.fixed)
        scratch = ValueRef(partials), ValueRef(counters)
        return self.call("append_attention", (op.q, op.k, op.v, rope, *caches, *scratch, op.output), **params)

    def gated_activation(self, op: ir.GatedActivation) -> Call:
        return self.call(
            "gated_activation", (op.gate, op.up, op.output), width=op.width, activation=op.activation,
            gate_stride=self.stride(op.gate), up_stride=self.stride(op.up), out_stride=self.stride(op.output),
        )  # fmt: skip

    def elementwise(self, op: ir.Elementwise) -> Call:
        args = (op.a, op.b if op.b else NULL, op.output)
        return self.call(
            "elementwise", args, width=op.width, function=op.function, scalar=float(op.scalar),
            a_stride=self.stride(op.a), b_stride=self.stride(op.b) if op.b else 0, out_stride=self.stride(op.output),
        )  # fmt: skip
