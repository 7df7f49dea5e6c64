// Activations in half precision, as matmul_records.cuh wants them: halves f16 [ceil(n_tokens / 128), tiles, 128 tokens, 64],
// and a scale for each token, a power of two that brings its largest element to 2^14 .. 2^15. So nothing overflows,
// whatever the model's range is, and scaling rounds nothing.
//
// What 128 tokens have of a tile is one piece of memory as it stands in shared memory: 16-byte piece p of token t in place
// p ^ t % 8, so that eight tokens' share no banks. A tile's columns stand in the order of its multiplication's four
// steps of 16: in place 16 s + 8 h + 2 q + e stands column 16 q + 4 s + h + 2 e. A lane of a record holds columns
// 16 q .. + 15, and two of its levels that stand a byte apart become a word of halves in one instruction.
#pragma once
#include "norms.cuh"
#include "quantized_rows.cuh"

constexpr int HALVED_TOKENS = 128, HALVED_BYTES = HALVED_TOKENS * TILE * 2;  // of a piece of memory

// The first half of what tokens token / 128 * 128 .. + 127 have of a tile. K: columns.
template <int K>
__device__ __forceinline__ long long halved_at(int token, int tile) {
    return (static_cast<long long>(token / HALVED_TOKENS) * (K / TILE) + tile) * (HALVED_TOKENS * TILE);
}

// C: K, NORM, EPS, WARPS. A block makes one token's row.
template <class C>
struct HalvedRow {
    static constexpr int WORDS = C::K / 2, TILE_WORDS = TILE / 2, THREADS = C::WARPS * WARP;

    static __device__ __forceinline__ void make(const float* x, const float* weight, const float* bias, int token,
                                                unsigned short* halves, float* scales) {
        __shared__ float partials[WARP];
        float mean = 0.0f, factor = 1.0f;
        if (C::NORM == LAYER_NORM) {
            float sum = 0.0f;
            for (int i = threadIdx.x; i < C::K; i += THREADS) sum += x[i];
            mean = block_sum(sum, partials) / C::K;
        }
        if (C::NORM != NO_NORM) {
            float squares = 0.0f;
            for (int i = threadIdx.x; i < C::K; i += THREADS) squares = fmaf(x[i] - mean, x[i] - mean, squares);
            factor = 1.0f / sqrtf(block_sum(squares, partials) / C::K + C::EPS);
        }
        const auto value = [&](int i) {
            if (C::NORM == RMS_NORM) return x[i] * factor * weight[i];
            if (C::NORM == LAYER_NORM) return (x[i] - mean) * factor * weight[i] + bias[i];
            return x[i];
        };
        float most = 0.0f;
#pragma unroll 4
        for (int i = threadIdx.x; i < C::K; i += THREADS) most = fmaxf(most, fabsf(value(i)));
        // Below 2^-95 a row counts as that large, so that the inverse is finite.
        const int exponent = max(static_cast<int>(__float_as_uint(block_max(most, partials)) >> 23), 32);
        const float inverse = __uint_as_float(static_cast<unsigned>(127 + 14 + 127 - exponent) << 23);
#pragma unroll 4
        for (int i = threadIdx.x; i < WORDS; i += THREADS) {
            const int tile = i / TILE_WORDS, word = i % TILE_WORDS, piece = word / 4, quarter = word % 4;
            const int column = tile * TILE + quarter * 16 + piece / 2 * 4 + piece % 2;
            unsigned* const to = reinterpret_cast<unsigned*>(halves + halved_at<C::K>(token, tile)) +
                                 token % HALVED_TOKENS * TILE_WORDS + (piece ^ token % 8) * 4 + quarter;
            *to = to_halves(value(column) * inverse, value(column + 2) * inverse);
        }
        if (threadIdx.x == 0) scales[token] = __uint_as_float(static_cast<unsigned>(exponent - 14) << 23);
    }
};
