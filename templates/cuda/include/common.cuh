// What all kernels share: the launch's state, reductions in a fixed order, and activations.
//
// Sums run in f32 in an order that depends on constants alone, so results are the same bits at every run.
#pragma once
#include "ptx.cuh"

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOWEST = -3.402823466e38f;  // finite: LOWEST - LOWEST is 0, not NaN

// Blocks that a multiprocessor must have registers for. Kernels of one token leave half of them to the next kernel,
// which then starts early. Other architectures than Hopper would spill for it.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
constexpr int BESIDE_EACH_OTHER = 2;
#else
constexpr int BESIDE_EACH_OTHER = 1;
#endif

enum Activation { NONE, RELU, SILU, GELU, GELU_TANH };

// state: i32 [8 + 2 * max_tokens] {n_tokens, context, draw [6], then slot and position of each token}. Kernels read
// it through these functions alone. draw: {scale as f32, top_k, span, top_p, counter [2]}, see choose.cuh.
__device__ __forceinline__ int count_tokens(const int* state) { return state[0]; }
__device__ __forceinline__ int context_of(const int* state) { return state[1]; }
__device__ __forceinline__ int slot_of(const int* state, int token) { return state[8 + 2 * token]; }
__device__ __forceinline__ int position_of(const int* state, int token) { return state[9 + 2 * token]; }
__device__ __forceinline__ const int* draw_of(const int* state) { return state + 2; }

// For a kernel of TOKENS: the decode variant holds one token and must not read the count.
template <int TOKENS>
__device__ __forceinline__ int count_tokens(const int* state) {
    return TOKENS == 1 ? 1 : count_tokens(state);
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

__host__ __device__ constexpr int power_of_two_above(int x) {
    int power = 1;
    while (power < x) power *= 2;
    return power;
}

__device__ __forceinline__ bool is_aligned(const void* address, int bytes) {
    return (reinterpret_cast<unsigned long long>(address) & (bytes - 1)) == 0;
}

// Sum over aligned segments of WIDTH lanes; every lane of the segment gets it. All 32 lanes call it.
template <int WIDTH = WARP>
__device__ __forceinline__ float segment_sum(float value) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

template <int WIDTH = WARP>
__device__ __forceinline__ float segment_max(float value) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, offset));
    return value;
}

// The largest of the warp's values and the lowest index that goes with it, in every lane.
__device__ __forceinline__ void take_largest(float& value, int& index) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, value, offset);
        const int other_index = __shfl_xor_sync(ALL_LANES, index, offset);
        if (other > value || (other == value && other_index < index)) value = other, index = other_index;
    }
}

// Sum over the block, the same bits in every thread. `partials` holds one float per warp.
__device__ __forceinline__ float block_sum(float value, float* partials) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = segment_sum(value);
    __syncthreads();  // the partials of an earlier call may still be read
    if (lane == 0) partials[warp] = value;
    __syncthreads();
    return segment_sum(lane < warps ? partials[lane] : 0.0f);
}

// Its largest value, which must not be negative; NaN counts for nothing.
__device__ __forceinline__ float block_max(float value, float* partials) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    value = segment_max(value);
    __syncthreads();
    if (lane == 0) partials[warp] = value;
    __syncthreads();
    return segment_max(lane < warps ? partials[lane] : 0.0f);
}

template <int KIND>
__device__ __forceinline__ float activate(float x) {
    if (KIND == RELU) return fmaxf(x, 0.0f);
    if (KIND == SILU) return __fdividef(x, 1.0f + expf(-x));
    if (KIND == GELU) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    if (KIND == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    return x;
}
