// Records: 16 rows by up to 4 tiles of 64 columns; the bytes are described in gqsa_runtime/layouts/records.py.
//
// Whatever its width, a tile is unpacked to bytes in one order: for each pair of rows (pair and pair + 8) two vectors,
// `nib` 0 with columns 0 .. 7 and 1 with columns 8 .. 15 of each group, as words of four columns [4 quarters, 2 halves,
// 2]. Rows stand in the order [pair, half] in vectors of 16, as their scales do. Sums within a tile are exact integers,
// so their order is free and nothing rounds but the sum over tiles, which every target makes in one order: all give the
// same bits, for one token and for many. record_places.h says what the kernel defines.
#ifndef GQSA_RECORDS_H
#define GQSA_RECORDS_H

#include "dots.h"
#include "record_places.h"

#define PAIRS_OF_ROWS 8

INLINE vb load_bytes(const void *p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return v;
}

// Levels of rows pair and pair + 8 of a whole tile: levels[nib]. width and pair are constants.
INLINE void unpack(int width, const uint8_t *values, int pair, vb levels[2]) {
    if (width == 8) {
        const vq first = (vq)load_bytes(values + 64 * pair), second = (vq)load_bytes(values + 512 + 64 * pair);
        levels[0] = (vb)__builtin_shufflevector(first, second, 0, 8, 2, 10, 4, 12, 6, 14);
        levels[1] = (vb)__builtin_shufflevector(first, second, 1, 9, 3, 11, 5, 13, 7, 15);
        if (SIGNED_LEVELS) levels[0] ^= 0x80, levels[1] ^= 0x80;
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

// Sums of level * q of a whole tile.
INLINE vi tile_sums(int width, const uint8_t *values, const struct tile_x *x) {
    vs of_pair[PAIRS_OF_ROWS];
    UNROLL for (int pair = 0; pair < PAIRS_OF_ROWS; pair++) {
        vb levels[2];
        unpack(width, values, pair, levels);
        of_pair[pair] = pair_sums(width, levels, x);
#if defined(__aarch64__)
        // Else the compiler begins all pairs at once and spills; levels that several tokens share are kept in memory.
        if (TOKENS == 1 || width == 4) __asm__ volatile("" : "+w"(of_pair[pair]));
#endif
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
    if (SIGNED_LEVELS && width == 8) steps.zeros -= 128;
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

// By a mask of four groups: row(how many are kept, which stored one goes to each place, -1: none).
#define OF_MASKS(row)                                                                                                \
    {row(0, -1, -1, -1, -1), row(1, 0, -1, -1, -1), row(1, -1, 0, -1, -1), row(2, 0, 1, -1, -1), row(1, -1, -1, 0, -1), \
     row(2, 0, -1, 1, -1),   row(2, -1, 0, 1, -1),  row(3, 0, 1, 2, -1),   row(1, -1, -1, -1, 0), row(2, 0, -1, -1, 1), \
     row(2, -1, 0, -1, 1),   row(3, 0, 1, -1, 2),   row(2, -1, -1, 0, 1),  row(3, 0, -1, 1, 2),   row(3, -1, 0, 1, 2),  \
     row(4, 0, 1, 2, 3)}

#if defined(__aarch64__)
// The same for bytes of 16 or 32 that end with the row's last kept group, 255: none. What is read beside the kept groups
// lies before them: others, zeros and scales.
#define BYTE(entry, n, place, byte) ((place) < 0 ? 255 : (4 + (place) - (n)) * (entry) + (byte))
#define BYTES_2(n, p) BYTE(4, n, p, 0), BYTE(4, n, p, 1), BYTE(4, n, p, 2), BYTE(4, n, p, 3)
#define BYTES_4(n, p) \
    BYTE(8, n, p, 0), BYTE(8, n, p, 1), BYTE(8, n, p, 2), BYTE(8, n, p, 3), \
    BYTE(8, n, p, 4), BYTE(8, n, p, 5), BYTE(8, n, p, 6), BYTE(8, n, p, 7)
#define ROW_2(n, a, b, c, d) {BYTES_2(n, a), BYTES_2(n, b), BYTES_2(n, c), BYTES_2(n, d)}
#define ROW_4(n, a, b, c, d) {BYTES_4(n, a), BYTES_4(n, b), BYTES_4(n, c), BYTES_4(n, d)}
#define KEPT(n, a, b, c, d) n
static const uint8_t PLACES_2[16][16] = OF_MASKS(ROW_2), PLACES_4[16][32] = OF_MASKS(ROW_4), N_KEPT[16] = OF_MASKS(KEPT);

// The four groups of one row; returns where the next row's begin.
INLINE const uint8_t *expand(int width, const uint8_t *values, uint32_t mask, uint8_t zero, uint8x16_t row[4]) {
    const uint8x16_t removed = vdupq_n_u8(zero);
    if (width == 8) {
        UNROLL for (int i = 0; i < 4; i++) {
            const int stays = mask >> i & 1;
            values += 16 * stays;
            row[i] = vbslq_u8(vdupq_n_u8((uint8_t)-stays), vld1q_u8(values - 16), removed);
        }
        return values;
    }
    values += 2 * width * N_KEPT[mask];
    if (width == 2) {
        row[0] = vqtbx1q_u8(removed, vld1q_u8(values - 16), vld1q_u8(PLACES_2[mask]));
    } else {
        const uint8x16x2_t stored = {{vld1q_u8(values - 32), vld1q_u8(values - 16)}};
        UNROLL for (int i = 0; i < 2; i++) row[i] = vqtbx2q_u8(removed, stored, vld1q_u8(PLACES_4[mask] + 16 * i));
    }
    return values;
}

INLINE const uint8_t *make_whole(int width, const uint8_t *values, const uint32_t kept[2], const uint8_t *zeros, uint8_t *to) {
    const uint8_t *second = values + 2 * width * __builtin_popcount(kept[0]);
    const uint64_t zeros_first = levels_of_zeros(width, zeros, 0), zeros_second = levels_of_zeros(width, zeros, 1);
    UNROLL for (int pair = 0; pair < PAIRS_OF_ROWS; pair++) {
        uint8x16_t a[4], b[4];
        values = expand(width, values, kept[0] >> 4 * pair & 15, (uint8_t)(zeros_first >> 8 * pair), a);
        second = expand(width, second, kept[1] >> 4 * pair & 15, (uint8_t)(zeros_second >> 8 * pair), b);
        if (width == 8) {
            memcpy(to + 64 * pair, a, 64), memcpy(to + 512 + 64 * pair, b, 64);
        } else if (width == 4) {
            UNROLL for (int i = 0; i < 2; i++) {
                const uint64x2_t x = vreinterpretq_u64_u8(a[i]), y = vreinterpretq_u64_u8(b[i]);
                vst1q_u8(to + 64 * pair + 32 * i, vreinterpretq_u8_u64(vzip1q_u64(x, y)));
                vst1q_u8(to + 64 * pair + 32 * i + 16, vreinterpretq_u8_u64(vzip2q_u64(x, y)));
            }
        } else {
            const uint32x4_t x = vreinterpretq_u32_u8(a[0]), y = vreinterpretq_u32_u8(b[0]);
            vst1q_u8(to + 32 * pair, vreinterpretq_u8_u32(vzip1q_u32(x, y)));
            vst1q_u8(to + 32 * pair + 16, vreinterpretq_u8_u32(vzip2q_u32(x, y)));
        }
    }
    return second;
}

#else
#define PLACE_ROW(n, a, b, c, d) {a, b, c, d}
static const int8_t PLACES[16][4] = OF_MASKS(PLACE_ROW);
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
