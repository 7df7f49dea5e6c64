// exp, erf and the activations on vectors, to about 1 ulp: logits must not drift from libm's.
#ifndef GQSA_VMATH_H
#define GQSA_VMATH_H

#include <math.h>

#include "vec.h"

// e^x = p 2^n: x = n ln 2 + r with |r| <= ln 2 / 2; Taylor's series to r^7 leaves 5e-9.
INLINE vf exp_parts(vf x, vi *exponent) {
    vf n = __builtin_elementwise_rint(x * 1.44269504088896341f);
    // ln 2 in two parts: the first has few enough bits for n times it to be exact.
    vf r = fma_v(n, splat(-0.693145751953125f), x);
    r = fma_v(n, splat(-1.42860682030941723e-6f), r);
    vf p = splat(1.0f / 5040);
    p = fma_v(p, r, splat(1.0f / 720));
    p = fma_v(p, r, splat(1.0f / 120));
    p = fma_v(p, r, splat(1.0f / 24));
    p = fma_v(p, r, splat(1.0f / 6));
    p = fma_v(p, r, splat(0.5f));
    *exponent = __builtin_convertvector(n, vi);
    return fma_v(p * r, r, r) + 1.0f;
}

INLINE vf power_of_two(vi n) { return __builtin_bit_cast(vf, (n + 127) << 23); }

// e^x. Under -87 the result is 0 (also for -inf), from 88.7 on it is inf.
INLINE vf exp_v(vf x) {
    vf clamped = x < -87.0f ? splat(-87.0f) : x;
    clamped = clamped > 88.7f ? splat(88.7f) : clamped;
    vi exponent;
    vf p = exp_parts(clamped, &exponent);
    // 2^n in two factors, as n = 128 has no float of its own.
    p = p * power_of_two(exponent >> 1) * power_of_two(exponent - (exponent >> 1));
    p = x < -87.0f ? splat(0.0f) : p;
    return x > 88.7f ? splat(INFINITY) : p;
}

// exp_v of x <= 0, or -inf: the same bits, two thirds of the instructions.
INLINE vf exp_of_negative_v(vf x) {
    vi exponent;
    const vf p = exp_parts(x < -87.0f ? splat(-87.0f) : x, &exponent);
    return x < -87.0f ? splat(0.0f) : p * power_of_two(exponent);
}

INLINE float exp_1(float x) { return exp_v(splat(x))[0]; }

// erf(x): x plus an odd polynomial near 0; 1 - e^p(|x|) further out, where p is a minimax fit of
// log(erfc) on 0.9277 .. 4 (4e-11), and erf is 1 in f32 from 4 on.
INLINE vf erf_v(vf x) {
    vf t = __builtin_elementwise_abs(x);
    vf s = x * x;
    vf near = splat(8.36011822684668e-05f);
    near = fma_v(near, s, splat(-0.0008140963618643582f));
    near = fma_v(near, s, splat(0.0052009448409080505f));
    near = fma_v(near, s, splat(-0.02685939520597458f));
    near = fma_v(near, s, splat(0.11283696442842484f));
    near = fma_v(near, s, splat(-0.37612634897232056f));
    near = fma_v(near, s, splat(0.12837916612625122f));
    near = fma_v(near, x, x);
    vf u = t > 4.0f ? splat(4.0f) : t;
    vf far = splat(-2.1253439626889303e-05f);
    far = fma_v(far, u, splat(0.0004362800682429224f));
    far = fma_v(far, u, splat(-0.004179800860583782f));
    far = fma_v(far, u, splat(0.025142254307866096f));
    far = fma_v(far, u, splat(-0.10831510275602341f));
    far = fma_v(far, u, splat(-0.6333153247833252f));
    far = fma_v(far, u, splat(-1.129530429840088f));
    far = fma_v(far, u, splat(0.00017787839169614017f));
    far = 1.0f - exp_v(far);
    far = x < 0.0f ? -far : far;
    return t > 0.9277f ? far : near;
}

enum { ACTIVATION_none, ACTIVATION_relu, ACTIVATION_silu, ACTIVATION_gelu, ACTIVATION_gelu_tanh };

// kind is a constant of the kernel.
INLINE vf activate(int kind, vf x) {
    switch (kind) {
    case ACTIVATION_relu:
        return x < 0.0f ? splat(0.0f) : x;
    case ACTIVATION_silu:
        return x / (1.0f + exp_v(-x));
    case ACTIVATION_gelu:
        return 0.5f * x * (1.0f + erf_v(x * 0.707106781186547524f));
    case ACTIVATION_gelu_tanh:
        // 0.5 (1 + tanh u) = 1 / (1 + e^-2u), without the cancellation near tanh = -1.
        return x / (1.0f + exp_v(-1.59576912160573071f * (x + 0.044715f * x * x * x)));
    default:
        return x;
    }
}

#endif
