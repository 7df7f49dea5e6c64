// The likeliest token, so that a greedy step hands over one number: one block, one pass, no order that could vary.
#pragma once
#include "common.cuh"

// C: VOCAB, THREADS of the block. Of equal logits the first wins. A NaN anywhere, or a largest logit that is
// infinite, gives -1: such logits come of damaged weights, and no token may be taken from them.
template <class C>
__device__ __forceinline__ void argmax(const float* logits, int* token) {
    constexpr int AT_ONCE = 8;  // loads in flight: from the L2 each takes half a microsecond
    constexpr int FOURS = C::VOCAB / 4;
    const float INFINITE = __uint_as_float(0x7f800000u);
    __shared__ float largest[WARP];
    __shared__ int indices[WARP];
    wait_for_inputs();
    let_dependents_start();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;

    float best = -INFINITE;
    int index = C::VOCAB;
    bool nan = false;
    const auto take = [&](float value, int place) {
        if (value > best) best = value, index = place;
        nan |= value != value;
    };
    for (int first = threadIdx.x; first < FOURS; first += AT_ONCE * C::THREADS) {
        float4 four[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int place = first + i * C::THREADS;
            if (place < FOURS) four[i] = reinterpret_cast<const float4*>(logits)[place];
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int place = 4 * (first + i * C::THREADS);
            if (place >= 4 * FOURS) continue;
            take(four[i].x, place), take(four[i].y, place + 1), take(four[i].z, place + 2), take(four[i].w, place + 3);
        }
    }
    if (4 * FOURS + threadIdx.x < C::VOCAB) take(logits[4 * FOURS + threadIdx.x], 4 * FOURS + threadIdx.x);
    if (nan) best = INFINITE;

    take_largest(best, index);
    if (lane == 0) largest[warp] = best, indices[warp] = index;
    __syncthreads();
    if (warp > 0) return;
    best = lane < C::THREADS / WARP ? largest[lane] : -INFINITE;
    index = lane < C::THREADS / WARP ? indices[lane] : C::VOCAB;
    take_largest(best, index);
    if (lane == 0) *token = best > -INFINITE && best < INFINITE ? index : -1;
}
