// y = W x for one BSR stream, task-centric: a warp takes the rows of one task (see group_units.cuh for
// the weights' layout). Tasks hold nearly equal numbers of kept groups, so skewed rows leave no straggler.
#pragma once
#include "activations_in_shared.cuh"
#include "epilogue.cuh"
#include "group_units.cuh"

// C: ROWS, K, GROUP_SIZE, BITS, TASKS, X_STRIDE, UNIT and what epilogue.cuh needs; for decode STAGED (x stands in
// shared memory) and STAGE_STRIDE, for prefill SEGMENT.

// Decode: one token. A warp walks its task's units as one stream, 32 at a step, whatever the rows: the
// loads depend on nothing but the task's bounds, DEPTH steps are always in flight, and rows of any
// length fill all lanes. Where a row ends within a step, its lanes are summed up and the rest goes on.
template <class C>
__device__ __forceinline__ void linear_sparse_decode(const float* x, const signed char* values, const int* groups,
                                                     const int* crow_indices, const int* tasks, const float* bias,
                                                     const float* residual, float* out) {
    using U = Units<C::GROUP_SIZE, C::BITS, C::UNIT>;
    using Staged = StagedActivations<C::K, C::UNIT, C::STAGE_STRIDE>;
    constexpr int DEPTH = C::BITS == 8 ? 4 : 6;
    GQSA_DYNAMIC_SHARED(float4, shared);

    const auto* const units = reinterpret_cast<const typename U::Load*>(values);
    const auto* const words = reinterpret_cast<const unsigned*>(groups);
    const int lane = threadIdx.x % WARP;
    const int task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    int row = task < C::TASKS ? tasks[task] : 0;
    const int row_end = task < C::TASKS ? tasks[task + 1] : 0;

    // Lane i holds the first group of row window_row + 1 + i: bounds of 32 rows in one load.
    int window_row = row;
    int window = crow_indices[min(row + 1 + lane, C::ROWS)];
    const unsigned begin = crow_indices[row] * U::PER_GROUP, end = crow_indices[row_end] * U::PER_GROUP;

    // Weights are no kernel's output: the first are on their way before the inputs are waited for.
    typename U::Load packed[DEPTH] = {};
    unsigned word[DEPTH] = {};
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) {
        const unsigned index = begin + i * WARP + lane;
        if (index < end) {
            packed[i] = load_streaming(units + index);
            word[i] = load_streaming(words + index / U::PER_GROUP);
        }
    }
    wait_for_inputs();
    let_dependents_start();
    if (C::STAGED) {
        Staged::stage(shared, x);
        __syncthreads();
    }
    if (row >= row_end) return;
    const bool aligned = is_aligned(x, 16);

    float sum = 0.0f;
    unsigned row_stop = __shfl_sync(ALL_LANES, window, 0) * U::PER_GROUP;
    Addends addends = {0.0f, 0.0f};
    if (lane == 0) addends = load_addends<C>(row, 0, bias, residual, out);
    for (unsigned base = begin;;) {
#pragma unroll
        for (int i = 0; i < DEPTH; ++i, base += WARP) {
            const unsigned index = base + lane;
            const typename U::Load now = packed[i];
            const unsigned now_word = word[i];
            const unsigned later = index + DEPTH * WARP;
            if (later < end) {
                packed[i] = load_streaming(units + later);
                word[i] = load_streaming(words + later / U::PER_GROUP);
            }
            // Past the end a lane repeats an old unit; no row is left that would count it.
            const int column = U::column(now_word, index);
            float product = U::scale(now_word) * U::dot(now, now_word, [&](int j) {
                return C::STAGED ? Staged::piece(shared, column, j)
                                    : load4(x + column * U::WEIGHTS + 4 * j, aligned);
            });
            while (row_stop <= base + WARP) {
                const bool mine = index < row_stop;
                const float total = segment_sum(mine ? sum + product : sum);
                if (lane == 0) out[row] = finish<C>(total, addends);
                sum = 0.0f;
                product = mine ? 0.0f : product;
                if (++row == row_end) return;
                if (row - window_row == WARP) {
                    window_row = row;
                    window = crow_indices[min(row + 1 + lane, C::ROWS)];
                }
                row_stop = __shfl_sync(ALL_LANES, window, row - window_row) * U::PER_GROUP;
                if (lane == 0) addends = load_addends<C>(row, 0, bias, residual, out);
            }
            sum += product;
        }
    }
}

// Prefill: TILE tokens per block row (blockIdx.y); each weight is unpacked once and used for all of them.
// x is read through the L1 cache. A segment of SEGMENT lanes takes a row, so that short rows keep the
// lanes busy; a warp takes ROWS_AT_ONCE rows side by side.
template <class C, int TILE>
__device__ __forceinline__ void linear_sparse_prefill(const float* x, const signed char* values, const int* groups,
                                                      const int* crow_indices, const int* tasks, const float* bias,
                                                      const float* residual, float* out, const int* state) {
    using U = Units<C::GROUP_SIZE, C::BITS, C::UNIT>;
    constexpr int UNROLL = 2;  // units in flight
    constexpr int SEGMENT = C::SEGMENT;
    constexpr int ROWS_AT_ONCE = WARP / SEGMENT;
    constexpr int KEPT = ceil_div(TILE, SEGMENT);  // tokens whose result a lane writes

    wait_for_inputs();
    let_dependents_start();
    const int first_token = blockIdx.y * TILE;
    const int n_tokens = min(TILE, count_tokens(state) - first_token);
    const int task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (n_tokens <= 0 || task >= C::TASKS) return;
    x += (size_t)first_token * C::X_STRIDE;
    const bool aligned = C::X_STRIDE % 4 == 0 && is_aligned(x, 16);
    const auto* const units = reinterpret_cast<const typename U::Load*>(values);
    const auto* const words = reinterpret_cast<const unsigned*>(groups);
    const int lane = threadIdx.x % SEGMENT, segment = threadIdx.x % WARP / SEGMENT;
    const int row_end = tasks[task + 1];

    for (int first_row = tasks[task]; first_row < row_end; first_row += ROWS_AT_ONCE) {
        const int row = first_row + segment;
        const bool valid = row < row_end;
        const unsigned begin = valid ? crow_indices[row] * U::PER_GROUP : 0;
        const unsigned end = valid ? crow_indices[row + 1] * U::PER_GROUP : 0;
        float sums[TILE] = {};
        for (unsigned base = begin + lane; base < end; base += SEGMENT * UNROLL) {
            typename U::Load packed[UNROLL];
            unsigned word[UNROLL];
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const unsigned index = base + i * SEGMENT;
                if (index >= end) break;
                packed[i] = load_streaming(units + index);
                word[i] = load_streaming(words + index / U::PER_GROUP);
            }
#pragma unroll
            for (int i = 0; i < UNROLL; ++i) {
                const unsigned index = base + i * SEGMENT;
                if (index >= end) break;
                float w[U::WEIGHTS];
                U::unpack(packed[i], word[i], w);
                const float scale = U::scale(word[i]);
                const float* x_unit = x + U::column(word[i], index) * U::WEIGHTS;
#pragma unroll
                for (int t = 0; t < TILE; ++t) {
                    if (t >= n_tokens) break;
                    float dot = 0.0f;
#pragma unroll
                    for (int j = 0; j < U::WEIGHTS / 4; ++j)
                        dot = dot4(load4(x_unit + (size_t)t * C::X_STRIDE + 4 * j, aligned), w + 4 * j, dot);
                    sums[t] = fmaf(dot, scale, sums[t]);
                }
            }
        }
        float kept[KEPT] = {};
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            const float sum = segment_sum<SEGMENT>(sums[t]);
            if (lane == t % SEGMENT) kept[t / SEGMENT] = sum;
        }
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const int t = i * SEGMENT + lane, token = first_token + t;
            if (t < n_tokens && valid) {
                const Addends addends = load_addends<C>(row, token, bias, residual, out);
                out[(size_t)token * C::OUT_STRIDE + row] = finish<C>(kept[i], addends);
            }
        }
    }
}
