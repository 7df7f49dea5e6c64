// Activations as 16-bit integers q with a scale for each token and tile of 64 columns, |q| <= 32639, so that q is
// 256 * high + low with both of them signed bytes. Normalisation, if there is one, comes first.
//
// The kernel defines TOKENS, K (a multiple of TILE), NORM and EPS. Vectors have 16 lanes on every target: a tile is
// four of them.
#ifndef GQSA_QUANTIZED_ROWS_H
#define GQSA_QUANTIZED_ROWS_H

#define VW 16
#include "state.h"
#include "vmath.h"

#define TILE 64
#define K_TILES (K / TILE)
#define PARTS (TILE / VW)
#define Q_MAX 32639.0f  // 127 * 256 + 127

enum { NO_NORM, RMS_NORM, LAYER_NORM };

// factor: 1 / the root of the mean square, of what is left after the mean for a layer norm.
struct norm {
    float mean, factor;
};

INLINE struct norm measure(const float *x) {
    struct norm norm = {0.0f, 1.0f};
    if (NORM == LAYER_NORM) {
        vf sums[PARTS] = {0};
        for (int k = 0; k < K; k += TILE)
            UNROLL for (int i = 0; i < PARTS; i++) sums[i] += load(x + k + i * VW);
        norm.mean = hsum((sums[0] + sums[1]) + (sums[2] + sums[3])) / K;
    }
    if (NORM != NO_NORM) {
        vf squares[PARTS] = {0};
        for (int k = 0; k < K; k += TILE) {
            UNROLL for (int i = 0; i < PARTS; i++) {
                vf value = load(x + k + i * VW) - norm.mean;
                squares[i] = fma_v(value, value, squares[i]);
            }
        }
        norm.factor = 1.0f / sqrtf(hsum((squares[0] + squares[1]) + (squares[2] + squares[3])) / K + EPS);
    }
    return norm;
}

// The tile that begins at a column: its integers in q, their sum in *sum; returns the scale. weight and bias are NULL
// without a norm. The factor of an RMS norm changes the scale alone.
INLINE float quantize_tile(struct norm norm, const float *x, const float *weight, const float *bias, int column,
                           vi q[PARTS], int *sum) {
    vf values[PARTS], most[PARTS];
    UNROLL for (int i = 0; i < PARTS; i++) {
        const int k = column + i * VW;
        values[i] = load(x + k);
        if (NORM == RMS_NORM) values[i] *= load(weight + k);
        if (NORM == LAYER_NORM) values[i] = (values[i] - norm.mean) * norm.factor * load(weight + k) + load(bias + k);
        most[i] = __builtin_elementwise_abs(values[i]);
    }
    const float largest = hmax(max_v(max_v(most[0], most[1]), max_v(most[2], most[3])));
    const float inverse = largest > 0.0f ? Q_MAX / largest : 0.0f;
    UNROLL for (int i = 0; i < PARTS; i++)
        q[i] = __builtin_convertvector(__builtin_elementwise_rint(values[i] * inverse), vi);
    *sum = __builtin_reduce_add((q[0] + q[1]) + (q[2] + q[3]));
    const float scale = largest / Q_MAX;
    return NORM == RMS_NORM ? scale * norm.factor : scale;
}

#endif
