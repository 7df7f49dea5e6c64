"""The constants that each operator's kernels carry: their names, types and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping

from gqsa_runtime.format import MAX_GROUP_COLUMNS
from gqsa_runtime.program import ACTIVATIONS

_MAX_INT = 2**31 - 1  # kernels index with 32 bits

_SIZE, _COUNT, _NUMBER, _FLAG = "an integer from 1", "an integer from 0", "a finite number", "true or false"
_LINEAR = {
    "tokens": _SIZE,
    "rows": _SIZE,
    "k": _SIZE,
    "x_stride": _SIZE,
    "out_stride": _SIZE,
    "bias": _FLAG,
    "activation": ACTIVATIONS,
    "residual": _FLAG,
    "residual_stride": _COUNT,
}
_HEADS = {"tokens": _SIZE, "heads": _SIZE, "kv_heads": _SIZE, "head_dim": _SIZE, "kv_dtype": ("f16", "f32")}

# Operator -> parameter -> what it must be: one of the kinds above, or a tuple of allowed values.
PARAMS: dict[str, dict[str, str | tuple]] = {
    "embedding": {
        "tokens": _SIZE, "width": _SIZE, "vocab": _SIZE, "source": ("tokens", "positions"), "position_offset": _COUNT,
        "scale": _NUMBER, "accumulate": _FLAG, "out_stride": _SIZE,
    },
    "rms_norm": {
        "tokens": _SIZE, "width": _SIZE, "heads": _SIZE, "eps": _NUMBER, "x_stride": _SIZE, "out_stride": _SIZE,
    },
    "layer_norm": {"tokens": _SIZE, "width": _SIZE, "eps": _NUMBER, "x_stride": _SIZE, "out_stride": _SIZE},
    "linear_sparse": {
        **_LINEAR, "group_size": (8, 16, 32, 64, 128), "bits": (2, 3, 4, 8), "n_tasks": _SIZE, "accumulate": _FLAG,
    },
    "linear_dense": _LINEAR,
    "kv_append": {**_HEADS, "rotary_dim": _COUNT, "q_stride": _SIZE, "k_stride": _SIZE, "v_stride": _SIZE},
    "attention": {**_HEADS, "scale": _NUMBER, "window": _COUNT, "q_stride": _SIZE, "out_stride": _SIZE},
    "gated_activation": {
        "tokens": _SIZE, "width": _SIZE, "activation": ACTIVATIONS, "gate_stride": _SIZE, "up_stride": _SIZE,
        "out_stride": _SIZE,
    },
    "elementwise": {
        "tokens": _SIZE, "width": _SIZE, "function": ("add", "mul", "scale", *ACTIVATIONS), "scalar": _NUMBER,
        "a_stride": _SIZE, "b_stride": _COUNT, "out_stride": _SIZE,
    },
    "last_row": {"width": _SIZE, "x_stride": _SIZE},
    "log_probs": {"tokens": _SIZE, "vocab": _SIZE, "x_stride": _SIZE},
}  # fmt: skip


def check_params(op: str, params: Mapping) -> str | None:
    """What is wrong with the constants of a kernel of operator `op`, or None."""
    rules = PARAMS[op]
    if set(params) != set(rules):
        return f"the constants are {sorted(params)}, expected {sorted(rules)}"
    for name, rule in rules.items():
        value = params[name]
        if not _allowed(value, rule):
            expected = rule if isinstance(rule, str) else "one of " + ", ".join(map(repr, rule))
            return f"{name} is {value!r}, expected {expected}"
    return _check_together(op, params)


def _allowed(value, rule: str | tuple) -> bool:
    if isinstance(rule, tuple):
        # True == 1 and 8.0 == 8: the type counts too.
        return any(type(value) is type(allowed) and value == allowed for allowed in rule)
    if rule is _FLAG:
        return type(value) is bool
    if rule is _NUMBER:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is int and (1 if rule is _SIZE else 0) <= value <= _MAX_INT


def _check_together(op: str, p: Mapping) -> str | None:
    if op == "linear_sparse":
        if p["k"] % p["group_size"] or p["k"] // p["group_size"] > MAX_GROUP_COLUMNS:
            return f"k is {p['k']}, expected at most {MAX_GROUP_COLUMNS} whole groups of {p['group_size']}"
    elif op in ("kv_append", "attention"):
        if p["heads"] % p["kv_heads"]:
            return f"{p['heads']} heads do not divide into {p['kv_heads']} KV heads"
        rotary_dim = p.get("rotary_dim", 0)
        if rotary_dim % 2 or rotary_dim > p["head_dim"]:
            return f"rotary_dim is {rotary_dim}, expected an even number up to head_dim {p['head_dim']}"
    return None
