// y = W x with fp16 weights [rows, k], row-major. A segment of lanes takes a row, 8 weights (16 bytes) a load.
#pragma once
#include "activations_in_shared.cuh"
#include "epilogue.cuh"
#include "group_units.cuh"

// C: ROWS, K, X_STRIDE and what epilogue.cuh needs; CHUNK: weights per load, 8 or 1; SEGMENT: lanes of a row;
// ROW_STEPS: sets of rows that a warp takes one after another; STAGED: x stands in shared memory, its planes
// STAGE_STRIDE apart.
template <class C>
struct DenseWalk {
    static constexpr bool VECTOR = C::CHUNK == 8;
    static constexpr int CHUNK = C::CHUNK, CHUNKS = C::K / CHUNK;
    static constexpr int SEGMENT = C::SEGMENT, ROWS_AT_ONCE = WARP / SEGMENT;
    static constexpr int UNROLL = 4;

    using Load = typename Packed<VECTOR ? 16 : 2>::Load;

    static __device__ __forceinline__ void unpack(Load packed, float* w) {
        unsigned words[VECTOR ? 4 : 1];
        Packed<VECTOR ? 16 : 2>::words(packed, words);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) w[i] = half_to_float(words[i / 2] >> (i % 2 * 16) & 0xffff);
    }
};

// TILE: 1 for decode, otherwise the tokens of a block row.
template <class C, int TILE>
__device__ __forceinline__ void linear_dense(const float* x, const unsigned short* weight, const float* bias,
                                             const float* residual, float* out, const int* state) {
    using Walk = DenseWalk<C>;
    using Staged = StagedActivations<C::K, 8, C::STAGE_STRIDE>;
    constexpr int KEPT = ceil_div(TILE, Walk::SEGMENT);
    GQSA_DYNAMIC_SHARED(float4, shared);

    const int lane = threadIdx.x % Walk::SEGMENT, segment = threadIdx.x % WARP / Walk::SEGMENT;
    const int warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    wait_for_inputs();
    let_dependents_start();
    const int first_token = blockIdx.y * TILE;
    const int n_tokens = min(TILE, count_tokens<TILE>(state) - first_token);
    if (n_tokens <= 0) return;
    x += (size_t)first_token * C::X_STRIDE;
    if (C::STAGED) {
        Staged::stage(shared, x);
        __syncthreads();
    }
    const bool aligned = (TILE == 1 || C::X_STRIDE % 4 == 0) && is_aligned(x, 16);

    for (int step = 0; step < C::ROW_STEPS; ++step) {
        const int first_row = (warp * C::ROW_STEPS + step) * Walk::ROWS_AT_ONCE, row = first_row + segment;
        if (first_row >= C::ROWS) return;
        const bool valid = row < C::ROWS;
        const auto* w_row = reinterpret_cast<const typename Walk::Load*>(weight + (size_t)(valid ? row : 0) * C::K);
        Addends addends = {0.0f, 0.0f};
        if (TILE == 1 && lane == 0 && valid) addends = load_addends<C>(row, 0, bias, residual, out);
        float sums[TILE] = {};
        for (int first = lane; first < Walk::CHUNKS; first += Walk::SEGMENT * Walk::UNROLL) {
            typename Walk::Load packed[Walk::UNROLL];
#pragma unroll
            for (int i = 0; i < Walk::UNROLL; ++i)
                if (first + i * Walk::SEGMENT < Walk::CHUNKS)
                    packed[i] = load_streaming(w_row + first + i * Walk::SEGMENT);
#pragma unroll
            for (int i = 0; i < Walk::UNROLL; ++i) {
                const int chunk = first + i * Walk::SEGMENT;
                if (chunk >= Walk::CHUNKS) break;
                float w[Walk::CHUNK];
                Walk::unpack(packed[i], w);
#pragma unroll
                for (int t = 0; t < TILE; ++t) {
                    if (t >= n_tokens) break;
                    const float* x_chunk = x + (size_t)t * C::X_STRIDE + chunk * Walk::CHUNK;
                    if (Walk::VECTOR) {
#pragma unroll
                        for (int j = 0; j < Walk::CHUNK / 4; ++j)
                            sums[t] = dot4(
                                C::STAGED ? Staged::piece(shared, chunk, j) : load4(x_chunk + 4 * j, aligned),
                                w + 4 * j, sums[t]);
                    } else {
                        sums[t] = fmaf(*x_chunk, w[0], sums[t]);
                    }
                }
            }
        }
        float kept[KEPT] = {};
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            const float sum = segment_sum<Walk::SEGMENT>(sums[t]);
            if (lane == t % Walk::SEGMENT) kept[t / Walk::SEGMENT] = sum;
        }
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const int t = i * Walk::SEGMENT + lane;
            if (t >= n_tokens || !valid) continue;
            if (TILE > 1) addends = load_addends<C>(row, first_token + t, bias, residual, out);
            out[(size_t)(first_token + t) * C::OUT_STRIDE + row] = finish<C>(kept[i], addends);
        }
    }
}
