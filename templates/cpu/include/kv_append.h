// Rotary embedding and the KV cache's new rows. See OPERATORS["kv_append"] for the arguments.
//
// The kernel defines TOKENS, HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, Q_STRIDE, K_STRIDE, V_STRIDE and what kv_cache.h
// needs. Shares are cut at (token, head) pairs, query heads first, then KV heads.
#ifndef GQSA_KV_APPEND_H
#define GQSA_KV_APPEND_H

#include "kv_cache.h"

#define HALF (ROTARY_DIM / 2)

// to[0 .. HEAD_DIM) = head rotated; `to` may be `head`. rope: cos[HALF], sin[HALF].
INLINE void rotate(const float *head, const float *rope, float *to) {
    for (int i = 0; i < HALF; i += VW) {
        int n = HALF - i;
        vf cos = load_n(rope + i, n), sin = load_n(rope + HALF + i, n);
        vf low = load_n(head + i, n), high = load_n(head + HALF + i, n);
        store_n(to + i, low * cos - high * sin, n);
        store_n(to + HALF + i, high * cos + low * sin, n);
    }
    if (to != head) memcpy(to + ROTARY_DIM, head + ROTARY_DIM, (HEAD_DIM - ROTARY_DIM) * sizeof *to);
}

INLINE void kv_append(const struct arguments *arg, int share, int n_shares) {
    float *q = arg->q;
    const float *k = arg->k, *v = arg->v, *rope = arg->rope;
    kv_t *k_cache = arg->k_cache, *v_cache = arg->v_cache;
    const int32_t *state = arg->state;
    int n_tokens = count_tokens(TOKENS, state), begin, end;
    split(n_tokens * (HEADS + KV_HEADS), share, n_shares, &begin, &end);
    for (int item = begin; item < end; item++) {
        int token = item / (HEADS + KV_HEADS), head = item % (HEADS + KV_HEADS);
        int position = position_of(state, token);
        const float *angles = rope + (size_t)position * ROTARY_DIM;
        if (head < HEADS) {
            float *at = q + (size_t)token * Q_STRIDE + head * HEAD_DIM;
            if (ROTARY_DIM) rotate(at, angles, at);
            continue;
        }
        head -= HEADS;
        size_t row = kv_row(kv_slot(state, token), position);
        float rotated[HEAD_DIM];
        rotate(k + (size_t)token * K_STRIDE + head * HEAD_DIM, angles, rotated);
        store_kv(k_cache + row, head, rotated);
        store_kv(v_cache + row, head, v + (size_t)token * V_STRIDE + head * HEAD_DIM);
    }
}

#endif
