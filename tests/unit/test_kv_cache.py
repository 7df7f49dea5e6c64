"""What a row of the KV cache takes, and that every count of memory asks for it."""

import dataclasses

import pytest
from gqsa_runtime import memory
from gqsa_runtime.kv_cache import row_constants, row_elements
from gqsa_runtime.program import KVLayer

from tests.format import tiny


@pytest.mark.parametrize(
    ("kv_dtype", "kv_heads", "head_dim", "elements"),
    [
        ("f16", 8, 128, 1024),
        ("f32", 3, 5, 15),
        ("int8", 8, 128, 1024 + 16),
        ("int8", 32, 128, 4096 + 64),
        ("int8", 9, 64, 576 + 32),  # 18 bytes of scales
        ("int8", 1, 20, 32 + 16),  # scales begin at 16 bytes
    ],
)
def test_a_row_holds_its_values_and_its_scales(kv_dtype, kv_heads, head_dim, elements):
    assert row_elements(kv_dtype, kv_heads, head_dim) == elements
    constants = row_constants({"kv_dtype": kv_dtype, "kv_heads": kv_heads, "head_dim": head_dim})
    assert constants["kv_row"] == elements
    if kv_dtype == "int8":
        assert kv_heads * head_dim <= constants["kv_scales"] <= elements - 2 * kv_heads
        assert elements % 16 == constants["kv_scales"] % 16 == 0


@pytest.mark.parametrize(("kv_dtype", "per_layer"), [("f32", 2 * 4096), ("f16", 2 * 2048), ("int8", 2 * 1040)])
def test_a_position_costs_its_rows_of_all_layers(kv_dtype, per_layer):
    program = dataclasses.replace(tiny.program(), kv_dtype=kv_dtype, kv_layers=(KVLayer(8, 128),) * 3)
    assert program.kv_bytes_per_token() == 3 * per_layer
    assert memory.context_bytes_per_token(program) == 3 * per_layer + 4 * 4
