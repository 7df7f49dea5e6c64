// gated of W norm(x) over records of 16 rows by 4 tiles of 64 columns; see linear_records.cuh and records.cuh.
// W [22016, 4096] in 1376 row blocks, records of at most 2208 bytes. x f32 [n_tokens, 4096], out f32 [n_tokens, 11008].
// Launch: consecutive row blocks a block, for up to 1 token(s).
#include "linear_records.cuh"

struct linear_records_t1_r22016_k4096_constants {
    static constexpr int ROWS = 22016, K = 4096, N_BLOCKS = 1376;
    static constexpr int WIDTHS = 16, MASKED_WIDTHS = 0, RECORD_BYTES = 2208;
    static constexpr bool WHOLE = 1, ONE = 1;
    static constexpr int X_STRIDE = 4096, OUT_STRIDE = 11008, RESIDUAL_STRIDE = 0;
    static constexpr int NORM = RMS_NORM, ACTIVATION = SILU, EPILOGUE = GATED;
    static constexpr bool BIAS = 0, RESIDUAL = 0, ACCUMULATE = false;
    static constexpr float EPS = 1e-05f;
    // How it is launched, and where things are in shared memory.
#if GQSA_SM_90
    static constexpr int MAX_BLOCK = 512;
    static constexpr int WARPS = 16;
    static constexpr int STAGES = 2;
    static constexpr int BLOCKS = 132;
    static constexpr int LOCAL_BLOCKS = 11;
    static constexpr int PLANES_AT = 0;
    static constexpr int RANGES_AT = 8192;
    static constexpr int PARTIALS_AT = 8720;
    static constexpr int SUMS_AT = 8848;
    static constexpr int BLOCKS_AT = 20112;
    static constexpr int PHASES_AT = 20176;
    static constexpr int RING_AT = 20688;
    static constexpr int LEFT_TO_COPY = 0;
    static constexpr int AT_ONCE = 1;
#else
    static constexpr int MAX_BLOCK = 512;
    static constexpr int WARPS = 16;
    static constexpr int STAGES = 2;
    static constexpr int BLOCKS = 132;
    static constexpr int LOCAL_BLOCKS = 11;
    static constexpr int PLANES_AT = 0;
    static constexpr int RANGES_AT = 8192;
    static constexpr int PARTIALS_AT = 8720;
    static constexpr int SUMS_AT = 8848;
    static constexpr int BLOCKS_AT = 20112;
    static constexpr int PHASES_AT = 20176;
    static constexpr int RING_AT = 20688;
    static constexpr int LEFT_TO_COPY = 0;
    static constexpr int AT_ONCE = 1;
#endif
};

extern "C" __global__ void __launch_bounds__(linear_records_t1_r22016_k4096_constants::MAX_BLOCK, BESIDE_EACH_OTHER)
linear_records_t1_r22016_k4096(
    const float* x, const signed char* planes, const float* ranges, const float* norm_weight,
    const float* norm_bias, const signed char* records, const int* starts, const int* blocks, const int* order,
    const float* bias, const float* residual, float* out, const int* state) {
    LinearRecords<linear_records_t1_r22016_k4096_constants>::run(x, norm_weight, norm_bias, records, starts, blocks, order, bias, residual, out,
                                             state);
}
