"""The schema of all operators: what a kernel computes, the constants stamped into it, the pointers it takes.

From here come the signatures of the CUDA kernels and the argument structs of the CPU kernels (when they
are rendered), the reader's checks, and the table of operators in docs/kernels.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gqsa_runtime.constants import COUNT, FLAG, NUMBER, SIZE, Params, Rule, allowed, shown
from gqsa_runtime.kv_cache import KV_ELEMENTS, row_elements, slot_rows
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, RECORDS, Layout
from gqsa_runtime.sampling import DRAW, OCTAVES

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")

# Fewest elements that memory must hold, from (params, max_tokens, context).
Elements = Callable[[Params, int, int], int]

# How the two families of kernels spell the types of memory. CUDA sources include no headers: a half is its bits.
C_TYPES = {
    "cuda": {"f32": "float", "f16": "unsigned short", "i32": "int", "i8": "signed char"},
    "cpu": {"f32": "float", "f16": "_Float16", "i32": "int32_t", "i8": "int8_t"},
}


@dataclass(frozen=True)
class Operand:
    """One pointer that an operator's kernels take.

    dtype: of the memory pointed to, or "kv_dtype" where that constant says what a KV cache holds.
    elements: fewest elements the memory must hold, from (params, max_tokens, context); of a KV cache, those of a slot.
    access: "in", "out", "inout", "weight", or "scratch": what is left there is of no use to anyone.
    present: whether the pointer is non-null for these params.
    """

    name: str
    dtype: str
    elements: Elements
    access: str = "in"
    present: Callable[[Params], bool] = lambda params: True

    def dtype_of(self, params: Params) -> str:
        """The dtype for these constants."""
        return KV_ELEMENTS[str(params["kv_dtype"])] if self.dtype == "kv_dtype" else self.dtype


# In `state`: how the token after the last one is chosen (sampling.DRAW), and where the tokens begin.
STATE_DRAW = slice(2, 2 + DRAW)
STATE_TOKENS = 2 + DRAW


def state_elements(max_tokens: int) -> int:
    """Elements of `state`, i32: {n_tokens, context, draw [6]}, then {slot, position} of each token."""
    return STATE_TOKENS + 2 * max_tokens


MOST_CHOICES = (1 << 20) - 1  # tokens of a vocabulary that `choose` can choose from: its integers leave so many bits
CHOOSE_SLICE = 2048  # logits that a block of `choose` counts
# i32 that each block of `choose` hands over: its largest logit, where that is, its octave; a u64 an octave; its tokens.
CHOOSE_PARTIAL = 4 + 2 * OCTAVES + CHOOSE_SLICE


def _rows(stride: str, width: str, per_token: str | None = None) -> Elements:
    def elements(p: Params, max_tokens: int, context: int) -> int:
        n_tokens = 1 if p.get("tokens", 1) == 1 else max_tokens
        return int((n_tokens - 1) * p[stride] + p[width] * (p[per_token] if per_token else 1))

    return elements


@dataclass(frozen=True)
class Operator:
    """description: the formula, for people. constants: name -> what it must be. operands: in order.

    check: what is wrong with constants that are each in their range, or None. layout: of a linear's weights.
    families: whose kernels there are.
    """

    description: str
    constants: Mapping[str, Rule]
    operands: tuple[Operand, ...]
    check: Callable[[Params], str | None] = lambda params: None
    layout: Layout | None = None
    families: tuple[str, ...] = ("cuda", "cpu")

    def pointers(self, family: str, params: Params) -> list[tuple[str, str]]:
        """(C type of the pointee, name) of each operand for the templates of a family, "cuda" or "cpu"."""
        return [
            ("const " * (o.access in ("in", "weight")) + C_TYPES[family][o.dtype_of(params)], o.name)
            for o in self.operands
        ]


def families_of(op: str, params: Params) -> tuple[str, ...]:
    """Whose targets have a kernel of operator `op` with these constants, which may be wrong."""
    tokens = params.get("tokens", 1)
    if op == "linear_records" and isinstance(tokens, int) and tokens > 1:
        return ("cuda",) if tokens <= FUSED_TOKENS else ("cpu",)
    return OPERATORS[op].families


def tokens_held(params: Params) -> int:
    """Most tokens of a launch of a kernel for one token or a few."""
    return 1 if params["tokens"] == 1 else FEW_TOKENS


def partials_elements(params: Params) -> int:
    """What append_attention hands over between the runs of a context, in f32."""
    return int(tokens_held(params) * params["heads"] * params["splits"] * (params["head_dim"] + 2))


def check_params(op: str, params: Params) -> str | None:
    """What is wrong with the constants of a kernel of operator `op`, or None."""
    rules = OPERATORS[op].constants
    if set(params) != set(rules):
        return f"the constants are {sorted(params)}, expected {sorted(rules)}"
    for name, rule in rules.items():
        value = params[name]
        if not allowed(value, rule):
            expected = rule if isinstance(rule, str) else "one of " + ", ".join(map(repr, rule))
            return f"{name} is {shown(value)}, expected {expected}"
    return OPERATORS[op].check(params)


def _check_heads(p: Params) -> str | None:
    if p["heads"] % p["kv_heads"]:
        return f"{p['heads']} heads do not divide into {p['kv_heads']} KV heads"
    rotary_dim = p.get("rotary_dim", 0)
    if rotary_dim % 2 or rotary_dim > p["head_dim"]:
        return f"rotary_dim is {rotary_dim}, expected an even number up to head_dim {p['head_dim']}"
    return None


def _check_append_attention(p: Params) -> str | None:
    if p["head_dim"] % 16 or p["head_dim"] > 256:
        return f"head_dim is {p['head_dim']}, expected a multiple of 16 up to 256"
    return _check_heads(p)


def _check_attention_halves(p: Params) -> str | None:
    if p["head_dim"] % 16 or p["head_dim"] > 128:
        return f"head_dim is {p['head_dim']}, expected a multiple of 16 up to 128"
    return _check_heads(p)


_HEADS: dict[str, Rule] = {
    "tokens": SIZE,
    "heads": SIZE,
    "kv_heads": SIZE,
    "head_dim": SIZE,
    "kv_dtype": tuple(KV_ELEMENTS),
    "window": COUNT,
}
_STATE = Operand("state", "i32", lambda p, t, c: state_elements(1 if p.get("tokens") == 1 else t))
_IDS: Elements = lambda p, t, c: 1 if p["tokens"] == 1 else t  # noqa: E731
_KV: Elements = lambda p, t, c: (  # noqa: E731
    slot_rows(p["window"], c) * row_elements(p["kv_dtype"], p["kv_heads"], p["head_dim"])
)
_WIDTH: Elements = lambda p, t, c: p["width"]  # noqa: E731

_ATTENTION = (
    Operand("q", "f32", _rows("q_stride", "head_dim", "heads")),
    Operand("k_cache", "kv_dtype", _KV),
    Operand("v_cache", "kv_dtype", _KV),
    Operand("out", "f32", _rows("out_stride", "head_dim", "heads"), "out"),
    _STATE,
)


def _part_elements(layout: Layout, name: str) -> Elements:
    return lambda p, max_tokens, context: layout.elements(p, 0)[name]


def _linear(layout: Layout) -> Operator:
    """A linear whose weights are stored in a layout. Where the content decides a part's size, the reader
    checks it by `Layout.check_sizes`."""
    accumulates = "accumulate" in layout.constants
    weights = (Operand(part.name, part.dtype, _part_elements(layout, part.name), "weight") for part in layout.parts)
    return Operator(
        "s = W x; " + "s += out if accumulate; " * accumulates + "out = activation(s + bias) + residual",
        {
            "tokens": SIZE, "rows": SIZE, "k": SIZE, "x_stride": SIZE, "out_stride": SIZE, "bias": FLAG,
            "activation": ACTIVATIONS, "residual": FLAG, "residual_stride": COUNT, **layout.constants,
        },
        (
            Operand("x", "f32", _rows("x_stride", "k")),
            *weights,
            Operand("bias", "f32", lambda p, t, c: p["rows"], "weight", lambda p: p["bias"]),
            Operand("residual", "f32", _rows("residual_stride", "rows"), "in", lambda p: p["residual"]),
            Operand("out", "f32", _rows("out_stride", "rows"), "inout" if accumulates else "out"),
            _STATE,
        ),
        layout.check_constants,
        layout,
    )  # fmt: skip


_TILE = 64  # columns that share a scale of their quantised activations
NORMS = ("none", "rms", "layer")
EPILOGUES = ("rows", "gated")
_NORMS: dict[str, Rule] = {"norm": NORMS, "eps": NUMBER}
_NORM_WEIGHT = Operand("norm_weight", "f32", lambda p, t, c: p["k"], "weight", lambda p: p["norm"] != "none")
_NORM_BIAS = Operand("norm_bias", "f32", lambda p, t, c: p["k"], "weight", lambda p: p["norm"] == "layer")


MATMUL_TOKENS = 128  # that a block of matmul_records takes
# Kernels for a few tokens, on CUDA alone: those made for more than one, up to FUSED_TOKENS. Their linears normalise and
# quantise activations themselves, as those of one token do. A launch holds up to FEW_TOKENS.
FUSED_TOKENS, FEW_TOKENS = 4, 8


def _halves(access: str) -> tuple[Operand, ...]:
    """Activations of many tokens in half precision: f16 [ceil(n_tokens / 128), k / 64, 128, 64], f32 [n_tokens]."""
    return (
        Operand("halves", "f16", lambda p, t, c: -(-t // MATMUL_TOKENS) * MATMUL_TOKENS * p["k"], access),
        Operand("scales", "f32", lambda p, t, c: t, access),
    )


def _tiles(per_tile: int) -> Elements:
    return lambda p, max_tokens, context: max_tokens * (p["k"] // _TILE) * per_tile


def _linear_records() -> Operator:
    """A few tokens are normalised and quantised by the kernel itself; more come quantised (operator quantize)."""

    def few(p: Params) -> bool:
        return bool(p["tokens"] <= FUSED_TOKENS)

    def more(p: Params) -> bool:
        return not few(p)

    linear = _linear(RECORDS)
    x, *weights, _ = linear.operands
    fused = (
        Operand(x.name, x.dtype, x.elements, present=few),
        Operand("planes", "i8", _tiles(2 * _TILE), present=more),
        Operand("ranges", "f32", _tiles(2), present=more),
        Operand("norm_weight", "f32", _NORM_WEIGHT.elements, "weight", lambda p: few(p) and p["norm"] != "none"),
        Operand("norm_bias", "f32", _NORM_BIAS.elements, "weight", lambda p: few(p) and p["norm"] == "layer"),
    )
    out = next(operand for operand in weights if operand.name == "out")
    weights[weights.index(out)] = Operand("out", "f32", _rows("out_stride", "out_width"), "out")
    return Operator(
        "s = W norm(x) + bias; out = activation(s) + residual, or, gated, activation(first half of s) * second half",
        {**linear.constants, **_NORMS, "epilogue": EPILOGUES, "out_width": SIZE},
        (*fused, *weights, _STATE),
        _check_linear_records,
        RECORDS,
    )


def _matmul_records() -> Operator:
    """linear_records for many tokens in half precision, whose activations come from operator halves."""
    linear = _linear_records()
    constants = {name: rule for name, rule in linear.constants.items() if name not in ("x_stride", *_NORMS)}
    weights = linear.operands[[operand.name for operand in linear.operands].index("records") :]
    return Operator(
        "linear_records of x = halves * scales, summed in f32",
        {**constants, "tokens": (MATMUL_TOKENS,)},
        (*_halves("in"), *weights),
        _check_linear_records,
        RECORDS,
        families=("cuda",),
    )


def _embedding_records() -> Operator:
    parts = (Operand(part.name, part.dtype, _part_elements(RECORDS, part.name), "weight") for part in RECORDS.parts)
    return Operator(
        "out[t] = scale * W[ids[t]], rows of a table in whole records of one width",
        {"tokens": SIZE, "rows": SIZE, "k": SIZE, "scale": NUMBER, "out_stride": SIZE, **RECORDS.constants},
        (Operand("ids", "i32", _IDS), *parts, Operand("out", "f32", _rows("out_stride", "k"), "out"), _STATE),
        _check_embedding_records,
        RECORDS,
    )


def _check_embedding_records(p: Params) -> str | None:
    if p["masked_widths"] or p["widths"] not in (1 << 4, 1 << 8):
        return f"the widths of a table are {p['widths']}, masked {p['masked_widths']}, expected 4 or 8 bits alone"
    return RECORDS.check_constants(p)


def _check_linear_records(p: Params) -> str | None:
    parts = 2 if p["epilogue"] == "gated" else 1
    if p["out_width"] * parts != p["rows"] or (parts == 2 and p["residual"]):
        return f"{p['rows']} rows make {p['out_width']} results by the epilogue {p['epilogue']}"
    return RECORDS.check_constants(p)


def _check_tiles(p: Params) -> str | None:
    return f"k is {p['k']}, expected a multiple of {_TILE}" if p["k"] % _TILE else None


def _check_choose(p: Params) -> str | None:
    return f"vocab is {p['vocab']}, expected at most {MOST_CHOICES}" if p["vocab"] > MOST_CHOICES else None


OPERATORS: dict[str, Operator] = {
    "embedding": Operator(
        "out[t] = scale * table[ids[t]], or for source positions table[position[t] + position_offset]",
        {
            "tokens": SIZE, "width": SIZE, "vocab": SIZE, "source": ("tokens", "positions"), "position_offset": COUNT,
            "scale": NUMBER, "out_stride": SIZE,
        },
        (
            Operand("ids", "i32", _IDS),
            Operand("table", "f16", lambda p, t, c: p["vocab"] * p["width"], "weight"),
            Operand("out", "f32", _rows("out_stride", "width"), "out"),
            _STATE,
        ),
    ),
    "embedding_records": _embedding_records(),
    "rms_norm": Operator(
        "out[t, h] = x[t, h] / sqrt(mean(x[t, h]^2) + eps) * weight, for each of `heads` slices of `width`",
        {"tokens": SIZE, "width": SIZE, "heads": SIZE, "eps": NUMBER, "x_stride": SIZE, "out_stride": SIZE},
        (
            Operand("x", "f32", _rows("x_stride", "width", "heads")),
            Operand("weight", "f32", _WIDTH, "weight"),
            Operand("out", "f32", _rows("out_stride", "width", "heads"), "out"),
            _STATE,
        ),
    ),
    "layer_norm": Operator(
        "out[t] = (x[t] - mean(x[t])) / sqrt(var(x[t]) + eps) * weight + bias",
        {"tokens": SIZE, "width": SIZE, "eps": NUMBER, "x_stride": SIZE, "out_stride": SIZE},
        (
            Operand("x", "f32", _rows("x_stride", "width")),
            Operand("weight", "f32", _WIDTH, "weight"),
            Operand("bias", "f32", _WIDTH, "weight"),
            Operand("out", "f32", _rows("out_stride", "width"), "out"),
            _STATE,
        ),
    ),
    "linear_dense": _linear(DENSE_F16),
    "linear_sparse": _linear(GROUP_WORDS),
    "linear_records": _linear_records(),
    "matmul_records": _matmul_records(),
    "quantize": Operator(
        "per tile of 64 columns of norm(x): q = round(x / scale), |q| <= 32639; planes: high and low bytes, "
        "256 * high + low = q; ranges: {scale, sum of q}",
        {"tokens": SIZE, "k": SIZE, "x_stride": SIZE, **_NORMS},
        (
            Operand("x", "f32", _rows("x_stride", "k")),
            _NORM_WEIGHT,
            _NORM_BIAS,
            Operand("planes", "i8", _tiles(2 * _TILE), "out"),
            Operand("ranges", "f32", _tiles(2), "out"),
            _STATE,
        ),
        _check_tiles,
        families=("cpu",),
    ),
    "halves": Operator(
        "halves = norm(x) / scale in f16 [tokens / 128, tiles, 128, 64], in the order that matmul_records wants; "
        "scale: of each token, the power of two that brings its largest to 2^14 .. 2^15",
        {"tokens": SIZE, "k": SIZE, "x_stride": SIZE, **_NORMS},
        (Operand("x", "f32", _rows("x_stride", "k")), _NORM_WEIGHT, _NORM_BIAS, *_halves("out"), _STATE),
        _check_tiles,
        families=("cuda",),
    ),
    # rope: [context, rotary_dim] f32, a row is cos[rotary_dim / 2] then sin[rotary_dim / 2].
    "kv_append": Operator(
        "rotates q in place and k on its way into the cache, in pairs (i, i + rotary_dim / 2), rotary_dim 0: neither; "
        "stores k and v at the cache row of position[t] in slot[t]; window: of the layer's attention",
        {**_HEADS, "rotary_dim": COUNT, "q_stride": SIZE, "k_stride": SIZE, "v_stride": SIZE},
        (
            Operand("q", "f32", _rows("q_stride", "head_dim", "heads"), "inout"),
            Operand("k", "f32", _rows("k_stride", "head_dim", "kv_heads")),
            Operand("v", "f32", _rows("v_stride", "head_dim", "kv_heads")),
            Operand("rope", "f32", lambda p, t, c: c * p["rotary_dim"], "in", lambda p: p["rotary_dim"] > 0),
            Operand("k_cache", "kv_dtype", _KV, "out"),
            Operand("v_cache", "kv_dtype", _KV, "out"),
            _STATE,
        ),
        _check_heads,
    ),
    "attention": Operator(
        "causal softmax(scale * q k^T) v over cached positions 0 .. position[t] of slot[t], with a window > 0 the last "
        "`window` of them; head h reads KV head h // (heads / kv_heads)",
        {**_HEADS, "scale": NUMBER, "q_stride": SIZE, "out_stride": SIZE},
        _ATTENTION,
        _check_heads,
    ),
    "attention_halves": Operator(
        "attention of many tokens with products of halves: q, weights and the cache",
        {**_HEADS, "kv_dtype": ("f16", "int8"), "scale": NUMBER, "q_stride": SIZE, "out_stride": SIZE},
        _ATTENTION,
        _check_attention_halves,
        families=("cuda",),
    ),
    # partials: head_dim values and two numbers of each head and run, whatever number of heads a block takes.
    "append_attention": Operator(
        "kv_append and attention of one token, or of each of a few, in one kernel, the context in up to `splits` runs; "
        "q stays as it is; counters are 0 before and after",
        {
            **_HEADS, "tokens": (1, FUSED_TOKENS), "kv_dtype": ("f16", "int8"), "rotary_dim": COUNT, "scale": NUMBER,
            "splits": SIZE, "q_stride": SIZE, "k_stride": SIZE, "v_stride": SIZE, "out_stride": SIZE,
        },
        (
            Operand("q", "f32", _rows("q_stride", "head_dim", "heads")),
            Operand("k", "f32", _rows("k_stride", "head_dim", "kv_heads")),
            Operand("v", "f32", _rows("v_stride", "head_dim", "kv_heads")),
            Operand("rope", "f32", lambda p, t, c: c * p["rotary_dim"], "in", lambda p: p["rotary_dim"] > 0),
            Operand("k_cache", "kv_dtype", _KV, "inout"),
            Operand("v_cache", "kv_dtype", _KV, "inout"),
            Operand("partials", "f32", lambda p, t, c: partials_elements(p), "out"),
            Operand("counters", "i32", lambda p, t, c: tokens_held(p) * p["heads"], "inout"),
            Operand("out", "f32", _rows("out_stride", "head_dim", "heads"), "out"),
            _STATE,
        ),
        _check_append_attention,
        families=("cuda",),
    ),
    "gated_activation": Operator(
        "out = activation(gate) * up",
        {
            "tokens": SIZE, "width": SIZE, "activation": ACTIVATIONS, "gate_stride": SIZE, "up_stride": SIZE,
            "out_stride": SIZE,
        },
        (
            Operand("gate", "f32", _rows("gate_stride", "width")),
            Operand("up", "f32", _rows("up_stride", "width")),
            Operand("out", "f32", _rows("out_stride", "width"), "out"),
            _STATE,
        ),
    ),
    "elementwise": Operator(
        "out = a + b, a * b, a * scalar or activation(a), by `function`",
        {
            "tokens": SIZE, "width": SIZE, "function": ("add", "mul", "scale", *ACTIVATIONS), "scalar": NUMBER,
            "a_stride": SIZE, "b_stride": COUNT, "out_stride": SIZE,
        },
        (
            Operand("a", "f32", _rows("a_stride", "width")),
            Operand("b", "f32", _rows("b_stride", "width"), "in", lambda p: p["function"] in ("add", "mul")),
            Operand("out", "f32", _rows("out_stride", "width"), "out"),
            _STATE,
        ),
    ),
    "last_row": Operator(
        "out[0] = x[n_tokens - 1]",
        {"width": SIZE, "x_stride": SIZE},
        (
            Operand("x", "f32", lambda p, t, c: (t - 1) * p["x_stride"] + p["width"]),
            Operand("out", "f32", _WIDTH, "out"),
            _STATE,
        ),
    ),
    # Ends decode and last_logits, so that a step hands over one number. CUDA's blocks alone use partials and counters,
    # which are 0 before and after.
    "choose": Operator(
        "token = first index of the largest logit, or one drawn as the draw in state asks (sampling.py); -1 where "
        "a logit is NaN or the largest is not finite",
        {"vocab": SIZE},
        (
            Operand("logits", "f32", lambda p, t, c: p["vocab"]),
            Operand("partials", "i32", lambda p, t, c: -(-p["vocab"] // CHOOSE_SLICE) * CHOOSE_PARTIAL, "scratch"),
            Operand("counters", "i32", lambda p, t, c: 1, "inout"),
            Operand("token", "i32", lambda p, t, c: 1, "out"),
            _STATE,
        ),
        _check_choose,
    ),
    "log_probs": Operator(
        "result[t] = log softmax(logits[t])[targets[t]]; argmax[t] = first index of the largest logit",
        {"tokens": SIZE, "vocab": SIZE, "x_stride": SIZE},
        (
            Operand("logits", "f32", _rows("x_stride", "vocab")),
            Operand("targets", "i32", _IDS),
            Operand("result", "f32", _IDS, "out"),
            Operand("argmax", "i32", _IDS, "out"),
            _STATE,
        ),
    ),
}  # fmt: skip
