// The KV cache, f16 or f32 [slots, context, kv_heads, head_dim], both caches alike: where its rows lie, and
// its elements.
#pragma once
#include "common.cuh"

// Where the rows of a token's slot lie, in elements from the start of a cache. Nothing else knows it. ROW: elements
// of a row, kv_heads * head_dim. What all rows of the slot share is worked out once.
template <int ROW>
struct KvSlot {
    size_t first;

    __device__ __forceinline__ KvSlot(const int* state, int token)
        : first((size_t)slot_of(state, token) * context_of(state) * ROW) {}

    __device__ __forceinline__ size_t row(int position) const { return first + (size_t)position * ROW; }
};

struct CacheF16 {
    using Element = unsigned short;
    static __device__ __forceinline__ float load(const Element* p) { return half_to_float(*p); }
    static __device__ __forceinline__ void store(Element* p, float value) { *p = float_to_half(value); }

    // Eight elements at a 16-byte address, as they are there and as floats.
    using Raw8 = uint4;
    static __device__ __forceinline__ Raw8 load_raw8(const Element* p) { return *reinterpret_cast<const Raw8*>(p); }
    static __device__ __forceinline__ Raw8 to_raw8(const float* v) {
        return {to_halves(v[0], v[1]), to_halves(v[2], v[3]), to_halves(v[4], v[5]), to_halves(v[6], v[7])};
    }
    static __device__ __forceinline__ void widen8(Raw8 bits, float* v) {
        const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = half_to_float(words[i / 2] >> (i % 2 * 16) & 0xffff);
    }
    static __device__ __forceinline__ void load8(const Element* p, float* v) { widen8(load_raw8(p), v); }
};

struct CacheF32 {
    using Element = float;
    static __device__ __forceinline__ float load(const Element* p) { return *p; }
    static __device__ __forceinline__ void store(Element* p, float value) { *p = value; }

    struct Raw8 {
        float4 low, high;
    };
    static __device__ __forceinline__ Raw8 load_raw8(const Element* p) {
        return {reinterpret_cast<const float4*>(p)[0], reinterpret_cast<const float4*>(p)[1]};
    }
    static __device__ __forceinline__ Raw8 to_raw8(const float* v) {
        return {{v[0], v[1], v[2], v[3]}, {v[4], v[5], v[6], v[7]}};
    }
    static __device__ __forceinline__ void widen8(Raw8 raw, float* v) {
        v[0] = raw.low.x, v[1] = raw.low.y, v[2] = raw.low.z, v[3] = raw.low.w;
        v[4] = raw.high.x, v[5] = raw.high.y, v[6] = raw.high.z, v[7] = raw.high.w;
    }
    static __device__ __forceinline__ void load8(const Element* p, float* v) { widen8(load_raw8(p), v); }
};
