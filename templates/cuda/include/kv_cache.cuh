// The KV cache, [slots, context] rows, see kv_cache.py: where they lie, and their elements.
#pragma once
#include "common.cuh"

// Where the rows of a token's slot lie, in elements from the start of a cache. Nothing else knows it. C: KV_ROW,
// elements of a row; KV_HELD, rows of a slot, 0: as many as the context. What all rows of the slot share is worked out once.
template <class C>
struct KvSlot {
    size_t first;

    __device__ __forceinline__ KvSlot(const int* state, int token) {
        const int context = context_of(state), rows = C::KV_HELD > 0 ? min(context, C::KV_HELD) : context;
        first = (size_t)slot_of(state, token) * rows * C::KV_ROW;
    }

    __device__ __forceinline__ size_t row(int position) const {
        if constexpr (C::KV_HELD > 0) position %= C::KV_HELD;
        return first + (size_t)position * C::KV_ROW;
    }
};

// What caches hold. SCALED: elements are to be multiplied by kv_scale of their row.
struct CacheF16 {
    using Element = unsigned short;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ float load(const Element* p) { return half_to_float(*p); }
    static __device__ __forceinline__ void store(Element* p, float value) { *p = float_to_half(value); }

    // Eight elements at a 16-byte address.
    static __device__ __forceinline__ void load8(const Element* p, float* v) {
        const uint4 bits = *reinterpret_cast<const uint4*>(p);
        const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = half_to_float(words[i / 2] >> (i % 2 * 16) & 0xffff);
    }
};

struct CacheF32 {
    using Element = float;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ float load(const Element* p) { return *p; }
    static __device__ __forceinline__ void store(Element* p, float value) { *p = value; }

    static __device__ __forceinline__ void load8(const Element* p, float* v) {
        const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};

struct CacheINT8 {
    using Element = signed char;
    static constexpr bool SCALED = true;
    static __device__ __forceinline__ float load(const Element* p) { return *p; }

    // Eight elements at an 8-byte address.
    static __device__ __forceinline__ void load8(const Element* p, float* v) {
        const uint2 bits = *reinterpret_cast<const uint2*>(p);
        const unsigned words[2] = {bits.x ^ 0x80808080, bits.y ^ 0x80808080};
#pragma unroll
        for (int i = 0; i < 8; ++i)  // 2^23 + 128 + element
            v[i] = __uint_as_float(and_or<0xff>(words[i / 4] >> i % 4 * 8, 0x4b000000)) - 8388736.0f;
    }
};

// What to multiply the elements of a KV head by. row: of all heads. C: Cache, KV_SCALES.
template <class C>
__device__ __forceinline__ float kv_scale(const typename C::Cache::Element* row, int kv_head) {
    if constexpr (C::Cache::SCALED)
        return half_to_float(*reinterpret_cast<const unsigned short*>(row + C::KV_SCALES + 2 * kv_head));
    else
        return 1.0f;
}

// The scale of a head's values, which takes the largest to 127. It is never 0, and where a value is no number or infinite,
// neither is it a number.
struct HeadScale {
    unsigned short bits;
    float scale, inverse;

    // largest: of the values, the bits of its magnitude.
    __device__ __forceinline__ HeadScale(int largest) {
        const float wanted = __uint_as_float(largest) * (1.0f / 127);
        bits = float_to_half(wanted < 5.9604645e-8f ? 5.9604645e-8f : wanted);  // 2^-24
        scale = half_to_float(bits);
        inverse = 1.0f / scale;
    }

    // The sum's low byte is the nearest integer, and of what is no number at least a byte.
    __device__ __forceinline__ signed char quantized(float value) const {
        return static_cast<signed char>(__float_as_uint(fminf(fmaxf(value * inverse, -127.0f), 127.0f) + 12582912.0f));
    }
};

__device__ __forceinline__ int magnitude(float value) { return __float_as_uint(value) & 0x7fffffff; }

// So that values relative to the largest, times their scales, are near 1 whatever the scales are.
__device__ __forceinline__ float exponent_of(float scale) {
    return static_cast<float>(static_cast<int>(__float_as_uint(scale) >> 23) - 127);
}

// Two bytes of a word as halves, exactly: elements of int8 plus 128, 4 in their places in SELECTOR.
template <unsigned SELECTOR>
__device__ __forceinline__ unsigned bytes_to_halves(unsigned word) {
    // 1024 + 128 + element, then less 1152.
    return multiply_add_halves(__byte_perm(word, 0x64646464, SELECTOR), 0x3c003c00, 0xe480e480);
}
