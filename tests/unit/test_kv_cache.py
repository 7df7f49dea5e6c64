"""What the KV cache takes, and that every count of memory asks for it."""

import dataclasses

import numpy as np
import pytest
from gqsa_runtime import memory
from gqsa_runtime.kv_cache import MOST_WINDOW_TOKENS, held_rows, row_constants, row_elements, slot_rows
from gqsa_runtime.program import KVLayer
from gqsa_runtime.window_rows import WindowRows, kept_positions, places

from tests.format import tiny


@pytest.mark.parametrize(
    ("kv_dtype", "kv_heads", "head_dim", "elements"),
    [
        ("f16", 8, 128, 1024),
        ("f32", 3, 5, 15),
        ("int8", 8, 128, 1024 + 16),
        ("int8", 32, 128, 4096 + 64),
        ("int8", 9, 64, 576 + 32),  # 18 bytes of scales
        ("int8", 1, 20, 32 + 16),  # scales begin at 32 bytes
    ],
)
def test_a_row_holds_its_values_and_its_scales(kv_dtype, kv_heads, head_dim, elements):
    assert row_elements(kv_dtype, kv_heads, head_dim) == elements
    constants = row_constants({"kv_dtype": kv_dtype, "kv_heads": kv_heads, "head_dim": head_dim, "window": 100})
    assert constants["kv_row"] == elements and constants["kv_held"] == held_rows(100)
    if kv_dtype == "int8":
        assert kv_heads * head_dim <= constants["kv_scales"] <= elements - 2 * kv_heads
        assert elements % 16 == constants["kv_scales"] % 16 == 0


def with_layers(*layers, **changes):
    return dataclasses.replace(tiny.program(), kv_layers=layers, **changes)


@pytest.mark.parametrize(("kv_dtype", "per_layer"), [("f32", 2 * 4096), ("f16", 2 * 2048), ("int8", 2 * 1040)])
def test_a_position_costs_its_rows_of_all_layers(kv_dtype, per_layer):
    program = with_layers(*[KVLayer(8, 128)] * 3, kv_dtype=kv_dtype)
    assert program.kv_bytes(5) == 5 * 3 * per_layer
    assert memory.context_bytes(program, 5) == 5 * (3 * per_layer + 4 * 4)


def test_a_layer_with_a_window_takes_no_more_than_it_sees():
    program = with_layers(KVLayer(1, 16, 40), KVLayer(1, 16), max_context=10_000)
    held = held_rows(40)
    assert held >= 40 + MOST_WINDOW_TOKENS - 1 and slot_rows(40, 100) == 100 and slot_rows(0, 10_000) == 10_000
    row = 2 * 16 * 4
    for context in (1, held, held + 1, 10_000):
        assert program.kv_bytes(context) == row * (min(context, held) + context)
    # The longest context that fits is where it is as long as that.
    tensors = {name: type("Tensor", (), {"size": 8}) for name in tiny.tensors()}
    for context in (0, 1, held - 1, held, held + 1, 9_999, 10_000):
        needed = memory.needed_bytes(program, tensors, "cpu", context)
        assert memory.largest_context(program, tensors, "cpu", needed) == context
        assert memory.largest_context(program, tensors, "cpu", needed - 1) == max(context - 1, 0)
    assert memory.largest_context(program, tensors, "cpu", needed * 2) == 10_000
    assert memory.context_costs(program, tensors, "cpu")[-1].kv_cache == row * (held + 10_000)


@pytest.mark.parametrize("windows", [(40,), (40, 7, 0), (0,)])
def test_what_a_window_has_lost_is_known(windows):
    """Against rows that remember which position wrote them last."""
    program, rng = with_layers(*(KVLayer(1, 16, window) for window in windows)), np.random.default_rng(0)
    known = WindowRows(program)
    slots = {window: np.full(held_rows(window), -1) for window in windows if window}
    n_tokens, seen = 0, set()
    for _ in range(2000):
        if rng.random() < 0.4:
            n_tokens = int(rng.integers(max(0, n_tokens - 700), n_tokens + 1))
            sound = all(
                (slot[places(window, at)] == at).all()
                for window, slot in slots.items()
                for at in (np.arange(max(0, n_tokens + 1 - window), n_tokens),)
            )
            held = known.hold(n_tokens)
            assert sound or not held
            seen.add(held)
            if not held:
                n_tokens = 0
        elif rng.random() < 0.1:  # a session
            known.restore(n_tokens)
            for window, slot in slots.items():
                slot[:] = -1
                at = kept_positions(window, n_tokens)
                slot[places(window, at)] = at
        if n_tokens == 0:
            known.clear()
        added = int(rng.integers(1, MOST_WINDOW_TOKENS))
        for window, slot in slots.items():
            at = np.arange(n_tokens, n_tokens + added)
            first = np.arange(max(0, n_tokens + 1 - window), n_tokens)
            slot[places(window, at)] = at
            assert (slot[places(window, first)] == first).all()  # what the first of these tokens sees
        n_tokens += added
        known.append(n_tokens)
    assert seen == ({True, False} if any(windows) else {True})
