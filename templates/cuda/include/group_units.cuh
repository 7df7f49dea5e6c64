// Units: what one lane loads and multiplies at a time, up to 16 weights of one kept group.
//
// values: [nnz, G * bits / 8] bytes, element i of a group at bit i * bits, little-endian.
// groups: [nnz] words, fp16 scale | column << 16 | zero << 28. Groups of more than 16 weights are
// several units that share a word. 8-bit groups have zero 128 (their zero does not fit the word).
//
// Levels become floats exactly: 2^23 + level is built in a mantissa, then 2^23 + zero is subtracted.
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

template <int GROUP_SIZE, int BITS, int UNIT>
struct Units {
    static_assert(BITS == 2 || BITS == 4 || BITS == 8, "groups have 2, 4 or 8 bits");
    static constexpr int WEIGHTS = UNIT;
    static constexpr int PER_GROUP = GROUP_SIZE / WEIGHTS;
    static constexpr int BYTES = WEIGHTS * BITS / 8;
    using Load = typename Packed<BYTES>::Load;

    static __device__ __forceinline__ float scale(unsigned word) { return half_to_float(word & 0xffff); }

    // Column of unit `index` of the stream, in units.
    static __device__ __forceinline__ int column(unsigned word, unsigned index) {
        return ((word >> 16) & 0xfff) * PER_GROUP + index % PER_GROUP;
    }

    static __device__ __forceinline__ float zero(unsigned word) {
        return BITS == 8 ? 128.0f : __uint_as_float(MAGIC | (word >> 28)) - 8388608.0f;
    }

    // weights[i] = level - zero.
    static __device__ __forceinline__ void unpack(Load packed, unsigned word, float* weights) {
        unsigned words[WORDS];
        Packed<BYTES>::words(packed, words);
        const float shift = 8388608.0f + zero(word);
#pragma unroll
        for (int i = 0; i < WEIGHTS; ++i)
            weights[i] = __uint_as_float(and_or<LEVELS>(words[i * BITS / 32] >> (i * BITS % 32), MAGIC)) - shift;
    }

    // Sum of (level - zero) * x over the unit; piece(j) gives x[4 j .. 4 j + 3].
    // Levels are used where they stand in their byte, as 2^place times themselves: one shift per byte
    // instead of one per level. A sum per place is put right at the end; all of this is exact but the sums.
    template <class Piece>
    static __device__ __forceinline__ float dot(Load packed, unsigned word, Piece piece) {
        constexpr int PLACES = 8 / BITS;
        unsigned words[WORDS];
        Packed<BYTES>::words(packed, words);
        float shifts[PLACES], sums[PLACES] = {};
        const float zero_ = zero(word);
#pragma unroll
        for (int p = 0; p < PLACES; ++p) shifts[p] = fmaf(zero_, float(1 << p * BITS), 8388608.0f);
#pragma unroll
        for (int j = 0; j < WEIGHTS / 4; ++j) {
            const float4 four = piece(j);
            const float x[4] = {four.x, four.y, four.z, four.w};
            accumulate<0>(words, x, j, shifts, sums);
            accumulate<1>(words, x, j, shifts, sums);
            accumulate<2>(words, x, j, shifts, sums);
            accumulate<3>(words, x, j, shifts, sums);
        }
        float sum = sums[0];
#pragma unroll
        for (int p = 1; p < PLACES; ++p) sum = fmaf(sums[p], 1.0f / (1 << p * BITS), sum);
        return sum;
    }

private:
    static constexpr unsigned MAGIC = 0x4b000000u;  // 2^23: its mantissa counts in ones
    static constexpr unsigned LEVELS = (1u << BITS) - 1;
    static constexpr int WORDS = BYTES < 4 ? 1 : BYTES / 4;

    // Weight 4 j + E, whose place in its byte is a constant.
    template <int E>
    static __device__ __forceinline__ void accumulate(const unsigned* words, const float* x, int j,
                                                      const float* shifts, float* sums) {
        constexpr int PLACE = E % (8 / BITS);
        const int bit = (4 * j + E) * BITS;
        const unsigned byte = words[bit / 32] >> (bit % 32 / 8 * 8);
        const float level = __uint_as_float(and_or<LEVELS << PLACE * BITS>(byte, MAGIC));
        sums[PLACE] = fmaf(level - shifts[PLACE], x[E], sums[PLACE]);
    }
};

__device__ __forceinline__ float dot4(float4 x, const float* w, float sum) {
    sum = fmaf(x.x, w[0], sum);
    sum = fmaf(x.y, w[1], sum);
    sum = fmaf(x.z, w[2], sum);
    return fmaf(x.w, w[3], sum);
}
