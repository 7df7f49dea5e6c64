// One BSR stream of a linear: s = sum over kept groups of scale * (values - zero) . x; see linear_sparse.cuh.
// x f32 [n_tokens, 4096], values i8 [nnz, 8], groups i32 [nnz], crow_indices i32 [4097],
// tasks i32 [2049] row boundaries, bias f32 [4096], residual and out f32 [n_tokens, 4096].
// Launch: a warp per task, at most 512 threads a block; blockIdx.y: tile of 1 token(s).
#include "linear_sparse.cuh"

struct linear_sparse_t1_w4_g16_r4096_k4096_constants {
    static constexpr int ROWS = 4096, K = 4096, GROUP_SIZE = 16, BITS = 4;
    static constexpr int TASKS = 2048, X_STRIDE = 4096, OUT_STRIDE = 4096;
    static constexpr int RESIDUAL_STRIDE = 4096, ACTIVATION = NONE;
    static constexpr bool BIAS = 0, RESIDUAL = 1, ACCUMULATE = 0;
    static constexpr int UNIT = 16;
    static constexpr bool STAGED = 1;
    static constexpr int STAGE_STRIDE = 258;
};

extern "C" __global__ void __launch_bounds__(512, 2)
linear_sparse_t1_w4_g16_r4096_k4096(
    const float* x, const signed char* values, const int* groups, const int* crow_indices, const int* tasks,
    const float* bias, const float* residual, float* out, const int* state) {
    linear_sparse_decode<linear_sparse_t1_w4_g16_r4096_k4096_constants>(
        x, values, groups, crow_indices, tasks, bias, residual, out);
}
