"""How CUDA launches the kernels over records: how much of a matrix a block takes, and its shared memory."""

from dataclasses import dataclass

from gqsa_runtime.layouts.records import ROWS, TILE
from gqsa_runtime.operators import MATMUL_TOKENS

MULTIPROCESSORS = 132  # blocks in a wave: one for each of the largest GPU's. Another number only rounds otherwise
WARPS = tuple(range(16, 2, -2))  # of a block, the first that has room for two stages
# Records of a warp that are left to copy when the next kernel may start, where a ring has so many stages: masked
# records take longer to add up than to copy.
LEFT_TO_COPY, LEFT_FROM_STAGES = 2, {"whole": 4, "masked": 3}
MAX_STAGES = 4  # of a warp's ring: with more in flight, activations wait behind weights
FEW_STAGES = 2  # of it for several tokens
MAX_BYTES = 98 * 1024  # fits every target
SM_90_HALF_BYTES = 112 * 1024  # the same for two kernels side by side on sm_90
# Two blocks share a multiprocessor of the largest GPU, never three: each gets one block of a kernel.
MIN_BYTES = 76 * 1024
SM_90_BYTES = 226 * 1024  # that a block can have there
_STAGE_BYTES, _BARRIER_BYTES = MATMUL_TOKENS * TILE * 2, 512
MAX_LOCAL = 24  # row blocks whose sums a block holds


@dataclass(frozen=True)
class RecordsLaunch:
    """blocks along x, threads of one, dynamic shared memory in bytes, and the constants that say so to the kernel."""

    blocks: int
    threads: int
    shared_bytes: int
    constants: dict[str, int]


def records_launch(p, target: str) -> RecordsLaunch:
    """The launch of linear_records with the constants p on a target."""
    budget = SM_90_HALF_BYTES if target == "sm_90" else MAX_BYTES
    # The same number for any number of tokens, or sums would have another order.
    warps = next((n for n in WARPS if _places(p, 1, 1, n)[1] + 2 * n * p["record_bytes"] <= budget), 2)
    if p["tokens"] > 1:
        budget, most_stages = SM_90_BYTES if target == "sm_90" else MAX_BYTES, FEW_STAGES
        at_once, waves = _few_tokens(p, warps, budget)
    else:
        at_once, waves, most_stages = 1, ceil_div(p["n_blocks"], MULTIPROCESSORS * MAX_LOCAL), MAX_STAGES
    blocks = MULTIPROCESSORS * waves
    local = ceil_div(p["n_blocks"], blocks)
    places, at = _places(p, at_once, local, warps)
    stages = max(1, min(most_stages, (budget - at) // (warps * p["record_bytes"])))
    constants = {"WARPS": warps, "STAGES": stages, "BLOCKS": blocks, "LOCAL_BLOCKS": local, **places, "RING_AT": at}
    starts_late = p["tokens"] == 1 and stages >= LEFT_FROM_STAGES["masked" if p["masked_widths"] else "whole"]
    constants["LEFT_TO_COPY"] = LEFT_TO_COPY if starts_late else 0
    constants["AT_ONCE"] = at_once
    return RecordsLaunch(blocks, warps * 32, max(at + warps * stages * p["record_bytes"], MIN_BYTES), constants)


def matmul_launch(p, target: str) -> RecordsLaunch:
    """The launch of matmul_records with the constants p on a target; blocks: along the rows.

    On sm_90 two halves of the warps share a block's rows, each with activations and records of its own.
    """
    halves, budget, least, most = (2, SM_90_BYTES, 2, 4) if target == "sm_90" else (1, MAX_BYTES, 3, 3)

    def stages(row_blocks: int) -> int:
        """How many stages of activations fit beside two records for each warp."""
        left = budget - _BARRIER_BYTES - halves * row_blocks * 2 * p["record_bytes"]
        return min(most, left // (halves * _STAGE_BYTES))

    row_blocks = next(n for n in (8, 4) if n == 4 or stages(n) >= least)
    records_at = halves * stages(row_blocks) * _STAGE_BYTES
    barriers_at = records_at + halves * row_blocks * 2 * p["record_bytes"]
    constants = {
        "WARPS": halves * row_blocks,
        "ROW_BLOCKS": row_blocks,
        "STAGES": stages(row_blocks),
        "RECORDS_AT": records_at,
        "BARRIERS_AT": barriers_at,
    }
    blocks, threads = ceil_div(p["n_blocks"], row_blocks), halves * row_blocks * 32
    return RecordsLaunch(blocks, threads, barriers_at + _BARRIER_BYTES, constants)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _few_tokens(p, warps: int, budget: int) -> tuple[int, int]:
    """(tokens that a block takes at once, waves of blocks) where two stages fit into the budget of shared memory.

    Their integers are all there, and their sums of all of a block's row blocks.
    """
    for at_once in (n for n in (4, 2, 1) if n <= p["tokens"]):
        for waves in range(1, ceil_div(p["n_blocks"], MULTIPROCESSORS) + 1):
            local = ceil_div(p["n_blocks"], MULTIPROCESSORS * waves)
            if local <= MAX_LOCAL and _places(p, at_once, local, warps)[1] + 2 * warps * p["record_bytes"] <= budget:
                return at_once, waves
    return 1, ceil_div(p["n_blocks"], MULTIPROCESSORS)


def _places(p, tokens: int, local: int, warps: int) -> tuple[dict[str, int], int]:
    """Where things begin in shared memory, and where the ring does. local: row blocks of a block."""
    places, at = {}, 0
    for name, size in (
        ("PLANES_AT", tokens * 2 * p["k"]),
        ("RANGES_AT", tokens * (p["k"] // TILE | 1) * 8),  # an odd number from token to token
        ("PARTIALS_AT", tokens * 128),
        ("SUMS_AT", local * warps * ROWS * tokens * 4),
        ("BLOCKS_AT", (local + 2) * 4),
        ("PHASES_AT", warps * MAX_STAGES * 8),
    ):
        places[name] = at
        at += ceil_div(size, 16) * 16
    return places, at
