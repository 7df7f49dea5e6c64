"""The constants that each operator's kernels carry: their names, types and ranges."""

from __future__ import annotations

from collections.abc import Mapping

from gqsa_runtime.constants import COUNT, FLAG, NUMBER, SIZE, Rule, allowed
from gqsa_runtime.layouts import LAYOUTS
from gqsa_runtime.program import ACTIVATIONS

_LINEAR = {
    "tokens": SIZE,
    "rows": SIZE,
    "k": SIZE,
    "x_stride": SIZE,
    "out_stride": SIZE,
    "bias": FLAG,
    "activation": ACTIVATIONS,
    "residual": FLAG,
    "residual_stride": COUNT,
}
_HEADS = {"tokens": SIZE, "heads": SIZE, "kv_heads": SIZE, "head_dim": SIZE, "kv_dtype": ("f16", "f32")}

# Operator -> constant -> what it must be.
PARAMS: dict[str, dict[str, Rule]] = {
    "embedding": {
        "tokens": SIZE, "width": SIZE, "vocab": SIZE, "source": ("tokens", "positions"), "position_offset": COUNT,
        "scale": NUMBER, "accumulate": FLAG, "out_stride": SIZE,
    },
    "rms_norm": {
        "tokens": SIZE, "width": SIZE, "heads": SIZE, "eps": NUMBER, "x_stride": SIZE, "out_stride": SIZE,
    },
    "layer_norm": {"tokens": SIZE, "width": SIZE, "eps": NUMBER, "x_stride": SIZE, "out_stride": SIZE},
    **{op: {**_LINEAR, **layout.constants} for op, layout in LAYOUTS.items()},
    "kv_append": {**_HEADS, "rotary_dim": COUNT, "q_stride": SIZE, "k_stride": SIZE, "v_stride": SIZE},
    "attention": {**_HEADS, "scale": NUMBER, "window": COUNT, "q_stride": SIZE, "out_stride": SIZE},
    "gated_activation": {
        "tokens": SIZE, "width": SIZE, "activation": ACTIVATIONS, "gate_stride": SIZE, "up_stride": SIZE,
        "out_stride": SIZE,
    },
    "elementwise": {
        "tokens": SIZE, "width": SIZE, "function": ("add", "mul", "scale", *ACTIVATIONS), "scalar": NUMBER,
        "a_stride": SIZE, "b_stride": COUNT, "out_stride": SIZE,
    },
    "last_row": {"width": SIZE, "x_stride": SIZE},
    "log_probs": {"tokens": SIZE, "vocab": SIZE, "x_stride": SIZE},
}  # fmt: skip


def check_params(op: str, params: Mapping) -> str | None:
    """What is wrong with the constants of a kernel of operator `op`, or None."""
    rules = PARAMS[op]
    if set(params) != set(rules):
        return f"the constants are {sorted(params)}, expected {sorted(rules)}"
    for name, rule in rules.items():
        value = params[name]
        if not allowed(value, rule):
            expected = rule if isinstance(rule, str) else "one of " + ", ".join(map(repr, rule))
            return f"{name} is {value!r}, expected {expected}"
    return _check_together(op, params)


def _check_together(op: str, p: Mapping) -> str | None:
    if op in LAYOUTS:
        return LAYOUTS[op].check_constants(p)
    if op in ("kv_append", "attention"):
        if p["heads"] % p["kv_heads"]:
            return f"{p['heads']} heads do not divide into {p['kv_heads']} KV heads"
        rotary_dim = p.get("rotary_dim", 0)
        if rotary_dim % 2 or rotary_dim > p["head_dim"]:
            return f"rotary_dim is {rotary_dim}, expected an even number up to head_dim {p['head_dim']}"
    return None
