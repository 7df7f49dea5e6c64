// Attention of one token in one launch: rotates q and k, appends k and v to the cache, and splits the context among
// blocks, so that one sequence fills the GPU at any length.
//
// A block takes QUERIES heads that share a KV head, and a run of cached rows. LANES lanes hold one head vector, so a
// warp takes WARP / LANES keys at once; each such group of lanes runs its own softmax over the keys it meets (online:
// running maximum, sum and weighted values). Groups, warps and at last runs are merged in a fixed order, the runs by
// whichever block is done last. How many runs there are, the position alone decides.
//
// A warp's keys and values pass through its own ring in shared memory. Rows before this token are of earlier steps, so
// the first are on their way before the inputs are waited for; this token's own row never comes from the cache.
#pragma once
#include "kv_cache.cuh"

// C: HEADS, KV_HEADS, HEAD_DIM (a multiple of 8, at most 256), ROTARY_DIM, SCALE, WINDOW, Cache, QUERIES, SPLITS (most
// runs), KEYS (fewest rows worth a run), WARPS, UNROLL (keys of a stage for each group of lanes), STAGES (of a ring),
// PARTIAL (HEAD_DIM + 2: values, largest score, sum), places in shared memory (MERGED_AT, RING_AT).
// partials: [HEADS / QUERIES, SPLITS, QUERIES, PARTIAL]. counters: [HEADS / QUERIES], 0 before and after.
template <class C>
struct AppendAttention {
    using Element = typename C::Cache::Element;
    using Raw = typename C::Cache::Raw8;
    static constexpr int HALF = C::ROTARY_DIM / 2, VECTOR = 8, VECTORS = C::HEAD_DIM / VECTOR;
    static constexpr int LANES = power_of_two_above(VECTORS), KEYS_AT_ONCE = WARP / LANES;
    static constexpr int STEP = KEYS_AT_ONCE * C::UNROLL;  // keys of a stage
    static constexpr int PIECES = C::HEAD_DIM * sizeof(Element) / 16, STAGE_BYTES = 2 * STEP * PIECES * 16;
    static constexpr int THREADS = C::WARPS * WARP, GROUPS = C::HEADS / C::QUERIES;

    // The softmax of a group of lanes so far, for one head; a lane has its eight of the values.
    struct Softmax {
        float largest, sum, values[VECTOR];

        __device__ __forceinline__ void rise_to(float top) {
            const float shrink = expf(largest - top);
            largest = top, sum *= shrink;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) values[e] *= shrink;
        }

        __device__ __forceinline__ void add(float weight, const float (&row)[VECTOR]) {
            sum += weight;
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) values[e] = fmaf(weight, row[e], values[e]);
        }
    };

    static __device__ __forceinline__ void run(const float* q, const float* k, const float* v, const float* rope,
                                               Element* k_cache, Element* v_cache, float* partials, int* counters,
                                               float* out, const int* state) {
        GQSA_DYNAMIC_SHARED(unsigned char, shared);
        float* const own = reinterpret_cast<float*>(shared);  // [QUERIES + 2, HEAD_DIM] queries, rotated and scaled, k, v
        float* const merged = reinterpret_cast<float*>(shared + C::MERGED_AT);  // [WARPS, QUERIES, PARTIAL]
        __shared__ int is_last;
        let_dependents_start();
        // The host wrote the state before any kernel of this launch plan began: it needs no wait.
        const int position = position_of(state, 0), length = position + 1;
        const int first = C::WINDOW > 0 ? max(0, length - C::WINDOW) : 0;
        const int n_runs = min(C::SPLITS, ceil_div(length - first, C::KEYS));
        const int place = blockIdx.x % GROUPS, run = blockIdx.x / GROUPS;
        if (run >= n_runs) {
            // It keeps its place until then: blocks of the next kernel would crowd into room that is free too early.
            wait_for_inputs();
            return;
        }
        const int per_run = ceil_div(length - first, n_runs), begin = first + run * per_run;
        const int end = min(begin + per_run, position);  // of the rows in the cache
        const int head = place * C::QUERIES, kv_head = head / (C::HEADS / C::KV_HEADS);
        const KvSlot<C::KV_HEADS * C::HEAD_DIM> slot(state, 0);
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % LANES, group = threadIdx.x % WARP / LANES;
        const bool holds = lane < VECTORS;
        k_cache += kv_head * C::HEAD_DIM;
        v_cache += kv_head * C::HEAD_DIM;

        // A stage: [STEP, HEAD_DIM] keys, then values. Steps past the end are counted and empty.
        unsigned char* const ring = shared + C::RING_AT + warp * (C::STAGES * STAGE_BYTES);
        const auto fetch = [&](int stage, int start) {
            if (start < end)
                for (int i = threadIdx.x % WARP; i < STEP * PIECES; i += WARP) {
                    const size_t from = slot.row(min(start + i / PIECES, end - 1)) + i % PIECES * (16 / sizeof(Element));
                    unsigned char* const to = ring + stage * STAGE_BYTES + i * 16;
                    copy_16(to, k_cache + from), copy_16(to + STAGE_BYTES / 2, v_cache + from);
                }
            copy_commit();
        };
        int start = begin + warp * STEP, stage = 0;
#pragma unroll
        for (int s = 0; s < C::STAGES; ++s) fetch(s, start + s * C::WARPS * STEP);
        // What comes next is at least on its way to the L2.
        constexpr int LINE = 128 / static_cast<int>(sizeof(Element)), LINES = ceil_div(C::HEAD_DIM, LINE);
        constexpr int TURN = C::STAGES * C::WARPS * STEP;
        const int ahead = begin + TURN, behind = min(end, begin + 3 * TURN);
        for (int i = threadIdx.x; i < (behind - ahead) * LINES; i += THREADS) {
            const size_t at = slot.row(ahead + i / LINES) + i % LINES * LINE;
            prefetch_l2(k_cache + at);
            prefetch_l2(v_cache + at);
        }
        wait_for_inputs();

        const float* const angles = rope + static_cast<size_t>(position) * C::ROTARY_DIM;
        for (int i = threadIdx.x; i < (C::QUERIES + 2) * C::HEAD_DIM; i += THREADS) {
            const int which = i / C::HEAD_DIM, d = i % C::HEAD_DIM;
            own[i] = which < C::QUERIES    ? rotated(q + (head + which) * C::HEAD_DIM, d, angles) * C::SCALE
                     : which == C::QUERIES ? rotated(k + kv_head * C::HEAD_DIM, d, angles)
                                           : v[kv_head * C::HEAD_DIM + d];
        }
        __syncthreads();
        float query[C::QUERIES][VECTOR];
        Softmax heads[C::QUERIES];
#pragma unroll
        for (int h = 0; h < C::QUERIES; ++h) {
            read8(own + h * C::HEAD_DIM, lane, query[h]);
            heads[h] = {LOWEST, 0.0f, {}};
        }
        if (run == n_runs - 1 && warp == 0) {
            float key[VECTOR], row[VECTOR];
            read8(own + C::QUERIES * C::HEAD_DIM, lane, key);
            read8(own + (C::QUERIES + 1) * C::HEAD_DIM, lane, row);
            const Raw key_bits = C::Cache::to_raw8(key), row_bits = C::Cache::to_raw8(row);
            if (group == 0 && holds) {
                // Heads of one KV head in several blocks all write the same.
                const size_t to = slot.row(position) + lane * VECTOR;
                *reinterpret_cast<Raw*>(k_cache + to) = key_bits, *reinterpret_cast<Raw*>(v_cache + to) = row_bits;
            }
            C::Cache::widen8(key_bits, key), C::Cache::widen8(row_bits, row);
#pragma unroll
            for (int h = 0; h < C::QUERIES; ++h) {
                const float score = dot(query[h], key);
                if (group > 0) continue;
                heads[h].largest = score;
                heads[h].add(1.0f, row);
            }
        }

        for (; start < end; start += C::WARPS * STEP) {
            copy_wait<C::STAGES - 1>();
            __syncwarp();
            const Element* const keys = reinterpret_cast<const Element*>(ring + stage * STAGE_BYTES);
            const Element* const rows = keys + STEP * C::HEAD_DIM;
            const auto read = [&](const Element* from, int u, float (&to)[VECTOR]) {
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) to[e] = 0.0f;
                if (holds) C::Cache::load8(from + (u * KEYS_AT_ONCE + group) * C::HEAD_DIM + lane * VECTOR, to);
            };
            float weights[C::QUERIES][C::UNROLL];  // scores at first
#pragma unroll
            for (int u = 0; u < C::UNROLL; ++u) {
                float key[VECTOR];
                read(keys, u, key);
                const bool counts = start + u * KEYS_AT_ONCE + group < end;
#pragma unroll
                for (int h = 0; h < C::QUERIES; ++h) {
                    const float score = dot(query[h], key);
                    weights[h][u] = counts ? score : LOWEST;
                }
            }
#pragma unroll
            for (int h = 0; h < C::QUERIES; ++h) {
                float top = heads[h].largest;
#pragma unroll
                for (int u = 0; u < C::UNROLL; ++u) top = fmaxf(top, weights[h][u]);
                heads[h].rise_to(top);
#pragma unroll
                for (int u = 0; u < C::UNROLL; ++u)
                    weights[h][u] = start + u * KEYS_AT_ONCE + group < end ? expf(weights[h][u] - top) : 0.0f;
            }
#pragma unroll
            for (int u = 0; u < C::UNROLL; ++u) {
                float row[VECTOR];
                read(rows, u, row);
#pragma unroll
                for (int h = 0; h < C::QUERIES; ++h) heads[h].add(weights[h][u], row);
            }
            __syncwarp();
            fetch(stage, start + C::STAGES * C::WARPS * STEP);
            stage = stage + 1 == C::STAGES ? 0 : stage + 1;
        }

        // Merge the warp's groups, then the warps through shared memory.
#pragma unroll
        for (int h = 0; h < C::QUERIES; ++h) {
            Softmax& one = heads[h];
#pragma unroll
            for (int offset = LANES; offset < WARP; offset *= 2) {
                one.rise_to(fmaxf(one.largest, __shfl_xor_sync(ALL_LANES, one.largest, offset)));
                one.sum += __shfl_xor_sync(ALL_LANES, one.sum, offset);
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) one.values[e] += __shfl_xor_sync(ALL_LANES, one.values[e], offset);
            }
            float* const to = merged + (warp * C::QUERIES + h) * C::PARTIAL;
            if (group == 0 && holds)
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) to[lane * VECTOR + e] = one.values[e];
            if (threadIdx.x % WARP == 0) to[C::HEAD_DIM] = one.largest, to[C::HEAD_DIM + 1] = one.sum;
        }
        __syncthreads();
        partials += static_cast<size_t>(place) * C::SPLITS * C::QUERIES * C::PARTIAL;
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
        if (threadIdx.x == 0) is_last = atomicAdd(counters + place, 1) == n_runs - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int i = threadIdx.x; i < C::QUERIES * C::HEAD_DIM; i += THREADS)
            out[i] = merge<1>(partials, n_runs, i).value();
        if (threadIdx.x == 0) counters[place] = 0;
    }

private:
    struct Merged {
        float weighted, top, sum;
        __device__ __forceinline__ float value() const { return __fdividef(weighted, sum); }
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

    // Over the lanes of a group, each with its eight.
    static __device__ __forceinline__ float dot(const float (&a)[VECTOR], const float (&b)[VECTOR]) {
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) sum = fmaf(a[e], b[e], sum);
        return segment_sum<LANES>(sum);
    }

    // A lane's eight of a head vector, zeros past its end.
    static __device__ __forceinline__ void read8(const float* from, int lane, float (&to)[VECTOR]) {
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) to[e] = 0.0f;
        if (lane < VECTORS) CacheF32::load8(from + lane * VECTOR, to);
    }

    // Element d of a head vector, in pairs (i, i + HALF).
    static __device__ __forceinline__ float rotated(const float* from, int d, const float* angles) {
        if (d >= C::ROTARY_DIM) return from[d];
        const int pair = d < HALF ? d : d - HALF;
        const float cosine = angles[pair], sine = angles[HALF + pair], low = from[pair], high = from[HALF + pair];
        return d < HALF ? low * cosine - high * sine : high * cosine + low * sine;
    }
};
