// What every linear does with its sums: s += out, s += bias, s = activation(s), s += residual, out = s.
//
// The kernel defines ACTIVATION, HAS_BIAS, HAS_RESIDUAL, ACCUMULATE, OUT_STRIDE and RESIDUAL_STRIDE.
#ifndef GQSA_LINEAR_H
#define GQSA_LINEAR_H

#include "state.h"
#include "vmath.h"

// sums: of rows row .. row + n - 1 of one token, n <= VW. out and residual may be the same memory.
INLINE void finish(vf sums, int n, int row, int token, const float *bias, const float *residual, float *out) {
    float *to = out + (size_t)token * OUT_STRIDE + row;
    if (ACCUMULATE) sums += load_n(to, n);
    if (HAS_BIAS) sums += load_n(bias + row, n);
    sums = activate(ACTIVATION, sums);
    if (HAS_RESIDUAL) sums += load_n(residual + (size_t)token * RESIDUAL_STRIDE + row, n);
    store_n(to, sums, n);
}

#endif
