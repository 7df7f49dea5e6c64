// The KV cache, f16 or f32 [slots, context, KV_HEADS, HEAD_DIM], both caches alike: where its rows lie, and
// its elements. The kernel defines KV_HEADS, HEAD_DIM and KV_F16.
#ifndef GQSA_KV_CACHE_H
#define GQSA_KV_CACHE_H

#include "state.h"
#include "vec.h"

#if KV_F16
typedef _Float16 kv_t;
#define load_kv_n load_f16_n
#define store_kv_n store_f16_n
#else
typedef float kv_t;
#define load_kv_n load_n
#define store_kv_n store_n
#endif

// Where the rows of a token's slot lie, in elements from the start of a cache. Nothing else knows it. What all
// rows of the slot share is worked out once.
struct kv_slot {
    size_t first;
};

INLINE struct kv_slot kv_slot(const int32_t *state, int token) {
    return (struct kv_slot){(size_t)slot_of(state, token) * context_of(state) * (KV_HEADS * HEAD_DIM)};
}

INLINE size_t kv_row(struct kv_slot slot, size_t position) { return slot.first + position * (KV_HEADS * HEAD_DIM); }

#endif
