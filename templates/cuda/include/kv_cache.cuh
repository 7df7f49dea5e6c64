// Elements of the KV cache, f16 or f32: [context, kv_heads, head_dim], both caches alike.
#pragma once
#include "common.cuh"

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
