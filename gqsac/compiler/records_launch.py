"""How CUDA launches the kernels over records: how much of a matrix a block takes, and its shared memory."""

from dataclasses import dataclass

WARPS = 16
_MULTIPROCESSORS = 132  # of the GPU that blocks are counted for; another number only rounds otherwise
_MOST_STAGES = 2  # of a warp's ring: more in flight keeps activations waiting behind weights
_BUDGET_BYTES = 111 * 1024  # fits every target, and two kernels side by side where one starts early
_LEAST_BYTES = 76 * 1024  # two blocks share a multiprocessor, never three: each gets one of a kernel
_MOST_LOCAL_BLOCKS = {1: 24}  # row blocks whose sums a block can hold, by tokens
_ROWS, _TILE = 16, 64


@dataclass(frozen=True)
class RecordsLaunch:
    """blocks along x, threads of one, dynamic shared memory in bytes, and the constants that say so to the kernel."""

    blocks: int
    threads: int
    shared_bytes: int
    constants: dict[str, int]


def records_launch(p) -> RecordsLaunch:
    """The launch of linear_records with the constants p."""
    tokens = p["tokens"]
    most_local = _MOST_LOCAL_BLOCKS.get(tokens, 2)
    waves = -(-p["n_blocks"] // (_MULTIPROCESSORS * most_local))
    blocks = _MULTIPROCESSORS * waves
    local = -(-p["n_blocks"] // blocks)
    places, at = {}, 0
    for name, size in (
        ("PLANES_AT", 2 * p["k"] if tokens == 1 else 0),
        ("RANGES_AT", p["k"] // _TILE * 8 if tokens == 1 else 0),
        ("PARTIALS_AT", 128),
        ("SUMS_AT", local * WARPS * _ROWS * tokens * 4),
        ("BLOCKS_AT", (local + 1) * 4),
        ("PHASES_AT", WARPS * _MOST_STAGES * 8),
    ):
        places[name] = at
        at += -(-size // 16) * 16
    stages = max(1, min(_MOST_STAGES, (_BUDGET_BYTES - at) // (WARPS * 2 * p["record_bytes"])))
    places["RING_AT"] = at
    constants = {"WARPS": WARPS, "STAGES": stages, "LOCAL_BLOCKS": local, **places}
    shared_bytes = max(at + WARPS * stages * 2 * p["record_bytes"], _LEAST_BYTES)
    return RecordsLaunch(blocks, WARPS * 32, shared_bytes, constants)
