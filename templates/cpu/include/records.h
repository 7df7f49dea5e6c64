// Records: 16 rows by up to 4 tiles of 64 columns; the bytes are described in gqsa_runtime/layouts/records.py.
//
// Whatever its width, a tile is unpacked to bytes in one order: for each pair of rows (pair and pair + 8) two vectors,
// `nib` 0 with columns 0 .. 7 and 1 with columns 8 .. 15 of each group, as words of four columns [4 quarters, 2 halves,
// 2]. Rows stand in the order [pair, half] in vectors of 16, as their scales do. Sums within a tile are exact integers,
// so their order is free and nothing rounds but the sum over tiles, which every target makes in one order: all give the
// same bits, for one token and for many. record_places.h says what the kernel defines.
#ifndef GQSA_RECORDS_H
#define GQSA_RECORDS_H

#include "quantized_rows.h"
#include "record_places.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define PAIRS_OF_ROWS 8

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

// A byte for each pair of rows: the level of the zero of row pair + 8 * half. zeros: of the tile.
INLINE uint64_t levels_of_zeros(int width, const uint8_t *zeros, int half) {
    const uint64_t each = 0x0101010101010101;
    uint64_t nibbles;
    memcpy(&nibbles, zeros, sizeof nibbles);
    nibbles = nibbles >> 4 * half & 15 * each;
    return width == 8 ? nibbles << 4 : width == 4 ? nibbles * 0x11 : (nibbles >> 2 & 3 * each) * 0x55;
}

// make_whole writes a tile of which only some groups are kept as a whole one to `to` (64-byte aligned): the rest get
// the level of their zero, which makes them weights of 0. kept: a bit per lane for each half. Returns where the next
// tile's groups begin. Nothing behind the kept groups is read.
#if defined(__AVX512F__)

// Groups of `count` lanes from `first` on of one half: 4, 8 or 16 lanes fill a vector at 8, 4 or 2 bits.
INLINE vq expand(int width, const uint8_t *values, uint32_t kept, int first, uint64_t zeros) {
    const uint8_t *from = values + 2 * width * __builtin_popcount(kept & ((1u << first) - 1));
    const vq row = width == 8 ? (vq){0} : width == 4 ? (vq){0, 0, 0, 0, 1, 1, 1, 1} : (vq){0, 0, 1, 1, 2, 2, 3, 3};
    const __m512i order = (__m512i)((row + (uint64_t)(first / 4)) * 0x0101010101010101);
    const __m512i removed = _mm512_shuffle_epi8(_mm512_set1_epi64((int64_t)zeros), order);
    if (width == 2) {
        const uint32_t mask = kept >> first & 0xffff;
        const __m512i stored = _mm512_maskz_loadu_epi32((__mmask16)_bzhi_u32(0xffff, (uint32_t)__builtin_popcount(mask)), from);
        return (vq)_mm512_mask_expand_epi32(removed, (__mmask16)mask, stored);
    }
    const uint32_t mask = width == 4 ? kept >> first & 0xff : _pdep_u32(kept >> first & 15, 0x55) * 3;
    const __m512i stored = _mm512_maskz_loadu_epi64((__mmask8)_bzhi_u32(0xff, (uint32_t)__builtin_popcount(mask)), from);
    return (vq)_mm512_mask_expand_epi64(removed, (__mmask8)mask, stored);
}

INLINE const uint8_t *make_whole(int width, const uint8_t *values, const uint32_t kept[2], const uint8_t *zeros, uint8_t *to) {
    const uint8_t *second = values + 2 * width * __builtin_popcount(kept[0]);
    const uint64_t zeros_first = levels_of_zeros(width, zeros, 0), zeros_second = levels_of_zeros(width, zeros, 1);
    const int lanes = 32 / width;
    UNROLL for (int i = 0; i < width; i++) {
        const vq a = expand(width, values, kept[0], i * lanes, zeros_first);
        const vq b = expand(width, second, kept[1], i * lanes, zeros_second);
        vq both[2] = {a, b};
        if (width == 4) {
            both[0] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            both[1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
        }
        if (width == 2) {
            const vu x = (vu)a, y = (vu)b;
            both[0] = (vq)__builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            both[1] = (vq)__builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(to + (width == 8 ? 64 * i : 128 * i), &both[0], 64);
        memcpy(to + (width == 8 ? 512 + 64 * i : 128 * i + 64), &both[1], 64);
    }
    return second + 2 * width * __builtin_popcount(kept[1]);
}

#else

#ifndef __AVX2__
// Without a branch: masks follow no pattern.
INLINE const uint8_t *make_whole(int width, const uint8_t *values, const uint32_t kept[2], const uint8_t *zeros, uint8_t *to) {
    const int entry = 2 * width;
    UNROLL for (int half = 0; half < 2; half++) {
        const uint64_t levels = levels_of_zeros(width, zeros, half);
        for (int lane = 0; lane < 32; lane++) {
            const uint64_t level = (levels >> lane / 4 * 8 & 0xff) * 0x0101010101010101;
            const uint64_t removed[2] = {level, level};
            const uintptr_t stays = kept[half] >> lane & 1, from = (uintptr_t)removed;
            memcpy(to + (width == 8 ? half * 32 + lane : 2 * lane + half) * entry,
                   (const void *)(from ^ ((from ^ (uintptr_t)values) & -stays)), entry);
            values += stays * entry;
        }
    }
    return values;
}

#else
// By a mask of four groups: which stored one goes to each place, -1: none.
static const int8_t PLACES[16][4] = {
    {-1, -1, -1, -1}, {0, -1, -1, -1}, {-1, 0, -1, -1}, {0, 1, -1, -1}, {-1, -1, 0, -1}, {0, -1, 1, -1},
    {-1, 0, 1, -1},   {0, 1, 2, -1},   {-1, -1, -1, 0}, {0, -1, -1, 1}, {-1, 0, -1, 1},  {0, 1, -1, 2},
    {-1, -1, 0, 1},   {0, -1, 1, 2},   {-1, 0, 1, 2},   {0, 1, 2, 3},
};
static const int32_t FIRST[8] = {-1, -1, -1, -1, 0, 0, 0, 0};  // the mask of the first n of four from 4 - n on

// The four groups of one row at 8 bits.
INLINE void copy_row(const uint8_t *values, uint32_t kept, int pair, uint64_t zeros, uint8_t *to) {
    const __m128i removed = _mm_set1_epi8((int8_t)(zeros >> 8 * pair));
    UNROLL for (int i = 0; i < 4; i++) {
        const int lane = 4 * pair + i;
        const __m128i stays = _mm_set1_epi32(-(int)(kept >> lane & 1));
        const uint8_t *from = values + 16 * __builtin_popcount(kept & ((1u << lane) - 1));
        const __m128i stored = _mm_maskload_epi32((const int *)from, stays);
        _mm_store_si128((__m128i *)to + i, _mm_blendv_epi8(removed, stored, stays));
    }
}

// The four groups of one row; 2 bits: in the lower half.
INLINE __m256i expand(int width, const uint8_t *values, uint32_t kept, int pair, uint64_t zeros) {
    const uint8_t *from = values + 2 * width * __builtin_popcount(kept & ((1u << 4 * pair) - 1));
    const uint32_t mask = kept >> 4 * pair & 15;
    const __m128i first = _mm_loadu_si128((const __m128i *)(FIRST + 4 - __builtin_popcount(mask)));
    const __m256i removed = _mm256_set1_epi8((int8_t)(zeros >> 8 * pair));
    int32_t packed;
    memcpy(&packed, PLACES[mask], sizeof packed);
    const __m128i places = _mm_cvtepi8_epi32(_mm_cvtsi32_si128(packed));
    if (width == 2) {
        const __m128 stored = (__m128)_mm_maskload_epi32((const int *)from, first);
        return _mm256_castsi128_si256((__m128i)_mm_blendv_ps(_mm_permutevar_ps(stored, places),
                                                             (__m128)_mm256_castsi256_si128(removed), (__m128)places));
    }
    const __m256 stored = (__m256)_mm256_maskload_epi64((const long long *)from, _mm256_cvtepi32_epi64(first));
    // Of each place its two words: 2 place and 2 place + 1.
    const __m256i twice = _mm256_add_epi32(_mm256_cvtepu32_epi64(places), _mm256_slli_epi64(_mm256_cvtepu32_epi64(places), 32));
    const __m256i words = _mm256_add_epi32(_mm256_add_epi32(twice, twice), _mm256_set1_epi64x(1ll << 32));
    return (__m256i)_mm256_blendv_ps(_mm256_permutevar8x32_ps(stored, words), (__m256)removed, (__m256)twice);
}

INLINE const uint8_t *make_whole(int width, const uint8_t *values, const uint32_t kept[2], const uint8_t *zeros, uint8_t *to) {
    const uint8_t *second = values + 2 * width * __builtin_popcount(kept[0]);
    const uint64_t zeros_first = levels_of_zeros(width, zeros, 0), zeros_second = levels_of_zeros(width, zeros, 1);
    UNROLL for (int pair = 0; pair < PAIRS_OF_ROWS; pair++) {
        if (width == 8) {
            copy_row(values, kept[0], pair, zeros_first, to + 64 * pair);
            copy_row(second, kept[1], pair, zeros_second, to + 512 + 64 * pair);
            continue;
        }
        const __m256i a = expand(width, values, kept[0], pair, zeros_first);
        const __m256i b = expand(width, second, kept[1], pair, zeros_second);
        __m256i *at = (__m256i *)(to + 16 * width * pair);
        if (width == 2) {
            const __m128i x = _mm256_castsi256_si128(a), y = _mm256_castsi256_si128(b);
            _mm256_store_si256(at, _mm256_set_m128i(_mm_unpackhi_epi32(x, y), _mm_unpacklo_epi32(x, y)));
        } else {
            const __m256i low = _mm256_unpacklo_epi64(a, b), high = _mm256_unpackhi_epi64(a, b);
            _mm256_store_si256(at, _mm256_permute2x128_si256(low, high, 0x20));
            _mm256_store_si256(at + 1, _mm256_permute2x128_si256(low, high, 0x31));
        }
    }
    return second + 2 * width * __builtin_popcount(kept[1]);
}
#endif
#endif

#define AHEAD 4096  // bytes of records that are asked for before they are needed; behind the last it does nothing

INLINE void prefetch(const uint8_t *from, int bytes) {
    UNROLL for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch(from + byte);
}

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
        const uint8_t *const fields = head_ + HEADER, *values = fields + steps_bytes(n_tiles);             \
        for (int slot = 0; slot < n_tiles; slot++, values += 128 * w) {                                \
            prefetch(values + AHEAD, 128 * w + 64);                                                    \
            body                                                                                       \
        }                                                                                              \
    }

#define MASKED_OF_WIDTH(w, body)                                                                     \
    if ((MASKED_WIDTHS & 1 << w) && masked_ && (ONE_KIND(MASKED_WIDTHS) || head_[8] == w)) {         \
        enum { width = w };                                                                            \
        const uint8_t *const fields = head_ + 48, *next_ = fields + steps_bytes(n_tiles);              \
        uint8_t values[128 * w] __attribute__((aligned(64)));                                          \
        for (int slot = 0; slot < n_tiles; slot++) {                                                   \
            uint32_t kept_[2];                                                                         \
            memcpy(kept_, head_ + 16 + 8 * slot, sizeof kept_);                                        \
            prefetch(next_ + AHEAD, 128 * w);                                                          \
            next_ = make_whole(w, next_, kept_, fields + 32 * n_tiles + 8 * slot, values);             \
            body                                                                                       \
        }                                                                                              \
    }

#endif
