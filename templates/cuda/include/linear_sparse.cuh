// y = W x for one BSR stream, task-centric: a warp takes the rows of one task (see group_units.cuh for
// the weights' layout). Tasks hold nearly equal numbers of kept groups, so skewed rows leave no straggler.
//
// A row is walked by a segment of SEGMENT lanes, so that short rows (K = 576: 36 groups of 16) keep all
// lanes busy; the warp takes WARP / SEGMENT rows at a time. Each lane holds UNROLL units in flight.
#pragma once
#include "activations_in_shared.cuh"
#include "epilogue.cuh"
#include "group_units.cuh"

// C: ROWS, K, GROUP_SIZE, BITS, TASKS, X_STRIDE and what epilogue.cuh needs.
template <class C>
struct SparseWalk {
    using U = Units<C::GROUP_SIZE, C::BITS>;
    // Half of the groups kept and UNROLL 4: one batch then covers a row.
    static constexpr int SEGMENT = power_of_two_below(C::K / U::WEIGHTS / 8, 4, WARP);
    static constexpr int ROWS_AT_ONCE = WARP / SEGMENT;
    static constexpr int UNROLL = C::BITS == 8 ? 2 : 4;
    static constexpr int BATCH = SEGMENT * UNROLL;

    const typename U::Load* values;
    const unsigned* groups;
    const int* crow_indices;
    int lane, segment, row_end;

    // Where the warp stands. first_row, batch and batches are the same in all lanes.
    struct Position {
        int first_row;
        int batch, batches;
        unsigned begin, end;  // units of this segment's row
    };

    struct Weights {
        typename U::Load packed[UNROLL];
        unsigned word[UNROLL];
    };

    __device__ __forceinline__ SparseWalk(const signed char* values_, const int* groups_, const int* crow_indices_,
                                          int row_end_)
        : values(reinterpret_cast<const typename U::Load*>(values_)),
          groups(reinterpret_cast<const unsigned*>(groups_)),
          crow_indices(crow_indices_),
          lane(threadIdx.x % SEGMENT),
          segment(threadIdx.x % WARP / SEGMENT),
          row_end(row_end_) {}

    __device__ __forceinline__ int row(const Position& at) const { return at.first_row + segment; }

    __device__ __forceinline__ Position enter(int first_row) const {
        Position at = {first_row, 0, 0, 0, 0};
        if (row(at) < row_end) {
            at.begin = crow_indices[row(at)] * U::PER_GROUP;
            at.end = crow_indices[row(at) + 1] * U::PER_GROUP;
        }
        int longest = at.end - at.begin;
#pragma unroll
        for (int offset = SEGMENT; offset < WARP; offset *= 2)
            longest = max(longest, __shfl_xor_sync(ALL_LANES, longest, offset));
        at.batches = max(1, (longest + BATCH - 1) / BATCH);  // an empty row still writes its result
        return at;
    }

    __device__ __forceinline__ unsigned unit(const Position& at, int i) const {
        return at.begin + at.batch * BATCH + i * SEGMENT + lane;
    }

    __device__ __forceinline__ void load(const Position& at, Weights& weights) const {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const unsigned index = unit(at, i);
            if (index < at.end) {
                weights.packed[i] = load_streaming(values + index);
                weights.word[i] = load_streaming(groups + index / U::PER_GROUP);
            }
        }
    }
};

// Decode: one token. Shared memory: the staged activations, if they fit.
template <class C>
__device__ __forceinline__ void linear_sparse_decode(const float* x, const signed char* values, const int* groups,
                                                     const int* crow_indices, const int* tasks, const float* bias,
                                                     const float* residual, float* out) {
    using Walk = SparseWalk<C>;
    using U = typename Walk::U;
    using Staged = StagedActivations<C::K, U::WEIGHTS>;
    GQSA_DYNAMIC_SHARED(float4, shared);

    // Weights are no kernel's output: the first batch is on its way before the inputs are waited for.
    const int task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int first_row = task < C::TASKS ? tasks[task] : 0;
    Walk walk(values, groups, crow_indices, task < C::TASKS ? tasks[task + 1] : 0);
    bool more = first_row < walk.row_end;
    typename Walk::Position at = {};
    typename Walk::Weights weights;
    if (more) {
        at = walk.enter(first_row);
        walk.load(at, weights);
    }
    wait_for_inputs();
    let_dependents_start();
    if (Staged::FITS) {
        Staged::stage(shared, x);
        __syncthreads();
    }
    const bool aligned = is_aligned(x, 16);

    float sum = 0.0f;
    Addends addends = {0.0f, 0.0f};
    while (more) {
        const bool writes = walk.lane == 0 && walk.row(at) < walk.row_end;
        if (at.batch == 0 && writes) addends = load_addends<C>(walk.row(at), 0, bias, residual, out);

        // The next batch, of this row or of the next, is loaded before this one is used.
        const bool row_done = at.batch + 1 == at.batches;
        typename Walk::Position next = at;
        next.batch += 1;
        if (row_done) {
            more = at.first_row + Walk::ROWS_AT_ONCE < walk.row_end;
            if (more) next = walk.enter(at.first_row + Walk::ROWS_AT_ONCE);
        }
        typename Walk::Weights next_weights;
        if (more) walk.load(next, next_weights);

#pragma unroll
        for (int i = 0; i < Walk::UNROLL; ++i) {
            const unsigned index = walk.unit(at, i);
            if (index >= at.end) continue;
            float w[U::WEIGHTS];
            U::unpack(weights.packed[i], weights.word[i], w);
            const int column = U::column(weights.word[i], index);
            float dot = 0.0f;
#pragma unroll
            for (int j = 0; j < U::WEIGHTS / 4; ++j)
                dot = dot4(Staged::FITS ? Staged::piece(shared, column, j)
                                        : load4(x + column * U::WEIGHTS + 4 * j, aligned),
                           w + 4 * j, dot);
            sum = fmaf(dot, U::scale(weights.word[i]), sum);
        }
        if (row_done) {
            sum = segment_sum<Walk::SEGMENT>(sum);
            if (writes) out[walk.row(at)] = finish<C>(sum, addends);
            sum = 0.0f;
        }
        at = next;
        weights = next_weights;
    }
}

// Prefill: TILE tokens per block row (blockIdx.y), each weight is unpacked once and used for all of them.
// x is read through the L1 cache.
template <class C, int TILE>
__device__ __forceinline__ void linear_sparse_prefill(const float* x, const signed char* values, const int* groups,
                                                      const int* crow_indices, const int* tasks, const float* bias,
                                                      const float* residual, float* out, const int* state) {
    using Walk = SparseWalk<C>;
    using U = typename Walk::U;
    constexpr int KEPT = ceil_div(TILE, Walk::SEGMENT);  // tokens whose result a lane writes

    wait_for_inputs();
    let_dependents_start();
    const int first_token = blockIdx.y * TILE;
    const int n_tokens = min(TILE, state[0] - first_token);
    const int task = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (n_tokens <= 0 || task >= C::TASKS) return;
    x += (size_t)first_token * C::X_STRIDE;
    const bool aligned = C::X_STRIDE % 4 == 0 && is_aligned(x, 16);

    const Walk walk(values, groups, crow_indices, tasks[task + 1]);
    for (int first_row = tasks[task]; first_row < walk.row_end; first_row += Walk::ROWS_AT_ONCE) {
        typename Walk::Position at = walk.enter(first_row);
        float sums[TILE] = {};
        for (; at.batch < at.batches; ++at.batch) {
            typename Walk::Weights weights;
            walk.load(at, weights);
#pragma unroll
            for (int i = 0; i < Walk::UNROLL; ++i) {
                const unsigned index = walk.unit(at, i);
                if (index >= at.end) continue;
                float w[U::WEIGHTS];
                U::unpack(weights.packed[i], weights.word[i], w);
                const float scale = U::scale(weights.word[i]);
                const float* x_unit = x + U::column(weights.word[i], index) * U::WEIGHTS;
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
            const float sum = segment_sum<Walk::SEGMENT>(sums[t]);
            if (walk.lane == t % Walk::SEGMENT) kept[t / Walk::SEGMENT] = sum;
        }
#pragma unroll
        for (int i = 0; i < KEPT; ++i) {
            const int t = i * Walk::SEGMENT + walk.lane, token = first_token + t;
            if (t < n_tokens && walk.row(at) < walk.row_end) {
                const Addends addends = load_addends<C>(walk.row(at), token, bias, residual, out);
                out[(size_t)token * C::OUT_STRIDE + walk.row(at)] = finish<C>(kept[i], addends);
            }
        }
    }
}
