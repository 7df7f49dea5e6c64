// y = W x for one BSR stream of 1xG groups, weights (q - zero) * scale in f32.
//
// The kernel defines TOKENS, K, GROUP_SIZE, BITS, N_TASKS, X_STRIDE and what linear.h needs; VW divides
// GROUP_SIZE. Shares are cut at tasks, which hold nearly equal numbers of groups. Every sum is made in
// one order, so results do not depend on the number of threads.
#ifndef GQSA_LINEAR_SPARSE_H
#define GQSA_LINEAR_SPARSE_H

#include "linear.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define GROUP_BYTES (GROUP_SIZE * BITS / 8)
#define PARTS (GROUP_SIZE / VW)

// Group words are decoded this many at a time, ahead of their use.
#define CHUNK 64

// scale, -zero * scale and first column / VW of groups begin .. end - 1.
struct chunk {
    int begin, end;
    float scale[CHUNK] __attribute__((aligned(64)));
    float offset[CHUNK] __attribute__((aligned(64)));
    uint32_t column[CHUNK] __attribute__((aligned(64)));
};

// Decodes groups begin .. min(begin + CHUNK, limit) - 1.
INLINE void decode_chunk(struct chunk *chunk, const uint32_t *groups, int begin, int limit) {
    chunk->begin = begin;
    chunk->end = min_i(limit, begin + CHUNK);
    for (int i = 0; i < chunk->end - begin; i += VW) {
        vu words;
        int count = chunk->end - begin - i;
        if (count >= VW) {
            memcpy(&words, groups + begin + i, sizeof words);
        } else {  // the tensor ends here
            uint32_t padded[VW] = {0};
            memcpy(padded, groups + begin + i, (size_t)count * sizeof *padded);
            memcpy(&words, padded, sizeof words);
        }
        vh half = __builtin_bit_cast(vh, __builtin_convertvector(words & 0xffff, vu16));
        vf scale = __builtin_convertvector(half, vf);
        vf zero = BITS == 8 ? splat(128.0f) : __builtin_convertvector(words >> 28, vf);
        vu column = (words >> 16 & 0xfff) * PARTS;
        store(chunk->scale + i, scale);
        store(chunk->offset + i, -zero * scale);
        memcpy(chunk->column + i, &column, sizeof column);
    }
}

// Tokens that share each decoded weight.
#define TILE (TOKENS == 1 ? 1 : VW)

// AVX-512 decodes a 4-bit group by broadcasting its 64 bits: even lanes get elements 0 .. 7 and odd
// lanes 8 .. 15. The activations take that order once, so that no weight has to be shuffled.
#define INTERLEAVED (VW == 16 && BITS == 4)

// A short tile repeats its last token rather than read past it.
INLINE void pack_x(float (*packed)[TILE][VW], const float *x, int n_tokens) {
    for (int i = 0; i < TILE; i++) {
        const float *row = x + (size_t)min_i(i, n_tokens - 1) * X_STRIDE;
        for (int k = 0; k < K / VW; k++) {
            vf v = load(row + k * VW);
#if INTERLEAVED
            v = __builtin_shufflevector(v, v, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
            store(packed[k][i], v);
        }
    }
}

// q of VW elements, packed from `from` on.
INLINE vf load_levels(const uint8_t *from) {
#if BITS == 8
    vu8 bytes;
    memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, vf);
#elif VW == 16
    // Each lane shifts its element down to bit 0; the table look-up ignores the bits above bit 3.
#if BITS == 4
    const __m512 table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i shifts = (__m512i)((vu)VEC_IOTA / 2 * 4);
    int64_t word;
    memcpy(&word, from, sizeof word);
    __m512i words = _mm512_set1_epi64(word);
#else
    const __m512 table = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const __m512i shifts = (__m512i)((vu)VEC_IOTA * 2);
    int32_t word;
    memcpy(&word, from, sizeof word);
    __m512i words = _mm512_set1_epi32(word);
#endif
    return (vf)_mm512_permutexvar_ps(_mm512_srlv_epi32(words, shifts), table);
#else
    uint32_t word = 0;
    memcpy(&word, from, VW * BITS / 8);
    return __builtin_convertvector((vu)word >> ((vu)VEC_IOTA * BITS) & ((1u << BITS) - 1), vf);
#endif
}

#define DOTS (TOKENS == 1 ? 4 : 1)  // groups whose sums run side by side, to hide the latency of multiply-add

// Sums over the groups of one row: lane i is token i's, for TOKENS == 1 all in lane 0.
INLINE vf row_sums(float (*x)[TILE][VW], const uint8_t *values, const uint32_t *groups, struct chunk *chunk,
                   int group, int row_end, int task_end) {
    vf sums[DOTS * TILE] = {0};
    while (group < row_end) {
        if (group >= chunk->end) decode_chunk(chunk, groups, group, task_end);
        const uint8_t *from = values + (size_t)chunk->begin * GROUP_BYTES;
        const int stop = min_i(row_end, chunk->end) - chunk->begin;
        int i = group - chunk->begin;
        group = chunk->begin + stop;
// Weights are q * scale - zero * scale: exact, as q, zero and the fp16 scale have 19 significant bits
// together.
#define ADD_GROUP(at, dot)                                                                                  \
    do {                                                                                                    \
        float(*of_group)[TILE][VW] = x + chunk->column[at];                                                 \
        UNROLL for (int part = 0; part < PARTS; part++) {                                                   \
            vf levels = load_levels(from + (size_t)(at) * GROUP_BYTES + part * VW * BITS / 8);              \
            vf weights = fma_v(levels, splat(chunk->scale[at]), splat(chunk->offset[at]));                  \
            UNROLL for (int token = 0; token < TILE; token++) sums[(dot) * TILE + token] =                  \
                fma_v(weights, load(of_group[part][token]), sums[(dot) * TILE + token]);                    \
        }                                                                                                   \
    } while (0)
        for (; i + DOTS <= stop; i += DOTS)
            UNROLL for (int dot = 0; dot < DOTS; dot++) ADD_GROUP(i + dot, dot);
        for (; i < stop; i++) ADD_GROUP(i, 0);
#undef ADD_GROUP
    }
#if TOKENS == 1
    return splat(hsum((sums[0] + sums[1]) + (sums[2] + sums[3])));
#else
    return hsum_each(sums);
#endif
}

// Rows row_begin .. row_end - 1 for tokens token .. token + n_tokens - 1 of one tile.
INLINE void tile_rows(const struct arguments *arg, float (*x)[TILE][VW], int token, int n_tokens, int row_begin, int row_end) {
    const uint8_t *values = (const uint8_t *)arg->values;
    const uint32_t *groups = (const uint32_t *)arg->groups;
    const int32_t *crow = arg->crow_indices;
    const float *bias = arg->bias, *residual = arg->residual;
    struct chunk chunk;
    chunk.begin = chunk.end = 0;
    for (int row = row_begin; row < row_end; row += VW) {
        int n = min_i(VW, row_end - row);
        float sums[TILE][VW] = {{0}};
        for (int i = 0; i < n; i++) {
            vf of_row = row_sums(x, values, groups, &chunk, crow[row + i], crow[row + i + 1], crow[row_end]);
            UNROLL for (int j = 0; j < TILE; j++) sums[j][i] = of_row[j];
        }
        for (int j = 0; j < n_tokens; j++) finish(load(sums[j]), n, row, token + j, bias, residual, arg->out);
    }
}

INLINE void linear_sparse(const struct arguments *arg, int share, int n_shares) {
    const float *x = arg->x;
    const int32_t *tasks = arg->tasks;
    float packed[K / VW][TILE][VW] __attribute__((aligned(64)));
    // Shares take whole tiles, and parts of their rows only where there are fewer tiles than shares: a
    // tile is packed once for each part.
    const int n_tokens = count_tokens(TOKENS, arg->state);
    const int n_tiles = (n_tokens + TILE - 1) / TILE;
    const int parts = min_i(N_TASKS, (n_shares + n_tiles - 1) / n_tiles);
    for (int item = share; item < n_tiles * parts; item += n_shares) {
        int begin, end;
        split(N_TASKS, item % parts, parts, &begin, &end);
        if (tasks[begin] == tasks[end]) continue;
        const int token = item / parts * TILE, n_now = min_i(TILE, n_tokens - token);
        pack_x(packed, x + (size_t)token * X_STRIDE, n_now);
        // Each task begins its own chunks: where a chunk begins decides the order of a row's sum, which
        // must not depend on the number of threads.
        for (int task = begin; task < end; task++)
            if (tasks[task] < tasks[task + 1]) tile_rows(arg, packed, token, n_now, tasks[task], tasks[task + 1]);
    }
}

#endif
