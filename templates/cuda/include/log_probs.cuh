// log softmax(logits)[target] and the first index of the largest logit: a block per token, two passes.
#pragma once
#include "common.cuh"

// C: VOCAB, X_STRIDE. blockIdx.y: token.
template <class C, int TOKENS>
__device__ __forceinline__ void log_probs(const float* logits, const int* targets, float* result, int* argmax,
                                          const int* state) {
    __shared__ float partials[WARP];
    __shared__ int indices[WARP];
    wait_for_inputs();
    let_dependents_start();
    const int token = blockIdx.y;
    if (token >= count_tokens<TOKENS>(state)) return;
    logits += (size_t)token * C::X_STRIDE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;

    float best = LOWEST;
    int index = C::VOCAB;
    for (int i = threadIdx.x; i < C::VOCAB; i += blockDim.x)
        if (logits[i] > best) best = logits[i], index = i;
    take_largest(best, index);
    if (lane == 0) partials[warp] = best, indices[warp] = index;
    __syncthreads();
    best = lane < warps ? partials[lane] : LOWEST;
    index = lane < warps ? indices[lane] : C::VOCAB;
    take_largest(best, index);

    float sum = 0.0f;
    for (int i = threadIdx.x; i < C::VOCAB; i += blockDim.x) sum += expf(logits[i] - best);
    sum = block_sum(sum, partials);
    if (threadIdx.x == 0) {
        result[token] = logits[targets[token]] - best - logf(sum);
        argmax[token] = index;
    }
}
