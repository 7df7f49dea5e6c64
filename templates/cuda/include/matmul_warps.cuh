// The multiplication of matmul_records.cuh by warps alone: two row blocks by 64 tokens each.
#pragma once

// Blocks that share a multiprocessor: two where it has room for their memory, but for sm_100, whose code needs the registers.
template <class C>
__host__ __device__ constexpr int blocks_beside() {
#if __CUDA_ARCH__ == 800
    return C::WARPS == 8 ? 2 : 1;
#else
    return 1;
#endif
}

template <class C>
struct WarpTile {
    static constexpr int HELD = 2, TOKENS = 64, ACROSS = HALVED_TOKENS / TOKENS, COLUMNS = TOKENS / 8;
    static constexpr int ROW_BYTES = TILE * 2;

    float sums[HELD][COLUMNS][4];

    // Row blocks FIRST .. LAST - 1, whose fragments are a. stage: of the warp's first token.
    template <int FIRST, int LAST>
    __device__ __forceinline__ void multiply(const unsigned (&a)[HELD][4][4], const unsigned char* stage, int lane) {
        const unsigned char* const row = stage + (lane / 16 * 8 + lane % 8) * ROW_BYTES;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            const unsigned char* const piece = row + ((2 * step + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
            for (int pair = 0; pair < COLUMNS / 2; ++pair) {
                unsigned b[4];
                load_matrices(b, piece + pair * (16 * ROW_BYTES));
#pragma unroll
                for (int i = FIRST; i < LAST; ++i) {
                    mma_halves(sums[i][2 * pair], a[i][step], b[0], b[1]);
                    mma_halves(sums[i][2 * pair + 1], a[i][step], b[2], b[3]);
                }
            }
        }
    }
};

template <class C>
__device__ __forceinline__ void multiply_block(const MatmulBlock<C>& block) {
    using T = WarpTile<C>;
    constexpr int THREADS = C::WARPS * WARP, SHARERS = T::ACROSS * WARP, N_TILES = MatmulBlock<C>::N_TILES;
    static_assert(C::WARPS % T::ACROSS == 0 && C::ROW_BLOCKS == C::WARPS && C::STAGES >= 2 && C::STAGES <= 4,
                  "see below: a record's copy");
    GQSA_DYNAMIC_SHARED(unsigned char, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = warp % T::ACROSS * T::TOKENS, sharer = threadIdx.x % SHARERS;
    const int held = warp / T::ACROSS * T::HELD, first_block = blockIdx.y * C::ROW_BLOCKS + held;

    RowBlock<C> rows[T::HELD];
#pragma unroll
    for (int i = 0; i < T::HELD; ++i) {
        rows[i].places = shared + C::RECORDS_AT + (held + i) * (2 * C::RECORD_BYTES);
        rows[i].open(block.records, block.starts, block.blocks, first_block + i, C::N_BLOCKS);
        rows[i].template fetch<SHARERS>(sharer), rows[i].template fetch<SHARERS>(sharer);
    }
    // Tokens past the last are left out: what they would have is used for nothing else.
    const int pieces = block.n_tokens * (T::ROW_BYTES / 16);
    const auto fetch = [&](int tile) {
        if (tile < N_TILES) {
            unsigned char* const stage = shared + tile % C::STAGES * HALVED_BYTES;
            const unsigned short* const from = block.activations(tile);
            for (int i = threadIdx.x; i < pieces; i += THREADS) copy_16(stage + i * 16, from + i * 8);
        }
        copy_commit();
    };
    let_dependents_start();
    wait_for_inputs();
#pragma unroll
    for (int tile = 0; tile < C::STAGES - 1; ++tile) fetch(tile);

    T own = {};
    for (int tile = 0; tile < N_TILES; ++tile) {
        copy_wait<C::STAGES - 2>();
        __syncthreads();  // what this tile needs is there, and all warps have left the one before
        // A record fetched here is needed four tiles later at the earliest, since those before the last have four.
#pragma unroll
        for (int i = 0; i < T::HELD; ++i) rows[i].template fetch<SHARERS>(sharer);
        fetch(tile + C::STAGES - 1);
        unsigned a[T::HELD][4][4];
        const bool holds[2] = {rows[0].take(tile, lane, a[0]), rows[1].take(tile, lane, a[1])};
        if (column >= block.n_tokens) continue;
        const unsigned char* const stage = shared + tile % C::STAGES * HALVED_BYTES + column * T::ROW_BYTES;
        if (holds[0] && holds[1]) own.template multiply<0, 2>(a, stage, lane);
        else if (holds[0]) own.template multiply<0, 1>(a, stage, lane);
        else if (holds[1]) own.template multiply<1, 2>(a, stage, lane);
    }
    copy_wait<0>();
#pragma unroll
    for (int i = 0; i < T::HELD; ++i) block.store(own.sums[i], first_block + i, column, lane);
}
