"""NumPy oracles: what each operator of `operators.OPERATORS` computes, in float64.

`run(op, params, arguments)` takes the arrays that a kernel gets, by argument name (flat, `state`
included), and returns the contents that every output must have afterwards, or a function that checks
them. Elements that a kernel must leave alone keep the value that they had.
"""

import math
from dataclasses import dataclass

import numpy as np
from gqsa_runtime.errors import ModelError
from gqsa_runtime.kv_cache import held_rows, row_elements, scales_at
from gqsa_runtime.layouts import DENSE_F16, GROUP_WORDS, RECORDS
from gqsa_runtime.operators import FUSED_TOKENS, STATE_DRAW, STATE_TOKENS, state_elements
from gqsa_runtime.sampling import choose

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(name, x):
    """The activation `name` of float64 x."""
    if name == "none":
        return x
    if name == "relu":
        return np.maximum(x, 0)
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    raise ValueError(f"unknown activation {name!r}")


@dataclass(frozen=True)
class Places:
    """Where in the KV cache the tokens of a launch belong: slots and positions, int [n_tokens].

    held: rows of a slot of a layer with a window, 0: as many as the context.
    """

    context: int
    held: int
    slots: np.ndarray
    positions: np.ndarray

    @classmethod
    def read(cls, params, state):
        """From `state`; the decode variant ignores its count of tokens."""
        n_tokens = 1 if params.get("tokens") == 1 else int(state[0])
        slots, positions = state[STATE_TOKENS : state_elements(n_tokens)].reshape(n_tokens, 2).astype(np.int64).T
        return cls(int(state[1]), held_rows(params.get("window", 0)), slots, positions)

    @property
    def rows(self):
        """Each token's row of the cache, int [n_tokens]."""
        return self.rows_of(self.slots, self.positions)

    def rows_of(self, slots, positions):
        """Rows of positions of slots."""
        if not self.held:
            return slots * self.context + positions
        return slots * min(self.context, self.held) + positions % self.held


def _rows(array, n_tokens, stride, width):
    """View [n_tokens, width] of a flat array with a row stride."""
    return np.lib.stride_tricks.as_strided(
        array, (n_tokens, width), (stride * array.itemsize, array.itemsize), writeable=True
    )


def _read(array, n_tokens, stride, width):
    return _rows(array, n_tokens, stride, width).astype(np.float64)


def _linear(layout):
    def compute(p, a, n, places, write):
        weight = layout.unpack(a, p).astype(np.float64)
        total = _read(a["x"], n, p["x_stride"], p["k"]) @ weight.T
        if p.get("accumulate"):
            total = total + _read(a["out"], n, p["out_stride"], p["rows"])
        if p["bias"]:
            total = total + a["bias"][: p["rows"]].astype(np.float64)
        total = activate(p["activation"], total)
        if p["residual"]:
            total = total + _read(a["residual"], n, p["residual_stride"], p["rows"])
        write("out", total, p["out_stride"])

    return compute


def _normalized(p, a, x):
    if p["norm"] == "none":
        return x
    if p["norm"] == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + p["eps"]) * a["norm_weight"][: p["k"]]
    return x + a["norm_bias"][: p["k"]] if p["norm"] == "layer" else x


def _embedding_records(p, a, n, places, write):
    write("out", RECORDS.unpack(a, p)[a["ids"][:n]].astype(np.float64) * p["scale"], p["out_stride"])


def halves_places(n_tokens, k):
    """Where each element stands in `halves`, see halved_rows.cuh: int [n_tokens, k]."""
    token, column = np.arange(n_tokens)[:, None], np.arange(k)
    tile, in_tile = column // 64, column % 64
    quarter, step, half, element = in_tile // 16, in_tile % 16 // 4, in_tile % 2, in_tile % 4 // 2
    piece = 2 * step + half
    start = (token // 128 * (k // 64) + tile) * 128 + token % 128
    return start * 64 + (piece ^ token % 8) * 8 + 2 * quarter + element


def _halves(p, a, n, places, write):
    x = _normalized(p, a, _read(a["x"], n, p["x_stride"], p["k"]))
    largest = np.abs(x).max(1)
    scale = np.where(largest > 0, np.exp2(np.floor(np.log2(np.maximum(largest, 2.0**-95))) - 14), 2.0**-109)
    places_of_x = halves_places(n, p["k"])

    def check_halves(actual):
        made = actual[places_of_x].astype(np.float64)
        np.testing.assert_allclose(made, x / scale[:, None], rtol=2**-11 + 1e-5, atol=2**-24)
        others = np.ones(len(actual), bool)
        others[places_of_x] = False
        assert (actual.view(np.uint16) == a["halves"].view(np.uint16))[others].all()

    return {"halves": check_halves, "scales": np.concatenate([scale.astype(np.float32), a["scales"][n:]])}


def _matmul_records(p, a, n, places, write):
    x = a["halves"][halves_places(n, p["k"])].astype(np.float64)
    _finish_records(p, a, n, write, x * a["scales"][:n, None].astype(np.float64))


def _linear_records(p, a, n, places, write):
    if p["tokens"] <= FUSED_TOKENS:
        x = _normalized(p, a, _read(a["x"], n, p["x_stride"], p["k"]))
    else:
        n_tiles = p["k"] // 64
        planes = a["planes"][: n * 2 * p["k"]].reshape(n, n_tiles, 2, 64).astype(np.float64)
        scales = a["ranges"][: n * n_tiles * 2].reshape(n, n_tiles, 2)[..., :1].astype(np.float64)
        x = ((planes[:, :, 0] * 256 + planes[:, :, 1]) * scales).reshape(n, -1)
    _finish_records(p, a, n, write, x)


def _finish_records(p, a, n, write, x):
    total = x @ RECORDS.unpack(a, p).astype(np.float64).T
    if p["bias"]:
        total = total + a["bias"][: p["rows"]].astype(np.float64)
    if p["epilogue"] == "gated":
        total = activate(p["activation"], total[:, : p["out_width"]]) * total[:, p["out_width"] :]
    else:
        total = activate(p["activation"], total)
    if p["residual"]:
        total = total + _read(a["residual"], n, p["residual_stride"], p["rows"])
    write("out", total, p["out_stride"])


def _quantize(p, a, n, places, write):
    n_tiles = p["k"] // 64
    x = _normalized(p, a, _read(a["x"], n, p["x_stride"], p["k"])).reshape(n, n_tiles, 64)
    scale = np.abs(x).max(2, keepdims=True) / 32639

    def check_planes(actual):
        planes = actual[: n * 2 * p["k"]].reshape(n, n_tiles, 2, 64).astype(np.int64)
        q = planes[:, :, 0] * 256 + planes[:, :, 1]
        assert np.abs(q).max() <= 32639
        np.testing.assert_allclose(q, x / scale, atol=0.55)  # half a step, and f32's rounding of a norm
        assert (actual[n * 2 * p["k"] :] == a["planes"][n * 2 * p["k"] :]).all()

    def check_ranges(actual):
        ranges = actual[: n * n_tiles * 2].reshape(n, n_tiles, 2)
        np.testing.assert_allclose(ranges[..., 0], scale[..., 0], rtol=1e-5)
        np.testing.assert_allclose(ranges[..., 1], (x / scale).sum(2), atol=33)
        assert (actual[n * n_tiles * 2 :] == a["ranges"][n * n_tiles * 2 :]).all()

    return {"planes": check_planes, "ranges": check_ranges}


def _embedding(p, a, n, places, write):
    index = a["ids"][:n] if p["source"] == "tokens" else places.positions + p["position_offset"]
    row = a["table"][: p["vocab"] * p["width"]].reshape(p["vocab"], p["width"])[index].astype(np.float64) * p["scale"]
    write("out", row, p["out_stride"])


def _rms_norm(p, a, n, places, write):
    x = _read(a["x"], n, p["x_stride"], p["heads"] * p["width"]).reshape(n, p["heads"], p["width"])
    out = x / np.sqrt((x * x).mean(-1, keepdims=True) + p["eps"]) * a["weight"][: p["width"]]
    write("out", out.reshape(n, -1), p["out_stride"])


def _layer_norm(p, a, n, places, write):
    x = _read(a["x"], n, p["x_stride"], p["width"])
    x = x - x.mean(-1, keepdims=True)
    out = x / np.sqrt((x * x).mean(-1, keepdims=True) + p["eps"]) * a["weight"][: p["width"]] + a["bias"][: p["width"]]
    write("out", out, p["out_stride"])


def _rotate(x, rope, rotary_dim):
    """x [n, heads, head_dim], rope [n, rotary_dim]: rotates pairs (i, i + rotary_dim / 2)."""
    half = rotary_dim // 2
    cos, sin = rope[:, None, :half], rope[:, None, half:]
    low, high = x[..., :half], x[..., half:rotary_dim]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, x[..., rotary_dim:]], axis=-1)


def _kv_append(p, a, n, places, write):
    q = _read(a["q"], n, p["q_stride"], p["heads"] * p["head_dim"]).reshape(n, p["heads"], -1)
    k = _read(a["k"], n, p["k_stride"], p["kv_heads"] * p["head_dim"]).reshape(n, p["kv_heads"], -1)
    v = _read(a["v"], n, p["v_stride"], p["kv_heads"] * p["head_dim"])
    if p["rotary_dim"]:
        table = a["rope"][: places.context * p["rotary_dim"]].reshape(places.context, p["rotary_dim"])
        rope = table[places.positions].astype(np.float64)
        q, k = _rotate(q, rope, p["rotary_dim"]), _rotate(k, rope, p["rotary_dim"])
    write("q", q.reshape(n, -1), p["q_stride"])
    v = v.reshape(n, p["kv_heads"], -1)
    if p["kv_dtype"] == "int8":
        return {name: _check_scaled_rows(p, a[name], rows, places) for name, rows in (("k_cache", k), ("v_cache", v))}
    width = p["kv_heads"] * p["head_dim"]
    write("k_cache", k.reshape(n, -1), width, places.rows)
    write("v_cache", v.reshape(n, -1), width, places.rows)


def scaled_rows(p, rows):
    """Rows [n, kv_heads, head_dim] as a cache of int8 holds them, i8 [n, row_elements], filled up with 0x5A."""
    made = np.full((len(rows), row_elements("int8", p["kv_heads"], p["head_dim"])), 0x5A, np.int8)
    scales = np.maximum((np.abs(rows).max(2) / 127).astype(np.float16), np.float16(2**-24))
    q = np.clip(np.rint(rows / scales[..., None].astype(np.float64)), -127, 127)
    made[:, : rows[0].size] = q.reshape(len(rows), -1)
    first = scales_at(p["kv_heads"], p["head_dim"])
    made[:, first : first + 2 * p["kv_heads"]] = scales.view(np.int8)
    return made


def _split_rows(p, made):
    """(q int8 [n, kv_heads, head_dim], scales f16 [n, kv_heads, 1]) of rows of a cache of int8."""
    first, values = scales_at(p["kv_heads"], p["head_dim"]), p["kv_heads"] * p["head_dim"]
    scales = np.ascontiguousarray(made[:, first : first + 2 * p["kv_heads"]]).view(np.float16)
    return made[:, :values].reshape(len(made), p["kv_heads"], -1), scales[..., None]


def _check_scaled_rows(p, before, rows, places):
    """That each value is the nearest that the row's scale allows, the scale takes the largest to 127, and no byte else
    was written."""
    width, first = row_elements("int8", p["kv_heads"], p["head_dim"]), scales_at(p["kv_heads"], p["head_dim"])
    written = np.concatenate([np.arange(rows[0].size), first + np.arange(2 * p["kv_heads"])])
    at = places.rows[:, None] * width + written

    def check(actual):
        q, scales = _split_rows(p, actual[places.rows[:, None] * width + np.arange(width)])
        largest, step = np.abs(rows).max(2, keepdims=True), scales.astype(np.float64)
        np.testing.assert_allclose(step, largest / 127, rtol=2**-10, atol=2**-24)
        assert (np.abs(q * step - rows) <= 0.501 * step + np.maximum(largest - 127 * step, 0)).all()
        others = actual.copy()
        others[at] = before[at]
        np.testing.assert_array_equal(others, before)

    return check


def _cache_rows(cache, at, p):
    """[rows, heads, head_dim] of a KV cache. at: which rows, int [rows]."""
    width = row_elements(p["kv_dtype"], p["kv_heads"], p["head_dim"])
    rows = cache[at[:, None] * width + np.arange(width)]
    if p["kv_dtype"] == "int8":
        q, scales = _split_rows(p, rows)
        rows = q * scales.astype(np.float64)
    rows = rows.astype(np.float64).reshape(len(at), p["kv_heads"], -1)
    return np.repeat(rows, p["heads"] // p["kv_heads"], axis=1)


def _attention(p, a, n, places, write):
    head_dim = p["head_dim"]
    q = _read(a["q"], n, p["q_stride"], p["heads"] * head_dim).reshape(n, p["heads"], head_dim)
    out = np.empty_like(q)
    for token, (slot, position) in enumerate(zip(places.slots, places.positions, strict=True)):
        seen = np.arange(max(0, position + 1 - p["window"]) if p["window"] else 0, position + 1)
        keys, vals = (_cache_rows(a[name], places.rows_of(slot, seen), p) for name in ("k_cache", "v_cache"))
        scores = p["scale"] * np.einsum("hd,shd->hs", q[token], keys)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[token] = np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), vals)
    write("out", out.reshape(n, -1), p["out_stride"])


def _append_attention(p, a, n, places, write):
    caches = {}

    def append(name, rows, stride, at=None):
        if name != "q":
            write(name, rows, stride, at)
            caches[name] = a[name].astype(np.float64)
            _rows(caches[name], at.max() + 1, stride, rows.shape[1])[at] = rows.astype(a[name].dtype)
        else:
            caches[name] = rows.reshape(-1)

    checks = _kv_append(p, a, n, places, append) or {}
    packed = {**p, "q_stride": p["heads"] * p["head_dim"]}
    if p["kv_dtype"] == "int8":  # what the kernel has appended, within a step of the right value, is what it attends to
        empty = a["out"].astype(np.float64)

        def expected_out(actual):
            made = empty.copy()

            def put(name, rows, stride):
                _rows(made, n, stride, rows.shape[1])[:] = rows

            _attention(packed, {**a, **caches}, n, places, put)
            return made

        checks["out"] = expected_out
    else:
        _attention(packed, {**a, **caches}, n, places, write)
    return {**checks, "counters": a["counters"].copy()}


def _gated_activation(p, a, n, places, write):
    gate = _read(a["gate"], n, p["gate_stride"], p["width"])
    up = _read(a["up"], n, p["up_stride"], p["width"])
    write("out", activate(p["activation"], gate) * up, p["out_stride"])


def _elementwise(p, a, n, places, write):
    x = _read(a["a"], n, p["a_stride"], p["width"])
    if p["function"] in ("add", "mul"):
        b = _read(a["b"], n, p["b_stride"], p["width"])
        out = x + b if p["function"] == "add" else x * b
    else:
        out = x * p["scalar"] if p["function"] == "scale" else activate(p["function"], x)
    write("out", out, p["out_stride"])


def _last_row(p, a, n, places, write):
    start = (n - 1) * p["x_stride"]
    write("out", a["x"][start : start + p["width"]][None].astype(np.float64), p["width"])


def _choose(p, a, n, places, write):
    try:
        token = choose(a["logits"][: p["vocab"]], a["state"][STATE_DRAW])
    except ModelError:
        token = -1
    write("token", np.array([[token]]), 1)
    return {"counters": a["counters"].copy()}


def _log_probs(p, a, n, places, write):
    logits = _read(a["logits"], n, p["x_stride"], p["vocab"])
    shifted = logits - logits.max(-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    write("result", log_probs[np.arange(n), a["targets"][:n]][None], n)
    write("argmax", logits.argmax(-1)[None], n)


_ORACLES = {
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "linear_dense": _linear(DENSE_F16),
    "linear_sparse": _linear(GROUP_WORDS),
    "embedding_records": _embedding_records,
    "linear_records": _linear_records,
    "quantize": _quantize,
    "halves": _halves,
    "matmul_records": _matmul_records,
    "kv_append": _kv_append,
    "append_attention": _append_attention,
    "attention": _attention,
    "attention_halves": _attention,
    "gated_activation": _gated_activation,
    "elementwise": _elementwise,
    "last_row": _last_row,
    "choose": _choose,
    "log_probs": _log_probs,
}


def run(op, params, arguments):
    """Contents of each output after the kernel ran: argument name -> array like the argument, or what checks it.

    A check takes what the argument became, and raises AssertionError, or returns what is to be expected of it.

    op: key of OPERATORS. params: its constants. arguments: name -> flat array or None, `state` too;
    they are not changed. Float outputs come back as float64, integers as they are.
    """
    outputs = {}

    def write(name, rows, stride, at=None):
        """at: which rows of the output these are, by default the first."""
        array = arguments[name]
        at = np.arange(len(rows)) if at is None else at
        result = array.astype(np.float64) if array.dtype.kind == "f" else array.copy()
        _rows(result, at.max() + 1, stride, rows.shape[1])[at] = rows
        outputs[name] = result

    places = Places.read(params, arguments["state"])
    checks = _ORACLES[op](params, arguments, len(places.positions), places, write)
    return outputs | (checks or {})
