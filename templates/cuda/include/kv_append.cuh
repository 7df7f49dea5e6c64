// Rotates q in place, rotates k on its way into the cache, copies v into the cache.
#pragma once
#include "kv_cache.cuh"

// C: HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, Cache, KV_ROW, KV_HELD, Q_STRIDE, K_STRIDE, V_STRIDE; Q_END, K_END and END: where the
// threads of q, k and v end.
// One thread per rotated pair of q and k, per other element of k and per element of v; blockIdx.y: token.
// rope: [context, ROTARY_DIM], a row is cos[ROTARY_DIM / 2] then sin[ROTARY_DIM / 2].
template <class C, int TOKENS>
__device__ __forceinline__ void kv_append(float* q, const float* k, const float* v, const float* rope,
                                          typename C::Cache::Element* k_cache, typename C::Cache::Element* v_cache,
                                          const int* state) {
    constexpr int HALF = C::ROTARY_DIM / 2;
    constexpr int K_ITEMS = C::HEAD_DIM - HALF;  // per head: pairs, then what is not rotated
    constexpr int PAIRS = HALF > 0 ? HALF : 1;  // no division by zero where nothing rotates

    wait_for_inputs();
    let_dependents_start();
    const int token = blockIdx.y, item = blockIdx.x * blockDim.x + threadIdx.x;
    if (token >= count_tokens<TOKENS>(state) || item >= C::END) return;
    const int position = position_of(state, token);
    const float* angles = rope + (size_t)position * C::ROTARY_DIM;
    const size_t row = KvSlot<C>(state, token).row(position);
    k_cache += row;
    v_cache += row;

    if (item < C::Q_END) {
        const int pair = item % PAIRS;
        float* low = q + (size_t)token * C::Q_STRIDE + item / PAIRS * C::HEAD_DIM + pair;
        const float cosine = angles[pair], sine = angles[HALF + pair], a = low[0], b = low[HALF];
        low[0] = a * cosine - b * sine;
        low[HALF] = b * cosine + a * sine;
    } else if (item < C::K_END) {
        const int head = (item - C::Q_END) / K_ITEMS, i = (item - C::Q_END) % K_ITEMS;
        const float* from = k + (size_t)token * C::K_STRIDE + head * C::HEAD_DIM;
        typename C::Cache::Element* to = k_cache + head * C::HEAD_DIM;
        if (i < HALF) {
            const float cosine = angles[i], sine = angles[HALF + i], a = from[i], b = from[HALF + i];
            C::Cache::store(to + i, a * cosine - b * sine);
            C::Cache::store(to + HALF + i, b * cosine + a * sine);
        } else {
            C::Cache::store(to + HALF + i, from[HALF + i]);
        }
    } else {
        const int i = item - C::K_END;
        C::Cache::store(v_cache + i, v[(size_t)token * C::V_STRIDE + i]);
    }
}

// The same for a cache with a scale for each head: a warp per head of q, k and v, KV_SCALES beside the constants above.
// Q_END, K_END and END count heads here, those of q only where something rotates.
template <class C, int TOKENS>
__device__ __forceinline__ void kv_append_scaled(float* q, const float* k, const float* v, const float* rope,
                                                 typename C::Cache::Element* k_cache,
                                                 typename C::Cache::Element* v_cache, const int* state) {
    constexpr int HALF = C::ROTARY_DIM / 2, PAIRS = HALF > 0 ? HALF : 1, EACH = ceil_div(C::HEAD_DIM, WARP);

    wait_for_inputs();
    let_dependents_start();
    const int token = blockIdx.y, item = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (token >= count_tokens<TOKENS>(state) || item >= C::END) return;
    const int position = position_of(state, token);
    const float* const angles = rope + (size_t)position * C::ROTARY_DIM;
    if (item < C::Q_END) {
        float* const head = q + (size_t)token * C::Q_STRIDE + item * C::HEAD_DIM;
        for (int pair = lane; pair < HALF; pair += WARP) {
            const float cosine = angles[pair], sine = angles[HALF + pair], a = head[pair], b = head[HALF + pair];
            head[pair] = a * cosine - b * sine;
            head[HALF + pair] = b * cosine + a * sine;
        }
        return;
    }
    const bool is_key = item < C::K_END;
    const int head = item - (is_key ? C::Q_END : C::K_END);
    const float* const from =
        (is_key ? k + (size_t)token * C::K_STRIDE : v + (size_t)token * C::V_STRIDE) + head * C::HEAD_DIM;
    float values[EACH];
    int largest = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int d = lane + j * WARP;
        values[j] = d < C::HEAD_DIM ? from[d] : 0.0f;
        if (is_key && d < C::ROTARY_DIM) {
            const float cosine = angles[d % PAIRS], sine = angles[HALF + d % PAIRS];
            const float partner = from[d < HALF ? d + HALF : d - HALF];
            values[j] = values[j] * cosine + partner * (d < HALF ? -sine : sine);
        }
        largest = max(largest, magnitude(values[j]));
    }
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
    const HeadScale scale(largest);
    typename C::Cache::Element* const row = (is_key ? k_cache : v_cache) + KvSlot<C>(state, token).row(position);
#pragma unroll
    for (int j = 0; j < EACH; ++j)
        if (lane + j * WARP < C::HEAD_DIM) row[head * C::HEAD_DIM + lane + j * WARP] = scale.quantized(values[j]);
    if (lane == 0) *reinterpret_cast<unsigned short*>(row + C::KV_SCALES + 2 * head) = scale.bits;
}
