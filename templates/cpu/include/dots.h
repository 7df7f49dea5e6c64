// Exact sums of level * q, levels unsigned bytes, q = 256 * high + low with signed bytes, by what a target has:
//
// - DOT_INSTRUCTIONS: products of four bytes added to 32 bits (`vpdpbusd`, `sdot`), of the high plane and of the low one.
// - Else, where a level meets one token, up to 4 bits: sums of 16 bits (`vpmaddubsw`, `smlal`), since 16 products of
//   15 * 128 stay below 2^15. Several tokens have no gain of it: two planes are as many products as one of 16 bits.
// - Else products of 16 bits (`vpmaddwd`, `smlal`), of even columns first, then of odd ones.
//
// The kernel defines TOKENS, WIDTHS and MASKED_WIDTHS. The order of levels in vectors is that of records.h.
#ifndef GQSA_DOTS_H
#define GQSA_DOTS_H

#include "quantized_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
#define DOT_INSTRUCTIONS 1
#else
#define DOT_INSTRUCTIONS 0
#endif
#if DOT_INSTRUCTIONS && defined(__aarch64__)
#define SIGNED_LEVELS 1  // `sdot` multiplies signed bytes: levels of 8 bits, and their zeros, are less by 128
#else
#define SIGNED_LEVELS 0
#endif
#define BY_BYTES(width) (DOT_INSTRUCTIONS || (TOKENS == 1 && (width) <= 4))

typedef uint8_t vb __attribute__((ext_vector_type(64)));
typedef uint16_t vw __attribute__((ext_vector_type(32)));
typedef uint64_t vq __attribute__((ext_vector_type(8)));
typedef uint8_t vb16 __attribute__((ext_vector_type(16)));

#define EVEN(levels) ((vw)(levels) & 0xff)
#define ODD(levels) ((vw)(levels) >> 8)

#define SHUFFLE_QUARTERS(a, b, i, j) /* 128-bit parts i and j of a, then of b */                                  \
    __builtin_shufflevector(a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3, \
                            16 + 4 * i, 17 + 4 * i, 18 + 4 * i, 19 + 4 * i, 16 + 4 * j, 17 + 4 * j, 18 + 4 * j, 19 + 4 * j)
#define SHUFFLE_WORDS(a, b, i) /* words i and i + 2 of each 128-bit part of a, then of b */                    \
    __builtin_shufflevector(a, b, i, 2 + i, 16 + i, 18 + i, 4 + i, 6 + i, 20 + i, 22 + i, 8 + i, 10 + i, 24 + i, \
                            26 + i, 12 + i, 14 + i, 28 + i, 30 + i)

#define HAS_WORDS (!DOT_INSTRUCTIONS && (TOKENS > 1 || (WIDTHS | MASKED_WIDTHS) & 1 << 8))
#define HAS_BYTES (!HAS_WORDS || (TOKENS == 1 && (WIDTHS | MASKED_WIDTHS) & 0x1f))

// An activation tile for `pair_sums`: vectors [plane or parity][nib], in the order of unpacked bytes. Of the two kinds a
// kernel has what its widths need.
struct tile_x {
#if HAS_BYTES
    vb planes[2][2];  // the high plane first
#endif
#if HAS_WORDS
    vw parities[2][2];
#endif
};

// Puts 16 columns, a quarter of a tile, into their places.
INLINE void place_quarter(struct tile_x *to, int quarter, vi q) {
#define PLACE(in, part, nib, quad) memcpy((uint8_t *)&to->in[part][nib] + 16 * quarter, &(__typeof__(quad)){quad}, 16)
#if HAS_BYTES
#define BYTES(v, i) \
    __builtin_shufflevector(v, v, i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7, \
                            i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7)
    const vb16 high = __builtin_convertvector((q + 128) >> 8, vb16), low = __builtin_convertvector(q, vb16);
    PLACE(planes, 0, 0, BYTES(high, 0)), PLACE(planes, 0, 1, BYTES(high, 8));
    PLACE(planes, 1, 0, BYTES(low, 0)), PLACE(planes, 1, 1, BYTES(low, 8));
#undef BYTES
#endif
#if HAS_WORDS
#define COLUMNS(i) __builtin_shufflevector(words, words, i, i + 2, i + 4, i + 6, i, i + 2, i + 4, i + 6)
    const vu16 words = __builtin_convertvector(q, vu16);
    PLACE(parities, 0, 0, COLUMNS(0)), PLACE(parities, 0, 1, COLUMNS(8));
    PLACE(parities, 1, 0, COLUMNS(1)), PLACE(parities, 1, 1, COLUMNS(9));
#undef COLUMNS
#endif
#undef PLACE
}

// Sums of a pair of rows, [quarters, 2 halves, 2], quarters added up until a register of the target holds them. `sum_rows`
// makes those of the 16 rows, [pair, half], from those of the eight pairs.
#if defined(__AVX512F__)
typedef vi vs;
INLINE vi sum_rows(const vs of_pair[8]) {
    vi two[4], four[2];
    UNROLL for (int i = 0; i < 4; i++)
        two[i] = SHUFFLE_WORDS(of_pair[2 * i], of_pair[2 * i + 1], 0) + SHUFFLE_WORDS(of_pair[2 * i], of_pair[2 * i + 1], 1);
    UNROLL for (int i = 0; i < 2; i++)
        four[i] = SHUFFLE_QUARTERS(two[2 * i], two[2 * i + 1], 0, 2) + SHUFFLE_QUARTERS(two[2 * i], two[2 * i + 1], 1, 3);
    return SHUFFLE_QUARTERS(four[0], four[1], 0, 2) + SHUFFLE_QUARTERS(four[0], four[1], 1, 3);
}
#elif defined(__AVX2__)
typedef int32_t vs __attribute__((ext_vector_type(8)));
INLINE vi sum_rows(const vs of_pair[8]) {
    vs two[4], four[2];
    UNROLL for (int i = 0; i < 4; i++)
        two[i] = __builtin_shufflevector(of_pair[2 * i], of_pair[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14)
                 + __builtin_shufflevector(of_pair[2 * i], of_pair[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    UNROLL for (int i = 0; i < 2; i++)
        four[i] = __builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11)
                  + __builtin_shufflevector(two[2 * i], two[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else
typedef int32x4_t vs;
INLINE vi sum_rows(const vs of_pair[8]) {
    vs four[4];
    UNROLL for (int i = 0; i < 4; i++) four[i] = vpaddq_s32(of_pair[2 * i], of_pair[2 * i + 1]);
    vi sums;
    memcpy(&sums, four, sizeof sums);
    return sums;
}
#endif

#if DOT_INSTRUCTIONS
// sums[i] + the products of four bytes each; the same with quarters added up.
#if defined(__AVX512VNNI__)
INLINE vi dot_bytes(vi sums, vb levels, vb x) { return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)levels, (__m512i)x); }
INLINE vs dot_quarters(vs sums, vb levels, vb x) { return dot_bytes(sums, levels, x); }
#elif defined(__AVXVNNI__)
#define DOT(sums, levels, x) ((vs)_mm256_dpbusd_avx_epi32((__m256i)(sums), (__m256i)(levels), (__m256i)(x)))
INLINE vi dot_bytes(vi sums, vb levels, vb x) {
    sums.lo = DOT(sums.lo, levels.lo, x.lo), sums.hi = DOT(sums.hi, levels.hi, x.hi);
    return sums;
}
INLINE vs dot_quarters(vs sums, vb levels, vb x) { return DOT(DOT(sums, levels.lo, x.lo), levels.hi, x.hi); }
#undef DOT
#else
INLINE vi dot_bytes(vi sums, vb levels, vb x) {
    int32x4_t all[4];
    int8x16_t a[4], b[4];
    memcpy(all, &sums, sizeof sums), memcpy(a, &levels, sizeof a), memcpy(b, &x, sizeof b);
    UNROLL for (int i = 0; i < 4; i++) all[i] = vdotq_s32(all[i], a[i], b[i]);
    memcpy(&sums, all, sizeof sums);
    return sums;
}
INLINE vs dot_quarters(vs sums, vb levels, vb x) {
    int8x16_t a[4], b[4];
    memcpy(a, &levels, sizeof a), memcpy(b, &x, sizeof b);
    UNROLL for (int i = 0; i < 4; i++) sums = vdotq_s32(sums, a[i], b[i]);
    return sums;
}
#endif

#else

// sums + the products of 16-bit integers; on Arm each has a sum of its own until `sum_words`.
#if defined(__AVX2__)
typedef vi word_sums;
INLINE word_sums dot_words(word_sums sums, vw a, vw b) {
#if defined(__AVX512F__)
    return sums + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
    vi products;
    products.lo = (vs)_mm256_madd_epi16((__m256i)a.lo, (__m256i)b.lo);
    products.hi = (vs)_mm256_madd_epi16((__m256i)a.hi, (__m256i)b.hi);
    return sums + products;
#endif
}
INLINE vi sum_words(word_sums sums) { return sums; }
#else
typedef struct {
    int32x4_t part[8];
} word_sums;
INLINE word_sums dot_words(word_sums sums, vw a, vw b) {
    int16x8_t x[4], y[4];
    memcpy(x, &a, sizeof x), memcpy(y, &b, sizeof y);
    UNROLL for (int i = 0; i < 4; i++) {
        sums.part[2 * i] = vmlal_s16(sums.part[2 * i], vget_low_s16(x[i]), vget_low_s16(y[i]));
        sums.part[2 * i + 1] = vmlal_high_s16(sums.part[2 * i + 1], x[i], y[i]);
    }
    return sums;
}
INLINE vi sum_words(word_sums sums) {
    int32x4_t all[4];
    UNROLL for (int i = 0; i < 4; i++) all[i] = vpaddq_s32(sums.part[2 * i], sums.part[2 * i + 1]);
    vi result;
    memcpy(&result, all, sizeof result);
    return result;
}
#endif

#if HAS_BYTES
// Of a pair's levels of up to 4 bits.
INLINE vs narrow_sums(const vb levels[2], const vb planes[2][2]) {
#if defined(__AVX512F__)
    vs sums[2];
    UNROLL for (int i = 0; i < 2; i++) {
        const __m512i of_plane = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)levels[0], (__m512i)planes[i][0]),
                                                  _mm512_maddubs_epi16((__m512i)levels[1], (__m512i)planes[i][1]));
        sums[i] = (vs)_mm512_madd_epi16(of_plane, _mm512_set1_epi16(i ? 1 : 256));
    }
    return sums[0] + sums[1];
#elif defined(__AVX2__)
    vs sums[2];
    UNROLL for (int i = 0; i < 2; i++) {
        __m256i products[4];
        UNROLL for (int nib = 0; nib < 2; nib++) {
            products[nib] = _mm256_maddubs_epi16((__m256i)levels[nib].lo, (__m256i)planes[i][nib].lo);
            products[2 + nib] = _mm256_maddubs_epi16((__m256i)levels[nib].hi, (__m256i)planes[i][nib].hi);
        }
        const __m256i of_plane = _mm256_add_epi16(_mm256_add_epi16(products[0], products[1]),
                                                  _mm256_add_epi16(products[2], products[3]));
        sums[i] = (vs)_mm256_madd_epi16(of_plane, _mm256_set1_epi16(i ? 1 : 256));
    }
    return sums[0] + sums[1];
#else
    int16x8_t of_plane[2];  // four sums of the first row, then of the second
    UNROLL for (int i = 0; i < 2; i++) {
        int16x8_t first = vdupq_n_s16(0), second = vdupq_n_s16(0);
        UNROLL for (int nib = 0; nib < 2; nib++) {
            int8x16_t a[4], b[4];
            memcpy(a, &levels[nib], sizeof a), memcpy(b, &planes[i][nib], sizeof b);
            UNROLL for (int quarter = 0; quarter < 4; quarter++) {
                first = vmlal_s8(first, vget_low_s8(a[quarter]), vget_low_s8(b[quarter]));
                second = vmlal_high_s8(second, a[quarter], b[quarter]);
            }
        }
        of_plane[i] = vpaddq_s16(first, second);
    }
    return vpadalq_s16(vshlq_n_s32(vpaddlq_s16(of_plane[0]), 8), of_plane[1]);
#endif
}
#endif

#if HAS_WORDS
// Of a pair's levels of 8 bits.
INLINE vs wide_sums(const vb levels[2], const vw parities[2][2]) {
    word_sums sums = {0};
    UNROLL for (int nib = 0; nib < 2; nib++) {
        sums = dot_words(sums, EVEN(levels[nib]), parities[0][nib]);
        sums = dot_words(sums, ODD(levels[nib]), parities[1][nib]);
    }
#if defined(__AVX512F__)
    return sums;
#elif defined(__AVX2__)
    return sums.lo + sums.hi;
#else
    const int32x4_t first = vaddq_s32(vaddq_s32(sums.part[0], sums.part[2]), vaddq_s32(sums.part[4], sums.part[6]));
    const int32x4_t second = vaddq_s32(vaddq_s32(sums.part[1], sums.part[3]), vaddq_s32(sums.part[5], sums.part[7]));
    return vpaddq_s32(first, second);
#endif
}
#endif
#endif

// Sums of level * q of a pair of rows of a tile; levels of [nib]. width is a constant.
INLINE vs pair_sums(int width, const vb levels[2], const struct tile_x *x) {
#if DOT_INSTRUCTIONS
    (void)width;
    const vs high = dot_quarters(dot_quarters((vs){0}, levels[0], x->planes[0][0]), levels[1], x->planes[0][1]);
    return dot_quarters(dot_quarters(high << 8, levels[0], x->planes[1][0]), levels[1], x->planes[1][1]);
#else
#if HAS_BYTES
    if (BY_BYTES(width)) return narrow_sums(levels, x->planes);
#endif
#if HAS_WORDS
    if (!BY_BYTES(width)) return wide_sums(levels, x->parities);
#endif
    __builtin_unreachable();
#endif
}

#endif
