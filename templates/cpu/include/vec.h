// Vectors of VW floats through clang's vector extensions: one source for AVX-512, AVX2 and NEON.
//
// VW: 16 with AVX-512, else 8 (NEON: two registers each). A kernel whose rows are multiples of 8 but
// not of 16 defines VW 8 before it includes this file.
// Loads and stores take any 4-byte aligned address: activations may start at a slice's offset.
#ifndef GQSA_VEC_H
#define GQSA_VEC_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifndef VW
#ifdef __AVX512F__
#define VW 16
#else
#define VW 8
#endif
#endif

#if VW != 8 && VW != 16
#error "VW is 8 or 16"
#endif

// Inlined always: constants of a kernel must reach the loops to be unrolled.
#define INLINE static inline __attribute__((always_inline, unused))
#define EXPORT __attribute__((visibility("default")))
#define UNROLL _Pragma("clang loop unroll(full)")

typedef float vf __attribute__((ext_vector_type(VW)));
typedef int32_t vi __attribute__((ext_vector_type(VW)));
typedef uint32_t vu __attribute__((ext_vector_type(VW)));
typedef uint16_t vu16 __attribute__((ext_vector_type(VW)));
typedef uint8_t vu8 __attribute__((ext_vector_type(VW)));
typedef int8_t vi8 __attribute__((ext_vector_type(VW)));
typedef _Float16 vh __attribute__((ext_vector_type(VW)));

#if VW == 16
#define VEC_IOTA {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define VEC_IOTA {0, 1, 2, 3, 4, 5, 6, 7}
#endif

INLINE vf load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf load_f16(const _Float16 *p) {
    vh v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vf);
}

INLINE void store_f16(_Float16 *p, vf v) {
    vh half = __builtin_convertvector(v, vh);
    memcpy(p, &half, sizeof half);
}

// The first n of VW elements, zeros behind them: the tail of a row must not be read past its end.
INLINE vf load_n(const float *p, int n) {
    if (n >= VW) return load(p);
    float padded[VW] = {0};
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return load(padded);
}

INLINE vf load_f16_n(const _Float16 *p, int n) {
    if (n >= VW) return load_f16(p);
    _Float16 padded[VW] = {0};
    for (int i = 0; i < n; i++) padded[i] = p[i];
    return load_f16(padded);
}

INLINE vf load_i8_n(const int8_t *p, int n) {
    vi8 v = {0};
    if (n >= VW)
        memcpy(&v, p, sizeof v);
    else
        for (int i = 0; i < n; i++) v[i] = p[i];
    return __builtin_convertvector(v, vf);
}

INLINE void store_n(float *p, vf v, int n) {
    if (n >= VW) {
        store(p, v);
        return;
    }
    for (int i = 0; i < n; i++) p[i] = v[i];
}

INLINE void store_f16_n(_Float16 *p, vf v, int n) {
    if (n >= VW) {
        store_f16(p, v);
        return;
    }
    for (int i = 0; i < n; i++) p[i] = (_Float16)v[i];
}

INLINE void store_i8_n(int8_t *p, vi8 v, int n) {
    if (n >= VW) {
        memcpy(p, &v, sizeof v);
        return;
    }
    for (int i = 0; i < n; i++) p[i] = v[i];
}

INLINE vf splat(float s) { return (vf)s; }
INLINE vf fma_v(vf a, vf b, vf c) { return __builtin_elementwise_fma(a, b, c); }
INLINE vf max_v(vf a, vf b) { return a > b ? a : b; }

INLINE float hsum(vf v) {
#if VW == 16
    __typeof__(v.lo) eight = v.lo + v.hi;
#else
    vf eight = v;
#endif
    __typeof__(eight.lo) four = eight.lo + eight.hi;
    return (four.x + four.z) + (four.y + four.w);
}

INLINE float hmax(vf v) {
#if VW == 16
    __typeof__(v.lo) eight = v.lo > v.hi ? v.lo : v.hi;
#else
    vf eight = v;
#endif
    __typeof__(eight.lo) four = eight.lo > eight.hi ? eight.lo : eight.hi;
    float a = four.x > four.z ? four.x : four.z, b = four.y > four.w ? four.y : four.w;
    return a > b ? a : b;
}

// Sums VW vectors at once: lane i of the result is the sum over v[i]. Each level adds halves of two
// vectors side by side, so that VW sums cost VW - 1 additions instead of VW * log2(VW).
INLINE vf hsum_each(const vf v[VW]) {
#if VW == 16
#define HALVES(a, b) (__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) \
    + __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define QUARTERS(a, b) (__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) \
    + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define PAIRS(a, b) (__builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) \
    + __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define SINGLES(a, b) (__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) \
    + __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
    vf a = HALVES(v[0], v[1]), b = HALVES(v[2], v[3]), c = HALVES(v[4], v[5]), d = HALVES(v[6], v[7]);
    vf e = HALVES(v[8], v[9]), f = HALVES(v[10], v[11]), g = HALVES(v[12], v[13]), h = HALVES(v[14], v[15]);
    a = QUARTERS(a, b), c = QUARTERS(c, d), e = QUARTERS(e, f), g = QUARTERS(g, h);
    a = PAIRS(a, c), e = PAIRS(e, g);
    return SINGLES(a, e);
#else
#define HALVES(a, b) (__builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) \
    + __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#define PAIRS(a, b) (__builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13) \
    + __builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15))
#define SINGLES(a, b) (__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) \
    + __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15))
    vf a = HALVES(v[0], v[1]), b = HALVES(v[2], v[3]), c = HALVES(v[4], v[5]), d = HALVES(v[6], v[7]);
    a = PAIRS(a, b), c = PAIRS(c, d);
    return SINGLES(a, c);
#endif
}

// A kernel runs as n_shares calls, in any order and at the same time, each with its own `share` in 0 ..
// n_shares - 1: share `share` takes items begin .. end - 1 of `total`.
INLINE void split(int total, int share, int n_shares, int *begin, int *end) {
    *begin = (int)((int64_t)total * share / n_shares);
    *end = (int)((int64_t)total * (share + 1) / n_shares);
}

INLINE int min_i(int a, int b) { return a < b ? a : b; }
INLINE int max_i(int a, int b) { return a > b ? a : b; }

#endif
