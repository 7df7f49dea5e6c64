// Attention of one token in one launch: rotates q and k, appends k and v to the cache, and splits the context among
// blocks, so that one sequence fills the GPU at any length.
//
// A block takes QUERIES heads that share a KV head (x) and a run of cached rows (y). LANES lanes hold one head
// vector, so a warp takes WARP / LANES keys at once; each such group of lanes runs its own softmax over the keys it
// meets (online: running maximum, sum and weighted values). Groups, warps and at last runs are merged in a fixed
// order, the runs by whichever block is done last. How many runs there are, the position alone decides.
#pragma once
#include "kv_cache.cuh"

// C: HEADS, KV_HEADS, HEAD_DIM (a multiple of 8, at most 256), ROTARY_DIM, SCALE, WINDOW, Cache, QUERIES, SPLITS (most
// runs), KEYS (fewest rows worth a run), WARPS, PARTIAL (HEAD_DIM + 2: values, largest score, sum).
// partials: [HEADS / QUERIES, SPLITS, QUERIES, PARTIAL]. counters: [HEADS / QUERIES], 0 before and after.
template <class C>
struct AppendAttention {
    using Element = typename C::Cache::Element;
    static constexpr int HALF = C::ROTARY_DIM / 2, VECTOR = 8, VECTORS = C::HEAD_DIM / VECTOR;
    static constexpr int LANES = power_of_two_above(VECTORS), KEYS_AT_ONCE = WARP / LANES;
    static constexpr int UNROLL = C::QUERIES > 4 ? 1 : C::QUERIES > 2 ? 2 : 4;  // keys that a group has in flight
    static constexpr int THREADS = C::WARPS * WARP;

    static __device__ __forceinline__ void run(const float* q, const float* k, const float* v, const float* rope,
                                               Element* k_cache, Element* v_cache, float* partials, int* counters,
                                               float* out, const int* state) {
        GQSA_DYNAMIC_SHARED(float, shared);
        float* const queries = shared;                                // [QUERIES, HEAD_DIM], rotated and scaled
        float* const merged = shared + C::QUERIES * C::HEAD_DIM;      // [WARPS, QUERIES, PARTIAL]
        __shared__ int is_last;
        let_dependents_start();
        // The host wrote the state before any kernel of this launch plan began: it needs no wait.
        const int position = position_of(state, 0), length = position + 1;
        const int first = C::WINDOW > 0 ? max(0, length - C::WINDOW) : 0;
        const int n_runs = min(C::SPLITS, ceil_div(length - first, C::KEYS));
        const int run = blockIdx.y, per_run = ceil_div(length - first, n_runs);
        if (run >= n_runs) return;
        const int begin = first + run * per_run, end = min(begin + per_run, length);
        const int head = blockIdx.x * C::QUERIES, kv_head = head / (C::HEADS / C::KV_HEADS);
        const KvSlot<C::KV_HEADS * C::HEAD_DIM> slot(state, 0);
        const float* const angles = rope + static_cast<size_t>(position) * C::ROTARY_DIM;
        k_cache += kv_head * C::HEAD_DIM;
        v_cache += kv_head * C::HEAD_DIM;
        // The rows before this token are of earlier steps: they are on their way to the L2 before the inputs are there.
        constexpr int LINE = 128 / static_cast<int>(sizeof(Element));
        constexpr int LINES = ceil_div(C::HEAD_DIM, LINE);
        for (int i = threadIdx.x; i < (min(end, position) - begin) * LINES; i += THREADS) {
            const size_t at = slot.row(begin + i / LINES) + i % LINES * LINE;
            prefetch_l2(k_cache + at);
            prefetch_l2(v_cache + at);
        }
        wait_for_inputs();

        q += head * C::HEAD_DIM;
        for (int i = threadIdx.x; i < C::QUERIES * C::HEAD_DIM; i += THREADS)
            queries[i] = rotated(q + i / C::HEAD_DIM * C::HEAD_DIM, i % C::HEAD_DIM, angles) * C::SCALE;
        if (begin <= position && position < end) {
            // Heads of one KV head in several blocks all write the same.
            k += kv_head * C::HEAD_DIM, v += kv_head * C::HEAD_DIM;
            for (int d = threadIdx.x; d < C::HEAD_DIM; d += THREADS) {
                C::Cache::store(k_cache + slot.row(position) + d, rotated(k, d, angles));
                C::Cache::store(v_cache + slot.row(position) + d, v[d]);
            }
        }
        __syncthreads();

        const int warp = threadIdx.x / WARP, lane = threadIdx.x % LANES, group = threadIdx.x % WARP / LANES;
        const bool holds = lane < VECTORS;
        float query[C::QUERIES][VECTOR], values[C::QUERIES][VECTOR] = {}, largest[C::QUERIES], sum[C::QUERIES] = {};
#pragma unroll
        for (int h = 0; h < C::QUERIES; ++h) {
            largest[h] = LOWEST;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e)
                query[h][e] = holds ? queries[h * C::HEAD_DIM + lane * VECTOR + e] : 0.0f;
        }
        constexpr int STEP = KEYS_AT_ONCE * UNROLL;
        for (int start = begin + warp * STEP; start < end; start += C::WARPS * STEP) {
            float keys[UNROLL][VECTOR] = {}, rows[UNROLL][VECTOR] = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                const size_t row = slot.row(min(start + u * KEYS_AT_ONCE + group, end - 1));
                if (holds) {
                    C::Cache::load8(k_cache + row + lane * VECTOR, keys[u]);
                    C::Cache::load8(v_cache + row + lane * VECTOR, rows[u]);
                }
            }
#pragma unroll
            for (int h = 0; h < C::QUERIES; ++h) {
                float score[UNROLL], new_largest = largest[h];
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    float dot = 0.0f;
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) dot = fmaf(query[h][e], keys[u][e], dot);
                    score[u] = segment_sum<LANES>(dot);
                    if (start + u * KEYS_AT_ONCE + group >= end) score[u] = LOWEST;
                    new_largest = fmaxf(new_largest, score[u]);
                }
                const float shrink = expf(largest[h] - new_largest);
                largest[h] = new_largest;
                sum[h] *= shrink;
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) values[h][e] *= shrink;
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    const bool counts = start + u * KEYS_AT_ONCE + group < end;
                    const float weight = counts ? expf(score[u] - new_largest) : 0.0f;
                    sum[h] += weight;
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) values[h][e] = fmaf(weight, rows[u][e], values[h][e]);
                }
            }
        }

        // Merge the warp's groups, then the warps through shared memory.
#pragma unroll
        for (int h = 0; h < C::QUERIES; ++h) {
#pragma unroll
            for (int offset = LANES; offset < WARP; offset *= 2) {
                const float other = __shfl_xor_sync(ALL_LANES, largest[h], offset);
                const float top = fmaxf(largest[h], other), mine = expf(largest[h] - top), theirs = expf(other - top);
                sum[h] = sum[h] * mine + __shfl_xor_sync(ALL_LANES, sum[h], offset) * theirs;
#pragma unroll
                for (int e = 0; e < VECTOR; ++e)
                    values[h][e] = values[h][e] * mine + __shfl_xor_sync(ALL_LANES, values[h][e], offset) * theirs;
                largest[h] = top;
            }
            float* const to = merged + (warp * C::QUERIES + h) * C::PARTIAL;
            if (group == 0 && holds)
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) to[lane * VECTOR + e] = values[h][e];
            if (threadIdx.x % WARP == 0) to[C::HEAD_DIM] = largest[h], to[C::HEAD_DIM + 1] = sum[h];
        }
        __syncthreads();
        partials += static_cast<size_t>(blockIdx.x) * C::SPLITS * C::QUERIES * C::PARTIAL;
        out += head * C::HEAD_DIM;
        if (n_runs == 1) {
            for (int i = threadIdx.x; i < C::QUERIES * C::HEAD_DIM; i += THREADS)
                out[i] = merge<C::WARPS>(merged, C::WARPS, i).value();
            return;
        }
        float* const mine = partials + run * C::QUERIES * C::PARTIAL;
        for (int i = threadIdx.x; i < C::QUERIES * C::HEAD_DIM; i += THREADS) {
            const Merged one = merge<C::WARPS>(merged, C::WARPS, i);
            float* const to = mine + i / C::HEAD_DIM * C::PARTIAL;
            to[i % C::HEAD_DIM] = one.weighted;
            if (i % C::HEAD_DIM == 0) to[C::HEAD_DIM] = one.top, to[C::HEAD_DIM + 1] = one.sum;
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) is_last = atomicAdd(counters + blockIdx.x, 1) == n_runs - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int i = threadIdx.x; i < C::QUERIES * C::HEAD_DIM; i += THREADS)
            out[i] = merge<1>(partials, n_runs, i).value();
        if (threadIdx.x == 0) counters[blockIdx.x] = 0;
    }

private:
    struct Merged {
        float weighted, top, sum;
        __device__ __forceinline__ float value() const { return weighted / sum; }
    };

    // Element i of [QUERIES, HEAD_DIM] over n parts [QUERIES, PARTIAL]. AT_ONCE: how far the loops are unrolled.
    template <int AT_ONCE>
    static __device__ __forceinline__ Merged merge(const float* parts, int n, int i) {
        parts += i / C::HEAD_DIM * C::PARTIAL;
        Merged all = {0.0f, LOWEST, 0.0f};
#pragma unroll AT_ONCE
        for (int p = 0; p < n; ++p) all.top = fmaxf(all.top, parts[p * C::QUERIES * C::PARTIAL + C::HEAD_DIM]);
#pragma unroll AT_ONCE
        for (int p = 0; p < n; ++p) {
            const float* const from = parts + p * C::QUERIES * C::PARTIAL;
            const float weight = expf(from[C::HEAD_DIM] - all.top);
            all.sum = fmaf(from[C::HEAD_DIM + 1], weight, all.sum);
            all.weighted = fmaf(from[i % C::HEAD_DIM], weight, all.weighted);
        }
        return all;
    }

    // Element d of a head vector, in pairs (i, i + HALF).
    static __device__ __forceinline__ float rotated(const float* from, int d, const float* angles) {
        if (d >= C::ROTARY_DIM) return from[d];
        const int pair = d < HALF ? d : d - HALF;
        const float cosine = angles[pair], sine = angles[HALF + pair], low = from[pair], high = from[HALF + pair];
        return d < HALF ? low * cosine - high * sine : high * cosine + low * sine;
    }
};
