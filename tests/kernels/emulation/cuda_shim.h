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
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {
void* dynamic_shared();
void block_barrier();
void warp_barrier();
unsigned exchange(unsigned value, int source, bool relative);  // value of lane source, or own lane ^ source
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
inline void wait_for_inputs() {}
inline void let_dependents_start() {}
