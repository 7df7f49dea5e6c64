// Attention of one token. Shares are cut at heads; heads of one KV head that fall to the same
// share walk the cache together, so that the second finds each block in the first-level cache.
#ifndef GQSA_ATTENTION_DECODE_H
#define GQSA_ATTENTION_DECODE_H

#include "attention.h"

#define POSITIONS 64  // cache rows in a block

struct decode_head {
    float max, sum;
    vf out[HEAD_PARTS];
};

// Adds cache rows first .. first + n - 1 of a slot to one head's running softmax. scales: what to multiply each row's
// products with its keys by, and its weight.
INLINE void attend_block(struct decode_head *head, const float *q, const kv_t *keys, const kv_t *vals,
                         const float (*scales)[POSITIONS], struct kv_slot slot, size_t first, int n) {
    float scores[POSITIONS];
    vf largest = splat(LOWEST);
    for (int base = 0; base < n; base += VW) {
        vf dots[VW];
        UNROLL for (int i = 0; i < VW; i++) {
            const kv_t *key = keys + kv_row(slot, first + min_i(base + i, n - 1));
            // The hardware's own prefetch follows rows that lie far apart badly. A prefetch past the cache's
            // end does nothing.
            const size_t later = kv_row(slot, first + base + i + POSITIONS);
            UNROLL for (int byte = 0; byte < HEAD_DIM * (int)sizeof *key; byte += 64) {
                __builtin_prefetch((const char *)(keys + later) + byte);
                __builtin_prefetch((const char *)(vals + later) + byte);
            }
            vf dot = load_kv(key, 0) * load_n(q, HEAD_DIM);
            UNROLL for (int part = 1; part < HEAD_PARTS; part++)
                dot = fma_v(load_kv(key, part), load_n(q + part * VW, HEAD_DIM - part * VW), dot);
            dots[i] = dot;
        }
        vi position = base + (vi)VEC_IOTA;
        vf score = position < n ? hsum_each(dots) * load(scales[0] + base) : splat(-INFINITY);
        largest = max_v(largest, score);
        store(scores + base, score);
    }
    float max = hmax(largest);
    max = max > head->max ? max : head->max;
    float shrink = exp_1(head->max - max);
    vf sum = splat(0.0f);
    for (int base = 0; base < n; base += VW) {
        vf p = exp_v(load(scores + base) - max);
        sum += p;
        store(scores + base, KV_SCALED ? p * load(scales[1] + base) : p);
    }
    head->max = max;
    head->sum = head->sum * shrink + hsum(sum);
    // Two sums for even and odd rows, to hide the latency of fused multiply-add.
    vf even[HEAD_PARTS], odd[HEAD_PARTS];
    UNROLL for (int part = 0; part < HEAD_PARTS; part++) {
        even[part] = head->out[part] * shrink;
        odd[part] = splat(0.0f);
    }
    int i = 0;
    for (; i + 2 <= n; i += 2) {
        const kv_t *row = vals + kv_row(slot, first + i), *next = vals + kv_row(slot, first + i + 1);
        UNROLL for (int part = 0; part < HEAD_PARTS; part++) {
            even[part] = fma_v(load_kv(row, part), splat(scores[i]), even[part]);
            odd[part] = fma_v(load_kv(next, part), splat(scores[i + 1]), odd[part]);
        }
    }
    if (i < n) {
        const kv_t *row = vals + kv_row(slot, first + i);
        UNROLL for (int part = 0; part < HEAD_PARTS; part++)
            even[part] = fma_v(load_kv(row, part), splat(scores[i]), even[part]);
    }
    UNROLL for (int part = 0; part < HEAD_PARTS; part++) head->out[part] = even[part] + odd[part];
}

INLINE void attention(const struct arguments *arg, int share, int n_shares) {
    const float *q = arg->q;
    float *out = arg->out;
    struct kv_slot slot = kv_slot(arg->state, 0);
    int position = position_of(arg->state, 0);
    int start = first_seen(position), head_begin, head_end;
    split(HEADS, share, n_shares, &head_begin, &head_end);
    for (int head = head_begin; head < head_end;) {
        int kv_head = head / PER_KV;
        const kv_t *keys = arg->k_cache + kv_head * HEAD_DIM, *vals = arg->v_cache + kv_head * HEAD_DIM;
        int n_heads = min_i(head_end, (kv_head + 1) * PER_KV) - head;
        struct decode_head heads[PER_KV];
        for (int i = 0; i < n_heads; i++) heads[i] = (struct decode_head){.max = LOWEST};
        for (int base = start; base <= position; base += POSITIONS) {
            int n = min_i(POSITIONS, position + 1 - base);
            float scales[2][POSITIONS] = {{0}};
            for (int i = 0; i < n; i++) {
                const size_t row = kv_row(slot, base + i);
                scales[0][i] = kv_scale(arg->k_cache + row, kv_head) * SCALE;
                if (KV_SCALED) scales[1][i] = kv_scale(arg->v_cache + row, kv_head);
            }
            for (int i = 0; i < n_heads; i++)
                attend_block(&heads[i], q + (head + i) * HEAD_DIM, keys, vals, scales, slot, base, n);
        }
        for (int i = 0; i < n_heads; i++) {
            for (int part = 0; part < HEAD_PARTS; part++)
                store_n(out + (head + i) * HEAD_DIM + part * VW, heads[i].out[part] / heads[i].sum,
                        HEAD_DIM - part * VW);
        }
        head += n_heads;
    }
}

#endif
