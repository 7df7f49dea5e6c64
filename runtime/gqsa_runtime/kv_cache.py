"""What a row of the KV cache is: the keys, or the values, of one token in one layer.

    f16, f32   [kv_heads, head_dim] of them
    int8       [kv_heads, head_dim] int8, filled up to 16 bytes; then [kv_heads] f16, filled up likewise: the scale of
               each head's values, which are q * scale with |q| <= 127

A layer with a sliding window holds only rows that can still be seen: position p has row p % held_rows(window) of its
slot, which no token of the same launch sees any more by the one that was there before.

Kernels get a row's size, the place of its scales and held_rows from here; so do devices, session files and every count
of memory.
"""

from __future__ import annotations

from gqsa_runtime.constants import Params

# What a cache holds -> dtype of its elements. A row of int8 has elements that are halves of a scale, too.
KV_ELEMENTS = {"f16": "f16", "f32": "f32", "int8": "i8"}
_ALIGNMENT = 16  # bytes, of what kernels load at once
MOST_WINDOW_TOKENS = 512  # of a launch, where layers have windows


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def row_elements(kv_dtype: str, kv_heads: int, head_dim: int) -> int:
    """Elements of a row, each of KV_ELEMENTS[kv_dtype]."""
    values = kv_heads * head_dim
    return scales_at(kv_heads, head_dim) + _aligned(2 * kv_heads) if kv_dtype == "int8" else values


def scales_at(kv_heads: int, head_dim: int) -> int:
    """Where in a row of int8 its scales begin, in bytes."""
    return _aligned(kv_heads * head_dim)


def held_rows(window: int) -> int:
    """Rows of a slot of a layer with this sliding window, however long the context. 0: as many as the context.

    The last token of a launch takes no row that its first one sees.
    """
    return window and _aligned(window + MOST_WINDOW_TOKENS)


def slot_rows(window: int, context: int) -> int:
    """Rows of a slot of a layer at a context."""
    return min(context, held_rows(window) or context)


def row_constants(params: Params) -> dict[str, int]:
    """What a kernel with these constants must know of the cache.

    kv_row: elements of a row. kv_scales: where in it its scales begin. kv_held: held_rows.
    """
    heads, head_dim = int(params["kv_heads"]), int(params["head_dim"])
    return {
        "kv_row": row_elements(str(params["kv_dtype"]), heads, head_dim),
        "kv_scales": scales_at(heads, head_dim),
        "kv_held": held_rows(int(params["window"])),
    }
