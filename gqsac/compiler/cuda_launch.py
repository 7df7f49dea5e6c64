"""How CUDA launches each operator's kernel: grid, block and dynamic shared memory from its constants.

Every formula here has its twin in `templates/cuda/include`, named in the comments. Grids cover the
largest launch (`max_tokens` rows) and never change, because launches are captured in CUDA graphs:
blocks past the last token exit at once.
"""

from gqsa_runtime.errors import UnsupportedError
from gqsa_runtime.program import Launch

from gqsac.compiler.kernel_spec import KernelSpec

WARP = 32
MAX_SHARED_BYTES = 96 * 1024  # MAX_STAGED_BYTES in activations_in_shared.cuh
_MAX_GRID_Y = 65535
_POINTWISE_BLOCK = 128
_NORM_BLOCK = 512
_MAX_WARP_NORM_WIDTH = 512  # norms.cuh
_ATTENTION_DECODE_BLOCK = 512
_ATTENTION_PREFILL_BLOCK = 256  # 16 x 16 in attention_prefill.cuh
_DENSE_BLOCK = 256


def launch(spec: KernelSpec, max_tokens: int) -> Launch:
    """Grid, block and dynamic shared memory of a kernel.

    max_tokens: most rows in one launch (the program's prefill_chunk); decode kernels (tokens = 1)
    always cover one. Raises UnsupportedError where a kernel cannot be launched on every target.
    """
    params = dict(spec.params)
    n_tokens = 1 if params.get("tokens") == 1 else max_tokens
    (x, y), block, shared_bytes = _LAUNCHES[spec.op](params, n_tokens)
    if y > _MAX_GRID_Y:
        raise UnsupportedError(
            f"a launch of {spec.op} over {max_tokens} tokens needs {y} block rows, CUDA allows {_MAX_GRID_Y}; "
            "build with a smaller prefill chunk"
        )
    if shared_bytes > MAX_SHARED_BYTES:
        raise UnsupportedError(
            f"{spec.op} with {params} needs {shared_bytes} bytes of shared memory, "
            f"every supported GPU offers only {MAX_SHARED_BYTES}; such a model cannot be built for CUDA"
        )
    return Launch((x, y, 1), block, shared_bytes)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _staged_bytes(k: int, unit: int) -> int:
    """StagedActivations::BYTES, 0 where the activations do not fit and are read through the cache."""
    planes, units = unit // 4, k // unit
    skew = 8 // planes if planes > 1 else 0
    size = planes * (units + (skew - units % 8) % 8) * 16
    return size if size <= MAX_SHARED_BYTES else 0


def _segment(loads: int) -> int:
    """Lanes that share a row of so many loads: power_of_two_below(loads / 8, 4, 32)."""
    return max(4, min(WARP, 1 << max(0, (loads // 8).bit_length() - 1)))


def _linear_sparse(p, n_tokens):
    if p["tokens"] > 1:
        block = 256
        return (_ceil_div(p["n_tasks"], block // WARP), _ceil_div(n_tokens, p["tokens"])), block, 0
    # Large blocks share one copy of x; with few tasks, small blocks reach more multiprocessors.
    block = 512 if p["n_tasks"] >= 2048 else 256 if p["n_tasks"] >= 1024 else 128
    return (_ceil_div(p["n_tasks"], block // WARP), 1), block, _staged_bytes(p["k"], min(p["group_size"], 16))


def _linear_dense(p, n_tokens):
    vector = p["k"] % 8 == 0
    rows_at_once = WARP // _segment(p["k"] // 8 if vector else p["k"])
    steps = 4 if p["rows"] > 16384 else 1  # ROW_STEPS in linear_dense.cuh
    grid = _ceil_div(p["rows"], rows_at_once * steps * (_DENSE_BLOCK // WARP))
    if p["tokens"] > 1:
        return (grid, _ceil_div(n_tokens, p["tokens"])), _DENSE_BLOCK, 0
    return (grid, 1), _DENSE_BLOCK, _staged_bytes(p["k"], 8) if vector else 0


def _attention(p, n_tokens):
    head_dim = p["head_dim"]
    if p["tokens"] == 1:
        warps = _ATTENTION_DECODE_BLOCK // WARP
        return (p["heads"], 1), _ATTENTION_DECODE_BLOCK, warps * (head_dim + 2) * 4
    queries, keys = (64, 32) if head_dim <= 128 else (32, 16)  # AttentionTile
    stride = _ceil_div(head_dim, 4) * 4 + 4
    floats = (queries + 2 * keys) * stride + queries * (keys + 1)
    return (p["heads"], _ceil_div(n_tokens, queries)), _ATTENTION_PREFILL_BLOCK, floats * 4


def _pointwise(width: str):
    return lambda p, n_tokens: ((_ceil_div(p[width], _POINTWISE_BLOCK), n_tokens), _POINTWISE_BLOCK, 0)


def _kv_append(p, n_tokens):
    half = p["rotary_dim"] // 2
    items = p["heads"] * half + p["kv_heads"] * (p["head_dim"] - half + p["head_dim"])
    return (_ceil_div(items, _POINTWISE_BLOCK), n_tokens), _POINTWISE_BLOCK, 0


def _rms_norm(p, n_tokens):
    if p["width"] <= _MAX_WARP_NORM_WIDTH:
        warps = min(p["heads"], 4)
        return (_ceil_div(p["heads"], warps), n_tokens), warps * WARP, 0
    return (p["heads"], n_tokens), _NORM_BLOCK, 0


def _block_per_token(p, n_tokens):
    return (1, n_tokens), _NORM_BLOCK, 0


_LAUNCHES = {
    "embedding": _pointwise("width"),
    "rms_norm": _rms_norm,
    "layer_norm": _block_per_token,
    "linear_sparse": _linear_sparse,
    "linear_dense": _linear_dense,
    "kv_append": _kv_append,
    "attention": _attention,
    "gated_activation": _pointwise("width"),
    "elementwise": _pointwise("width"),
    "last_row": lambda p, n_tokens: ((_ceil_div(p["width"], _POINTWISE_BLOCK), 1), _POINTWISE_BLOCK, 0),
    "log_probs": _block_per_token,
}
