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

__device__ __forceinline__ int round_to_int(float value) {
    int nearest;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(nearest) : "f"(value));
    return nearest;
}

// Nothing is loaded before it that stands behind it, where the assembler would rather spill than wait.
__device__ __forceinline__ void one_after_another() {
#if __CUDA_ARCH__ >= 1000
    asm volatile("bar.warp.sync 0xffffffff;" ::: "memory");
#endif
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

__device__ __forceinline__ void prefetch_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
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

// D += A B over 8-bit integers, A unsigned [16, 32] or [16, 16], B signed [32 or 16, 8]; lane = 4 * pair + quarter.
// a[0], a[1]: rows pair and pair + 8 of columns 4 * quarter .. + 3; a[2], a[3]: the same of columns 16 + 4 * quarter ..
// b0 (b1): those columns (16 + them) as rows of B's column `pair`. d[0], d[1]: row pair, columns 2 * quarter, + 1 of D;
// d[2], d[3]: row pair + 8.
__device__ __forceinline__ void mma_32(int* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                       unsigned b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_16(int* d, unsigned a0, unsigned a1, unsigned b0) {
#if __CUDA_ARCH__ >= 1000
    mma_32(d, a0, a1, 0, 0, b0, 0);  // the short one is a function call there
    return;
#endif
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a0), "r"(a1), "r"(b0));
}

// Copies to shared memory that a warp starts and meets later; see copy_ring.cuh.
__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

#if __CUDA_ARCH__ >= 900
#define GQSA_BULK_COPY 1

__device__ __forceinline__ void barrier_init(void* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One thread: `bytes` (a multiple of 16) from global to shared memory; the barrier's phase ends when they are there.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, void* barrier) {
    const unsigned address = shared_address(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(address)
                 : "memory");
}

__device__ __forceinline__ void barrier_wait(void* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
        "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
#else
#define GQSA_BULK_COPY 0

__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}
#endif

#endif  // GQSA_HOST_EMULATION
