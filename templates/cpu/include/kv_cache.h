// The KV cache, [slots, context] rows, see kv_cache.py: where they lie, and their elements. The kernel defines KV_HEADS,
// HEAD_DIM, one of KV_F16, KV_F32 and KV_INT8, KV_ROW (elements of a row), KV_SCALES (place of the scales in a row) and
// KV_HELD (rows of a slot, 0: as many as the context).
#ifndef GQSA_KV_CACHE_H
#define GQSA_KV_CACHE_H

#include "state.h"
#include "vec.h"

// Where the rows of a token's slot lie, in elements from the start of a cache. Nothing else knows it. What all
// rows of the slot share is worked out once.
struct kv_slot {
    size_t first;
};

INLINE struct kv_slot kv_slot(const int32_t *state, int token) {
    size_t rows = context_of(state);
    if (KV_HELD && rows > KV_HELD) rows = KV_HELD;
    return (struct kv_slot){slot_of(state, token) * rows * KV_ROW};
}

INLINE size_t kv_row(struct kv_slot slot, size_t position) {
#if KV_HELD
    position %= KV_HELD;
#endif
    return slot.first + position * KV_ROW;
}

// Elements of a KV head, values + i from the start of a row on: load_kv_n gives the first n as floats, store_kv writes a
// head of floats. They are to be multiplied by kv_scale(row, head).
#if KV_INT8
#define KV_SCALED 1
typedef int8_t kv_t;
#define load_kv_n load_i8_n

INLINE float kv_scale(const kv_t *row, int head) {
    _Float16 scale;
    memcpy(&scale, row + KV_SCALES + 2 * head, sizeof scale);
    return scale;
}

// The scale takes the largest to 127. It is never 0, and where a value is no number or infinite, neither is it a number.
INLINE void store_kv(kv_t *row, int head, const float *from) {
    vi bits = {0};
    for (int i = 0; i < HEAD_DIM; i += VW) {
        vi one = (vi)load_n(from + i, HEAD_DIM - i) & 0x7fffffff;
        bits = one > bits ? one : bits;
    }
    int32_t most = 0;
    for (int i = 0; i < VW; i++) most = bits[i] > most ? bits[i] : most;
    float largest;
    memcpy(&largest, &most, sizeof largest);
    _Float16 scale = (_Float16)(largest * (1.0f / 127));
    if (scale < (_Float16)0x1p-24f) scale = (_Float16)0x1p-24f;
    memcpy(row + KV_SCALES + 2 * head, &scale, sizeof scale);
    float inverse = 1.0f / (float)scale;
    for (int i = 0; i < HEAD_DIM; i += VW) {
        // The sum's low byte is the nearest integer, and of what is no number at least a byte.
        vf q = load_n(from + i, HEAD_DIM - i) * inverse;
        q = q > 127.0f ? splat(127.0f) : q < -127.0f ? splat(-127.0f) : q;
        vi integers = (vi)(q + 12582912.0f);
        store_i8_n(row + head * HEAD_DIM + i, __builtin_convertvector(integers, vi8), HEAD_DIM - i);
    }
}
#else
#define KV_SCALED 0
#if KV_F16
typedef _Float16 kv_t;
#define load_kv_n load_f16_n
#define store_kv_n store_f16_n
#else
typedef float kv_t;
#define load_kv_n load_n
#define store_kv_n store_n
#endif

INLINE float kv_scale(const kv_t *row, int head) {
    (void)row, (void)head;
    return 1.0f;
}

INLINE void store_kv(kv_t *row, int head, const float *from) {
    for (int i = 0; i < HEAD_DIM; i += VW)
        store_kv_n(row + head * HEAD_DIM + i, load_n(from + i, HEAD_DIM - i), HEAD_DIM - i);
}
#endif

#endif
