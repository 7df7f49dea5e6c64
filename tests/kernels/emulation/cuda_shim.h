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
void wait_for_others();  // lets other threads run before it returns
void pair_arrive();
void pair_wait();  // until all threads of both blocks have arrived as often as this one
void* in_pair(void* own, int rank);  // the same place in the shared memory of that block
unsigned exchange(unsigned value, int source, bool relative);  // value of lane source, or own lane ^ source
void gather(const unsigned* values, int count, unsigned (*all)[8]);  // of the warp's lanes, [32][8]
void check_alignment(const void* address, std::size_t bytes);
}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

template <class T>
inline T shuffle(T value, int source, bool relative) {
    static_assert(sizeof(T) % 4 == 0, "shuffles move words");
    unsigned words[sizeof(T) / 4];
    std::memcpy(words, &value, sizeof(T));
    for (unsigned& word : words) word = emulation::exchange(word, source, relative);
    std::memcpy(&value, words, sizeof(T));
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

inline unsigned __ballot_sync(unsigned, bool value) {
    unsigned mine = value, all[32][8], bits = 0;
    emulation::gather(&mine, 1, all);
    for (int lane = 0; lane < 32; ++lane) bits |= all[lane][0] << lane;
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
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
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) {
    const volatile float product = a * b;
    return product;
}
inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned __int128>(a) * b >> 64;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void one_after_another() {}
inline int held(int value) { return value; }
inline void prefetch_l2(const void*) {}
inline void __threadfence() {}
template <class T>
inline T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = static_cast<unsigned long long>(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <int I>
inline unsigned four_bytes(unsigned a, unsigned b, unsigned c, unsigned d) {
    const unsigned words[4] = {a, b, c, d};
    unsigned bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= (words[i] >> 8 * I & 0xff) << 8 * i;
    return bytes;
}

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

inline _Float16 half_of(unsigned word, int i) {
    const unsigned short bits = word >> 16 * i;
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return value;
}
template <class F>
inline unsigned of_halves(F value) {
    unsigned word = 0;
    for (int i = 0; i < 2; ++i) {
        const _Float16 half = value(i);
        unsigned short bits;
        std::memcpy(&bits, &half, 2);
        word |= static_cast<unsigned>(bits) << 16 * i;
    }
    return word;
}
// Products and sums of halves are exact as doubles.
inline unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    return of_halves([&](int i) {
        return static_cast<_Float16>(static_cast<double>(half_of(a, i)) * half_of(b, i) + half_of(c, i));
    });
}
inline unsigned multiply_halves(unsigned a, unsigned b) {
    return of_halves([&](int i) { return static_cast<_Float16>(static_cast<double>(half_of(a, i)) * half_of(b, i)); });
}
inline unsigned to_halves(float low, float high) {
    return of_halves([&](int i) { return static_cast<_Float16>(i ? high : low); });
}
inline void mma_halves(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    unsigned all[32][8];
    emulation::gather(mine, 6, all);
    const int lane = threadIdx.x % 32, pair = lane / 4, quarter = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = i / 2, column = 2 * quarter + i % 2;
        double sum = d[i];
        for (int h = 0; h < 2; ++h)
            for (int q = 0; q < 4; ++q)
                for (int e = 0; e < 2; ++e)
                    sum += static_cast<double>(half_of(all[pair * 4 + q][2 * h + row], e)) *
                           half_of(all[column * 4 + q][4 + h], e);
        d[i] = static_cast<float>(sum);
    }
}
// TRANSPOSED: of each matrix.
template <bool TRANSPOSED>
inline void load_four_matrices(unsigned (&to)[4], const void* row) {
    emulation::check_alignment(row, 16);
    unsigned mine[4], all[32][8];
    std::memcpy(mine, row, 16);
    emulation::gather(mine, 4, all);
    const int lane = threadIdx.x % 32, line = lane / 4, word = lane % 4;
    for (int m = 0; m < 4; ++m) {
        if (!TRANSPOSED) {
            to[m] = all[m * 8 + line][word];
        } else {
            to[m] = of_halves([&](int i) { return half_of(all[m * 8 + 2 * word + i][line / 2], line % 2); });
        }
    }
}
inline void load_matrices(unsigned (&to)[4], const void* row) { load_four_matrices<false>(to, row); }
inline void load_matrices_transposed(unsigned (&to)[4], const void* row) { load_four_matrices<true>(to, row); }

// What sm_90 has of its own is tested where the test asks for it.
#ifndef GQSA_WARP_GROUPS
#define GQSA_WARP_GROUPS 0
#endif
#ifndef GQSA_SM_90
#define GQSA_SM_90 0
#endif
inline void group_wait(unsigned (&)[4][4]) {}
inline void clear(unsigned (&a)[4][4]) { std::memset(a, 0, sizeof a); }
// A barrier: how many must arrive, how many have not, and how often all have, from the low bits up.
inline void barrier_init(void* barrier, int count = 1) {
    emulation::check_alignment(barrier, 8);
    *static_cast<unsigned long long*>(barrier) = count | count << 16;
}
inline void barrier_arrive(void* barrier) {
    unsigned long long& state = *static_cast<unsigned long long*>(barrier);
    state -= 1 << 16;
    if ((state >> 16 & 0xffff) == 0) state += (state & 0xffff) << 16 | 1ull << 32;
}
inline void barrier_wait(void* barrier, int parity) {
    while ((*static_cast<unsigned long long*>(barrier) >> 32 & 1) == parity) emulation::wait_for_others();
}
inline void bulk_copy(void* to, const void* from, int bytes, void* barrier) {
    emulation::check_alignment(to, 16);
    emulation::check_alignment(from, 16);
    std::memcpy(to, from, bytes);
    barrier_arrive(barrier);
}
inline void group_multiply(float (&d)[16][4], const unsigned (&a)[4][4], const void* tokens) {
    emulation::check_alignment(tokens, 1024);
    const int lane = threadIdx.x % 32, pair = lane / 4, quarter = lane % 4;
    for (int step = 0; step < 4; ++step) {
        unsigned all[32][8];
        emulation::gather(a[step], 4, all);
        for (int i = 0; i < 64; ++i) {
            const int row = i % 4 / 2, token = i / 4 * 8 + 2 * quarter + i % 2;
            double sum = d[i / 4][i % 4];
            for (int h = 0; h < 2; ++h) {
                unsigned piece[4];
                const int place = (2 * step + h) ^ token % 8;
                std::memcpy(piece, static_cast<const char*>(tokens) + token * 128 + place * 16, 16);
                for (int q = 0; q < 4; ++q)
                    for (int e = 0; e < 2; ++e)
                        sum += static_cast<double>(half_of(all[pair * 4 + q][2 * h + row], e)) * half_of(piece[q], e);
            }
            d[i / 4][i % 4] = static_cast<float>(sum);
        }
    }
}

#define GQSA_BULK_COPY 0
inline void copy_16(void* to, const void* from) {
    emulation::check_alignment(to, 16);
    emulation::check_alignment(from, 16);
    std::memcpy(to, from, 16);
}
inline void copy_16_or_zeros(void* to, const void* from, bool there) {
    emulation::check_alignment(to, 16);
    if (there)
        copy_16(to, from);
    else
        std::memset(to, 0, 16);
}
inline void copy_commit() {}
template <int LATER>
inline void copy_wait() {}

// Two blocks run side by side where the test says so, as it does for kernels with GQSA_PAIR on sm_90.
#define GQSA_PAIRS GQSA_SM_90
#define GQSA_PAIR
inline int rank_in_pair() { return blockIdx.x % 2; }
inline void pair_arrive() { emulation::pair_arrive(); }
inline void pair_wait() { emulation::pair_wait(); }
template <class T>
inline void store_in_pair(T* own, T value, int rank) {
    *static_cast<T*>(emulation::in_pair(own, rank)) = value;
}

inline void wait_for_inputs() {}
inline void let_dependents_start() {}
