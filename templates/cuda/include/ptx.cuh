// Every instruction that needs PTX, and what the host emulation puts in its place.
//
// NVRTC gets no CUDA headers: types such as float4 and uint4, shuffles and barriers are built into it,
// half precision is not, so a half is an unsigned short of bits here.
#pragma once

#ifdef GQSA_HOST_EMULATION
#include "cuda_shim.h"
#else

// A cubin for sm_90, which is compiled as sm_90a: what has a launch of its own there.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define GQSA_SM_90 1
#else
#define GQSA_SM_90 0
#endif

#define GQSA_DYNAMIC_SHARED(type, name) extern __shared__ __align__(1024) type name[]

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

// Byte I of each of four words, the first one's lowest.
template <int I>
__device__ __forceinline__ unsigned four_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    return __byte_perm(__byte_perm(a, b, I | 4 + I << 4), __byte_perm(c, d, I | 4 + I << 4), 0x5410);
}

// The value, kept in a register: the compiler can't know how it was made, and so not make it again.
__device__ __forceinline__ int held(int value) {
    asm volatile("" : "+r"(value));
    return value;
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

// A product that no addition behind it takes up: the same bits, whatever stands around it.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }

// Two neighbouring blocks of a grid that run at the same time and write to each other's shared memory.
#if GQSA_SM_90
#define GQSA_PAIRS 1
#define GQSA_PAIR __cluster_dims__(2, 1, 1)

// The place of a block in its pair, 0 or 1.
__device__ __forceinline__ int rank_in_pair() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
}

// A barrier of all threads of a pair, in two halves: what they wrote before the first is seen behind the second.
__device__ __forceinline__ void pair_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void pair_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where the block of that rank has what stands at `own` in this one's shared memory.
__device__ __forceinline__ unsigned address_in_pair(const void* own, int rank) {
    unsigned address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address)
        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
    return address;
}

// Writes there.
__device__ __forceinline__ void store_in_pair(uint2* own, uint2 value, int rank) {
    asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address_in_pair(own, rank)), "r"(value.x), "r"(value.y)
                 : "memory");
}
__device__ __forceinline__ void store_in_pair(float2* own, float2 value, int rank) {
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address_in_pair(own, rank)), "f"(value.x), "f"(value.y)
                 : "memory");
}
__device__ __forceinline__ void store_in_pair(float* own, float value, int rank) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address_in_pair(own, rank)), "f"(value) : "memory");
}
#else
#define GQSA_PAIRS 0
#define GQSA_PAIR
__device__ __forceinline__ int rank_in_pair() { return 0; }
__device__ __forceinline__ void pair_arrive() {}
__device__ __forceinline__ void pair_wait() {}
template <class T>
__device__ __forceinline__ void store_in_pair(T*, T, int) {}
#endif

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

// D += A B over halves, A [16, 16], B [16, 8], D f32 [16, 8]; lane = 4 * pair + quarter. a[0], a[1]: rows pair and
// pair + 8, columns 2 * quarter, + 1; a[2], a[3]: the same of columns 8 + them. b0, b1: rows 2 * quarter, + 1 and
// 8 + them of B's column `pair`. d as for mma_32.
__device__ __forceinline__ void mma_halves(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same by four warps together, on sm_90a: each has its own 16 rows of A, in the fragments a of four steps of 16, by all
// 128 tokens of B, which bulk copies have put into shared memory: rows of 128 bytes (64 halves of a token), 16-byte
// piece p of row r in place p ^ r % 8, from a multiple of 1024 bytes on. Done when group_wait returns. All in one
// statement: whatever the compiler put between two multiplications would make them wait for each other.
#if GQSA_SM_90
#define GQSA_WARP_GROUPS 1
#define GQSA_SUMS \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

__device__ __forceinline__ void group_multiply(float (&d)[16][4], const unsigned (&a)[4][4], const void* tokens) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(tokens));
    // Eight rows are 1024 bytes apart; 128-byte swizzle. A step is 32 bytes of a row.
    const unsigned long long matrix = (address & 0x3ffff) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
    asm volatile(
        "{\n.reg .b64 matrix;\nmov.b64 matrix, %80;\n"
        "wgmma.fence.sync.aligned;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " GQSA_SUMS "{%64, %65, %66, %67}, matrix, 1, 1, 1, 0;\n"
        "add.s64 matrix, matrix, 2;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " GQSA_SUMS "{%68, %69, %70, %71}, matrix, 1, 1, 1, 0;\n"
        "add.s64 matrix, matrix, 2;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " GQSA_SUMS "{%72, %73, %74, %75}, matrix, 1, 1, 1, 0;\n"
        "add.s64 matrix, matrix, 2;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " GQSA_SUMS "{%76, %77, %78, %79}, matrix, 1, 1, 1, 0;\n"
        "wgmma.commit_group.sync.aligned;\n}"
        : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]), "+f"(d[1][3]),
          "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]),
          "+f"(d[4][0]), "+f"(d[4][1]), "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
          "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]), "+f"(d[7][2]), "+f"(d[7][3]),
          "+f"(d[8][0]), "+f"(d[8][1]), "+f"(d[8][2]), "+f"(d[8][3]), "+f"(d[9][0]), "+f"(d[9][1]), "+f"(d[9][2]), "+f"(d[9][3]),
          "+f"(d[10][0]), "+f"(d[10][1]), "+f"(d[10][2]), "+f"(d[10][3]), "+f"(d[11][0]), "+f"(d[11][1]), "+f"(d[11][2]), "+f"(d[11][3]),
          "+f"(d[12][0]), "+f"(d[12][1]), "+f"(d[12][2]), "+f"(d[12][3]), "+f"(d[13][0]), "+f"(d[13][1]), "+f"(d[13][2]), "+f"(d[13][3]),
          "+f"(d[14][0]), "+f"(d[14][1]), "+f"(d[14][2]), "+f"(d[14][3]), "+f"(d[15][0]), "+f"(d[15][1]), "+f"(d[15][2]), "+f"(d[15][3])
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]),
          "r"(a[1][0]), "r"(a[1][1]), "r"(a[1][2]), "r"(a[1][3]),
          "r"(a[2][0]), "r"(a[2][1]), "r"(a[2][2]), "r"(a[2][3]),
          "r"(a[3][0]), "r"(a[3][1]), "r"(a[3][2]), "r"(a[3][3]),
          "l"(matrix)
        : "memory");
}

// Not as a choice for each register, which would cost whoever needs no zeros.
__device__ __forceinline__ void clear(unsigned (&a)[4][4]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) asm volatile("mov.b32 %0, 0;" : "=r"(a[i / 4][i % 4]));
}

// next: what has been made meanwhile, lest the compiler make it afterwards.
__device__ __forceinline__ void group_wait(unsigned (&next)[4][4]) {
    asm volatile("wgmma.wait_group.sync.aligned 0;"
                 : "+r"(next[0][0]), "+r"(next[0][1]), "+r"(next[0][2]), "+r"(next[0][3]),
                   "+r"(next[1][0]), "+r"(next[1][1]), "+r"(next[1][2]), "+r"(next[1][3]),
                   "+r"(next[2][0]), "+r"(next[2][1]), "+r"(next[2][2]), "+r"(next[2][3]),
                   "+r"(next[3][0]), "+r"(next[3][1]), "+r"(next[3][2]), "+r"(next[3][3])
                 :
                 : "memory");
}
#else
#define GQSA_WARP_GROUPS 0
#endif

// Four matrices of 8 rows of 16 bytes from shared memory: lane l points at row l % 8 of matrix l / 8, and gets word
// l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}

// The same, transposed: element l % 4 * 2 and the next of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}

// Arithmetic on two halves in a word, rounded once.
__device__ __forceinline__ unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

__device__ __forceinline__ unsigned multiply_halves(unsigned a, unsigned b) {
    unsigned result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// Two floats as halves, the first in the low half of the word.
__device__ __forceinline__ unsigned to_halves(float low, float high) {
    unsigned result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// Copies to shared memory that a warp starts and meets later; see copy_ring.cuh.
__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Zeros where `there` is false; then nothing is read.
__device__ __forceinline__ void copy_16_or_zeros(void* to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

#if __CUDA_ARCH__ >= 900
#define GQSA_BULK_COPY 1

// A phase ends when `count` threads have arrived and what they expect has been copied.
__device__ __forceinline__ void barrier_init(void* barrier, int count = 1) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(void* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// True in one of the warp's lanes, all of which call it. The assembler knows that it is only one: it gives a bulk copy's
// operands to the uniform registers at once, where it would else go through the lanes in a loop.
__device__ __forceinline__ bool is_elected() {
    unsigned elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
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
#endif

#endif  // GQSA_HOST_EMULATION
