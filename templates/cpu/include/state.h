// The launch's state: i32 [8 + 2 * max_tokens] {n_tokens, context, draw [6], then slot and position of each
// token}. Kernels read it through these functions alone. draw: {scale as f32, top_k, span, top_p, counter [2]}, see choose.h.
#ifndef GQSA_STATE_H
#define GQSA_STATE_H

#include <stdint.h>

// tokens: the kernel's constant, 0 where it has none. The decode variant, 1, must not read the count.
static inline int count_tokens(int tokens, const int32_t *state) { return tokens == 1 ? 1 : state[0]; }
static inline int context_of(const int32_t *state) { return state[1]; }
static inline int slot_of(const int32_t *state, int token) { return state[8 + 2 * token]; }
static inline int position_of(const int32_t *state, int token) { return state[9 + 2 * token]; }
static inline const int32_t *draw_of(const int32_t *state) { return state + 2; }

#endif
