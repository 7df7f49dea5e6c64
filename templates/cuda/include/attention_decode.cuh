// Attention of one token: a block per head, its warps share the cached rows out among them.
//
// LANES lanes hold one head vector, so a warp takes WARP / LANES keys at once. Each such group of lanes
// runs its own softmax over the keys it meets (online: running maximum, sum and weighted values); the
// groups are merged at the end, in a fixed order.
#pragma once
#include "kv_cache.cuh"

// C: HEADS, KV_HEADS, HEAD_DIM, SCALE, WINDOW, Cache, KV_ROW, KV_SCALES, KV_HELD. Shared memory: [warps, PARTIAL] floats, of each warp its
// values [HEAD_DIM], largest score and sum.
template <class C>
__device__ __forceinline__ void attention_decode(const float* q, const typename C::Cache::Element* k_cache,
                                                 const typename C::Cache::Element* v_cache, float* out,
                                                 const int* state) {
    constexpr int VECTOR = C::HEAD_DIM % 8 == 0 ? 8 : 1;  // elements that a lane loads at once
    constexpr int VECTORS = C::HEAD_DIM / VECTOR;
    constexpr int LANES = VECTORS > WARP ? WARP : power_of_two_above(VECTORS);
    constexpr int PER_LANE = ceil_div(VECTORS, LANES);
    constexpr int KEYS_AT_ONCE = WARP / LANES;
    constexpr int UNROLL = PER_LANE * VECTOR <= 8 ? 4 : 1;  // keys that a group has in flight
    GQSA_DYNAMIC_SHARED(float, shared);

    wait_for_inputs();
    let_dependents_start();
    const int head = blockIdx.x, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int lane = threadIdx.x % LANES, group = threadIdx.x % WARP / LANES;
    const int length = position_of(state, 0) + 1;
    const KvSlot<C> slot(state, 0);
    const int kv_head = head / (C::HEADS / C::KV_HEADS);
    const int first = C::WINDOW > 0 ? max(0, length - C::WINDOW) : 0;

    const auto load = [&](const typename C::Cache::Element* row, float (*to)[VECTOR]) {
        row += kv_head * C::HEAD_DIM;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
            const int vector = lane + i * LANES;
            if (vector >= VECTORS) {
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) to[i][e] = 0.0f;
            } else if constexpr (VECTOR == 8) {
                C::Cache::load8(row + vector * 8, to[i]);
            } else {
                to[i][0] = C::Cache::load(row + vector);
            }
        }
    };

    float query[PER_LANE][VECTOR], values[PER_LANE][VECTOR] = {};
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
        for (int e = 0; e < VECTOR; ++e) {
            const int d = (lane + i * LANES) * VECTOR + e;
            query[i][e] = d < C::HEAD_DIM ? q[head * C::HEAD_DIM + d] * C::SCALE : 0.0f;
        }
    float largest = LOWEST, sum = 0.0f;

    for (int start = first + warp * KEYS_AT_ONCE * UNROLL; start < length; start += warps * KEYS_AT_ONCE * UNROLL) {
        float score[UNROLL], scale[UNROLL];
        float keys[UNROLL][PER_LANE][VECTOR], new_largest = largest;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int position = min(start + u * KEYS_AT_ONCE + group, length - 1);
            load(k_cache + slot.row(position), keys[u]);
            scale[u] = kv_scale<C>(k_cache + slot.row(position), kv_head);
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) dot = fmaf(query[i][e], keys[u][i][e], dot);
            score[u] = segment_sum<LANES>(dot) * scale[u];
            if (start + u * KEYS_AT_ONCE + group >= length) score[u] = LOWEST;
            new_largest = fmaxf(new_largest, score[u]);
        }
        const float shrink = expf(largest - new_largest);
        largest = new_largest;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) values[i][e] *= shrink;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int position = start + u * KEYS_AT_ONCE + group;
            if (position >= length) continue;
            float row[PER_LANE][VECTOR];
            load(v_cache + slot.row(position), row);
            float weight = expf(score[u] - largest);
            sum += weight;
            weight *= kv_scale<C>(v_cache + slot.row(position), kv_head);
#pragma unroll
            for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) values[i][e] = fmaf(weight, row[i][e], values[i][e]);
        }
    }

    // Merge the warp's groups, then the warps through shared memory.
#pragma unroll
    for (int offset = LANES; offset < WARP; offset *= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, largest, offset), new_largest = fmaxf(largest, other);
        const float mine = expf(largest - new_largest), theirs = expf(other - new_largest);
        sum = sum * mine + __shfl_xor_sync(ALL_LANES, sum, offset) * theirs;
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e)
                values[i][e] = values[i][e] * mine + __shfl_xor_sync(ALL_LANES, values[i][e], offset) * theirs;
        largest = new_largest;
    }
    float* partial = shared + warp * C::PARTIAL;
    if (group == 0) {
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
            for (int e = 0; e < VECTOR; ++e) {
                const int d = (lane + i * LANES) * VECTOR + e;
                if (d < C::HEAD_DIM) partial[d] = values[i][e];
            }
        if (lane == 0) partial[C::HEAD_DIM] = largest, partial[C::HEAD_DIM + 1] = sum;
    }
    __syncthreads();
    for (int d = threadIdx.x; d < C::HEAD_DIM; d += blockDim.x) {
        float top = LOWEST, total = 0.0f, value = 0.0f;
        for (int w = 0; w < warps; ++w) top = fmaxf(top, shared[w * C::PARTIAL + C::HEAD_DIM]);
        for (int w = 0; w < warps; ++w) {
            const float* from = shared + w * C::PARTIAL;
            const float weight = expf(from[C::HEAD_DIM] - top);
            total = fmaf(from[C::HEAD_DIM + 1], weight, total);
            value = fmaf(from[d], weight, value);
        }
        out[head * C::HEAD_DIM + d] = value / total;
    }
}
