"""Kernel cases: a KernelSpec, random arguments for it, and what the oracle says must come out.

They know nothing of devices: every target (C, CUDA under host emulation, a real GPU) runs all of
them. Whatever a kernel must not use is NaN; what it must not write holds, in pure outputs, a finite
value that no valid run makes, so that even a NaN written there shows up.

    case = CASES[0]
    problem = case.build()
    # run the kernel on problem.arguments: flat arrays (or None) in the order of OPERATORS[spec.op]
    problem.check()

Arguments that overlap in memory (a residual that is also the output, q, k and v inside one row) are
views of one base array: see `Problem.roots`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from gqsa_runtime.engine import launch_state
from gqsa_runtime.kv_cache import KV_ELEMENTS, held_rows, row_elements, scales_at, slot_rows
from gqsa_runtime.layouts import GROUP_WORDS
from gqsa_runtime.operators import (
    CHOOSE_PARTIAL,
    CHOOSE_SLICE,
    FUSED_TOKENS,
    OPERATORS,
    families_of,
    partials_elements,
    state_elements,
    tokens_held,
)
from gqsa_runtime.program import NUMPY_DTYPES
from gqsa_runtime.sampling import GREEDY, SamplingOptions, first_draw

from gqsac.bsr import BsrStream, pack_values
from gqsac.compiler.kernel_spec import KernelSpec, name_kernels
from tests.kernels import cases_records, oracles

POISON = -0x0BADBAD  # for i32
UNWRITTEN = {np.dtype(np.float32): -1.25e30, np.dtype(np.float16): -60000.0}
TAIL = 24  # poisoned elements after each argument
_ALIGNMENT = 64  # bytes, as tensors and buffers in a file have


@dataclass
class Problem:
    """Arguments in OPERATORS order (flat arrays or None), and the outputs that are expected of them."""

    spec: KernelSpec
    arguments: list
    expected: dict[str, np.ndarray]
    rtol: float
    atol: float

    def roots(self) -> list:
        """The distinct arrays that own the arguments' memory; arguments are views of them."""
        found = {id(_root(a)): _root(a) for a in self.arguments if a is not None}
        return list(found.values())

    def check(self) -> None:
        """Compares the arguments, after the kernel ran on them, with what is expected."""
        for operand, actual in zip(OPERATORS[self.spec.op].operands, self.arguments, strict=True):
            if operand.name not in self.expected:
                continue
            expected = self.expected[operand.name]
            if callable(expected):  # the oracle itself says what is near enough
                expected = expected(actual)
                if expected is None:
                    continue
            if actual.dtype.kind == "f":
                rtol = max(self.rtol, 1.1e-3) if actual.dtype == np.float16 else self.rtol
                np.testing.assert_allclose(
                    actual.astype(np.float64), expected, rtol, self.atol, equal_nan=True, err_msg=operand.name
                )
            else:
                np.testing.assert_array_equal(actual, expected, err_msg=operand.name)


@dataclass(frozen=True)
class Case:
    """fill(rng, params, case) returns arguments by name, without `state`.

    The tokens continue slot 0 from `position`, or have the (slot, position) that `places` gives.
    """

    name: str
    spec: KernelSpec
    fill: Callable = field(repr=False)
    n_tokens: int
    position: int
    max_tokens: int
    context: int
    rtol: float = 2e-5
    atol: float = 2e-5
    extra: object = None  # what `fill` needs beside the constants
    places: tuple[tuple[int, int], ...] = ()
    draw: tuple[int, ...] = tuple(GREEDY)

    @property
    def slots(self) -> int:
        """How many slots the KV cache has."""
        return 1 + max(slot for slot, _ in self.token_places())

    def token_places(self) -> tuple[tuple[int, int], ...]:
        """(slot, position) of each token."""
        return self.places or tuple((0, self.position + token) for token in range(self.n_tokens))

    def build(self) -> Problem:
        """The same problem at every call: the case's name seeds it."""
        rng = np.random.default_rng(list(self.name.encode()))
        params = dict(self.spec.params)
        named = self.fill(rng, params, self)
        slots, positions = np.array(self.token_places()).T
        state = _empty(state_elements(self.max_tokens), np.int32)
        state[: state_elements(self.n_tokens)] = launch_state(self.context, slots, positions, self.draw)
        if params.get("tokens") == 1:  # the decode variant must not read the count of tokens
            state[0] = POISON
        named["state"] = state
        arguments = [named[operand.name] for operand in OPERATORS[self.spec.op].operands]
        for operand, array in zip(OPERATORS[self.spec.op].operands, arguments, strict=True):
            assert (array is not None) == operand.present(params), (self.name, operand.name)
            if array is not None:
                assert len(array) >= operand.elements(params, self.max_tokens, self.context), operand.name
        return Problem(self.spec, arguments, oracles.run(self.spec.op, params, named), self.rtol, self.atol)


def _root(array):
    while array.base is not None:
        array = array.base
    return array


def _empty(count, dtype):
    """Poisoned array of count elements and a tail, aligned as in a file."""
    dtype = np.dtype(dtype)
    nbytes = (count + TAIL) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    array = raw[start : start + nbytes].view(dtype)
    array[:] = np.nan if dtype.kind == "f" else (POISON if dtype.itemsize == 4 else 0x5A)
    return array


def _output(count, dtype):
    """Like _empty, for memory that is only written."""
    array = _empty(count, dtype)
    array[:] = UNWRITTEN.get(array.dtype, POISON if array.dtype.itemsize == 4 else 0x5A)
    return array


def _array(values, dtype):
    values = np.asarray(values, dtype).ravel()
    array = _empty(len(values), dtype)
    array[: len(values)] = values
    return array


def _normal(rng, count, dtype=np.float32, scale=1.0):
    return _array(rng.standard_normal(count) * scale, dtype)


def _count(case, tokens):
    """(rows that the buffers hold, rows that are filled)."""
    return (1, 1) if tokens == 1 else (case.max_tokens, case.n_tokens)


def _activations(rng, case, params, stride, width, offset=0, filled=True, scale=1.0):
    """f32 rows of a buffer, NaN between rows and after the last token; not filled: an output."""
    rows, n_tokens = _count(case, params.get("tokens"))
    count = offset + (rows - 1) * stride + max(stride, width)
    if not filled:
        return _output(count, np.float32)[offset:]
    buffer = _empty(count, np.float32)[offset:]
    for t in range(n_tokens):
        buffer[t * stride : t * stride + width] = rng.standard_normal(width) * scale
    return buffer


def _keep(rng, pattern, rows, columns):
    """bool [rows, columns]: which groups are kept."""
    keep = rng.random((rows, columns)) < 0.5
    if pattern == "full":
        keep[:] = True
    elif pattern == "empty":
        keep[:] = False
    elif pattern == "empty_rows":
        keep[rng.random(rows) < 0.5] = False
        keep[[0, -1]] = False
    elif pattern == "full_rows":
        keep[::3] = True
    elif pattern == "skewed":
        keep = rng.random((rows, columns)) < 0.05
        keep[rows // 2] = True
        keep[-1] = True
    return keep


def _fill_epilogue(rng, p, case, out):
    if p["bias"]:
        yield "bias", _normal(rng, p["rows"])
    else:
        yield "bias", None
    if not p["residual"]:
        yield "residual", None
    elif case.name.endswith("aliased"):
        yield "residual", out
    else:
        yield "residual", _activations(rng, case, p, p["residual_stride"], p.get("out_width", p["rows"]))


def _linear_sparse(pattern, offset=0):
    def fill(rng, p, case):
        columns = p["k"] // p["group_size"]
        keep = _keep(rng, pattern, p["rows"], columns)
        crow_indices = np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int32)
        nnz = int(crow_indices[-1])
        levels = rng.integers(0, 1 << p["bits"], (nnz, p["group_size"]), dtype=np.uint8)
        size = (1 << p["bits"]) * np.sqrt(p["k"])
        stream = BsrStream(
            p["rows"], p["k"], p["group_size"], p["bits"], crow_indices, np.nonzero(keep)[1],
            values=pack_values(levels, p["bits"]),
            scales=((rng.random(nnz) + 0.5) * 2 / size).astype(np.float16),
            zeros=rng.integers(0, 1 << p["bits"], nnz) if p["bits"] < 8 else np.full(nnz, 128),
        )  # fmt: skip
        filled = p["accumulate"] or case.name.endswith("aliased")
        out = _activations(rng, case, p, p["out_stride"], p["rows"], filled=filled)
        layout = GROUP_WORDS
        dtypes = {"i8": np.int8, "i32": np.int32}
        return {
            "x": _activations(rng, case, p, p["x_stride"], p["k"], offset),
            **{
                part.name: _array(layout.pack(part.name, stream, p).reshape(-1), dtypes[part.dtype])
                for part in layout.parts
            },
            **dict(_fill_epilogue(rng, p, case, out)),
            "out": out,
        }

    return fill


def _linear_dense(offset=0):
    def fill(rng, p, case):
        out = _activations(rng, case, p, p["out_stride"], p["rows"], filled=case.name.endswith("aliased"))
        return {
            "x": _activations(rng, case, p, p["x_stride"], p["k"], offset),
            "weight": _normal(rng, p["rows"] * p["k"], np.float16, p["k"] ** -0.5),
            **dict(_fill_epilogue(rng, p, case, out)),
            "out": out,
        }

    return fill


def _embedding(rng, p, case):
    rows, n_tokens = _count(case, p["tokens"])
    ids = _empty(rows, np.int32)
    ids[:n_tokens] = rng.integers(0, p["vocab"], n_tokens)
    return {
        "ids": ids,
        "table": _normal(rng, p["vocab"] * p["width"], np.float16),
        "out": _activations(rng, case, p, p["out_stride"], p["width"], filled=False),
    }


def _norm(rng, p, case):
    width = p["width"] * p.get("heads", 1)
    x = _activations(rng, case, p, p["x_stride"], width, scale=3.0) + np.float32(0.5)
    x = _array(x[: len(x) - TAIL], np.float32)
    arguments = {"x": x, "weight": _normal(rng, p["width"])}
    if "heads" not in p:
        arguments["bias"] = _normal(rng, p["width"])
    in_place = case.name.endswith("in_place")
    out = x if in_place else _activations(rng, case, p, p["out_stride"], width, filled=False)
    return {**arguments, "out": out}


def _kv_append(rng, p, case):
    q_width, kv_width = p["heads"] * p["head_dim"], p["kv_heads"] * p["head_dim"]
    if case.name.endswith("stacked"):  # q, k and v are slices of the stacked linear's row
        q = _activations(rng, case, p, p["q_stride"], q_width + 2 * kv_width)
        k, v = q[q_width:], q[q_width + kv_width :]
    else:
        q = _activations(rng, case, p, p["q_stride"], q_width)
        k = _activations(rng, case, p, p["k_stride"], kv_width)
        v = _activations(rng, case, p, p["v_stride"], kv_width)
    rope = None
    if p["rotary_dim"]:
        angles = rng.random((case.context, p["rotary_dim"] // 2)) * 6.3
        rope = _array(np.concatenate([np.cos(angles), np.sin(angles)], 1), np.float32)
    row, dtype = _cache_row(p)
    caches = [_output(case.slots * slot_rows(p["window"], case.context) * row, dtype) for _ in range(2)]
    return {"q": q, "k": k, "v": v, "rope": rope, "k_cache": caches[0], "v_cache": caches[1]}


def _cache_row(p):
    """(elements of a row of a cache, their dtype)."""
    return row_elements(p["kv_dtype"], p["kv_heads"], p["head_dim"]), NUMPY_DTYPES[KV_ELEMENTS[p["kv_dtype"]]]


def _attention(rng, p, case):
    width, dtype = _cache_row(p)
    seen = np.zeros((case.slots, slot_rows(p["window"], case.context)), bool)  # all other rows must not be used
    for slot, position in case.token_places():
        positions = np.arange(max(0, position + 1 - p["window"]) if p["window"] else 0, position + 1)
        seen[slot, positions % seen.shape[1]] = True
    caches = []
    for factor in (1.0, case.extra or 1.0):
        cache = _empty(seen.size * width, dtype)
        rows = cache[: seen.size * width].reshape(-1, width)
        if p["kv_dtype"] == "int8":  # tokens differ in how large they are
            rows[:, scales_at(p["kv_heads"], p["head_dim"]) :].view(np.float16)[:] = np.nan
            values = rng.standard_normal((seen.sum(), p["kv_heads"], p["head_dim"])) * factor
            rows[seen.ravel()] = oracles.scaled_rows(p, values * rng.uniform(0.1, 1.2, (seen.sum(), 1, 1)))
        else:
            rows[seen.ravel()] = rng.standard_normal((seen.sum(), width))
        caches.append(cache)
    return {
        "q": _activations(rng, case, p, p["q_stride"], p["heads"] * p["head_dim"], scale=2.0),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "out": _activations(rng, case, p, p["out_stride"], p["heads"] * p["head_dim"], filled=False),
    }


def _gated_activation(rng, p, case):
    if case.name.endswith("stacked"):
        gate = _activations(rng, case, p, p["gate_stride"], 2 * p["width"], scale=2.0)
        up = gate[p["width"] :]
    else:
        gate = _activations(rng, case, p, p["gate_stride"], p["width"], scale=2.0)
        up = _activations(rng, case, p, p["up_stride"], p["width"])
    return {"gate": gate, "up": up, "out": _activations(rng, case, p, p["out_stride"], p["width"], filled=False)}


def _elementwise(rng, p, case):
    a = _activations(rng, case, p, p["a_stride"], p["width"], scale=2.0)
    b = _activations(rng, case, p, p["b_stride"], p["width"]) if p["function"] in ("add", "mul") else None
    in_place = case.name.endswith("in_place")
    return {
        "a": a,
        "b": b,
        "out": a if in_place else _activations(rng, case, p, p["out_stride"], p["width"], filled=False),
    }


def _last_row(rng, p, case):
    return {"x": _activations(rng, case, p, p["x_stride"], p["width"]), "out": _output(p["width"], np.float32)}


def _choose(rng, p, case):
    """extra: (places, value) of some of the logits, or what makes all of them from normal ones."""
    logits = _activations(rng, case, {"tokens": 1}, p["vocab"], p["vocab"], scale=4.0)
    if callable(case.extra):
        logits[: p["vocab"]] = case.extra(logits[: p["vocab"]])
    else:
        places, value = case.extra
        logits[[int(place * (p["vocab"] - 1)) for place in places]] = value
    return {
        "logits": logits,
        "partials": _output(-(-p["vocab"] // CHOOSE_SLICE) * CHOOSE_PARTIAL, np.int32),
        "counters": _array([0], np.int32),
        "token": _output(1, np.int32),
    }


def _log_probs(rng, p, case):
    rows, n_tokens = _count(case, p["tokens"])
    logits = _activations(rng, case, p, p["x_stride"], p["vocab"], scale=4.0)
    for t in range(n_tokens):  # a tie: the first of the largest wins
        row = logits[t * p["x_stride"] : t * p["x_stride"] + p["vocab"]]
        row[[p["vocab"] // 3, p["vocab"] // 2, p["vocab"] - 1]] = 23.5
    targets = _empty(rows, np.int32)
    targets[:n_tokens] = rng.integers(0, p["vocab"], n_tokens)
    return {
        "logits": logits,
        "targets": targets,
        "result": _output(rows, np.float32),
        "argmax": _output(rows, np.int32),
    }


def _sparse_cases():
    base = {
        "tokens": 1, "rows": 37, "k": 576, "group_size": 16, "bits": 4, "n_tasks": 7, "x_stride": 576,
        "out_stride": 37, "bias": False, "activation": "none", "residual": False, "residual_stride": 37,
        "accumulate": False,
    }  # fmt: skip

    def case(name, pattern="random", offset=0, **changes):
        n_tokens, position = changes.pop("n_tokens", 1), changes.pop("position", 3)
        params = {**base, "x_stride": changes.get("k", 576), "out_stride": changes.get("rows", 37), **changes}
        params = {**params, "residual_stride": changes.get("residual_stride", params["out_stride"])}
        fill = _linear_sparse(pattern, offset)
        yield Case(
            f"linear_sparse/{name}", KernelSpec.make("linear_sparse", **params), fill, n_tokens, position, 16, 64
        )

    for group_size, k in ((8, 72), (8, 40), (16, 576), (32, 576), (64, 576), (128, 640)):
        for bits in (2, 4, 8):
            yield from case(f"g{group_size}_k{k}_w{bits}", group_size=group_size, k=k, bits=bits)
            if k != 40:
                yield from case(
                    f"g{group_size}_k{k}_w{bits}_tile", group_size=group_size, k=k, bits=bits, tokens=8, n_tokens=5
                )
    for pattern in ("full", "empty", "empty_rows", "full_rows", "skewed"):
        yield from case(pattern, pattern, bias=True)
        yield from case(f"{pattern}_tile", pattern, bias=True, tokens=8, n_tokens=13)
    for n_tasks in (1, 37, 64):
        yield from case(f"tasks_{n_tasks}", "skewed", n_tasks=n_tasks)
    yield from case("rows_1", rows=1, n_tasks=1)
    yield from case("rows_1024", "full_rows", rows=1024, k=40, group_size=8, n_tasks=300)
    yield from case("wide_k_4096", k=4096, rows=9, n_tasks=5, residual=True)
    yield from case("wide_k_11008", "skewed", k=11008, rows=6, n_tasks=4)
    # More than 96 KB of activations: x is not staged in shared memory.
    yield from case("wide_k_28672", k=28672, rows=5, n_tasks=3, activation="relu")
    yield from case("last_column_of_4096", "full", k=32768, rows=2, group_size=8, n_tasks=2)
    yield from case("unaligned_x", offset=3)
    yield from case("unaligned_x_tile", offset=5, x_stride=577, tokens=8, n_tokens=8)
    for activation in ("relu", "silu", "gelu", "gelu_tanh"):
        yield from case(f"epilogue_{activation}", activation=activation, bias=True, residual=True)
        yield from case(f"epilogue_{activation}_accumulate", activation=activation, accumulate=True)
    yield from case("residual_aliased", residual=True)
    yield from case("accumulate", accumulate=True)
    yield from case("everything", accumulate=True, bias=True, activation="silu", residual=True, residual_stride=40)
    for n_tokens in (1, 5, 8, 13, 16):
        yield from case(
            f"tile_tokens_{n_tokens}", tokens=8, n_tokens=n_tokens, x_stride=584, out_stride=45, residual_stride=50,
            bias=True, activation="gelu", residual=True, accumulate=True, bits=2,
        )  # fmt: skip
    yield from case("tile_residual_aliased", tokens=8, n_tokens=13, residual=True, out_stride=41)
    yield from case("tile_wide", tokens=8, n_tokens=3, k=4096, rows=5, n_tasks=2)
    yield from case("few", tokens=FUSED_TOKENS, n_tokens=7, bias=True, residual=True)


def _dense_cases():
    def case(name, offset=0, n_tokens=1, **changes):
        params = {
            "tokens": 1, "rows": 37, "k": 72, "x_stride": changes.get("k", 72), "out_stride": changes.get("rows", 37),
            "bias": False, "activation": "none", "residual": False, "residual_stride": changes.get("rows", 37),
            **changes,
        }  # fmt: skip
        spec = KernelSpec.make("linear_dense", **params)
        yield Case(f"linear_dense/{name}", spec, _linear_dense(offset), n_tokens, 2, 16, 64)

    for rows, k in ((37, 72), (1001, 40), (50, 576), (3, 4096), (11, 35), (1, 8), (2, 28672)):
        yield from case(f"r{rows}_k{k}", rows=rows, k=k)
        if k != 28672:
            yield from case(f"r{rows}_k{k}_tile", rows=rows, k=k, tokens=8, n_tokens=13)
    yield from case("unaligned_x", offset=1)
    yield from case("unaligned_x_tile", offset=1, x_stride=77, tokens=8, n_tokens=5)
    yield from case("few", tokens=FUSED_TOKENS, n_tokens=7, bias=True, residual=True)
    for activation in ("relu", "silu", "gelu", "gelu_tanh"):
        yield from case(f"epilogue_{activation}", bias=True, activation=activation, residual=True, residual_stride=44)
    yield from case("residual_aliased", residual=True)
    for n_tokens in (1, 5, 8):
        yield from case(
            f"tile_tokens_{n_tokens}", tokens=8, n_tokens=n_tokens, x_stride=80, out_stride=43, residual_stride=39,
            bias=True, activation="silu", residual=True,
        )  # fmt: skip


# Tokens of several slots in one launch: runs one after another, runs that do not begin at 0, single tokens in turn.
MIXED_PLACES = {
    "two_slots": (*((1, position) for position in range(5, 10)), *((0, position) for position in range(4))),
    "interleaved": tuple((token % 2, 3 + token // 2 * (token % 2 + 1)) for token in range(13)),
    "gap": (*((2, position) for position in range(3)), *((2, position) for position in range(7, 12)), (0, 0), (1, 20)),
}


def _simple_cases():
    def case(name, fill, n_tokens=1, position=3, context=64, places=(), extra=None, draw=tuple(GREEDY), **params):
        spec = KernelSpec.make(name.split("/")[0], **params)
        n_tokens = len(places) or n_tokens
        return Case(name, spec, fill, n_tokens, position, 16, context, places=places, extra=extra, draw=draw)

    table = {"vocab": 101, "width": 72, "position_offset": 0, "scale": 1.0, "out_stride": 72}
    for source, offset in (("tokens", 0), ("positions", 2)):
        changes = {**table, "source": source, "position_offset": offset}
        yield case(f"embedding/{source}", _embedding, tokens=1, **changes)
        yield case(f"embedding/{source}_tile", _embedding, 13, tokens=8, **{**changes, "out_stride": 81})
        changes = {**changes, "scale": 8.5}
        yield case(f"embedding/{source}_scaled", _embedding, tokens=1, **changes)
        yield case(f"embedding/{source}_scaled_tile", _embedding, 5, tokens=8, **changes)
    for mix, places in MIXED_PLACES.items():
        changes = {**table, "source": "positions", "position_offset": 2}
        yield case(f"embedding/positions_{mix}", _embedding, places=places, tokens=8, **changes)
    yield case("embedding/wide", _embedding, tokens=1, **{**table, "width": 2049, "out_stride": 2049}, source="tokens")

    for width in (40, 576, 4099):
        strides = {"x_stride": width + 3, "out_stride": width + 8, "eps": 1e-5}
        for tokens, n_tokens in ((1, 1), (8, 13)):
            tail = "" if tokens == 1 else "_tile"
            yield case(f"rms_norm/n{width}{tail}", _norm, n_tokens, tokens=tokens, width=width, heads=1, **strides)
            yield case(f"layer_norm/n{width}{tail}", _norm, n_tokens, tokens=tokens, width=width, **strides)
    in_place = {"x_stride": 576, "out_stride": 576, "eps": 1e-6}
    yield case("rms_norm/in_place", _norm, tokens=1, width=576, heads=1, **in_place)
    yield case("layer_norm/in_place", _norm, 5, tokens=8, width=576, **in_place)
    for heads, width in ((9, 64), (3, 128)):
        strides = {"x_stride": heads * width + 32, "out_stride": heads * width + 32, "eps": 1e-6}
        yield case(f"rms_norm/heads{heads}_n{width}", _norm, tokens=1, heads=heads, width=width, **strides)
        yield case(f"rms_norm/heads{heads}_n{width}_in_place", _norm, 5, tokens=8, heads=heads, width=width, **strides)

    for kv_dtype in KV_ELEMENTS:
        for heads, kv_heads, head_dim, rotary_dim in ((9, 3, 64, 64), (4, 4, 80, 32), (2, 1, 128, 0), (2, 1, 256, 256)):
            shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "window": 0}
            row = (heads + 2 * kv_heads) * head_dim
            strides = {"q_stride": row, "k_stride": row, "v_stride": row, "rotary_dim": rotary_dim}
            name = f"h{heads}_kv{kv_heads}_d{head_dim}_rotary{rotary_dim}_{kv_dtype}"
            shape["kv_dtype"] = kv_dtype
            yield case(f"kv_append/{name}_stacked", _kv_append, 1, 11, tokens=1, **shape, **strides)
            yield case(f"kv_append/{name}_tile_stacked", _kv_append, 13, 7, tokens=8, **shape, **strides)
            strides = {
                "q_stride": heads * head_dim,
                "k_stride": kv_heads * head_dim + 5,
                "v_stride": kv_heads * head_dim,
            }
            yield case(f"kv_append/{name}", _kv_append, 5, 0, tokens=8, rotary_dim=rotary_dim, **shape, **strides)

    for kv_dtype in KV_ELEMENTS:
        shape = {"heads": 4, "kv_heads": 2, "head_dim": 40, "rotary_dim": 16, "kv_dtype": kv_dtype, "window": 0}
        strides = {"q_stride": 160, "k_stride": 80, "v_stride": 80}
        yield case(f"kv_append/slot_2_{kv_dtype}", _kv_append, places=((2, 11),), tokens=1, **shape, **strides)
        for mix, places in MIXED_PLACES.items():
            yield case(f"kv_append/{mix}_{kv_dtype}", _kv_append, places=places, tokens=8, **shape, **strides)
        # Past the rows that a layer with a window has: the places of the first ones again.
        shape |= {"window": 16}
        far = {"context": 700, **shape, **strides}
        yield case(f"kv_append/far_{kv_dtype}", _kv_append, places=((1, held_rows(16) + 3),), tokens=1, **far)
        yield case(f"kv_append/far_{kv_dtype}_tile", _kv_append, 9, held_rows(16) - 5, tokens=8, **far)

    for function in ("relu", "silu", "gelu", "gelu_tanh"):
        gated = {"width": 200, "activation": function, "gate_stride": 400, "up_stride": 400, "out_stride": 200}
        yield case(f"gated_activation/{function}_stacked", _gated_activation, tokens=1, **gated)
        gated = {"width": 67, "activation": function, "gate_stride": 70, "up_stride": 67, "out_stride": 69}
        yield case(f"gated_activation/{function}_tile", _gated_activation, 13, tokens=8, **gated)
    for function in ("add", "mul", "scale", "relu", "silu", "gelu", "gelu_tanh"):
        each = {"function": function, "scalar": 0.375 if function == "scale" else 1.0}
        strides = {"a_stride": 70, "b_stride": 67, "out_stride": 69}
        yield case(f"elementwise/{function}_tile", _elementwise, 5, tokens=8, width=67, **each, **strides)
        strides = {"a_stride": 576, "b_stride": 576, "out_stride": 576}
        yield case(f"elementwise/{function}_in_place", _elementwise, tokens=1, width=576, **each, **strides)

    for n_tokens in (1, 13):
        yield case(f"last_row/tokens_{n_tokens}", _last_row, n_tokens, width=77, x_stride=80)
    for vocab in (3, 2051, 32003):
        # The largest first, last, in between; several of them.
        for name, places in {
            "first": [0],
            "last": [1],
            "inside": [0.37],
            "ties": [0.2, 0.4, 0.9],
            "far": [1, 0],
        }.items():
            yield case(f"choose/v{vocab}_{name}", _choose, vocab=vocab, extra=(places, 23.5))
    yield from _drawn_cases(case)
    for name, extra in {
        "nan": ([0.7], np.nan),
        "nan_last": ([1], np.nan),
        "infinite": ([0.4], np.inf),
        "some_removed": ([0, 1], -np.inf),
        "nothing": lambda logits: np.full_like(logits, -np.inf),
        "zeros": lambda logits: np.full_like(logits, -0.0),
    }.items():
        yield case(f"choose/v2051_{name}", _choose, vocab=2051, extra=extra)
        yield case(f"choose/v2051_{name}_drawn", _choose, vocab=2051, extra=extra, draw=_draw(7, top_p=0.9))
    for vocab in (101, 4999):
        yield case(f"log_probs/v{vocab}", _log_probs, tokens=1, vocab=vocab, x_stride=vocab)
        yield case(f"log_probs/v{vocab}_tile", _log_probs, 13, tokens=8, vocab=vocab, x_stride=vocab + 5)


def _draw(seed, temperature=0.8, **options):
    return tuple(first_draw(SamplingOptions(temperature=temperature, **options), seed))


def _drawn_cases(case):
    alone = ([0.5], 0.0)
    flat = lambda logits: logits * 0.01  # noqa: E731  more tokens in an octave than are listed
    same = lambda logits: np.full_like(logits, 3.25)  # noqa: E731
    steep = lambda logits: np.where(np.arange(len(logits)) % 97 == 5, logits, -np.inf)  # noqa: E731
    for seed, (name, vocab, extra, options) in enumerate(
        [
            ("everything", 32003, alone, {"top_k": 40, "top_p": 0.95, "min_p": 0.05}),
            ("plain", 3, alone, {}),
            ("plain", 2048, alone, {}),
            ("plain", 9001, alone, {}),
            ("plain_hot", 9001, alone, {"temperature": 3.0}),
            ("plain_cold", 9001, alone, {"temperature": 0.001}),
            ("plain_coldest", 9001, alone, {"temperature": 1e-300}),
            ("flat", 32003, flat, {}),
            ("flat_top_p", 32003, flat, {"top_p": 0.6}),
            ("flat_everything", 32003, flat, {"top_k": 20000, "top_p": 0.9, "min_p": 0.92}),
            ("same", 12007, same, {"temperature": 1.0}),
            ("same_top_k", 12007, same, {"top_k": 7000}),
            ("same_top_p", 12007, same, {"top_p": 0.5, "temperature": 1.0}),
            ("same_everything", 3001, same, {"top_k": 2500, "top_p": 0.5, "min_p": 0.5}),
            ("steep", 9001, steep, {"top_p": 0.99}),
            ("steep_top_k", 9001, steep, {"top_k": 500}),
            ("top_k", 9001, alone, {"top_k": 40}),
            ("top_k_all", 9001, alone, {"top_k": 9001}),
            ("top_p", 9001, alone, {"top_p": 0.95}),
            ("top_p_all", 9001, alone, {"top_p": 0.999999999}),
            ("top_p_few", 9001, alone, {"top_p": 1e-12}),
            ("min_p", 9001, alone, {"min_p": 0.05}),
            ("min_p_all", 9001, alone, {"min_p": 1e-300}),
            ("far_tail", 32003, lambda logits: logits * 3, {"temperature": 0.3}),
        ]
    ):
        yield case(f"choose/v{vocab}_{name}", _choose, vocab=vocab, extra=extra, draw=_draw(seed, **options))
    for seed in range(12):  # random numbers from near 0 to near 1
        yield case(f"choose/v4100_seed_{seed}", _choose, vocab=4100, extra=alone, draw=_draw(seed, 1.3, top_p=0.97))


def _attention_cases():
    def case(
        name, n_tokens, position, context=96, heads=4, kv_heads=2, head_dim=64, kv_dtype="f16", window=0, places=(),
        extra=None, **changes,
    ):  # fmt: skip
        width = heads * head_dim
        params = {
            "tokens": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5,
            "window": window, "kv_dtype": kv_dtype, "q_stride": width, "out_stride": width, **changes,
        }  # fmt: skip
        spec = KernelSpec.make("attention", **params)
        atol = 5e-5 * (extra or 1.0)
        return Case(
            f"attention/{name}",
            spec,
            _attention,
            n_tokens,
            position,
            80,
            context,
            atol=atol,
            extra=extra,
            places=places,
        )

    for kv_dtype in KV_ELEMENTS:
        for heads, kv_heads, head_dim in ((9, 3, 64), (2, 2, 80), (4, 1, 128), (2, 1, 256), (2, 1, 20)):
            shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype}
            name = f"h{heads}_kv{kv_heads}_d{head_dim}_{kv_dtype}"
            yield case(name, 1, 37, **shape)
            yield case(f"{name}_tile", 13, 21, **shape, tokens=8)
    for position in (0, 1, 31, 700):
        yield case(f"position_{position}", 1, position, 704)
    for n_tokens, position in ((1, 0), (5, 0), (8, 64), (80, 3), (80, 0)):
        yield case(f"tile_tokens_{n_tokens}_position_{position}", n_tokens, position, tokens=8)
    for window in (1, 16, 4096):
        yield case(f"window_{window}", 1, 90, window=window)
        yield case(f"window_{window}_tile", 13, 70, window=window, tokens=8)
    yield case("slot_2", 1, 37, places=((2, 37),))
    yield case("slot_2_window_16", 1, 37, window=16, places=((2, 37),))
    far = held_rows(40) + 11  # within the window of the last row that a slot has
    for kv_dtype in ("f16", "int8"):
        beyond = {"context": 640, "window": 40, "kv_dtype": kv_dtype}
        yield case(f"far_{kv_dtype}", 1, 0, places=((1, far),), **beyond)
        yield case(f"far_{kv_dtype}_tile", 70, far - 40, tokens=8, **beyond)
    wide = tuple((token // 30, 7 + token % 30) for token in range(80))  # runs that cross tiles of queries
    for mix, places in {**MIXED_PLACES, "wide": wide}.items():
        for window in (0, 4):
            yield case(f"{mix}_window_{window}", len(places), 0, places=places, window=window, tokens=8)
        yield case(f"{mix}_d256_f32", len(places), 0, places=places, head_dim=256, kv_dtype="f32", tokens=8)
    for name, tokens, n_tokens in (("", 1, 1), ("_tile", 8, 13)):
        yield case(f"small_values{name}", n_tokens, 40, kv_dtype="int8", extra=1e-5, tokens=tokens)
    strides = {"q_stride": 300, "out_stride": 261}
    yield case("strides", 1, 5, **strides)
    yield case("strides_tile", 70, 5, tokens=8, **strides)


def _attention_halves_cases(kv_dtype):
    def case(
        name,
        n_tokens,
        position,
        context=96,
        heads=4,
        kv_heads=2,
        head_dim=64,
        window=0,
        places=(),
        extra=None,
        **changes,
    ):
        width = heads * head_dim
        params = {
            "tokens": 128, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5,
            "window": window, "kv_dtype": kv_dtype, "q_stride": width, "out_stride": width, **changes,
        }  # fmt: skip
        spec = KernelSpec.make("attention_halves", **params)
        # Queries and weights are rounded to 11 bits.
        return Case(
            f"attention_halves/{kv_dtype}_{name}", spec, _attention, n_tokens, position, max(80, n_tokens), context,
            1e-3, 4e-3 * (extra or 1.0), extra, places=places,
        )  # fmt: skip

    for heads, kv_heads, head_dim in ((9, 3, 64), (2, 2, 80), (2, 1, 96), (2, 2, 112), (4, 1, 128), (2, 1, 16)):
        yield case(f"h{heads}_kv{kv_heads}_d{head_dim}", 13, 21, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for n_tokens, position in ((1, 0), (5, 0), (16, 64), (17, 63), (80, 3), (80, 0), (130, 190)):
        context = 320 if n_tokens > 80 else 96
        yield case(f"tokens_{n_tokens}_position_{position}", n_tokens, position, context, heads=2, kv_heads=1)
    if kv_dtype == "f16":  # what no type of cache changes is tried with this one
        for window in (1, 16, 4096):
            yield case(f"window_{window}", 70, 20, window=window)
        yield case("strides", 70, 5, q_stride=300, out_stride=261)
    far = tuple((1, held_rows(40) - 30 + token) for token in range(70))  # beyond the last row that a slot has
    yield case("far", 70, 0, context=640, window=40, places=far)
    wide = tuple((token // 30, 7 + token % 30) for token in range(80))  # runs that cross tiles of queries
    for mix, places in {**MIXED_PLACES, "wide": wide}.items():
        for window in (0, 4) if kv_dtype == "f16" else (4,):
            yield case(f"{mix}_window_{window}", len(places), 0, places=places, window=window)
    if kv_dtype == "int8":
        yield case("small_values", 70, 5, extra=1e-5)
        yield case("large_values", 70, 5, extra=1e5)


def _append_attention(rng, p, case):
    past = _attention(rng, p, case)
    half = p["rotary_dim"] // 2
    angles = rng.random((case.context, half)) * 6.3
    counters = _array(np.zeros(tokens_held(p) * p["heads"]), np.int32)
    kv_width = p["kv_heads"] * p["head_dim"]
    return {
        **past,
        "k": _activations(rng, case, p, p["k_stride"], kv_width),
        "v": _activations(rng, case, p, p["v_stride"], kv_width),
        "rope": _array(np.concatenate([np.cos(angles), np.sin(angles)], 1), np.float32) if half else None,
        "partials": _output(partials_elements(p), np.float32),
        "counters": counters,
    }


def _append_attention_cases(kv_dtype):
    f16 = kv_dtype == "f16"  # what no type of cache changes is tried with this one

    def case(name, position, heads=4, kv_heads=2, head_dim=64, window=0, places=(), n_tokens=1, **changes):
        params = {
            "tokens": 1, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5,
            "window": window, "kv_dtype": kv_dtype, "rotary_dim": head_dim, "splits": 4, "q_stride": heads * head_dim,
            "k_stride": kv_heads * head_dim, "v_stride": kv_heads * head_dim, "out_stride": heads * head_dim, **changes,
        }  # fmt: skip
        spec = KernelSpec.make("append_attention", **params)
        context = 704 if position > 90 or max(places, default=(0, 0))[1] > 90 else 96
        return Case(
            f"append_attention/{kv_dtype}_{name}", spec, _append_attention, n_tokens, position, n_tokens, context,
            atol=5e-5, places=places,
        )  # fmt: skip

    shapes = ((9, 3, 64), (2, 2, 80), (8, 1, 128), (14, 2, 64), (22, 2, 48), (2, 1, 256), (5, 1, 16))
    for heads, kv_heads, head_dim in shapes:
        yield case(f"h{heads}_kv{kv_heads}_d{head_dim}", 70, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    for position in (0, 1, 15, 16, 31, 90, 127, 128, 260, 700):
        yield case(f"position_{position}", position)
    for window in (1, 16, 40, 4096) if f16 else (40,):
        yield case(f"window_{window}", 90, window=window)
    for rotary_dim in (0, 32) if f16 else (32,):
        yield case(f"rotary_{rotary_dim}", 40, rotary_dim=rotary_dim)
    yield case("slot_2", 37, places=((2, 37),))
    far = held_rows(40) + 11  # within the window of the last row that a slot has
    yield case("far", 0, window=40, places=((1, far),))
    few = {"tokens": FUSED_TOKENS}
    for position, n_tokens in ((0, 1), (0, 8), (13, 5), (60, 8), (255, 4), (381, 3), (692, 8))[: 7 if f16 else 4]:
        yield case(f"few_{position}_{n_tokens}", position, n_tokens=n_tokens, **few)
    for heads, kv_heads, head_dim in shapes if f16 else shapes[1:3]:
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, **few}
        yield case(f"few_h{heads}_kv{kv_heads}_d{head_dim}", 70, n_tokens=3, **shape)
    if f16:
        yield case("one_run", 300, splits=1)
        yield case("few_window", 80, window=4, n_tokens=7, **few)
        yield case("few_without_rope", 40, rotary_dim=0, n_tokens=3, **few)
        yield case("few_strides", 40, n_tokens=5, q_stride=300, k_stride=140, v_stride=131, out_stride=261, **few)
    yield case("few_far", 0, window=40, places=tuple((1, far - 13 + i) for i in range(8)), n_tokens=8, **few)
    mixed = ((2, 37), (2, 38), (0, 8), (0, 9), (1, 0), (1, 1), (1, 2), (3, 12))
    yield case("few_slots", 0, places=mixed, n_tokens=8, **few)


_HELPERS = SimpleNamespace(
    activations=_activations, array=_array, fill_epilogue=_fill_epilogue, normal=_normal, output=_output
)
CASES: tuple[Case, ...] = (
    *_sparse_cases(),
    *_dense_cases(),
    *_simple_cases(),
    *_attention_cases(),
    *_attention_halves_cases("f16"),
    *_attention_halves_cases("int8"),
    *_append_attention_cases("f16"),
    *_append_attention_cases("int8"),
    *cases_records.make_cases(Case, _HELPERS),
)
CPU_CASES, CUDA_CASES = (
    tuple(case for case in CASES if family in families_of(case.spec.op, dict(case.spec.params)))
    for family in ("cpu", "cuda")
)
# Kernel names, unique over all cases: equal specs share one kernel.
KERNEL_NAMES: dict[KernelSpec, str] = name_kernels([case.spec for case in CASES])
CUDA_NAMES: dict[KernelSpec, str] = {case.spec: KERNEL_NAMES[case.spec] for case in CUDA_CASES}


def cases_with_dots() -> list[Case]:
    """For a target that adds dot products to another: of linear_records one case for each set of widths, for one token
    and for several. That the arithmetic gives the same bits, `test_cpu_records` and `test_cpu_arm` see.
    """
    kinds: dict[tuple, Case] = {}
    for case in CPU_CASES:
        if case.spec.op == "linear_records":
            params = dict(case.spec.params)
            kinds.setdefault((params["widths"], params["masked_widths"], params["tokens"] == 1), case)
    return list(kinds.values())
