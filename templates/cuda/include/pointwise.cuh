// Operators that treat every element alone. A thread per element of a row, blockIdx.y: token.
#pragma once
#include "common.cuh"

// Token and column of this thread; false where it has none.
template <int WIDTH, int TOKENS>
__device__ __forceinline__ bool locate(const int* state, int& token, int& column) {
    wait_for_inputs();
    let_dependents_start();
    token = blockIdx.y;
    column = blockIdx.x * blockDim.x + threadIdx.x;
    return token < count_tokens<TOKENS>(state) && column < WIDTH;
}

// A step that follows on the device may be given -1, where no token could be chosen: its result is dropped.
// C: WIDTH, SOURCE_POSITIONS, POSITION_OFFSET, SCALE, OUT_STRIDE. table: [vocab, WIDTH] halves.
template <class C, int TOKENS>
__device__ __forceinline__ void embedding(const int* ids, const unsigned short* table, float* out, const int* state) {
    int token, column;
    if (!locate<C::WIDTH, TOKENS>(state, token, column)) return;
    const size_t row = C::SOURCE_POSITIONS ? position_of(state, token) + C::POSITION_OFFSET : max(ids[token], 0);
    out[(size_t)token * C::OUT_STRIDE + column] = half_to_float(table[row * C::WIDTH + column]) * C::SCALE;
}

// C: WIDTH, ACTIVATION, GATE_STRIDE, UP_STRIDE, OUT_STRIDE.
template <class C, int TOKENS>
__device__ __forceinline__ void gated_activation(const float* gate, const float* up, float* out, const int* state) {
    int token, column;
    if (!locate<C::WIDTH, TOKENS>(state, token, column)) return;
    out[(size_t)token * C::OUT_STRIDE + column] =
        activate<C::ACTIVATION>(gate[(size_t)token * C::GATE_STRIDE + column]) *
        up[(size_t)token * C::UP_STRIDE + column];
}

enum Function { ADD, MUL, SCALE, ACTIVATE };

// C: WIDTH, FUNCTION, ACTIVATION, SCALAR, A_STRIDE, B_STRIDE, OUT_STRIDE.
template <class C, int TOKENS>
__device__ __forceinline__ void elementwise(const float* a, const float* b, float* out, const int* state) {
    int token, column;
    if (!locate<C::WIDTH, TOKENS>(state, token, column)) return;
    float value = a[(size_t)token * C::A_STRIDE + column];
    if (C::FUNCTION == ADD) value += b[(size_t)token * C::B_STRIDE + column];
    if (C::FUNCTION == MUL) value *= b[(size_t)token * C::B_STRIDE + column];
    if (C::FUNCTION == SCALE) value *= C::SCALAR;
    if (C::FUNCTION == ACTIVATE) value = activate<C::ACTIVATION>(value);
    out[(size_t)token * C::OUT_STRIDE + column] = value;
}

// C: WIDTH, X_STRIDE. out[0] = x[n_tokens - 1].
template <class C>
__device__ __forceinline__ void last_row(const float* x, float* out, const int* state) {
    wait_for_inputs();
    let_dependents_start();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column < C::WIDTH) out[column] = x[(size_t)(count_tokens(state) - 1) * C::X_STRIDE + column];
}
