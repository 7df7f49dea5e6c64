// y = W x for an f16 matrix [ROWS, K], sums in f32.
//
// The kernel defines TOKENS, ROWS, K, X_STRIDE and what linear.h needs. Shares are cut at blocks of
// BLOCK rows; within a block BLOCK_ROWS x BLOCK_TOKENS sums run at once, lanes along k.
#ifndef GQSA_LINEAR_DENSE_H
#define GQSA_LINEAR_DENSE_H

#include "linear.h"

#define BLOCK 64  // rows that stay in the second-level cache while all tokens pass
#define BLOCK_ROWS 4
#if TOKENS == 1
#define BLOCK_TOKENS 1
#elif VW == 16
#define BLOCK_TOKENS 6  // 24 sums of 32 registers
#else
#define BLOCK_TOKENS 2  // 8 sums of 16 registers
#endif
#define K_FULL (K / VW * VW)

// sums[row][token] of one tile.
INLINE void tile_sums(const _Float16 *const weight[BLOCK_ROWS], const float *const x[BLOCK_TOKENS],
                      float sums[BLOCK_ROWS][BLOCK_TOKENS]) {
    vf acc[BLOCK_ROWS][BLOCK_TOKENS] = {{0}};
    for (int k = 0; k < K_FULL; k += VW) {
        vf w[BLOCK_ROWS];
        UNROLL for (int row = 0; row < BLOCK_ROWS; row++) w[row] = load_f16(weight[row] + k);
        UNROLL for (int token = 0; token < BLOCK_TOKENS; token++) {
            vf value = load(x[token] + k);
            UNROLL for (int row = 0; row < BLOCK_ROWS; row++)
                acc[row][token] = fma_v(w[row], value, acc[row][token]);
        }
    }
#if K_FULL < K
    UNROLL for (int token = 0; token < BLOCK_TOKENS; token++) {
        vf value = load_n(x[token] + K_FULL, K - K_FULL);
        UNROLL for (int row = 0; row < BLOCK_ROWS; row++)
            acc[row][token] = fma_v(load_f16_n(weight[row] + K_FULL, K - K_FULL), value, acc[row][token]);
    }
#endif
    UNROLL for (int row = 0; row < BLOCK_ROWS; row++)
        UNROLL for (int token = 0; token < BLOCK_TOKENS; token++) sums[row][token] = hsum(acc[row][token]);
}

INLINE void linear_dense(const struct arguments *arg, int share, int n_shares) {
    const float *x = arg->x;
    const _Float16 *weight = arg->weight;
    const float *bias = arg->bias, *residual = arg->residual;
    float *out = arg->out;
    int n_tokens = count_tokens(TOKENS, arg->state);
    int begin, end;
    split((ROWS + BLOCK - 1) / BLOCK, share, n_shares, &begin, &end);
    for (int block = begin; block < end; block++) {
        int row_end = min_i(ROWS, (block + 1) * BLOCK);
        for (int token = 0; token < n_tokens; token += BLOCK_TOKENS) {
            const float *rows[BLOCK_TOKENS];  // the last row or token is computed again to fill a short tile
            for (int i = 0; i < BLOCK_TOKENS; i++) rows[i] = x + (size_t)min_i(token + i, n_tokens - 1) * X_STRIDE;
            for (int row = block * BLOCK; row < row_end; row += VW) {
                float sums[BLOCK_TOKENS][VW];
                int n = min_i(VW, row_end - row);
                for (int quad = 0; quad < VW; quad += BLOCK_ROWS) {
                    const _Float16 *weights[BLOCK_ROWS];
                    float tile[BLOCK_ROWS][BLOCK_TOKENS];
                    for (int i = 0; i < BLOCK_ROWS; i++)
                        weights[i] = weight + (size_t)min_i(row + quad + i, ROWS - 1) * K;
                    if (quad < n) tile_sums(weights, rows, tile);
                    else memset(tile, 0, sizeof tile);
                    for (int i = 0; i < BLOCK_ROWS; i++)
                        for (int j = 0; j < BLOCK_TOKENS; j++) sums[j][quad + i] = tile[i][j];
                }
                for (int j = 0; j < min_i(BLOCK_TOKENS, n_tokens - token); j++)
                    finish(load(sums[j]), n, row, token + j, bias, residual, out);
            }
        }
    }
}

#endif
