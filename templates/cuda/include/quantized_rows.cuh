// Activations as 16-bit integers with a scale for each token and tile of 64 columns, as records.cuh wants them:
// planes i8 [tiles, 2, 64] (high bytes, low bytes) and ranges float2 [tiles] {scale, bits of the integers' sum}.
// Normalisation, if there is one, comes first; every block that needs the activations makes them itself.
#pragma once
#include "records.cuh"

enum Norm { NO_NORM, RMS_NORM, LAYER_NORM };

template <int WIDTH>
__device__ __forceinline__ int segment_sum_int(int value) {
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(ALL_LANES, value, offset);
    return value;
}

// Makes one token's integers, a thread holding every THREADS-th piece of eight columns. C: K, NORM, EPS, WARPS.
//
// The factor of an RMS norm is the same for all columns, so it changes the scales and none of the integers: it is
// known only after the barrier that the integers need anyway, and multiplies the scales where they are used.
template <class C>
struct RowQuantizer {
    static constexpr int PIECE = 8, PIECES = C::K / PIECE, THREADS = C::WARPS * WARP;
    static constexpr int PER_THREAD = (PIECES + THREADS - 1) / THREADS;
    static constexpr int HELD = PER_THREAD <= 4 ? PER_THREAD : 1;  // pieces in registers
    static constexpr int LANES = TILE / PIECE;                     // that share a tile

    struct Piece {
        float v[PIECE];
    };

    // What a thread has of a token's row, where that fits its registers.
    struct Row {
        const float* x;
        bool aligned;
        Piece held[HELD];
    };

    const float *norm_weight, *norm_bias;
    Piece weight[HELD];
    float mean, squares;

    // Before the inputs are waited for.
    __device__ __forceinline__ void prefetch(const float* norm_weight_, const float* norm_bias_) {
        norm_weight = norm_weight_, norm_bias = norm_bias_;
        if (C::NORM != NO_NORM && HELD == PER_THREAD)
#pragma unroll
            for (int j = 0; j < HELD; ++j) weight[j] = read(norm_weight, index(j), true);
    }

    __device__ __forceinline__ Row load(const float* x) const {
        Row row = {x, is_aligned(x, 16), {}};
        if (HELD == PER_THREAD)
#pragma unroll
            for (int j = 0; j < HELD; ++j) row.held[j] = read(x, index(j), row.aligned);
        return row;
    }

    // Writes results with put(address, value). partials: a float per warp. A barrier must follow before results or
    // factor() are used.
    template <class Put>
    __device__ __forceinline__ void quantize(const Row& row, unsigned* planes, float2* ranges, float* partials, Put put) {
        if constexpr (HELD == PER_THREAD) {
            measure([&](auto add) {
#pragma unroll
                for (int j = 0; j < HELD; ++j)
                    if (PIECES % THREADS == 0 || index(j) < PIECES) add(row.held[j]);
            }, partials);
#pragma unroll
            for (int j = 0; j < HELD; ++j)
                if (PIECES % THREADS == 0 || index(j) / WARP * WARP < PIECES)
                    store(index(j), row.held[j], weight[j], planes, ranges, put);
        } else {
            measure([&](auto add) {
                for (int j = 0; j < PER_THREAD; ++j)
                    if (index(j) < PIECES) add(read(row.x, index(j), row.aligned));
            }, partials);
            for (int j = 0; j < PER_THREAD; ++j) {
                if (index(j) / WARP * WARP >= PIECES) break;
                Piece weights = {};
                if (C::NORM != NO_NORM) weights = read(norm_weight, index(j), true);
                store(index(j), read(row.x, index(j), row.aligned), weights, planes, ranges, put);
            }
        }
        if (C::NORM == RMS_NORM) {
            const float sum = segment_sum(squares);
            if (threadIdx.x % WARP == 0) put(partials + threadIdx.x / WARP, sum);
        }
    }

    // By which the scales are to be multiplied.
    __device__ __forceinline__ float factor(const float* partials) const {
        if (C::NORM != RMS_NORM) return 1.0f;
        const int lane = threadIdx.x % WARP;
        return rsqrtf(segment_sum(lane < C::WARPS ? partials[lane] : 0.0f) * (1.0f / C::K) + C::EPS);
    }

private:
    static __device__ __forceinline__ int index(int j) { return threadIdx.x + j * THREADS; }

    // Zeros behind the row.
    static __device__ __forceinline__ Piece read(const float* from, int i, bool aligned) {
        Piece piece = {};
        if (PIECES % THREADS > 0 && i >= PIECES) return piece;
        if (aligned) {
#pragma unroll
            for (int e = 0; e < PIECE; e += 4) {
                const float4 four = reinterpret_cast<const float4*>(from)[i * (PIECE / 4) + e / 4];
                piece.v[e] = four.x, piece.v[e + 1] = four.y, piece.v[e + 2] = four.z, piece.v[e + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int e = 0; e < PIECE; ++e) piece.v[e] = from[i * PIECE + e];
        }
        return piece;
    }

    // RMS norm: the thread's squares. Layer norm: the mean, and in place of squares the factor.
    template <class Each>
    __device__ __forceinline__ void measure(Each each, float* partials) {
        mean = 0.0f, squares = 0.0f;
        if (C::NORM == NO_NORM) return;
        if (C::NORM == LAYER_NORM) {
            float sum = 0.0f;
            each([&](const Piece& piece) {
#pragma unroll
                for (int e = 0; e < PIECE; ++e) sum += piece.v[e];
            });
            mean = block_sum(sum, partials) / C::K;
        }
        each([&](const Piece& piece) {
#pragma unroll
            for (int e = 0; e < PIECE; ++e) squares = fmaf(piece.v[e] - mean, piece.v[e] - mean, squares);
        });
        if (C::NORM == LAYER_NORM) squares = 1.0f / sqrtf(block_sum(squares, partials) / C::K + C::EPS);
    }

    // All lanes of the warp call it, those past the row too.
    template <class Put>
    __device__ __forceinline__ void store(int i, Piece piece, const Piece& weights, unsigned* planes, float2* ranges,
                                          Put put) const {
        float most = 0.0f;
#pragma unroll
        for (int e = 0; e < PIECE; ++e) {
            float& v = piece.v[e];
            if (C::NORM == RMS_NORM) v *= weights.v[e];
            if (C::NORM == LAYER_NORM)
                v = i < PIECES ? (v - mean) * squares * weights.v[e] + norm_bias[i * PIECE + e] : 0.0f;
            most = fmaxf(most, fabsf(v));
        }
        most = segment_max<LANES>(most);
        // Approximate by less than a step is wide; the scale below goes with the integers, not with the inverse.
        const float inverse = most > 0.0f ? __fdividef(Q_MAX, most) : 0.0f;
        // 1.5 * 2^23 has room for nothing behind the point: the sum's low 16 bits are the nearest integer q.
        constexpr float ROUND = 12582912.0f;
        constexpr unsigned ROUND_BITS = 0x4b400000u;
        unsigned q[PIECE], sum = 0, high[2], low[2];
#pragma unroll
        for (int e = 0; e < PIECE; ++e) {
            q[e] = __float_as_uint(fmaf(piece.v[e], inverse, ROUND));
            sum += q[e] - ROUND_BITS;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const unsigned* const four = q + 4 * i;
            high[i] = four_bytes<1>(four[0] + 128, four[1] + 128, four[2] + 128, four[3] + 128);
            low[i] = four_bytes<0>(four[0], four[1], four[2], four[3]);  // q - 256 * high, as bytes
        }
        const int q_sum = segment_sum_int<LANES>(static_cast<int>(sum));
        if (PIECES % THREADS == 0 || i < PIECES) {
            uint2* const to = reinterpret_cast<uint2*>(planes) + i / LANES * (2 * LANES) + i % LANES;
            put(to, uint2{high[0], high[1]});
            put(to + LANES, uint2{low[0], low[1]});
            if (i % LANES == 0) put(ranges + i / LANES, float2{most * (1.0f / Q_MAX), __uint_as_float(q_sum)});
        }
    }
};
