// Several tokens over records: limited by arithmetic. A tile of weights is unpacked and turned once, so that lanes are
// its 16 rows, and then meets each of up to TOKEN_TILE tokens, whose integers are broadcast.
#ifndef GQSA_LINEAR_RECORDS_PREFILL_H
#define GQSA_LINEAR_RECORDS_PREFILL_H

#include "linear_records.h"

// Tokens whose integers stay in the second-level cache.
#define TOKEN_TILE (K <= 2048 ? 64 : K <= 4096 ? 32 : K <= 8192 ? 16 : 8)
#define WORDS (TILE / 4)
#if defined(__AVX512F__) || (defined(__AVX2__) && !DOT_INSTRUCTIONS)
#define TOKENS_AT_ONCE 4
#else
#define TOKENS_AT_ONCE 2  // their sums and a few words fit the registers
#endif

// Tokens past the last are zeros.
struct token_tile {
    uint32_t x[K_TILES][TOKEN_TILE][2 * WORDS];  // DOT_INSTRUCTIONS: the two planes; else pairs of 16-bit integers
    float scales[K_TILES][TOKEN_TILE];
    int sums[K_TILES][TOKEN_TILE];
};

INLINE void pack_token(const struct arguments *arg, struct token_tile *to, int token, int at) {
    for (int tile = 0; tile < K_TILES; tile++) {
        const size_t index = (size_t)token * K_TILES + tile;
        const int8_t *planes = arg->planes + index * (2 * TILE);
        uint32_t *x = to->x[tile][at];
#if DOT_INSTRUCTIONS
        memcpy(x, planes, 2 * TILE);
#else
        uint16_t words[2 * TILE];
        for (int i = 0; i < TILE; i++) {
            const int from = (i & ~3) | (i & 1) << 1 | (i & 2) >> 1;  // columns 0, 2, 1, 3 of each four
            words[i] = (uint16_t)(256 * planes[from] + planes[TILE + from]);
        }
        memcpy(x, words, 2 * TILE);
#endif
        to->scales[tile][at] = arg->ranges[2 * index];
        to->sums[tile][at] = (int)arg->ranges[2 * index + 1];
    }
}

// words[i]: columns 4 i .. 4 i + 3 of the 16 rows.
INLINE void turn_tile(int width, const uint8_t *values, vb words[WORDS]) {
    vu from[2][PAIRS_OF_ROWS];
    UNROLL for (int pair = 0; pair < PAIRS_OF_ROWS; pair++) {
        vb levels[2];
        unpack(width, values, pair, levels);
        from[0][pair] = (vu)levels[0], from[1][pair] = (vu)levels[1];
    }
    UNROLL for (int nib = 0; nib < 2; nib++) {
        vu two[2][4], four[2][2][2];  // [column of 4][.., quarter's low bit][pairs]
        UNROLL for (int i = 0; i < 4; i++) {
            two[0][i] = SHUFFLE_WORDS(from[nib][2 * i], from[nib][2 * i + 1], 0);
            two[1][i] = SHUFFLE_WORDS(from[nib][2 * i], from[nib][2 * i + 1], 1);
        }
        UNROLL for (int word = 0; word < 2; word++) {
            UNROLL for (int i = 0; i < 2; i++) {
                four[word][0][i] = SHUFFLE_QUARTERS(two[word][2 * i], two[word][2 * i + 1], 0, 2);
                four[word][1][i] = SHUFFLE_QUARTERS(two[word][2 * i], two[word][2 * i + 1], 1, 3);
            }
            UNROLL for (int low = 0; low < 2; low++) {
                words[4 * low + 2 * nib + word] = (vb)SHUFFLE_QUARTERS(four[word][low][0], four[word][low][1], 0, 2);
                words[4 * (low + 2) + 2 * nib + word] = (vb)SHUFFLE_QUARTERS(four[word][low][0], four[word][low][1], 1, 3);
            }
        }
    }
}

struct turned_tile {
    vb words[WORDS];
    struct steps steps;
};

static __attribute__((noinline)) void add_tile(const struct turned_tile *weights, const struct token_tile *tokens, int tile,
                                               int n_tokens, vf acc[TOKEN_TILE]) {
    const struct steps steps = weights->steps;
#if DOT_INSTRUCTIONS
#ifdef __AVX512F__
    vb words[WORDS];  // in registers
    UNROLL for (int i = 0; i < WORDS; i++) words[i] = weights->words[i];
#else
    const vb *words = weights->words;
#endif
#endif
    for (int first = 0; first < n_tokens; first += TOKENS_AT_ONCE) {
        vi sums[TOKENS_AT_ONCE];
        const uint32_t(*x)[2 * WORDS] = tokens->x[tile] + first;
#if DOT_INSTRUCTIONS
        vi high[TOKENS_AT_ONCE] = {0}, low[TOKENS_AT_ONCE] = {0};
        UNROLL for (int i = 0; i < WORDS; i++) {
            UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) {
                high[t] = dot_bytes(high[t], words[i], (vb)(vu)x[t][i]);
                low[t] = dot_bytes(low[t], words[i], (vb)(vu)x[t][WORDS + i]);
            }
        }
        UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) sums[t] = (high[t] << 8) + low[t];
#else
        word_sums each[TOKENS_AT_ONCE] = {0};
        for (int i = 0; i < WORDS; i++) {
            const vw even = EVEN(weights->words[i]), odd = ODD(weights->words[i]);
            UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) {
                each[t] = dot_words(each[t], even, (vw)(vu)x[t][2 * i]);
                each[t] = dot_words(each[t], odd, (vw)(vu)x[t][2 * i + 1]);
            }
        }
        UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++) sums[t] = sum_words(each[t]);
#endif
        UNROLL for (int t = 0; t < TOKENS_AT_ONCE; t++)
            acc[first + t] = add_products(acc[first + t], sums[t], steps, tokens->scales[tile][first + t],
                                          tokens->sums[tile][first + t]);
    }
}

// Tokens first .. first + n_tokens - 1, up to TOKEN_TILE.
static __attribute__((noinline)) void multiply_many(const struct arguments *arg, int begin, int end, int first, int n_tokens) {
    const int32_t *blocks = arg->blocks;
    const int n_padded = (n_tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE * TOKENS_AT_ONCE;
    struct token_tile tokens;
    for (int i = 0; i < n_tokens; i++) pack_token(arg, &tokens, first + i, i);
    for (int i = n_tokens; i < n_padded; i++) {
        for (int tile = 0; tile < K_TILES; tile++) {
            memset(tokens.x[tile][i], 0, sizeof tokens.x[tile][i]);
            tokens.scales[tile][i] = 0.0f, tokens.sums[tile][i] = 0;
        }
    }
    for (int block = begin; block < end; block++) {
        vf acc[TOKEN_TILE];
        memset(acc, 0, n_padded * sizeof *acc);
        for (int i = blocks[block]; i < blocks[block + 1]; i++) {
            const uint8_t *record = record_at(arg, i);
            FOR_EACH_TILE(record, {
                struct turned_tile weights;
                turn_tile(width, values, weights.words);
                weights.steps = load_steps(width, fields, n_tiles, slot);
                add_tile(&weights, &tokens, tile_of(record, i - blocks[block], slot), n_tokens, acc);
            });
        }
        const struct rows rows = find_rows(arg, block);
        for (int i = 0; i < n_tokens; i += 2) finish(arg, &rows, first + i, min_i(2, n_tokens - i), acc + i);
    }
}

// As quantize_token leaves a token, from the planes.
INLINE void place_token(const struct arguments *arg, struct token *to, int token) {
    typedef int8_t bytes __attribute__((ext_vector_type(VW)));
    for (int tile = 0; tile < K_TILES; tile++) {
        const size_t index = (size_t)token * K_TILES + tile;
        UNROLL for (int quarter = 0; quarter < PARTS; quarter++) {
            bytes high, low;
            memcpy(&high, arg->planes + index * (2 * TILE) + quarter * VW, sizeof high);
            memcpy(&low, arg->planes + index * (2 * TILE) + TILE + quarter * VW, sizeof low);
            place_quarter(&to->x[tile], quarter, __builtin_convertvector(high, vi) * 256 + __builtin_convertvector(low, vi));
        }
        to->scales[tile] = arg->ranges[2 * index];
        to->sums[tile] = (int)arg->ranges[2 * index + 1];
    }
}

INLINE void linear_records(const struct arguments *arg, int share, int n_shares) {
    const int n_tokens = count_tokens(TOKENS, arg->state);
    if (n_tokens <= FEW) {
        const int begin = first_block(arg, share, n_shares), end = first_block(arg, share + 1, n_shares);
        if (begin == end) return;
        prefetch_block(arg, begin);
        struct token tokens[FEW];
        for (int t = 0; t < n_tokens; t++) place_token(arg, &tokens[t], t);
        multiply_few(arg, begin, end, tokens, n_tokens);
        return;
    }
    // Shares take whole tiles of tokens, and parts of their rows only where there are fewer tiles than shares: a tile
    // of tokens is packed once for each part.
    const int n_token_tiles = (n_tokens + TOKEN_TILE - 1) / TOKEN_TILE;
    const int parts = min_i(N_BLOCKS, (n_shares + n_token_tiles - 1) / n_token_tiles);
    for (int item = share; item < n_token_tiles * parts; item += n_shares) {
        const int begin = first_block(arg, item % parts, parts), end = first_block(arg, item % parts + 1, parts);
        if (begin == end) continue;
        prefetch_block(arg, begin);
        const int first = item / parts * TOKEN_TILE;
        multiply_many(arg, begin, end, first, min_i(TOKEN_TILE, n_tokens - first));
    }
}

#endif
