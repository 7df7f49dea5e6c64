// One token over records: limited by the memory bus. Each share quantises the token for itself while its first weights
// are on their way.
#ifndef GQSA_LINEAR_RECORDS_DECODE_H
#define GQSA_LINEAR_RECORDS_DECODE_H

#include "linear_records.h"

// The quantised token: a scale and the sum of the integers for each tile.
struct token {
    struct tile_x x[K_TILES];
    float scales[K_TILES];
    int sums[K_TILES];
};

INLINE void quantize_token(const struct arguments *arg, struct token *token) {
    const struct norm norm = measure(arg->x);
    for (int tile = 0; tile < K_TILES; tile++) {
        const int column = tile * TILE;
        vi q[PARTS];
        token->scales[tile] = quantize_tile(norm, arg->x + column, arg->norm_weight + column, arg->norm_bias + column, q,
                                            &token->sums[tile]);
        UNROLL for (int quarter = 0; quarter < PARTS; quarter++) place_quarter(&token->x[tile], quarter, q[quarter]);
    }
}

INLINE void linear_records(const struct arguments *arg, int share, int n_shares) {
    const int begin = first_block(arg, share, n_shares), end = first_block(arg, share + 1, n_shares);
    if (begin == end) return;
    const uint8_t *records = (const uint8_t *)arg->records;
    const int32_t *starts = arg->starts, *blocks = arg->blocks;
    prefetch(records + (size_t)starts[blocks[begin]] * 16, AHEAD);
    struct token token;
    quantize_token(arg, &token);
    for (int block = begin; block < end; block++) {
        vf acc = 0;
        for (int i = blocks[block]; i < blocks[block + 1]; i++) {
            const uint8_t *record = records + (size_t)starts[i] * 16;
            FOR_EACH_TILE(record, {
                const int tile = tile_of(head_, slot);
                const vi sums = tile_sums(width, values, &token.x[tile]);
                acc = add_products(acc, sums, load_steps(width, fields, n_tiles, slot), token.scales[tile], token.sums[tile]);
            });
        }
        const struct rows rows = find_rows(arg, block);
        finish(arg, &rows, 0, 1, &acc);
    }
}

#endif
