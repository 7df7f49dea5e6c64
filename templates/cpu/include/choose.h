// Draws the next token as `gqsa_runtime/sampling.py` defines it, bit for bit: counts and sums of integers by octave, then,
// in the octave that holds the place looked for, by nine bits of a token's key at a time.
#ifndef GQSA_CHOOSE_H
#define GQSA_CHOOSE_H

#include "argmax.h"
#include "state.h"

// OCTAVES, STEP_BITS, SCALED_LIMIT and EXPONENTIAL_0 up, of the definition, come from the template.
#define STEPS (1 << STEP_BITS)
#define INDEX_BITS 20
#define KEY_BITS (INDEX_BITS + STEP_BITS)
#define DIGIT_BITS 9
#define BINS (1 << DIGIT_BITS)
#define LISTED 4096   // most tokens of an octave that are listed, and not looked for again
#define COUNT_BIT 44  // of an amount: the sum of weights below, the number of tokens above; of up to 2^20 - 1 tokens
#define MASS (((uint64_t)1 << COUNT_BIT) - 1)
#define CHUNK 256

struct choice {
    const float *logits;
    int vocab;
    float scale;
    int top;                    // whole part of the largest scaled logit
    uint64_t octaves[OCTAVES];  // amounts
    int last_octave;            // no token behind this octave and key is kept
    uint64_t last_key;
    int listed_octave, n_listed;  // n_listed > LISTED: too many
    uint64_t list[LISTED], bins[BINS];
};

// One product, not fused with what follows.
INLINE vf scale_v(vf logits, float scale) {
    const float limit = SCALED_LIMIT;
    vf scaled = logits * scale;
    scaled = scaled > limit ? splat(limit) : scaled;
    return scaled < -limit ? splat(-limit) : scaled;
}

INLINE vi octaves_v(const struct choice *c, vf logits, vf scaled) {
    vi octaves = c->top - __builtin_convertvector(__builtin_elementwise_floor(scaled), vi);
    octaves = octaves > OCTAVES ? (vi)OCTAVES : octaves;
    return logits == -INFINITY ? (vi)OCTAVES : octaves;
}

// Just below a whole number the difference is rounded up to 1.
INLINE vi steps_v(vf scaled) {
    vi steps = __builtin_convertvector((scaled - __builtin_elementwise_floor(scaled)) * (float)STEPS, vi);
    return steps >= STEPS ? (vi)(STEPS - 1) : steps;
}

// 2^(step / STEPS) in units of 2^-23.
INLINE uint32_t weight_of(uint32_t step) {
    const uint64_t x = step << 16;
    uint64_t power = EXPONENTIAL_4;
    power = EXPONENTIAL_3 + (power * x >> 32);
    power = EXPONENTIAL_2 + (power * x >> 32);
    power = EXPONENTIAL_1 + (power * x >> 32);
    power = EXPONENTIAL_0 + (power * x >> 32);
    return (uint32_t)((((uint64_t)1 << 31) + (power * x >> 32)) >> 8);
}

INLINE uint64_t amount_of(int step) { return (uint64_t)1 << COUNT_BIT | weight_of((uint32_t)step); }

static void count_octaves(struct choice *c) {
    uint64_t sums[4][OCTAVES + 1] = {{0}};  // of every fourth token: additions to one place would wait for each other
    for (int first = 0; first < c->vocab; first += CHUNK) {
        const int count = min_i(CHUNK, c->vocab - first);
        int32_t octaves[CHUNK], steps[CHUNK];
        uint32_t weights[CHUNK];
        for (int i = 0; i < count; i += VW) {
            vf logits = load_n(c->logits + first + i, count - i), scaled = scale_v(logits, c->scale);
            vi octave = octaves_v(c, logits, scaled), step = steps_v(scaled);
            memcpy(octaves + i, &octave, sizeof octave);
            memcpy(steps + i, &step, sizeof step);
        }
        for (int i = count; i < CHUNK; i++) octaves[i] = OCTAVES, steps[i] = 0;
        for (int i = 0; i < CHUNK; i++) weights[i] = weight_of((uint32_t)steps[i]);
        for (int i = 0; i < CHUNK; i += 4) {
            UNROLL for (int j = 0; j < 4; j++) sums[j][octaves[i + j]] += (uint64_t)1 << COUNT_BIT | weights[i + j];
        }
    }
    for (int octave = 0; octave < OCTAVES; octave++)
        c->octaves[octave] = sums[0][octave] + sums[1][octave] + sums[2][octave] + sums[3][octave];
}

INLINE int is_kept(const struct choice *c, int octave, uint64_t key) {
    return octave < c->last_octave || (octave == c->last_octave && key <= c->last_key);
}

// A token's key: its step turned round, its index. Where bins is null the token is listed, else counted in its bin.
INLINE void take(struct choice *c, uint64_t *bins, int octave, uint64_t key, uint64_t begin, int shift) {
    if (!is_kept(c, octave, key)) return;
    if (!bins) {
        if (c->n_listed < LISTED) c->list[c->n_listed] = key;
        c->n_listed++;
    } else if (key >= begin && (key - begin) >> shift < BINS) {
        bins[(key - begin) >> shift] += amount_of(STEPS - 1 - (int)(key >> INDEX_BITS));
    }
}

static void look_for(struct choice *c, uint64_t *bins, int octave, uint64_t begin, int shift) {
    for (int first = 0; first < c->vocab; first += VW) {
        const int count = min_i(VW, c->vocab - first);
        vf logits = load_n(c->logits + first, count), scaled = scale_v(logits, c->scale);
        vi same = octaves_v(c, logits, scaled) == octave;
        if (!__builtin_reduce_or(same)) continue;
        vi steps = steps_v(scaled);
        for (int i = 0; i < count; i++)
            if (same[i]) take(c, bins, octave, (uint64_t)(STEPS - 1 - steps[i]) << INDEX_BITS | (first + i), begin, shift);
    }
}

// Amounts of the tokens of an octave that are kept, by key: bin (key - begin) >> shift of keys from begin on.
static void tally(struct choice *c, int octave, uint64_t begin, int shift) {
    memset(c->bins, 0, sizeof c->bins);
    if (octave != c->listed_octave) {
        c->listed_octave = octave, c->n_listed = 0;
        if (c->octaves[octave] >> COUNT_BIT <= LISTED) {
            look_for(c, NULL, octave, 0, 0);
        } else {
            c->n_listed = LISTED + 1;
        }
    }
    if (c->n_listed > LISTED) {
        look_for(c, c->bins, octave, begin, shift);
    } else {
        for (int i = 0; i < c->n_listed; i++) take(c, c->bins, octave, c->list[i], begin, shift);
    }
}

// What a search goes by: tokens, or their weights; those of an octave are shifted right by it.
INLINE uint64_t part_of(uint64_t amount, int counted, int shift) {
    return counted ? amount >> COUNT_BIT : (amount & MASS) >> shift;
}

// The octave that holds a position; takes what is before it from the position.
INLINE int find_octave(const struct choice *c, int counted, uint64_t *position) {
    for (int octave = 0; octave < OCTAVES; octave++) {
        const uint64_t part = part_of(c->octaves[octave], counted, octave);
        if (*position < part) return octave;
        *position -= part;
    }
    return OCTAVES - 1;
}

static uint64_t find_key(struct choice *c, int octave, int counted, uint64_t position) {
    uint64_t key = 0;
    for (int shift = KEY_BITS - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        tally(c, octave, key, shift);
        int bin = 0;
        for (; bin < BINS - 1; bin++) {
            const uint64_t part = part_of(c->bins[bin], counted, 0);
            if (position < part) break;
            position -= part;
        }
        key += (uint64_t)bin << shift;
    }
    return key;
}

// The key of the token on which the share fraction / 2^64 of all weights falls.
static uint64_t find_share(struct choice *c, uint64_t fraction, int *octave) {
    uint64_t total = 0;
    for (int i = 0; i < OCTAVES; i++) total += part_of(c->octaves[i], 0, i);
    const unsigned __int128 product = (unsigned __int128)total * fraction;
    uint64_t position = (uint64_t)(product >> 64);
    *octave = find_octave(c, 0, &position);
    if (*octave > 0) position = position << *octave | (uint64_t)product >> (64 - *octave);
    return find_key(c, *octave, 0, position);
}

// Drops all tokens behind one.
static void keep_up_to(struct choice *c, int octave, uint64_t key) {
    if (!is_kept(c, octave, key)) return;
    c->last_octave = octave, c->last_key = key;
    tally(c, octave, 0, KEY_BITS);
    c->octaves[octave] = c->bins[0];
    for (int i = octave + 1; i < OCTAVES; i++) c->octaves[i] = 0;
}

// SplitMix64.
INLINE uint64_t mixed(uint64_t counter) {
    counter = (counter ^ counter >> 30) * 0xBF58476D1CE4E5B9u;
    counter = (counter ^ counter >> 27) * 0x94D049BB133111EBu;
    return counter ^ counter >> 31;
}

// best: the largest logit, finite.
static int draw_token(const float *logits, int vocab, float best, const int32_t *draw) {
    struct choice c;
    memcpy(&c.scale, draw, sizeof c.scale);
    c.logits = logits, c.vocab = vocab;
    c.last_octave = OCTAVES - 1, c.last_key = ((uint64_t)1 << KEY_BITS) - 1;
    c.listed_octave = -1, c.n_listed = 0;
    const vf scaled = scale_v(splat(best), c.scale);
    c.top = (int)floorf(scaled[0]);
    count_octaves(&c);

    int octave;
    uint64_t n_tokens = 0;
    for (int i = 0; i < OCTAVES; i++) n_tokens += c.octaves[i] >> COUNT_BIT;
    if (draw[1] > 0 && (uint64_t)draw[1] < n_tokens) {
        uint64_t position = (uint64_t)draw[1] - 1;
        octave = find_octave(&c, 1, &position);
        keep_up_to(&c, octave, find_key(&c, octave, 1, position));
    }
    if (draw[3]) {
        const uint64_t key = find_share(&c, (uint64_t)(uint32_t)draw[3] << 32, &octave);
        keep_up_to(&c, octave, key);
    }
    if (draw[2] < OCTAVES * STEPS) {
        const int last = STEPS - 1 - steps_v(scaled)[0] + draw[2];
        if (last < OCTAVES * STEPS)
            keep_up_to(&c, last / STEPS, ((uint64_t)(last % STEPS + 1) << INDEX_BITS) - 1);
    }
    const uint64_t counter = (uint32_t)draw[4] | (uint64_t)(uint32_t)draw[5] << 32;
    const uint64_t key = find_share(&c, mixed(counter), &octave);
    return (int)(key & ((1 << INDEX_BITS) - 1));
}

#endif
