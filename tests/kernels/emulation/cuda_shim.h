// CUDA C++ on the CPU, for tests: what a kernel's source needs in order to be compiled by g++.
//
// Each CUDA thread is a fiber; fibers change at barriers and shuffles only (see emulator.cpp). Included by
// ptx.cuh in place of its PTX when GQSA_HOST_EMULATION is defined.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time
#define GQSA_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::dynamic_shared())

struct Dim3 {
    unsigned x, y, z;
};
extern Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {
void* dynamic_shared();
void block_barrier();
void warp_barrier();
unsigned exchange(unsigned value, int source, bool relative);  // value of lane source, or own lane ^ source
void gather(const unsigned* values, int count, unsigned (*all)[8]);  // of the warp's lanes, [32][8]
void check_alignment(const void* address, std::size_t bytes);
}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

template <class T>
inline T shuffle(T value, int source, bool relative) {
    static_assert(sizeof(T) == 4, "shuffles move 32 bits");
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    bits = emulation::exchange(bits, source, relative);
    std::memcpy(&value, &bits, 4);
    return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned, T value, int lane_mask) {
    return shuffle(value, lane_mask, true);
}
template <class T>
inline T __shfl_sync(unsigned, T value, int lane) {
    return shuffle(value, lane, false);
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

inline float half_to_float(unsigned short bits) {
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}
inline unsigned short float_to_half(float value) {
    const _Float16 half = value;
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

template <unsigned MASK>
inline unsigned and_or(unsigned bits, unsigned magic) {
    return (bits & MASK) | magic;
}

template <class T>
inline T load_streaming(const T* address) {
    emulation::check_alignment(address, sizeof(T));
    return *address;
}
inline void one_after_another() {}
inline void prefetch_l2(const void*) {}
inline void __threadfence() {}
inline int atomicAdd(int* address, int value) {
    const int before = *address;
    *address += value;
    return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int round_to_int(float value) { return static_cast<int>(std::nearbyint(value)); }

// One mma: each lane shows its fragments and multiplies what its four elements of D need.
template <int HALVES>
inline void mma(int* d, const unsigned* a, const unsigned* b) {
    unsigned mine[8] = {}, all[32][8];
    for (int i = 0; i < 2 * HALVES; ++i) mine[i] = a[i];
    for (int i = 0; i < HALVES; ++i) mine[4 + i] = b[i];
    emulation::gather(mine, 8, all);
    const int lane = threadIdx.x % 32, pair = lane / 4, quarter = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = 2 * quarter + i % 2;
        for (int h = 0; h < HALVES; ++h)
            for (int q = 0; q < 4; ++q)
                for (int e = 0; e < 4; ++e) {
                    const unsigned char left = all[pair * 4 + q][2 * h + row] >> 8 * e;
                    const signed char right = all[column * 4 + q][4 + h] >> 8 * e;
                    d[i] += left * right;
                }
    }
}
inline void mma_32(int* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    const unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    mma<2>(d, a, b);
}
inline void mma_16(int* d, unsigned a0, unsigned a1, unsigned b0) {
    const unsigned a[2] = {a0, a1};
    mma<1>(d, a, &b0);
}

#define GQSA_BULK_COPY 0
inline void copy_16(void* to, const void* from) {
    emulation::check_alignment(to, 16);
    emulation::check_alignment(from, 16);
    std::memcpy(to, from, 16);
}
inline void copy_commit() {}
template <int LATER>
inline void copy_wait() {}

inline void wait_for_inputs() {}
inline void let_dependents_start() {}
