// Attention of many tokens. Lanes are queries: (token, head) pairs that read one KV head, QUERIES of
// them to a tile, token by token; a tile is cut where a token does not continue the one before it. Keys
// and values enter as broadcasts, so that scores, maxima, masks and sums need no reduction across lanes.
// Shares take tiles in turn, as later tiles see more rows.
#ifndef GQSA_ATTENTION_PREFILL_H
#define GQSA_ATTENTION_PREFILL_H

#include "attention.h"

#if VW == 16
#define QUERY_PARTS 4  // 4 x 4 sums of 32 registers
#else
#define QUERY_PARTS 2  // 4 x 2 sums of 16 registers
#endif
#define QUERIES (QUERY_PARTS * VW)
#define POSITIONS 64  // cache rows in a block
#define FEATURES (HEAD_DIM % 4 == 0 ? 4 : 1)  // features of the output that are summed at once

struct prefill_tile {
    vf q[HEAD_DIM][QUERY_PARTS];  // scaled
    vf out[HEAD_DIM][QUERY_PARTS];
    vf scores[POSITIONS][QUERY_PARTS];
    vf max[QUERY_PARTS], sum[QUERY_PARTS], shrink[QUERY_PARTS];
    vi first[QUERY_PARTS], last[QUERY_PARTS];  // cache rows that each query sees
    float keys[POSITIONS][HEAD_PARTS * VW];
    float vals[POSITIONS][HEAD_PARTS * VW];
};

// scores[position][query] of the first n_rows of one block, a multiple of 4. Rows past the last position repeat it and
// are masked.
INLINE void block_scores(struct prefill_tile *tile, int n_rows) {
    for (int row = 0; row < n_rows; row += 4) {
        vf sums[4][QUERY_PARTS] = {{0}};
        for (int d = 0; d < HEAD_DIM; d++) {
            UNROLL for (int i = 0; i < 4; i++) {
                vf key = splat(tile->keys[row + i][d]);
                UNROLL for (int part = 0; part < QUERY_PARTS; part++)
                    sums[i][part] = fma_v(key, tile->q[d][part], sums[i][part]);
            }
        }
        UNROLL for (int i = 0; i < 4; i++)
            UNROLL for (int part = 0; part < QUERY_PARTS; part++) tile->scores[row + i][part] = sums[i][part];
    }
}

// Scores become exp(score - max); the older sums' factor goes to shrink.
INLINE void block_softmax(struct prefill_tile *tile, int base, int n_rows, int masked) {
    for (int part = 0; part < QUERY_PARTS; part++) {
        vf max = tile->max[part];
        for (int row = 0; row < n_rows; row++) {
            vf score = tile->scores[row][part];
            if (masked) {
                vi position = (vi)(base + row);
                score = position <= tile->last[part] ? score : splat(-INFINITY);
                score = position >= tile->first[part] ? score : splat(-INFINITY);
                tile->scores[row][part] = score;
            }
            max = max_v(max, score);
        }
        tile->shrink[part] = exp_of_negative_v(tile->max[part] - max);
        vf sum = tile->sum[part] * tile->shrink[part];
        for (int row = 0; row < n_rows; row++) {
            vf p = exp_of_negative_v(tile->scores[row][part] - max);
            sum += p;
            tile->scores[row][part] = p;
        }
        tile->max[part] = max;
        tile->sum[part] = sum;
    }
}

INLINE void block_values(struct prefill_tile *tile, int n_rows) {
    for (int d = 0; d < HEAD_DIM; d += FEATURES) {
        vf sums[FEATURES][QUERY_PARTS];
        UNROLL for (int i = 0; i < FEATURES; i++)
            UNROLL for (int part = 0; part < QUERY_PARTS; part++)
                sums[i][part] = tile->out[d + i][part] * tile->shrink[part];
        for (int row = 0; row < n_rows; row++) {
            UNROLL for (int i = 0; i < FEATURES; i++) {
                vf value = splat(tile->vals[row][d + i]);
                UNROLL for (int part = 0; part < QUERY_PARTS; part++)
                    sums[i][part] = fma_v(value, tile->scores[row][part], sums[i][part]);
            }
        }
        UNROLL for (int i = 0; i < FEATURES; i++)
            UNROLL for (int part = 0; part < QUERY_PARTS; part++) tile->out[d + i][part] = sums[i][part];
    }
}

// Queries begin .. end - 1 of one KV head, QUERIES at most; query = token * PER_KV + head within the KV head.
// Their tokens have one slot and positions rising by one. Not inlined: a tile has its own stack, up to
// 0.6 MiB at HEAD_DIM 256.
static __attribute__((noinline)) void attend_tile(const struct arguments *arg, int kv_head, int begin, int end) {
    const int32_t *state = arg->state;
    const struct kv_slot slot = kv_slot(state, begin / PER_KV);
    const int first_position = position_of(state, begin / PER_KV);
    const int last_position = position_of(state, (end - 1) / PER_KV);
    struct prefill_tile tile;
    for (int i = 0; i < QUERIES; i++) {  // a short tile repeats its last query
        int at = min_i(begin + i, end - 1), token = at / PER_KV;
        const float *q = arg->q + (size_t)token * Q_STRIDE
                         + (kv_head * PER_KV + at % PER_KV) * HEAD_DIM;
        for (int d = 0; d < HEAD_DIM; d++) ((float *)tile.q[d])[i] = q[d] * SCALE;
        ((int32_t *)tile.first)[i] = first_seen(position_of(state, token));
        ((int32_t *)tile.last)[i] = position_of(state, token);
    }
    memset(tile.out, 0, sizeof tile.out);
    for (int part = 0; part < QUERY_PARTS; part++) tile.max[part] = splat(LOWEST), tile.sum[part] = splat(0.0f);
    for (int base = first_seen(first_position); base <= last_position; base += POSITIONS) {
        // A row that no query sees would add nothing.
        const int n_rows = min_i(POSITIONS, (last_position - base + 4) / 4 * 4);
        for (int row = 0; row < n_rows; row++) {
            const size_t offset = kv_row(slot, min_i(base + row, last_position));
            const kv_t *key = arg->k_cache + offset, *val = arg->v_cache + offset;
            const float key_scale = kv_scale(key, kv_head), val_scale = kv_scale(val, kv_head);
            for (int part = 0; part < HEAD_PARTS; part++) {
                store(tile.keys[row] + part * VW, load_kv(key + kv_head * HEAD_DIM, part) * key_scale);
                store(tile.vals[row] + part * VW, load_kv(val + kv_head * HEAD_DIM, part) * val_scale);
            }
        }
        int masked = base + POSITIONS - 1 > first_position || base < first_seen(last_position);
        block_scores(&tile, n_rows);
        block_softmax(&tile, base, n_rows, masked);
        block_values(&tile, n_rows);
    }
    for (int i = 0; i < end - begin; i++) {
        int at = begin + i;
        float *out = arg->out + (size_t)(at / PER_KV) * OUT_STRIDE
                     + (kv_head * PER_KV + at % PER_KV) * HEAD_DIM;
        float scale = 1.0f / ((const float *)tile.sum)[i];
        for (int d = 0; d < HEAD_DIM; d++) out[d] = ((const float *)tile.out[d])[i] * scale;
    }
}

// Whether a token continues the one before it: the same slot, the next position.
INLINE int follows(const int32_t *state, int token) {
    return slot_of(state, token) == slot_of(state, token - 1)
           && position_of(state, token) == position_of(state, token - 1) + 1;
}

INLINE void attention(const struct arguments *arg, int share, int n_shares) {
    int n_queries = count_tokens(TOKENS, arg->state) * PER_KV;
    int tiles = (n_queries + QUERIES - 1) / QUERIES;
    for (int item = share; item < tiles * KV_HEADS; item += n_shares) {
        int begin = item / KV_HEADS * QUERIES, limit = min_i(begin + QUERIES, n_queries);
        while (begin < limit) {
            int token = begin / PER_KV + 1;
            while (token * PER_KV < limit && follows(arg->state, token)) token++;
            int end = min_i(token * PER_KV, limit);
            attend_tile(arg, item % KV_HEADS, begin, end);
            begin = end;
        }
    }
}

#endif
