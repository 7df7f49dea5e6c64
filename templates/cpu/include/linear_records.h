// y = W x over records (see records.h): what one token and several have in common.
//
// The kernel defines TOKENS, ROWS, K, N_BLOCKS, WIDTHS, MASKED_WIDTHS, WHOLE, NORM, EPS, GATED, ACTIVATION, HAS_BIAS,
// HAS_RESIDUAL, OUT_STRIDE and RESIDUAL_STRIDE. A block of 16 rows is always summed by one share and in one order, so
// results do not depend on the number of threads.
#ifndef GQSA_LINEAR_RECORDS_H
#define GQSA_LINEAR_RECORDS_H

#include "records.h"

#define BLOCK_ROWS 16
#define BLOCK_UNITS 4  // of 16 bytes, what a block costs beside its bytes

INLINE int64_t cost_before(const struct arguments *arg, int block) {
    return arg->starts[arg->blocks[block]] + (int64_t)block * BLOCK_UNITS;
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

// Whether rows[0 .. n - 1] count up, so that vectors can be loaded and stored.
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

// sums: of a block's rows, [pair, half]. out and residual may be the same memory.
INLINE void store_rows(const struct arguments *arg, int block, int token, vf sums) {
    const int32_t *rows = arg->order + block * BLOCK_ROWS;
    float *out = arg->out + (size_t)token * OUT_STRIDE;
    vf values = __builtin_shufflevector(sums, sums, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    if (HAS_BIAS) values += gather(arg->bias, rows, is_run(rows, VW));
    if (GATED) {
        const int run = is_run(rows, VW / 2);
        const __typeof__(values.lo) products = activate(ACTIVATION, values).lo * values.hi;
        if (run) memcpy(out + rows[0], &products, sizeof products);
        else
            for (int i = 0; i < VW / 2; i++)
                if (rows[i] >= 0) out[rows[i]] = products[i];
        return;
    }
    const int run = is_run(rows, VW);
    values = activate(ACTIVATION, values);
    if (HAS_RESIDUAL) values += gather(arg->residual + (size_t)token * RESIDUAL_STRIDE, rows, run);
    if (run) store(out + rows[0], values);
    else
        for (int i = 0; i < VW; i++)
            if (rows[i] >= 0) out[rows[i]] = values[i];
}

#endif
