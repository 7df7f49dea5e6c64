// Every instruction that needs PTX, and what the host emulation puts in its place.
//
// NVRTC gets no CUDA headers: types such as float4 and uint4, shuffles and barriers are built into it,
// half precision is not, so a half is an unsigned short of bits here.
#pragma once

#ifdef GQSA_HOST_EMULATION
#include "cuda_shim.h"
#else

#define GQSA_DYNAMIC_SHARED(type, name) extern __shared__ type name[]

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// (bits & MASK) | magic in one instruction; from C++ operators it becomes two.
template <unsigned MASK>
__device__ __forceinline__ unsigned and_or(unsigned bits, unsigned magic) {
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(bits), "n"(MASK), "r"(magic));
    return result;
}

// Weights are read once per launch: they pass the L1 without staying in it, which leaves it to x.
__device__ __forceinline__ uint4 load_streaming(const uint4* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}

__device__ __forceinline__ uint2 load_streaming(const uint2* address) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
    return v;
}

__device__ __forceinline__ unsigned load_streaming(const unsigned* address) {
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
    return v;
}

__device__ __forceinline__ unsigned short load_streaming(const unsigned short* address) {
    unsigned short v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(address));
    return v;
}

// Programmatic dependent launch. A kernel calls wait_for_inputs() in every thread before it touches
// memory that another kernel writes or reads; without the launch attribute both are no-ops.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#endif  // GQSA_HOST_EMULATION
