// Units: what one lane loads and multiplies at a time, min(G, 16) weights of one kept group.
//
// values: [nnz, G * bits / 8] bytes, element i of a group at bit i * bits, little-endian.
// groups: [nnz] words, fp16 scale | column << 16 | zero << 28. Groups of more than 16 weights are
// several units that share a word. 8-bit groups have zero 128 (their zero does not fit the word).
#pragma once
#include "common.cuh"

template <int BYTES>
struct Packed;
template <>
struct Packed<2> {
    using Load = unsigned short;
    static __device__ __forceinline__ void words(Load v, unsigned* w) { w[0] = v; }
};
template <>
struct Packed<4> {
    using Load = unsigned;
    static __device__ __forceinline__ void words(Load v, unsigned* w) { w[0] = v; }
};
template <>
struct Packed<8> {
    using Load = uint2;
    static __device__ __forceinline__ void words(Load v, unsigned* w) { w[0] = v.x, w[1] = v.y; }
};
template <>
struct Packed<16> {
    using Load = uint4;
    static __device__ __forceinline__ void words(Load v, unsigned* w) {
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
};

template <int GROUP_SIZE, int BITS>
struct Units {
    static_assert(BITS == 2 || BITS == 4 || BITS == 8, "groups have 2, 4 or 8 bits");
    static constexpr int WEIGHTS = GROUP_SIZE < 16 ? GROUP_SIZE : 16;  // per unit
    static constexpr int PER_GROUP = GROUP_SIZE / WEIGHTS;
    static constexpr int BYTES = WEIGHTS * BITS / 8;
    using Load = typename Packed<BYTES>::Load;

    static __device__ __forceinline__ float scale(unsigned word) { return half_to_float(word & 0xffff); }

    // Column of unit `index` of the stream, in units.
    static __device__ __forceinline__ int column(unsigned word, unsigned index) {
        return ((word >> 16) & 0xfff) * PER_GROUP + index % PER_GROUP;
    }

    // weights[i] = level - zero, exact: 2^23 + level is built in the mantissa, then 2^23 + zero subtracted.
    static __device__ __forceinline__ void unpack(Load packed, unsigned word, float* weights) {
        unsigned words[BYTES < 4 ? 1 : BYTES / 4];
        Packed<BYTES>::words(packed, words);
        const float shift = BITS == 8 ? 8388608.0f + 128.0f : __uint_as_float(0x4b000000u | (word >> 28));
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i) {
            const unsigned level = words[i * BITS / 32] >> (i * BITS % 32) & ((1u << BITS) - 1);
            weights[i] = __uint_as_float(0x4b000000u | level) - shift;
        }
    }
};

__device__ __forceinline__ float dot4(float4 x, const float* w, float sum) {
    sum = fmaf(x.x, w[0], sum);
    sum = fmaf(x.y, w[1], sum);
    sum = fmaf(x.z, w[2], sum);
    return fmaf(x.w, w[3], sum);
}
