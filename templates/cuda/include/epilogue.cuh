// What a linear does with a row's sum: out = activation(sum (+ out) + bias) + residual.
#pragma once
#include "common.cuh"

// Every row by itself, or activation(row r) * row r + ROWS / 2.
enum Epilogue { ROWS_ALONE, GATED };

// Loaded while the row's weights are on their way, so that its latency hides behind theirs.
struct Addends {
    float before;  // bias, and what out holds if the stream accumulates
    float after;   // residual
};

// C: BIAS, RESIDUAL, ACCUMULATE flags, ACTIVATION, OUT_STRIDE, RESIDUAL_STRIDE. bias: [rows].
// residual may be the same memory as out: each element is read and written by one thread only.
template <class C>
__device__ __forceinline__ Addends load_addends(int row, int token, const float* bias, const float* residual,
                                                const float* out) {
    Addends addends = {0.0f, 0.0f};
    if (C::ACCUMULATE) addends.before = out[(size_t)token * C::OUT_STRIDE + row];
    if (C::BIAS) addends.before += bias[row];
    if (C::RESIDUAL) addends.after = residual[(size_t)token * C::RESIDUAL_STRIDE + row];
    return addends;
}

template <class C>
__device__ __forceinline__ float finish(float sum, Addends addends) {
    return activate<C::ACTIVATION>(sum + addends.before) + addends.after;
}
