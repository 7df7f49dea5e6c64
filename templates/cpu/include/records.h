// Records: 16 rows by up to 4 tiles of 64 columns; the bytes are described in gqsa_runtime/layouts/records.py.
//
// The kernel defines WIDTHS, MASKED_WIDTHS and WHOLE. Whatever its width, a tile is unpacked to bytes in one order:
// for each pair of rows (pair and pair + 8) two vectors, `nib` 0 with columns 0 .. 7 and 1 with columns 8 .. 15 of
// each group, as words of four columns [4 quarters, 2 halves, 2]. Rows stand in the order [pair, half] in vectors of
// 16, as their scales do. Sums within a tile are exact integers, so their order is free and nothing rounds but
// the sum over tiles, which every target makes in one order: all give the same bits, for one token and for many.
#ifndef GQSA_RECORDS_H
#define GQSA_RECORDS_H

#include "quantized_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PAIRS_OF_ROWS 8
#define TILES 4  // of a record

#if defined(__AVX512VNNI__)
#define BYTE_DOTS 1  // levels times the bytes of q: the high plane first, then the low one
#else
#define BYTE_DOTS 0  // levels times q as 16-bit integers: even columns first, then odd ones
#endif

typedef uint8_t vb __attribute__((ext_vector_type(64)));
typedef uint16_t vw __attribute__((ext_vector_type(32)));
typedef uint64_t vq __attribute__((ext_vector_type(8)));
typedef uint8_t vb16 __attribute__((ext_vector_type(16)));

INLINE vb load_bytes(const void *p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return v;
}

// sums[i] + the products of four bytes each, levels unsigned and x signed.
#if BYTE_DOTS
INLINE vi dot_bytes(vi sums, vb levels, vb x) { return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)levels, (__m512i)x); }
#else
// sums[i] + the products of two 16-bit integers each.
INLINE vi dot_words(vi sums, vw a, vw b) {
#if defined(__AVX512BW__)
    return sums + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    vi products;
    products.lo = (__typeof__(products.lo))_mm256_madd_epi16((__m256i)a.lo, (__m256i)b.lo);
    products.hi = (__typeof__(products.hi))_mm256_madd_epi16((__m256i)a.hi, (__m256i)b.hi);
    return sums + products;
#elif defined(__ARM_NEON)
    int16x8_t left[4], right[4];
    int32x4_t products[4];
    memcpy(left, &a, sizeof a), memcpy(right, &b, sizeof b);
    UNROLL for (int i = 0; i < 4; i++)
        products[i] = vpaddq_s32(vmull_s16(vget_low_s16(left[i]), vget_low_s16(right[i])), vmull_high_s16(left[i], right[i]));
    vi all;
    memcpy(&all, products, sizeof all);
    return sums + all;
#else
    const vi x = (vi)a, y = (vi)b;
    return sums + (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}
#endif

#define EVEN(levels) ((vw)(levels) & 0xff)
#define ODD(levels) ((vw)(levels) >> 8)

// An activation tile for `tile_sums`: vectors [plane or parity][nib], in the order of unpacked bytes.
struct tile_x {
    vb part[2][2];
};

// Puts 16 columns, a quarter of a tile, into their places.
INLINE void place_quarter(struct tile_x *to, int quarter, vi q) {
    uint8_t *at = (uint8_t *)to + 16 * quarter;
#if BYTE_DOTS
#define PLACE(part, nib, first) \
    memcpy(at + 64 * (2 * part + nib), \
           &(vb16){__builtin_shufflevector(part ? low : high, high, first, first + 1, first + 2, first + 3, first + 4, \
                                           first + 5, first + 6, first + 7, first, first + 1, first + 2, first + 3, \
                                           first + 4, first + 5, first + 6, first + 7)}, 16)
    const vb16 high = __builtin_convertvector((q + 128) >> 8, vb16), low = __builtin_convertvector(q, vb16);
    PLACE(0, 0, 0), PLACE(0, 1, 8), PLACE(1, 0, 0), PLACE(1, 1, 8);
#else
#define PLACE(part, nib, first) \
    memcpy(at + 64 * (2 * part + nib), \
           &(words8){__builtin_shufflevector(words, words, first, first + 2, first + 4, first + 6, first, first + 2, first + 4, \
                                             first + 6)}, 16)
    typedef uint16_t words8 __attribute__((ext_vector_type(8)));
    const vu16 words = __builtin_convertvector(q, vu16);
    PLACE(0, 0, 0), PLACE(0, 1, 8), PLACE(1, 0, 1), PLACE(1, 1, 9);
#endif
#undef PLACE
}

// Levels of rows pair and pair + 8 of a whole tile: levels[nib]. width and pair are constants.
INLINE void unpack(int width, const uint8_t *values, int pair, vb levels[2]) {
    if (width == 8) {
        const vq first = (vq)load_bytes(values + 64 * pair), second = (vq)load_bytes(values + 512 + 64 * pair);
        levels[0] = (vb)__builtin_shufflevector(first, second, 0, 8, 2, 10, 4, 12, 6, 14);
        levels[1] = (vb)__builtin_shufflevector(first, second, 1, 9, 3, 11, 5, 13, 7, 15);
        return;
    }
    if (width == 4) {
        const vb bytes = load_bytes(values + 64 * pair);
        levels[0] = bytes & 15, levels[1] = bytes >> 4;
        return;
    }
    // Bits from 2 s up of each byte are columns 4 s .. 4 s + 3 of a group; of high bits, bit 2 s + half.
    const vu shift = {0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2, 0, 2}, half = {0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1};
    typedef uint32_t words4 __attribute__((ext_vector_type(4)));
    typedef uint32_t words8 __attribute__((ext_vector_type(8)));
    vu high = 0;
    if (width != 2) {
        words4 bits;
        memcpy(&bits, values + (width == 3 ? 256 : 0) + 16 * pair, sizeof bits);
        high = __builtin_shufflevector(bits, bits, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    }
    if (width == 1) {
        UNROLL for (int nib = 0; nib < 2; nib++) levels[nib] = (vb)(high >> (shift + half + 4 * nib)) & 1;
        return;
    }
    words8 words;
    memcpy(&words, values + 32 * pair, sizeof words);
    const vu low = __builtin_shufflevector(words, words, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    UNROLL for (int nib = 0; nib < 2; nib++) {
        levels[nib] = (vb)(low >> (shift + 4 * nib)) & 3;
        if (width == 3) {
            const vu by = shift + half + 4 * nib;  // bit `by` goes to bit 2
            levels[nib] |= (vb)(high >> by << 2) & 4;
        }
    }
}

#define SHUFFLE_QUARTERS(a, b, i, j) /* 128-bit parts i and j of a, then of b */                                  \
    __builtin_shufflevector(a, b, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3, \
                            16 + 4 * i, 17 + 4 * i, 18 + 4 * i, 19 + 4 * i, 16 + 4 * j, 17 + 4 * j, 18 + 4 * j, 19 + 4 * j)
#define SHUFFLE_WORDS(a, b, i) /* words i and i + 2 of each 128-bit part of a, then of b */                    \
    __builtin_shufflevector(a, b, i, 2 + i, 16 + i, 18 + i, 4 + i, 6 + i, 20 + i, 22 + i, 8 + i, 10 + i, 24 + i, \
                            26 + i, 12 + i, 14 + i, 28 + i, 30 + i)

#ifdef __AVX512F__
// The sums of the 16 rows, from a vector for each pair: [4 quarters, 2 halves, 2].
INLINE vi sum_rows(const vi of_pair[PAIRS_OF_ROWS]) {
    vi two[4], four[2];
    UNROLL for (int i = 0; i < 4; i++)
        two[i] = SHUFFLE_WORDS(of_pair[2 * i], of_pair[2 * i + 1], 0) + SHUFFLE_WORDS(of_pair[2 * i], of_pair[2 * i + 1], 1);
    UNROLL for (int i = 0; i < 2; i++)
        four[i] = SHUFFLE_QUARTERS(two[2 * i], two[2 * i + 1], 0, 2) + SHUFFLE_QUARTERS(two[2 * i], two[2 * i + 1], 1, 3);
    return SHUFFLE_QUARTERS(four[0], four[1], 0, 2) + SHUFFLE_QUARTERS(four[0], four[1], 1, 3);
}
#else
INLINE vi sum_rows(const vi of_pair[PAIRS_OF_ROWS]) {
    typedef int32_t vi8 __attribute__((ext_vector_type(8)));
    vi8 each[8], two[4], four[2];
    UNROLL for (int i = 0; i < 8; i++) each[i] = of_pair[i].lo + of_pair[i].hi;
    UNROLL for (int i = 0; i < 4; i++)
        two[i] = __builtin_shufflevector(each[2 * i], each[2 * i + 1], 0, 2, 8, 10, 4, 6, 12, 14)
                 + __builtin_shufflevector(each[2 * i], each[2 * i + 1], 1, 3, 9, 11, 5, 7, 13, 15);
    UNROLL for (int i = 0; i < 2; i++)
        four[i] = __builtin_shufflevector(two[2 * i], two[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11)
                  + __builtin_shufflevector(two[2 * i], two[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15);
    return __builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// Sums of level * q of a whole tile.
INLINE vi tile_sums(int width, const uint8_t *values, const struct tile_x *x) {
    vi of_pair[PAIRS_OF_ROWS];
    UNROLL for (int pair = 0; pair < PAIRS_OF_ROWS; pair++) {
        vb levels[2];
        unpack(width, values, pair, levels);
        vi sums = 0;
#if BYTE_DOTS
        sums = dot_bytes(dot_bytes(sums, levels[0], x->part[0][0]), levels[1], x->part[0][1]) << 8;
        sums = dot_bytes(dot_bytes(sums, levels[0], x->part[1][0]), levels[1], x->part[1][1]);
#else
        UNROLL for (int nib = 0; nib < 2; nib++) {
            sums = dot_words(sums, EVEN(levels[nib]), (vw)x->part[0][nib]);
            sums = dot_words(sums, ODD(levels[nib]), (vw)x->part[1][nib]);
        }
#endif
        of_pair[pair] = sums;
    }
    return sum_rows(of_pair);
}

// What is common to the columns of a tile. zeros are in sixteenths of the width's range, and sums are shifted to
// the same unit: scale * (level - zero) is scales * ((level << shift) - zeros).
struct steps {
    vf scales;
    vi zeros;
    int shift;
};

INLINE struct steps load_steps(int width, const uint8_t *fields, int n_tiles, int slot) {
    typedef uint8_t vb8 __attribute__((ext_vector_type(8)));
    typedef uint16_t vw8 __attribute__((ext_vector_type(8)));
    struct steps steps;
    vb8 packed;
    memcpy(&packed, fields + 32 * n_tiles + 8 * slot, sizeof packed);
    const vw8 wide = __builtin_convertvector(packed, vw8);
    const vb16 nibbles = (vb16)((wide | wide << 4) & 0x0f0f);
    steps.zeros = __builtin_convertvector(nibbles, vi) << (width == 8 ? 4 : 0);
    steps.shift = width == 8 ? 0 : 4 - width;
    steps.scales = load_f16((const _Float16 *)(fields + 32 * slot)) * (1.0f / (1 << steps.shift));
    return steps;
}

// acc + the products of a tile: as exact as the sums until they become floats.
INLINE vf add_products(vf acc, vi sums, struct steps steps, float scale, int q_sum) {
    const vi products = (sums << steps.shift) - steps.zeros * q_sum;
    return fma_v(__builtin_convertvector(products, vf), steps.scales * scale, acc);
}

// Bytes of the scales and zeros of n tiles.
INLINE int steps_bytes(int n) { return 32 * n + (8 * n + 15) / 16 * 16; }

// Writes a tile of which only some groups are kept as a whole one to `to`: the rest get the level of their zero, which
// makes them weights of 0. kept: a bit per lane for each half. Returns where the next tile's groups begin.
INLINE const uint8_t *make_whole(int width, const uint8_t *values, const uint32_t kept[2], const uint8_t *zeros, uint8_t *to) {
    const int entry = 2 * width;
    UNROLL for (int half = 0; half < 2; half++) {
        for (int lane = 0; lane < 32; lane++) {
            const int zero = zeros[lane / 4] >> 4 * half & 15;
            const uint64_t level = width == 8 ? zero << 4 : width == 4 ? zero * 0x11 : (zero >> 2) * 0x55;
            const uint64_t removed[2] = {level * 0x0101010101010101, level * 0x0101010101010101};
            const int stays = kept[half] >> lane & 1;
            memcpy(to + (width == 8 ? half * 32 + lane : 2 * lane + half) * entry,
                   stays ? values : (const uint8_t *)removed, entry);
            values += stays ? entry : 0;
        }
    }
    return values;
}


INLINE int tile_of(const uint8_t *record, int slot) { return record[2 * slot] | record[2 * slot + 1] << 8; }

#define ONE_KIND(set) (((set) & ((set) - 1)) == 0)

// Runs body for each tile of a record in turn, with `width` (a constant), `slot`, `n_tiles`, `fields` and `values`, the
// tile's levels as those of a whole one.
#define FOR_EACH_TILE(record, body)                                                                          \
    do {                                                                                                       \
        const uint8_t *const head_ = (record);                                                                 \
        const int n_tiles = WHOLE ? TILES : head_[9];                                                          \
        const int masked_ = MASKED_WIDTHS && (!WIDTHS || head_[10]);                                           \
        OF_WIDTH(4, body) OF_WIDTH(2, body) OF_WIDTH(8, body) OF_WIDTH(3, body) OF_WIDTH(1, body)              \
        MASKED_OF_WIDTH(4, body) MASKED_OF_WIDTH(2, body) MASKED_OF_WIDTH(8, body)                             \
    } while (0)

#define OF_WIDTH(w, body)                                                                            \
    if ((WIDTHS & 1 << w) && !masked_ && (ONE_KIND(WIDTHS) || head_[8] == w)) {                      \
        enum { width = w };                                                                            \
        const uint8_t *const fields = head_ + 16, *values = fields + steps_bytes(n_tiles);             \
        for (int slot = 0; slot < n_tiles; slot++, values += 128 * w) { body }                         \
    }

#define MASKED_OF_WIDTH(w, body)                                                                     \
    if ((MASKED_WIDTHS & 1 << w) && masked_ && (ONE_KIND(MASKED_WIDTHS) || head_[8] == w)) {         \
        enum { width = w };                                                                            \
        const uint8_t *const fields = head_ + 48, *next_ = fields + steps_bytes(n_tiles);              \
        uint8_t values[128 * w] __attribute__((aligned(64)));                                          \
        for (int slot = 0; slot < n_tiles; slot++) {                                                   \
            uint32_t kept_[2];                                                                         \
            memcpy(kept_, head_ + 16 + 8 * slot, sizeof kept_);                                        \
            next_ = make_whole(w, next_, kept_, fields + 32 * n_tiles + 8 * slot, values);             \
            body                                                                                       \
        }                                                                                              \
    }

#endif
