// y = W x over records (see records.h): what one token and several have in common.
//
// The kernel defines TOKENS, ROWS, K, N_BLOCKS, NORM, EPS, GATED, ACTIVATION, HAS_BIAS, HAS_RESIDUAL, OUT_STRIDE and
// RESIDUAL_STRIDE, and what record_places.h needs. A block of 16 rows is always summed by one share and in one order, so
// results do not depend on the number of threads.
#ifndef GQSA_LINEAR_RECORDS_H
#define GQSA_LINEAR_RECORDS_H

#include "records.h"

#define BLOCK_ROWS 16
#define FEW (TOKENS == 1 ? 1 : 6)  // tokens that are better off without turned tiles
#define BLOCK_UNITS 4  // of 16 bytes, what a block costs beside its bytes

INLINE int64_t cost_before(const struct arguments *arg, int block) {
    return start_of(arg, arg->blocks[block]) + (int64_t)block * BLOCK_UNITS;
}

// The first block of share `share`: shares have about equal numbers of bytes.
INLINE int first_block(const struct arguments *arg, int share, int n_shares) {
    const int64_t before = cost_before(arg, N_BLOCKS) * share / n_shares;
    int low = 0, high = N_BLOCKS;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (cost_before(arg, middle) < before) low = middle + 1;
        else high = middle;
    }
    return low;
}

// Where the rows of a block go.
struct rows {
    const int32_t *of_out;  // [16], -1: nowhere
    int first, is_run;      // whether of_out counts up from `first`, so that vectors can be loaded and stored
    vf bias;
};

INLINE int is_run(const int32_t *rows, int n) {
    int32_t wrong = 0;
    UNROLL for (int i = 1; i < n; i++) wrong |= rows[i] ^ (rows[0] + i);
    return wrong == 0 && rows[0] >= 0;
}

INLINE vf gather(const float *from, const int32_t *rows, int is_run) {
    if (is_run) return load(from + rows[0]);
    float values[VW];
    for (int i = 0; i < VW; i++) values[i] = rows[i] < 0 ? 0.0f : from[rows[i]];
    return load(values);
}

INLINE struct rows find_rows(const struct arguments *arg, int block) {
    const int32_t *of_out = arg->order + block * BLOCK_ROWS;
    struct rows rows = {of_out, of_out[0], is_run(of_out, GATED ? VW / 2 : VW), splat(0.0f)};
    if (HAS_BIAS) rows.bias = gather(arg->bias, of_out, is_run(of_out, VW));
    return rows;
}

// [pair, half] to [half, pair].
INLINE vf in_order(vf sums) {
    return __builtin_shufflevector(sums, sums, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
}

INLINE void store_rows(const struct rows *rows, const float *values, float *out, int n) {
    if (rows->is_run) {
        memcpy(out + rows->first, values, n * sizeof *out);
        return;
    }
    for (int i = 0; i < n; i++)
        if (rows->of_out[i] >= 0) out[rows->of_out[i]] = values[i];
}

// sums: of a block's rows [pair, half] for tokens token and, if there are two, token + 1. out and residual may be the
// same memory.
INLINE void finish(const struct arguments *arg, const struct rows *rows, int token, int n_tokens, const vf sums[2]) {
    float *out = arg->out + (size_t)token * OUT_STRIDE;
    const vf first = in_order(sums[0]) + rows->bias, second = n_tokens > 1 ? in_order(sums[1]) + rows->bias : first;
    float values[2 * VW] __attribute__((aligned(64)));
    if (GATED) {  // the halves of both tokens share vectors
        const vf gates = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
        const vf ups = __builtin_shufflevector(first, second, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        store(values, activate(ACTIVATION, gates) * ups);
    } else {
        store(values, activate(ACTIVATION, first)), store(values + VW, activate(ACTIVATION, second));
    }
    const int height = GATED ? VW / 2 : VW;
    for (int t = 0; t < n_tokens; t++) {
        float *const of_token = values + t * height;
        if (HAS_RESIDUAL)
            store(of_token, load(of_token)
                            + gather(arg->residual + (size_t)(token + t) * RESIDUAL_STRIDE, rows->of_out, rows->is_run));
        store_rows(rows, of_token, out + (size_t)t * OUT_STRIDE, height);
    }
}

// A token for `multiply_few`: a scale and the sum of the integers for each tile.
struct token {
    struct tile_x x[K_TILES];
    float scales[K_TILES];
    int sums[K_TILES];
};

// Each tile of the weights meets one token after the other as it is unpacked.
INLINE void multiply_few(const struct arguments *arg, int begin, int end, const struct token *tokens, int n_tokens) {
    const int32_t *blocks = arg->blocks;
    for (int block = begin; block < end; block++) {
        vf acc[FEW] = {0};
        for (int i = blocks[block]; i < blocks[block + 1]; i++) {
            const uint8_t *record = record_at(arg, i);
            FOR_EACH_TILE(record, {
                const int tile = tile_of(record, i - blocks[block], slot);
                const struct steps steps = load_steps(width, fields, n_tiles, slot);
                for (int t = 0; t < n_tokens; t++)
                    acc[t] = add_products(acc[t], tile_sums(width, values, &tokens[t].x[tile]), steps,
                                          tokens[t].scales[tile], tokens[t].sums[tile]);
            });
        }
        const struct rows rows = find_rows(arg, block);
        for (int t = 0; t < n_tokens; t += 2) finish(arg, &rows, t, min_i(2, n_tokens - t), acc + t);
    }
}

// Weights are nobody's output: a share asks for its first before it looks at the activations.
INLINE void prefetch_block(const struct arguments *arg, int block) {
    prefetch(record_at(arg, arg->blocks[block]), AHEAD);
}

#endif
