"""How CUDA launches each operator's kernel: grid, block and dynamic shared memory from its constants.

Here alone is decided how work is cut among threads. What a kernel must know of that is stamped into its constants
(`launch` in the templates); headers never work it out again. Grids cover the largest launch (`max_tokens` rows) and
never change, because launches are captured in CUDA graphs: blocks past the last token exit at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gqsa_runtime.errors import UnsupportedError
from gqsa_runtime.operators import CHOOSE_SLICE, FEW_TOKENS, tokens_held
from gqsa_runtime.program import Launch

from gqsac.compiler.kernel_spec import KernelSpec
from gqsac.compiler.records_launch import (
    MIN_BYTES,
    MULTIPROCESSORS,
    SM_90_BYTES,
    SM_90_HALF_BYTES,
    ceil_div,
    matmul_launch,
    records_launch,
)

WARP = 32
MAX_SHARED_BYTES = 98 * 1024  # leaves sm_86, sm_89 and sm_120 their reserve
_MAX_GRID_Y = 65535
_POINTWISE_BLOCK = 128
_NORM_BLOCK = 512
_MAX_WARP_NORM_WIDTH = 512  # wider rows take a block
_ATTENTION_DECODE_BLOCK = 512
_ATTENTION_PREFILL_BLOCK = 256
# When one token attends, or a few: most of them that a block takes together; fewest cached rows worth a run of the
# context; warps of a block, the first number of them that has room for two tiles of 16 rows each; most tiles of a warp.
_ATTENTION_TOKENS, _RUN_KEYS, _ATTENTION_WARPS, _ATTENTION_STAGES = 4, 256, (8, 4, 2, 1), 4
_DENSE_BLOCK = 256


@dataclass(frozen=True)
class Geometry:
    """How a kernel's work is cut. grid: from the most tokens of a launch, blocks (x, y). block: threads.

    shared_bytes: of dynamic shared memory. constants: what the kernel's template is given as `launch`, MAX_BLOCK
    (for its launch bounds, by default the block) among it.
    """

    grid: Callable[[int], tuple[int, int]]
    block: int
    shared_bytes: int = 0
    constants: Mapping[str, int | bool] = field(default_factory=dict)


def own_targets(op: str) -> tuple[str, ...]:
    """Targets on which an operator's work is cut in a way of their own."""
    return _OWN_TARGETS.get(op, ())


def geometry(spec: KernelSpec, target: str = "") -> Geometry:
    """How a kernel's work is cut on a target, "" for all without a way of their own."""
    made = _GEOMETRIES[spec.op](dict(spec.params), *((target,) if own_targets(spec.op) else ()))
    return Geometry(made.grid, made.block, made.shared_bytes, {"MAX_BLOCK": made.block, **made.constants})


def launches(spec: KernelSpec, max_tokens: int) -> dict[str, Launch]:
    """A kernel's launch by target, as program.Kernel holds them."""
    return {target: launch(spec, max_tokens, target) for target in ("", *own_targets(spec.op))}


def launch(spec: KernelSpec, max_tokens: int, target: str = "") -> Launch:
    """Grid, block and dynamic shared memory of a kernel on a target.

    max_tokens: most rows in one launch (the plan's prefill_chunk); decode kernels (tokens = 1)
    always cover one. Raises UnsupportedError where a kernel cannot be launched on every target.
    """
    target = target if target in own_targets(spec.op) else ""
    params, made = dict(spec.params), geometry(spec, target)
    x, y = made.grid(1 if params.get("tokens") == 1 else max_tokens)
    if y > _MAX_GRID_Y:
        raise UnsupportedError(
            f"a launch of {spec.op} over {max_tokens} tokens needs {y} block rows, CUDA allows {_MAX_GRID_Y}; "
            "build with a smaller prefill chunk"
        )
    most = SM_90_BYTES if target else MAX_SHARED_BYTES
    if made.shared_bytes > most:
        raise UnsupportedError(
            f"{spec.op} with {params} needs {made.shared_bytes} bytes of shared memory, "
            f"{target or 'every supported GPU'} offers only {most}; such a model cannot be built for CUDA"
        )
    return Launch((x, y, 1), made.block, made.shared_bytes)


def _staging(k: int, unit: int) -> tuple[int, dict]:
    """(bytes of shared memory, constants) of one token's activations in it, see activations_in_shared.cuh.

    0 bytes, and STAGED false, where they do not fit: then they are read through the cache.
    """
    planes, units = unit // 4, k // unit
    # Planes lie so far apart that neither the writes along x nor the reads of units meet bank conflicts.
    skew = 8 // planes if planes > 1 else 0
    stride = units + (skew - units % 8) % 8
    size = planes * stride * 16
    staged = size <= MAX_SHARED_BYTES
    return size if staged else 0, {"STAGED": staged, "STAGE_STRIDE": stride}


def _segment(loads: int) -> int:
    """Lanes that share a row of so many loads: a power of two, so that each has about 8 or more."""
    return max(4, min(WARP, 1 << max(0, (loads // 8).bit_length() - 1)))


def _linear_sparse(p):
    unit = min(p["group_size"], 16)  # weights that a lane loads at once
    if p["tokens"] > 1:
        block = 256
        constants = {"UNIT": unit, "SEGMENT": _segment(p["k"] // unit)}
        return Geometry(
            lambda n_tokens: (ceil_div(p["n_tasks"], block // WARP), ceil_div(n_tokens, p["tokens"])),
            block,
            constants=constants,
        )
    # Large blocks share one copy of x; with few tasks, small blocks reach more multiprocessors.
    block = 512 if p["n_tasks"] >= 2048 else 256 if p["n_tasks"] >= 1024 else 128
    shared_bytes, staging = _staging(p["k"], unit)
    constants = {"MAX_BLOCK": 512, "UNIT": unit, **staging}
    return Geometry(lambda n_tokens: (ceil_div(p["n_tasks"], block // WARP), 1), block, shared_bytes, constants)


def _linear_dense(p):
    chunk = 8 if p["k"] % 8 == 0 else 1  # weights per load: otherwise rows do not start on 16 bytes
    segment = _segment(p["k"] // chunk)
    # Sets of rows that a warp takes one after another: with many rows, fewer blocks stage x.
    row_steps = 4 if p["rows"] > 16384 else 1
    grid = ceil_div(p["rows"], WARP // segment * row_steps * (_DENSE_BLOCK // WARP))
    decode = p["tokens"] == 1
    shared_bytes, staging = _staging(p["k"], 8) if decode and chunk == 8 else (0, {"STAGED": False, "STAGE_STRIDE": 0})
    constants = {"CHUNK": chunk, "SEGMENT": segment, "ROW_STEPS": row_steps, **staging}
    return Geometry(lambda n_tokens: (grid, ceil_div(n_tokens, p["tokens"])), _DENSE_BLOCK, shared_bytes, constants)


def _linear_records(p, target: str):
    made = records_launch(p, target)
    return Geometry(lambda n_tokens: (made.blocks, 1), made.threads, made.shared_bytes, made.constants)


def _matmul_records(p, target: str):
    made = matmul_launch(p, target)
    return Geometry(
        lambda n_tokens: (ceil_div(n_tokens, p["tokens"]), made.blocks),
        made.threads,
        made.shared_bytes,
        made.constants,
    )


def _row_by_block(p):
    return Geometry(lambda n_tokens: (1, n_tokens), _NORM_BLOCK, constants={"WARPS": _NORM_BLOCK // WARP})


def _attention(p):
    head_dim = p["head_dim"]
    if p["tokens"] == 1:
        partial = head_dim + 2  # floats that a warp hands over: its values, largest score and sum
        shared_bytes = _ATTENTION_DECODE_BLOCK // WARP * partial * 4
        return Geometry(lambda n_tokens: (p["heads"], 1), _ATTENTION_DECODE_BLOCK, shared_bytes, {"PARTIAL": partial})
    queries, keys = (64, 32) if head_dim <= 128 else (32, 16)
    stride = ceil_div(head_dim, 4) * 4 + 4  # floats from row to row, against bank conflicts
    weight_stride = keys + 1
    shared_bytes = ((queries + 2 * keys) * stride + queries * weight_stride) * 4
    constants = {"QUERIES": queries, "KEYS": keys, "STRIDE": stride, "WEIGHT_STRIDE": weight_stride}
    return Geometry(
        lambda n_tokens: (p["heads"], ceil_div(n_tokens, queries)), _ATTENTION_PREFILL_BLOCK, shared_bytes, constants
    )


def _attention_halves(p):
    warps, keys, row_bytes = 4, 64, 2 * p["head_dim"] + 16
    tile_bytes = stage_bytes = 2 * keys * row_bytes  # keys and values
    tile_at, end = 0, 2 * stage_bytes
    if p["kv_dtype"] == "int8":  # stages as they come, with 16 bytes of scales a row, and one tile of halves
        stage_bytes = 2 * keys * (p["head_dim"] + 16)
        tile_at = 2 * stage_bytes
        end = tile_at + tile_bytes + 3 * keys * 4
    constants = {
        "WARPS": warps, "KEYS": keys, "ROW_BYTES": row_bytes, "STAGE_BYTES": stage_bytes, "TILE_AT": tile_at,
        "SCALES_AT": tile_at + tile_bytes,
    }  # fmt: skip
    return Geometry(lambda n_tokens: (p["heads"], ceil_div(n_tokens, 16 * warps)), warps * WARP, end, constants)


def splits_of(heads: int, kv_heads: int) -> int:
    """Most runs of the context in a decode step: as many blocks as the largest GPU has multiprocessors."""
    return max(1, MULTIPROCESSORS // (heads // _queries(heads, kv_heads)))


def _queries(heads: int, kv_heads: int) -> int:
    """Heads of one KV head that a block takes: the cache is read once for all of them."""
    group = heads // kv_heads
    return max(n for n in range(1, 9) if group % n == 0)


def _append_attention(p, target: str):
    head_dim, queries = p["head_dim"], _queries(p["heads"], p["kv_heads"])
    own = target == "sm_90"
    tokens, row_bytes = tokens_held(p), 2 * head_dim + 16
    # A row of the cache in shared memory: its elements and, of int8, 16 bytes of scales.
    cached_bytes = head_dim + 16 if p["kv_dtype"] == "int8" else 2 * head_dim
    tile_row_bytes = cached_bytes + 16 - cached_bytes % 32  # an odd number of 16 bytes
    own_at, own_bytes = 16 * row_bytes, 2 * cached_bytes  # behind the queries a key and a value of each token
    ring_at, stage_bytes = own_at + tokens * own_bytes, 2 * 16 * tile_row_bytes
    budget = SM_90_HALF_BYTES if own else MAX_SHARED_BYTES
    # The same number for one token and for a few, or sums would have another order.
    room = budget - own_at - FEW_TOKENS * own_bytes
    # Wide heads want 200 registers a thread, of which two blocks of 8 warps on sm_90 have 128.
    most = 8 if head_dim < 128 else 4
    warps = next(n for n in _ATTENTION_WARPS if n == 1 or (n <= most and 2 * n * stage_bytes <= room))
    stages = min(_ATTENTION_STAGES, (budget - ring_at) // (warps * stage_bytes))
    blocks, shared_bytes = p["heads"] // queries * p["splits"], ring_at + warps * stages * stage_bytes
    if own:
        # Like the linears around it one block on each multiprocessor, beside one other: see records_launch.
        blocks, shared_bytes = max(blocks, MULTIPROCESSORS), max(shared_bytes, MIN_BYTES)
    # Eight elements of the queries a thread, for which there are registers.
    at_once = min(tokens, _ATTENTION_TOKENS, 8 // queries, 8 * warps * WARP // (queries * head_dim))
    constants = {
        "TOKENS": tokens, "AT_ONCE": max(1, at_once), "QUERIES": queries,
        "KEYS": _RUN_KEYS, "BLOCKS": blocks, "WARPS": warps, "STAGES": stages, "ROW_BYTES": row_bytes,
        "TILE_ROW_BYTES": tile_row_bytes, "OWN_AT": own_at, "RING_AT": ring_at,
    }  # fmt: skip
    return Geometry(lambda n_tokens: (blocks, 1), warps * WARP, shared_bytes, constants)


def _pointwise(p):
    return Geometry(lambda n_tokens: (ceil_div(p["width"], _POINTWISE_BLOCK), n_tokens), _POINTWISE_BLOCK)


def _kv_append(p):
    half = p["rotary_dim"] // 2
    if p["kv_dtype"] == "int8":  # a warp per head, that of q only where it rotates
        q_end = p["heads"] if half else 0
        constants = {"Q_END": q_end, "K_END": q_end + p["kv_heads"], "END": q_end + 2 * p["kv_heads"]}
        blocks = ceil_div(constants["END"], _POINTWISE_BLOCK // WARP)
        return Geometry(lambda n_tokens: (blocks, n_tokens), _POINTWISE_BLOCK, constants=constants)
    # A thread per rotated pair of q, then per pair or other element of k, then per element of v.
    q_end = p["heads"] * half
    k_end = q_end + p["kv_heads"] * (p["head_dim"] - half)
    end = k_end + p["kv_heads"] * p["head_dim"]
    constants = {"Q_END": q_end, "K_END": k_end, "END": end}
    return Geometry(lambda n_tokens: (ceil_div(end, _POINTWISE_BLOCK), n_tokens), _POINTWISE_BLOCK, constants=constants)


def _rms_norm(p):
    by_warp = p["width"] <= _MAX_WARP_NORM_WIDTH
    warps = min(p["heads"], 4) if by_warp else _NORM_BLOCK // WARP
    grid = ceil_div(p["heads"], warps) if by_warp else p["heads"]
    constants = {"MAX_BLOCK": _NORM_BLOCK, "BY_WARP": by_warp}
    return Geometry(lambda n_tokens: (grid, n_tokens), warps * WARP, constants=constants)


def _block_per_token(p):
    return Geometry(lambda n_tokens: (1, n_tokens), _NORM_BLOCK)


def _last_row(p):
    return Geometry(lambda n_tokens: (ceil_div(p["width"], _POINTWISE_BLOCK), 1), _POINTWISE_BLOCK)


def _choose(p):
    slices = ceil_div(p["vocab"], CHOOSE_SLICE)
    return Geometry(
        lambda n_tokens: (slices, 1), CHOOSE_SLICE // 4, constants={"SLICE": CHOOSE_SLICE, "SLICES": slices}
    )


_OWN_TARGETS = dict.fromkeys(("append_attention", "linear_records", "matmul_records"), ("sm_90",))
_GEOMETRIES: dict[str, Callable[..., Geometry]] = {
    "embedding": _pointwise,
    "rms_norm": _rms_norm,
    "layer_norm": _block_per_token,
    "linear_sparse": _linear_sparse,
    "linear_dense": _linear_dense,
    "embedding_records": lambda p: _pointwise({"width": p["k"]}),
    "linear_records": _linear_records,
    "matmul_records": _matmul_records,
    "halves": _row_by_block,
    "kv_append": _kv_append,
    "append_attention": _append_attention,
    "attention": _attention,
    "attention_halves": _attention_halves,
    "gated_activation": _pointwise,
    "elementwise": _pointwise,
    "last_row": _last_row,
    "choose": _choose,
    "log_probs": _block_per_token,
}
