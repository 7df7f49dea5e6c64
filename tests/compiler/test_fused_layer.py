"""The operators that one layer becomes, in full: a change of fusion or tracing is seen in review."""

import pytest

from gqsac.compiler import ir
from gqsac.compiler.passes.fuse import fuse
from gqsac.compiler.passes.legalize import legalize
from gqsac.compiler.passes.trace import trace
from tests.compiler.tiny import COMPILED, config

LLAMA = """
RMSNorm input_layernorm width=64
Linear self_attn.q_proj+k_proj+v_proj rows=64+32+32 k=64
Slice self_attn.q_proj 0:64
Slice self_attn.k_proj 64:96
Slice self_attn.v_proj 96:128
Attention self_attn heads=4/2x16 rope=rope0
Linear self_attn.o_proj rows=64 k=64 +residual
RMSNorm post_attention_layernorm width=64
Linear mlp.gate_proj+up_proj rows=96+96 k=64
Slice mlp.gate_proj 0:96
Slice mlp.up_proj 96:192
GatedActivation mlp silu width=96
Linear mlp.down_proj rows=64 k=96 +residual
"""

LLAMA_UNSTACKED = """
RMSNorm input_layernorm width=64
Linear self_attn.q_proj rows=64 k=64
Linear self_attn.k_proj rows=32 k=64
Linear self_attn.v_proj rows=32 k=64
Attention self_attn heads=4/2x16 rope=rope0
Linear self_attn.o_proj rows=64 k=64 +residual
RMSNorm post_attention_layernorm width=64
Linear mlp.gate_proj rows=96 k=64
Linear mlp.up_proj rows=96 k=64
GatedActivation mlp silu width=96
Linear mlp.down_proj rows=64 k=96 +residual
"""

OPT = """
LayerNorm self_attn_layer_norm width=64
Linear self_attn.q_proj+k_proj+v_proj rows=64+64+64 k=64 +bias
Slice self_attn.q_proj 0:64
Slice self_attn.k_proj 64:128
Slice self_attn.v_proj 128:192
Attention self_attn heads=4/4x16 rope=None
Linear self_attn.out_proj rows=64 k=64 +bias +residual
LayerNorm final_layer_norm width=64
Linear fc1 rows=96 k=64 +bias relu
Linear fc2 rows=64 k=96 +bias +residual
"""

QWEN3 = """
RMSNorm input_layernorm width=64
Linear self_attn.q_proj+k_proj+v_proj rows=128+64+64 k=64
Slice self_attn.q_proj 0:128
Slice self_attn.k_proj 128:192
Slice self_attn.v_proj 192:256
RMSNorm self_attn.q_norm width=32 heads=4
RMSNorm self_attn.k_norm width=32 heads=2
Attention self_attn heads=4/2x32 rope=rope0
Linear self_attn.o_proj rows=64 k=128 +residual
RMSNorm post_attention_layernorm width=64
Linear mlp.gate_proj+up_proj rows=96+96 k=64
Slice mlp.gate_proj 0:96
Slice mlp.up_proj 96:192
GatedActivation mlp silu width=96
Linear mlp.down_proj rows=64 k=96 +residual
"""


def describe(op: ir.Op, prefix: str) -> str:
    words = [type(op).__name__, op.name.removeprefix(prefix).lstrip(".")]
    match op:
        case ir.Linear():
            words += [f"rows={'+'.join(map(str, op.rows))}", f"k={op.k}"]
            words += ["+bias"] * any(op.biases) + [op.activation] * (op.activation != "none")
            words += ["+residual"] * (op.residual is not None)
        case ir.Slice():
            words.append(f"{op.start}:{op.start + op.width}")
        case ir.Attention():
            words += [f"heads={op.heads}/{op.kv_heads}x{op.head_dim}", f"rope={op.rope}"]
        case ir.GatedActivation():
            words += [op.activation, f"width={op.width}"]
        case ir.RMSNorm():
            words += [f"width={op.width}"] + [f"heads={op.heads}"] * (op.heads > 1)
        case ir.LayerNorm():
            words.append(f"width={op.width}")
        case _:
            raise AssertionError(f"not seen in a layer before: {op}")
    return " ".join(words)


@pytest.mark.parametrize(
    "fields, prefix, stacks, expected",
    [
        (COMPILED["llama-2-grouped"], "model.layers.1", True, LLAMA),
        (COMPILED["llama-2-grouped"], "model.layers.1", False, LLAMA_UNSTACKED),
        (COMPILED["opt"], "model.decoder.layers.1", True, OPT),
        (config("qwen3", head_dim=32), "model.layers.1", True, QWEN3),
    ],
    ids=["llama", "llama-unstacked", "opt", "qwen3"],
)
def test_one_layer_becomes(fields, prefix, stacks, expected):
    graph = fuse(legalize(trace(fields)), lambda names: stacks)
    layer = [describe(op, prefix) for op in graph.ops if op.name.startswith(prefix)]
    assert "\n".join(layer) == expected.strip()


def test_around_the_layers_of_llama_there_is_little():
    graph = fuse(legalize(trace(COMPILED["llama-2-grouped"])), lambda names: True)
    outside = [type(op).__name__ for op in graph.ops if ".layers." not in op.name]
    assert outside == ["Embedding", "RMSNorm", "Linear"]


def test_opt_adds_its_two_embeddings_and_folds_the_scale_of_queries():
    graph = legalize(trace(COMPILED["opt"]))
    tokens, positions, added = graph.ops[:3]
    assert (tokens.source, positions.source, positions.position_offset) == ("tokens", "positions", 2)
    assert (added.function, added.a, added.b) == ("add", tokens.output, positions.output)
    assert {op.scale for op in graph.ops if isinstance(op, ir.Attention)} == {16**-0.5}
    assert not any(isinstance(op, ir.Elementwise) and op.function == "scale" for op in graph.ops)


def test_gemma_scales_inside_its_embedding():
    graph = legalize(trace(COMPILED["gemma"]))
    assert graph.ops[0].scale == pytest.approx(8.0)  # sqrt(hidden_size)
    assert {op.weight_offset for op in graph.ops if isinstance(op, ir.RMSNorm)} == {1.0}
