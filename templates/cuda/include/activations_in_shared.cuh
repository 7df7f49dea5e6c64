// The activations of one token in shared memory, laid out against bank conflicts.
//
// x is cut into units of 4 * PLANES floats. Piece j (4 floats) of unit c stands at float4 index
// j * stride + c, so lanes that read piece j of different units touch different banks whenever the units
// differ modulo 8, and piece j + 1 lies at a constant distance. The stride makes the writes, which run
// along x, conflict-free too.
#pragma once
#include "common.cuh"

// K and UNIT, in floats. STRIDE: of the planes, in float4; made by cuda_launch.py, as is whether all of it fits.
template <int K, int UNIT, int STRIDE>
struct StagedActivations {
    static constexpr int PLANES = UNIT / 4;

    // All threads of the block call it, then __syncthreads().
    static __device__ __forceinline__ void stage(float4* shared, const float* x) {
        if (is_aligned(x, 16)) {
#pragma unroll 4
            for (int i = threadIdx.x; i < K / 4; i += blockDim.x)
                shared[(i % PLANES) * STRIDE + i / PLANES] = reinterpret_cast<const float4*>(x)[i];
        } else {
            for (int i = threadIdx.x; i < K / 4; i += blockDim.x)
                shared[(i % PLANES) * STRIDE + i / PLANES] =
                    make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
        }
    }

    static __device__ __forceinline__ float4 piece(const float4* shared, int unit, int j) {
        return shared[j * STRIDE + unit];
    }
};

// Four floats from global memory, in one load where the address allows it.
__device__ __forceinline__ float4 load4(const float* x, bool aligned) {
    if (aligned) return *reinterpret_cast<const float4*>(x);
    return make_float4(x[0], x[1], x[2], x[3]);
}
