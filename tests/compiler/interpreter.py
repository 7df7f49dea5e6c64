"""A plain reading of the IR: runs an ir.Graph over a whole sequence in f32. The oracle of the passes."""

import torch
from torch import Tensor

from gqsac.compiler import ir

_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def interpret(graph: ir.Graph, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Logits, f32 [n_tokens, vocab_size]. weights: a state dict by stored names; tokens: int64 [n_tokens]."""

    def weight(name: str) -> Tensor:
        return weights[graph.aliases.get(name, name)].float()

    values: dict[str, Tensor] = {}
    for op in graph.ops:
        values[op.output] = _run(op, values, weight, tokens, graph)
        assert values[op.output].shape == (len(tokens), ir.width(op)), op
    return values[graph.logits]


def _run(op: ir.Op, values: dict[str, Tensor], weight, tokens: Tensor, graph: ir.Graph) -> Tensor:
    match op:
        case ir.Embedding():
            index = tokens if op.source == "tokens" else torch.arange(len(tokens))
            assert weight(op.table).shape == (op.rows, op.width)
            return op.scale * weight(op.table)[index + op.position_offset]
        case ir.Linear():
            parts = [weight(name) for name in op.weights]
            assert [tuple(part.shape) for part in parts] == [(rows, op.k) for rows in op.rows]
            y = values[op.x] @ torch.cat(parts).T
            biases = [
                weight(name) if name else torch.zeros(rows) for name, rows in zip(op.biases, op.rows, strict=True)
            ]
            y = _ACTIVATIONS[op.activation](y + torch.cat(biases))
            return y + values[op.residual] if op.residual else y
        case ir.Slice():
            return values[op.x][:, op.start : op.start + op.width]
        case ir.RMSNorm():
            x = values[op.x].unflatten(-1, (op.heads, op.width))
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + op.eps)
            return (x * (weight(op.weight) + op.weight_offset)).flatten(1)
        case ir.LayerNorm():
            bias = weight(op.bias) if op.bias else None
            return torch.nn.functional.layer_norm(values[op.x], (op.width,), weight(op.weight), bias, op.eps)
        case ir.Attention():
            return _attention(op, values, graph)
        case ir.GatedActivation():
            return _ACTIVATIONS[op.activation](values[op.gate]) * values[op.up]
        case ir.Elementwise(function="add"):
            return values[op.a] + values[op.b]
        case ir.Elementwise(function="mul"):
            return values[op.a] * values[op.b]
        case ir.Elementwise(function="scale"):
            return values[op.a] * op.scalar
        case ir.Elementwise():
            return _ACTIVATIONS[op.function](values[op.a])
    raise AssertionError(f"no meaning for {op}")


def _attention(op: ir.Attention, values: dict[str, Tensor], graph: ir.Graph) -> Tensor:
    q = values[op.q].unflatten(-1, (op.heads, op.head_dim)).transpose(0, 1)  # [heads, n_tokens, head_dim]
    k = values[op.k].unflatten(-1, (op.kv_heads, op.head_dim)).transpose(0, 1)
    v = values[op.v].unflatten(-1, (op.kv_heads, op.head_dim)).transpose(0, 1)
    if op.rope:
        q, k = (_rotate(x, graph.ropes[op.rope]) for x in (q, k))
    groups = op.heads // op.kv_heads
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    position = torch.arange(q.shape[1])
    allowed = position[None, :] <= position[:, None]
    if op.window:
        allowed &= position[None, :] > position[:, None] - op.window
    scores = (op.scale * q @ k.transpose(1, 2)).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def _rotate(x: Tensor, table: ir.RopeTable) -> Tensor:
    half = table.rotary_dim // 2
    is_long = table.original_context is not None and x.shape[1] > table.original_context
    inv_freq = table.long_inv_freq if is_long else table.inv_freq
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor(inv_freq)
    cos, sin = angles.cos() * table.scaling, angles.sin() * table.scaling
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
