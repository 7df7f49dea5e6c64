"""The traced model: a straight line of operators in SSA over per-token rows.

Every value is f32 [n_tokens, width]. Parameters are named as in the checkpoint (state-dict names);
whether a linear's weight is dense or compressed is not the graph's business.
"""

from dataclasses import dataclass, field

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class Op:
    """One operator. name: path of the module that made it. output: the value it defines."""

    name: str
    output: str


@dataclass(frozen=True)
class Embedding(Op):
    """scale * table[index + position_offset], index = token id or position. table: [rows, width]."""

    table: str
    rows: int
    width: int
    source: str = "tokens"  # or "positions"
    position_offset: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class RMSNorm(Op):
    """x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over each of `heads` slices of `width`."""

    x: str
    weight: str
    width: int
    eps: float
    heads: int = 1
    weight_offset: float = 0.0


@dataclass(frozen=True)
class LayerNorm(Op):
    x: str
    weight: str
    bias: str | None
    width: int
    eps: float


@dataclass(frozen=True)
class Linear(Op):
    """activation(norm(x) W^T + b) + residual. Stacked siblings: W is the rows of `weights`, one below another.

    weights, biases: one entry per stacked part; rows: of each part. biases entries may be None. norm: its own x and
    output do not count. gated: activation(first half) * second half of the rows, and no residual.
    """

    x: str
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    rows: tuple[int, ...]
    k: int
    activation: str = "none"
    residual: str | None = None
    norm: RMSNorm | LayerNorm | None = None
    gated: bool = False

    @property
    def n_rows(self) -> int:
        """Rows of W."""
        return sum(self.rows)

    @property
    def width(self) -> int:
        return self.n_rows // 2 if self.gated else self.n_rows


@dataclass(frozen=True)
class Slice(Op):
    """Columns [start, start + width) of x. Costs nothing: it becomes an offset and a stride."""

    x: str
    start: int
    width: int


@dataclass(frozen=True)
class Attention(Op):
    """Causal attention with its own KV cache. Rotates q and k by `rope` first if given.

    layer: 0, 1, … in program order, the index of its KV cache. window: 0 or sliding window length.
    """

    q: str
    k: str
    v: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    rope: str | None = None


@dataclass(frozen=True)
class Elementwise(Op):
    """a + b ("add"), a * b ("mul"), a * scalar ("scale"), or activation(a) (the activation's name)."""

    function: str
    a: str
    width: int
    b: str | None = None
    scalar: float = 1.0


@dataclass(frozen=True)
class GatedActivation(Op):
    """activation(gate) * up."""

    gate: str
    up: str
    width: int
    activation: str


@dataclass(frozen=True)
class RopeTable:
    """inv_freq: f32 values [rotary_dim / 2]; scaling: factor on cos and sin (yarn's attention factor).

    long_inv_freq: in place of inv_freq in a sequence of more than original_context tokens (longrope), or both None.
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    original_context: int | None = None

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)


@dataclass(frozen=True)
class Graph:
    """ops in order; `logits` is the last value, [n_tokens, vocab_size], made by the last op, a Linear.

    aliases: parameter name -> the name it is stored under (tied weights).
    """

    model_class: str
    ops: tuple[Op, ...]
    logits: str
    vocab_size: int
    max_context: int
    ropes: dict[str, RopeTable] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def inputs(op: Op) -> tuple[str, ...]:
    """Names of the values that an operator reads."""
    names = []
    for key in ("x", "a", "b", "q", "k", "v", "gate", "up", "residual"):
        value = getattr(op, key, None)
        if isinstance(value, str):
            names.append(value)
    return tuple(names)


def width(op: Op) -> int:
    """Features per token of the operator's output."""
    if isinstance(op, RMSNorm):
        return op.width * op.heads
    if isinstance(op, Attention):
        return op.heads * op.head_dim
    return op.width


def verify(graph: Graph) -> None:
    """Checks SSA form and widths. Raises ValueError: a broken graph is a bug of the compiler."""
    widths: dict[str, int] = {}
    for op in graph.ops:
        for name in inputs(op):
            if name not in widths:
                raise ValueError(f"{op.name}: reads {name!r} before it is defined")
        if op.output in widths:
            raise ValueError(f"{op.name}: defines {op.output!r} a second time")
        for name, expected in _expected_widths(op):
            if widths[name] != expected:
                raise ValueError(f"{op.name}: {name!r} is {widths[name]} wide, expected {expected}")
        widths[op.output] = width(op)
    if not graph.ops or graph.ops[-1].output != graph.logits:
        raise ValueError("the last operator does not make the logits")
    if widths[graph.logits] != graph.vocab_size:
        raise ValueError(f"logits are {widths[graph.logits]} wide, expected the vocabulary's {graph.vocab_size}")


def _expected_widths(op: Op) -> list[tuple[str, int]]:
    match op:
        case Linear():
            return [(op.x, op.k)] + ([(op.residual, op.width)] if op.residual else [])
        case Attention():
            kv_width = op.kv_heads * op.head_dim
            return [(op.q, op.heads * op.head_dim), (op.k, kv_width), (op.v, kv_width)]
        case RMSNorm() | LayerNorm():
            return [(op.x, width(op))]
        case Elementwise():
            return [(op.a, op.width)] + ([(op.b, op.width)] if op.b else [])
        case GatedActivation():
            return [(op.gate, op.width), (op.up, op.width)]
    return []
