// Rotates q in place, rotates k on its way into the cache, copies v into the cache.
#pragma once
#include "kv_cache.cuh"

// C: HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, Cache, Q_STRIDE, K_STRIDE, V_STRIDE; Q_END, K_END and END: where the
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
    const size_t row = KvSlot<C::KV_HEADS * C::HEAD_DIM>(state, token).row(position);
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
