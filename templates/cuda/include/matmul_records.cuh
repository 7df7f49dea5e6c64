// y = W x over records (see records.cuh) for many tokens, on the tensor cores' halves: dequantised weights times
// activations as halved_rows.cuh makes them, summed in f32.
//
// A block takes ROW_BLOCKS row blocks by 128 tokens and walks the tiles of 64 columns in order. Warps share a ring of
// STAGES stages of activations; a row block's records come through two places of their own, for they may begin and
// end at any tile. On sm_90a four warps multiply together, each its own row block by all tokens, and the tensor cores
// read the activations themselves (matmul_groups.cuh). Elsewhere a warp takes two row blocks by 64 tokens: a fragment
// of weights meets 64 tokens, one of activations 32 rows (matmul_warps.cuh). The order of each sum is a matter of
// constants, whatever the grid is and however many tokens there are.
#pragma once
#include "epilogue.cuh"
#include "halved_rows.cuh"
#include "row_block.cuh"

// What one block of a matmul is given. blockIdx.x: 128 tokens, blockIdx.y: ROW_BLOCKS row blocks.
// C: K, N_BLOCKS, ROWS, WIDTHS, MASKED_WIDTHS, RECORD_BYTES, WHOLE, EPILOGUE, WARPS, ROW_BLOCKS, STAGES, RECORDS_AT (where records begin
// in shared memory, behind the activations) and what epilogue.cuh needs.
template <class C>
struct MatmulBlock {
    static constexpr int N_TILES = C::K / TILE;

    const unsigned short* halves;
    const float *scales, *bias, *residual;
    const signed char* records;
    const int *starts, *blocks, *order;
    float* out;
    int first_token, n_tokens;  // of the block's

    // Activations of a tile.
    __device__ __forceinline__ const unsigned short* activations(int tile) const {
        return halves + halved_at<C::K>(first_token, tile);
    }

    // sums: the warp's of row block `block` by tokens `column` .. of the block's, in fragments of 8 tokens.
    template <int COLUMNS>
    __device__ __forceinline__ void store(const float (&sums)[COLUMNS][4], int block, int column, int lane) const {
        if (block >= C::N_BLOCKS) return;
        const int pair = lane / 4, to[2] = {order[block * 16 + pair], order[block * 16 + pair + 8]};
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int in_tile = column + c * 8 + lane % 4 * 2 + e, token = first_token + in_tile;
                if (in_tile >= n_tokens) continue;
                const float scale = scales[token];
                float* const row = out + static_cast<long long>(token) * C::OUT_STRIDE;
                if constexpr (C::EPILOGUE == GATED) {
                    if (to[0] < 0) continue;
                    const float gate = sums[c][e] * scale + (C::BIAS ? bias[to[0]] : 0.0f);
                    const float up = sums[c][2 + e] * scale + (C::BIAS ? bias[to[1]] : 0.0f);
                    row[to[0]] = activate<C::ACTIVATION>(gate) * up;
                } else {
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        if (to[r] >= 0)
                            row[to[r]] = finish<C>(sums[c][2 * r + e] * scale,
                                                   load_addends<C>(to[r], token, bias, residual, out));
                }
            }
    }
};

#if GQSA_WARP_GROUPS
#include "matmul_groups.cuh"
#else
#include "matmul_warps.cuh"
#endif

template <class C>
__device__ __forceinline__ void matmul_records(const unsigned short* halves, const float* scales,
                                               const signed char* records, const int* starts, const int* blocks,
                                               const int* order, const float* bias, const float* residual, float* out,
                                               const int* state) {
    // The host wrote the state before any kernel of this launch plan began: it needs no wait.
    const int first_token = blockIdx.x * HALVED_TOKENS, n_tokens = min(HALVED_TOKENS, count_tokens(state) - first_token);
    if (n_tokens <= 0) return;
    const MatmulBlock<C> block{halves, scales, bias,  residual, records,     starts,
                               blocks, order,  out,   first_token, n_tokens};
    multiply_block<C>(block);
}
