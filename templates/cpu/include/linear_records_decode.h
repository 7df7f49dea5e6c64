// One token over records: limited by the memory bus. Each share normalises and quantises the token for itself while its
// first weights are on their way.
#ifndef GQSA_LINEAR_RECORDS_DECODE_H
#define GQSA_LINEAR_RECORDS_DECODE_H

#include "linear_records.h"

INLINE void quantize_token(const struct arguments *arg, struct token *token) {
    const struct norm norm = measure(arg->x);
    for (int tile = 0; tile < K_TILES; tile++) {
        vi q[PARTS];
        token->scales[tile] =
            quantize_tile(norm, arg->x, arg->norm_weight, arg->norm_bias, tile * TILE, q, &token->sums[tile]);
        UNROLL for (int quarter = 0; quarter < PARTS; quarter++) place_quarter(&token->x[tile], quarter, q[quarter]);
    }
}

INLINE void linear_records(const struct arguments *arg, int share, int n_shares) {
    const int begin = first_block(arg, share, n_shares), end = first_block(arg, share + 1, n_shares);
    if (begin == end) return;
    prefetch_block(arg, begin);
    struct token token;
    quantize_token(arg, &token);
    multiply_few(arg, begin, end, &token, 1);
}

#endif
