// RMSNorm over slices of a row and LayerNorm. Narrow slices take a warp each, wide ones a block.
// out may be x: each element is read and written by the same thread, after the sums are done.
#pragma once
#include "common.cuh"

// C: WIDTH, HEADS, EPS, X_STRIDE, OUT_STRIDE, BY_WARP. blockIdx.y: token.
template <class C, int TOKENS>
__device__ __forceinline__ void rms_norm(const float* x, const float* weight, float* out, const int* state) {
    constexpr bool BY_WARP = C::BY_WARP;
    __shared__ float partials[WARP];
    wait_for_inputs();
    let_dependents_start();
    const int token = blockIdx.y;
    const int head = BY_WARP ? blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP : blockIdx.x;
    if (token >= count_tokens<TOKENS>(state) || head >= C::HEADS) return;
    x += (size_t)token * C::X_STRIDE + head * C::WIDTH;
    out += (size_t)token * C::OUT_STRIDE + head * C::WIDTH;

    const int first = BY_WARP ? threadIdx.x % WARP : threadIdx.x, step = BY_WARP ? WARP : blockDim.x;
    float squares = 0.0f;
#pragma unroll 4
    for (int i = first; i < C::WIDTH; i += step) squares = fmaf(x[i], x[i], squares);
    squares = BY_WARP ? segment_sum(squares) : block_sum(squares, partials);
    const float factor = 1.0f / sqrtf(squares / C::WIDTH + C::EPS);
#pragma unroll 4
    for (int i = first; i < C::WIDTH; i += step) out[i] = x[i] * factor * weight[i];
}

// C: WIDTH, EPS, X_STRIDE, OUT_STRIDE. A block per token; the variance is that of x - mean, not a
// difference of large sums.
template <class C, int TOKENS>
__device__ __forceinline__ void layer_norm(const float* x, const float* weight, const float* bias, float* out,
                                           const int* state) {
    __shared__ float partials[WARP];
    wait_for_inputs();
    let_dependents_start();
    const int token = blockIdx.y;
    if (token >= count_tokens<TOKENS>(state)) return;
    x += (size_t)token * C::X_STRIDE;
    out += (size_t)token * C::OUT_STRIDE;

    float sum = 0.0f, squares = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x; i < C::WIDTH; i += blockDim.x) sum += x[i];
    const float mean = block_sum(sum, partials) / C::WIDTH;
#pragma unroll 4
    for (int i = threadIdx.x; i < C::WIDTH; i += blockDim.x) squares = fmaf(x[i] - mean, x[i] - mean, squares);
    const float factor = 1.0f / sqrtf(block_sum(squares, partials) / C::WIDTH + C::EPS);
#pragma unroll 4
    for (int i = threadIdx.x; i < C::WIDTH; i += blockDim.x) out[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}
