"""Specialize: turns each operator into a kernel launch, all of its numbers stamped into a KernelSpec.

A launch still names IR values; plan_memory gives them addresses. Every operator is specialised
twice: for one token (decode) and for tiles of TOKEN_TILE tokens (prefill and scoring).
"""

from dataclasses import dataclass

from gqsa_runtime.program import Argument

from gqsac.compiler import ir
from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.passes.group_patterns import Patterns
from gqsac.compiler.passes.pack import Packing

TOKEN_TILE = 8  # tokens that share one pass over the weights: eight f32 accumulators a lane

# Values beside the graph's own, filled or read by the runtime. "last": the last token's hidden state.
RESERVED = ("tokens", "targets", "state", "logits", "log_probs", "argmax", "last")

NULL = Argument("null")


@dataclass(frozen=True)
class ValueRef:
    """An f32 row-per-token value, or a reserved buffer, that a kernel points to.

    storage: the value that owns the memory. offset: first column, in elements.
    """

    storage: str
    offset: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch; args in the order of OPERATORS[spec.op].operands. writes: storage it defines."""

    spec: KernelSpec
    args: tuple[ValueRef | Argument, ...]
    writes: str


@dataclass(frozen=True)
class Launches:
    """Launches of each phase, and the width (row stride) of each storage in elements."""

    phases: dict[str, tuple[Launch, ...]]
    widths: dict[str, int]


def specialize(graph: ir.Graph, packing: Packing, patterns: Patterns, kv_dtype: str) -> Launches:
    """Launches for the four phases of gqsa_runtime.program.PHASES. kv_dtype: "f16" or "f32"."""
    views = _resolve_slices(graph)
    widths = {op.output: ir.width(op) for op in graph.ops if not isinstance(op, ir.Slice)}
    head = graph.ops[-1]
    hidden_width = widths[views[head.x].storage]
    widths |= {"last": hidden_width, "logits": graph.vocab_size}

    def lower(ops, tokens: int, **renamed: ValueRef) -> tuple[Launch, ...]:
        specializer = _Specializer(graph, packing, patterns, kv_dtype, views | renamed, widths, tokens)
        return tuple(launch for op in ops for launch in specializer.launches(op))

    logits = {graph.logits: ValueRef("logits")}
    hidden = views[head.x]
    last_row = Launch(
        KernelSpec.make("last_row", width=hidden_width, x_stride=hidden_width),
        (hidden, ValueRef("last"), ValueRef("state")),
        "last",
    )
    log_probs = Launch(
        KernelSpec.make("log_probs", tokens=TOKEN_TILE, vocab=graph.vocab_size, x_stride=graph.vocab_size),
        tuple(ValueRef(name) for name in ("logits", "targets", "log_probs", "argmax", "state")),
        "log_probs",
    )
    body = graph.ops[:-1]
    phases = {
        "decode": lower(graph.ops, 1, **logits),
        "prefill_body": lower(body, TOKEN_TILE),
        "last_logits": (last_row, *lower([head], 1, **logits, **{head.x: ValueRef("last")})),
        "all_log_probs": (*lower([head], TOKEN_TILE, **logits), log_probs),
    }
    widths.pop(graph.logits)
    return Launches(phases, widths)


def _resolve_slices(graph: ir.Graph) -> dict[str, ValueRef]:
    """Every value as a place in the storage of the operator that computes it."""
    views: dict[str, ValueRef] = {}
    for op in graph.ops:
        if isinstance(op, ir.Slice):
            base = views[op.x]
            views[op.output] = ValueRef(base.storage, base.offset + op.start)
        else:
            views[op.output] = ValueRef(op.output)
    return views


class _Specializer:
    def __init__(self, graph, packing, patterns, kv_dtype, views, widths, tokens):
        self.graph: ir.Graph = graph
        self.packing: Packing = packing
        self.patterns: Patterns = patterns
        self.kv_dtype: str = kv_dtype
        self.views: dict[str, ValueRef] = views
        self.widths: dict[str, int] = widths
        self.tokens: int = tokens

    def stride(self, value: str) -> int:
        return self.widths[self.views[value].storage]

    def launch(self, op: ir.Op, operator: str, args, **params) -> Launch:
        out = self.views[op.output]
        spec = KernelSpec.make(operator, tokens=self.tokens, **params)
        resolved = tuple(self.views[arg] if isinstance(arg, str) else arg for arg in args)
        return Launch(spec, (*resolved, ValueRef("state")), out.storage)

    def launches(self, op: ir.Op) -> list[Launch]:
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

    def embedding(self, op: ir.Embedding) -> Launch:
        args = (ValueRef("tokens"), Argument("tensor", self.packing.tables[op.table]), op.output)
        return self.launch(
            op, "embedding", args, width=op.width, vocab=op.rows, source=op.source, scale=float(op.scale),
            position_offset=op.position_offset, accumulate=False, out_stride=self.stride(op.output),
        )  # fmt: skip

    def rms_norm(self, op: ir.RMSNorm) -> Launch:
        args = (op.x, Argument("tensor", self.packing.vectors[op.weight]), op.output)
        return self.launch(
            op, "rms_norm", args, width=op.width, heads=op.heads, eps=float(op.eps),
            x_stride=self.stride(op.x), out_stride=self.stride(op.output),
        )  # fmt: skip

    def layer_norm(self, op: ir.LayerNorm) -> Launch:
        weight = Argument("tensor", self.packing.vectors[op.weight])
        bias = Argument("tensor", self.packing.vectors[op.bias or f"{op.output}.no_bias"])
        return self.launch(
            op, "layer_norm", (op.x, weight, bias, op.output), width=op.width, eps=float(op.eps),
            x_stride=self.stride(op.x), out_stride=self.stride(op.output),
        )  # fmt: skip

    def linear(self, op: ir.Linear) -> list[Launch]:
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
        parts = self.patterns.linears[op.output]
        launches = []
        for index, (tensors, part) in enumerate(zip(names.parts, parts, strict=True)):
            last = index == len(parts) - 1
            weights = [Argument("tensor", tensor) for tensor in tensors]
            args = (op.x, *weights, bias if last else NULL, residual if last else NULL, op.output)
            constants = {**shape, **(epilogue if last else no_epilogue), **part.constants}
            launches.append(self.launch(op, part.layout.op, args, **constants))
        return launches

    def attention(self, op: ir.Attention) -> list[Launch]:
        heads = {"heads": op.heads, "kv_heads": op.kv_heads, "head_dim": op.head_dim, "kv_dtype": self.kv_dtype}
        caches = (Argument("k_cache", op.layer), Argument("v_cache", op.layer))
        rope = Argument("rope", op.rope) if op.rope is not None else NULL
        rotary_dim = self.graph.ropes[op.rope].rotary_dim if op.rope is not None else 0
        q_stride = self.stride(op.q)
        append = self.launch(
            op, "kv_append", (op.q, op.k, op.v, rope, *caches), rotary_dim=rotary_dim, q_stride=q_stride,
            k_stride=self.stride(op.k), v_stride=self.stride(op.v), **heads,
        )  # fmt: skip
        attend = self.launch(
            op, "attention", (op.q, *caches, op.output), scale=float(op.scale), window=op.window,
            q_stride=q_stride, out_stride=self.stride(op.output), **heads,
        )  # fmt: skip
        # kv_append defines no activation of its own: it rotates q in place.
        return [Launch(append.spec, append.args, self.views[op.q].storage), attend]

    def gated_activation(self, op: ir.GatedActivation) -> Launch:
        return self.launch(
            op, "gated_activation", (op.gate, op.up, op.output), width=op.width, activation=op.activation,
            gate_stride=self.stride(op.gate), up_stride=self.stride(op.up), out_stride=self.stride(op.output),
        )  # fmt: skip

    def elementwise(self, op: ir.Elementwise) -> Launch:
        args = (op.a, op.b if op.b else NULL, op.output)
        return self.launch(
            op, "elementwise", args, width=op.width, function=op.function, scalar=float(op.scalar),
            a_stride=self.stride(op.a), b_stride=self.stride(op.b) if op.b else 0, out_stride=self.stride(op.output),
        )  # fmt: skip
