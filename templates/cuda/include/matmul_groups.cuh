// The multiplication of matmul_records.cuh by groups of four warps, which the tensor cores of sm_90a serve together: 64 rows
// by all 128 tokens. Copies are the bulk engine's: a stage of activations is one, begun by the first thread when all warps
// are done with its last content; a record is one, begun by the warp that alone reads it.
#pragma once

template <class C>
__host__ __device__ constexpr int blocks_beside() {
    return C::BLOCKS_BESIDE;
}

// C: also BARRIERS_AT, in shared memory.
template <class C>
__device__ __forceinline__ void multiply_block(const MatmulBlock<C>& block) {
    constexpr int N_TILES = MatmulBlock<C>::N_TILES;
    static_assert(C::WARPS % 4 == 0 && C::STAGES >= 2, "whole groups, and something under way");
    GQSA_DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    unsigned long long* const filled = reinterpret_cast<unsigned long long*>(shared + C::BARRIERS_AT);  // [STAGES]
    unsigned long long* const left = filled + C::STAGES;                                                // [STAGES]
    unsigned long long* const arrived = left + C::STAGES + 2 * warp;                                    // [WARPS, 2]

    if (threadIdx.x < C::STAGES) barrier_init(filled + threadIdx.x), barrier_init(left + threadIdx.x, C::WARPS);
    if (lane < 2) barrier_init(arrived + lane);
    __syncthreads();

    RowBlock<C> rows;
    rows.places = shared + C::RECORDS_AT + warp * (2 * C::RECORD_BYTES);
    rows.open(block.records, block.starts, block.blocks, blockIdx.y * C::WARPS + warp, C::N_BLOCKS);
    int from = 0, to = 0;  // of the next record to copy, looked up a record ahead
    if (rows.count > 0) from = rows.starts[0], to = rows.starts[1];
    const auto fetch_record = [&] {
        if (!rows.wants()) return;
        if (lane == 0)
            bulk_copy(rows.place(rows.fetched), rows.records + static_cast<long long>(from) * 16, (to - from) * 16,
                      arrived + rows.fetched % 2);
        from = to;
        if (++rows.fetched < rows.count) to = rows.starts[rows.fetched + 1];
    };
    fetch_record(), fetch_record();
    let_dependents_start();
    wait_for_inputs();
    // Tokens past the last are left out: what they would have is used for nothing else.
    const auto fetch_activations = [&](int tile, int stage) {
        bulk_copy(shared + stage * HALVED_BYTES, block.activations(tile), block.n_tokens * TILE * 2, filled + stage);
    };
    if (threadIdx.x == 0)
        for (int tile = 0; tile < min(C::STAGES, N_TILES); ++tile) fetch_activations(tile, tile);
    __syncwarp();

    // Fragments of a tile; zeros where the row block does not hold it, for the other warps may.
    const auto take = [&](int tile, unsigned (&a)[4][4]) {
        if (rows.current < rows.count && rows.slot == 0) {
            fetch_record();  // into the place that was left before
            barrier_wait(arrived + rows.current % 2, rows.current / 2 & 1);
        }
        if (!rows.take(tile, lane, a)) clear(a);
    };
    float sums[HALVED_TOKENS / 8][4] = {};
    int tile = 0, stage = 0, turn = 0;  // turn: parity of how often the ring has gone round
    // One tile is multiplied while the fragments of the next are made.
    const auto step = [&](const unsigned (&a)[4][4], unsigned (&next)[4][4]) {
        barrier_wait(filled + stage, turn);
        group_multiply(sums, a, shared + stage * HALVED_BYTES);
        if (tile + 1 < N_TILES) take(tile + 1, next);
        // A tile late, when no warp is likely to be waited for.
        if (threadIdx.x == 0 && tile > 0 && tile - 1 + C::STAGES < N_TILES) {
            const int before = stage == 0 ? C::STAGES - 1 : stage - 1;
            barrier_wait(left + before, stage == 0 ? turn ^ 1 : turn);
            fetch_activations(tile - 1 + C::STAGES, before);
        }
        __syncwarp();
        group_wait(next);
        if (lane == 0) barrier_arrive(left + stage);
        if (++stage == C::STAGES) stage = 0, turn ^= 1;
        return ++tile < N_TILES;
    };
    unsigned even[4][4], odd[4][4] = {};
    take(0, even);
    while (step(even, odd) && step(odd, even)) {
    }
    block.store(sums, blockIdx.y * C::WARPS + warp, 0, lane);
}
