// The multiplication of matmul_records.cuh by groups of four warps, which the tensor cores of sm_90a serve together: 64 rows
// by all 128 tokens. Two halves of the warps take the same rows, each one half of the tiles, and are added at the end: so
// small matrices and short prompts keep a multiprocessor busy, too.
//
// Copies are the bulk engine's: a stage of activations is one, begun by the first thread of a half when all its warps are
// done with the stage's last content; a record is one, begun by the warp that alone reads it.
#pragma once

template <class C>
__host__ __device__ constexpr int blocks_beside() {
    return 1;
}

// Half of a block's warps over tiles first .. last - 1. C: also ROW_BLOCKS (warps of a half) and BARRIERS_AT, in shared memory.
template <class C>
struct MatmulHalf {
    static constexpr int N_TILES = MatmulBlock<C>::N_TILES, THREADS = C::ROW_BLOCKS * WARP;
    static constexpr int COLUMNS = HALVED_TOKENS / 8;
    // A multiple of a record's tiles: where none is absent, no record belongs to both halves.
    static constexpr int MIDDLE = ceil_div(N_TILES, 2 * TILES) * TILES < N_TILES ? ceil_div(N_TILES, 2 * TILES) * TILES : N_TILES;
    static_assert(C::ROW_BLOCKS % 4 == 0 && C::WARPS == 2 * C::ROW_BLOCKS && C::STAGES >= 2, "whole groups, copies ahead");

    const MatmulBlock<C>& block;
    const int lane, half, thread, first, last;  // thread: of the half
    unsigned char* const stages;                // [STAGES, HALVED_BYTES]
    unsigned long long *const filled, *const left, *const arrived;  // barriers [STAGES], [STAGES], the warp's [2]
    RowBlock<C> rows;
    int from, to;  // of the next record to copy, looked up a record ahead
    float sums[COLUMNS][4];

    __device__ __forceinline__ MatmulHalf(const MatmulBlock<C>& block_, unsigned char* shared)
        : block(block_), lane(threadIdx.x % WARP), half(threadIdx.x / THREADS), thread(threadIdx.x % THREADS),
          first(half ? MIDDLE : 0), last(half ? N_TILES : MIDDLE), stages(shared + half * (C::STAGES * HALVED_BYTES)),
          filled(reinterpret_cast<unsigned long long*>(shared + C::BARRIERS_AT) + half * (2 * C::STAGES)),
          left(filled + C::STAGES),
          arrived(reinterpret_cast<unsigned long long*>(shared + C::BARRIERS_AT) + 4 * C::STAGES + threadIdx.x / WARP * 2) {
        if (thread < C::STAGES) barrier_init(filled + thread), barrier_init(left + thread, C::ROW_BLOCKS);
        if (lane < 2) barrier_init(arrived + lane);
        rows.places = shared + C::RECORDS_AT + threadIdx.x / WARP * (2 * C::RECORD_BYTES);
        rows.open(block.records, block.starts, block.blocks, row_block(), C::N_BLOCKS);
        if (half) rows.skip_to(MIDDLE, lane);
        else rows.end_before(MIDDLE, lane);
        from = to = 0;
        if (rows.count > 0) from = rows.start(0), to = rows.start(1);
#pragma unroll
        for (int i = 0; i < COLUMNS * 4; ++i) sums[i / 4][i % 4] = 0.0f;
    }

    __device__ __forceinline__ int row_block() const { return blockIdx.y * C::ROW_BLOCKS + thread / WARP; }

    __device__ __forceinline__ void fetch_record() {
        if (!rows.wants()) return;
        if (lane == 0)
            bulk_copy(rows.place(rows.fetched), rows.records + static_cast<long long>(from) * 16, (to - from) * 16,
                      arrived + rows.fetched % 2);
        from = to;
        if (++rows.fetched < rows.count) to = rows.start(rows.fetched + 1);
    }

    // Tokens past the last are left out: what they would have is used for nothing else.
    __device__ __forceinline__ void fetch_activations(int tile, int stage) {
        bulk_copy(stages + stage * HALVED_BYTES, block.activations(tile), block.n_tokens * TILE * 2, filled + stage);
    }

    // Fragments of a tile; zeros where the row block does not hold it, for the other warps may.
    __device__ __forceinline__ void take(int tile, unsigned (&a)[4][4]) {
        if (rows.current < rows.count && rows.slot == 0) {
            fetch_record();  // into the place that was left before
            barrier_wait(arrived + rows.current % 2, rows.current / 2 & 1);
        }
        if (!rows.take(tile, lane, a)) clear(a);
    }

    // Everything between: the records' first copies are begun, and inputs are there.
    __device__ __forceinline__ void run() {
        if (thread == 0)
            for (int i = 0; i < min(C::STAGES, last - first); ++i) fetch_activations(first + i, i);
        __syncwarp();
        int tile = first, stage = 0, turn = 0;  // turn: parity of how often the ring has gone round
        // One tile is multiplied while the fragments of the next are made.
        const auto step = [&](const unsigned (&a)[4][4], unsigned (&next)[4][4]) {
            barrier_wait(filled + stage, turn);
            group_multiply(sums, a, stages + stage * HALVED_BYTES);
            if (tile + 1 < last) take(tile + 1, next);
            // A tile late, when no warp is likely to be waited for.
            if (thread == 0 && tile > first && tile - 1 + C::STAGES < last) {
                const int before = stage == 0 ? C::STAGES - 1 : stage - 1;
                barrier_wait(left + before, stage == 0 ? turn ^ 1 : turn);
                fetch_activations(tile - 1 + C::STAGES, before);
            }
            __syncwarp();
            group_wait(next);
            if (lane == 0) barrier_arrive(left + stage);
            if (++stage == C::STAGES) stage = 0, turn ^= 1;
            return ++tile < last;
        };
        if (first >= last) return;
        if (rows.count > 0) barrier_wait(arrived, 0);  // the first record may be taken from its middle on
        unsigned even[4][4], odd[4][4] = {};
        take(first, even);
        while (step(even, odd) && step(odd, even)) {
        }
    }

    // Adds the halves: each finishes half of the tokens. shared: [2, THREADS] of 2 COLUMNS floats, once both have run.
    __device__ __forceinline__ void finish(float* shared) {
        constexpr int OWN = COLUMNS / 2;
        float* const mine = shared + half * (2 * COLUMNS * THREADS) + thread;
        const float* const theirs = shared + (1 - half) * (2 * COLUMNS * THREADS) + thread;
#pragma unroll
        for (int i = 0; i < OWN * 4; ++i)
            mine[i * THREADS] = half ? sums[i / 4][i % 4] : sums[OWN + i / 4][i % 4];
        __syncthreads();
        float total[OWN][4];
#pragma unroll
        for (int i = 0; i < OWN * 4; ++i)
            total[i / 4][i % 4] = (half ? sums[OWN + i / 4][i % 4] : sums[i / 4][i % 4]) + theirs[i * THREADS];
        block.store(total, row_block(), half * (HALVED_TOKENS / 2), lane);
    }
};

template <class C>
__device__ __forceinline__ void multiply_block(const MatmulBlock<C>& block) {
    GQSA_DYNAMIC_SHARED(unsigned char, shared);
    MatmulHalf<C> half(block, shared);
    __syncthreads();  // the barriers are made
    half.fetch_record(), half.fetch_record();
    let_dependents_start();
    wait_for_inputs();
    half.run();
    __syncthreads();  // both halves have left the activations
    half.finish(reinterpret_cast<float*>(shared));
}
