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
    static __device__ __forceinline__ float load(const Element* p) { return *p; }
    static __device__ __forceinline__ void store(Element* p, float value) { *p = value; }

    static __device__ __forceinline__ void load8(const Element* p, float* v) {
        const float4 low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};
