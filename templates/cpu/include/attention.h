// Parts that both forms of attention share. See OPERATORS["attention"] for the arguments.
//
// The kernel defines TOKENS, HEADS, KV_HEADS, HEAD_DIM, SCALE, WINDOW, Q_STRIDE, OUT_STRIDE and what kv_cache.h needs.
// Softmax runs online over blocks of cache rows: a running maximum and sum for each query, and what
// was summed under an older maximum is scaled down when a larger one comes.
#ifndef GQSA_ATTENTION_H
#define GQSA_ATTENTION_H

#include "kv_cache.h"
#include "vmath.h"

#define PER_KV (HEADS / KV_HEADS)  // query heads that read one KV head
#define HEAD_PARTS ((HEAD_DIM + VW - 1) / VW)

// Lower than any score, yet finite: exp(-inf - LOWEST) is 0 where exp(-inf + inf) would be NaN.
#define LOWEST -1e30f

// Part `part` of a cache row of one head, zeros past HEAD_DIM.
INLINE vf load_kv(const kv_t *row, int part) { return load_kv_n(row + part * VW, HEAD_DIM - part * VW); }

// First cache row that the query at `position` sees.
INLINE int first_seen(int position) { return WINDOW > 0 ? max_i(0, position - WINDOW + 1) : 0; }

#endif
