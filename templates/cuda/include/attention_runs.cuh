// Runs of a launch's tokens: those that follow one another in one slot, and so share the rows of the cache that they see.
#pragma once
#include "kv_cache.cuh"

// End of the run that begins with token `first`: of the tokens up to `limit` that have its slot and
// positions rising by one. All lanes of the warp call it.
__device__ __forceinline__ int run_end(const int* state, int first, int limit) {
    int end = limit;
    for (int token = limit - 1 - threadIdx.x % WARP; token > first; token -= WARP)
        if (slot_of(state, token) != slot_of(state, token - 1) ||
            position_of(state, token) != position_of(state, token - 1) + 1)
            end = token;
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) end = min(end, __shfl_xor_sync(ALL_LANES, end, offset));
    return end;
}

// attend(first, last) for each run of the block's tokens, TOKENS at blockIdx.y. Between runs the block meets.
template <int TOKENS, class Attend>
__device__ __forceinline__ void by_runs(const int* state, Attend attend) {
    wait_for_inputs();
    let_dependents_start();
    const int begin = blockIdx.y * TOKENS, end = min(begin + TOKENS, count_tokens(state));
    for (int first = begin; first < end;) {
        const int next = run_end(state, first, end);
        if (first > begin) __syncthreads();  // the last run's tiles may still be read
        attend(first, next - 1);
        first = next;
    }
}
