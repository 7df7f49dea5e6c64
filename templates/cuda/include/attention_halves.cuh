// Causal attention of many tokens on the tensor cores, flash style: a block takes QUERIES tokens of one head, 16 to
// a warp, and walks the cache in tiles of KEYS rows that come through two stages of shared memory. Queries, keys,
// weights and values are halves, sums and the softmax f32.
//
// A cache of int8 comes as it is; once a tile has arrived, the block turns it into halves, which hold its integers exactly.
// The scale of a row's key multiplies its scores, that of its value its weight.
//
// Scores stand in the layout of D of one mma, which is that of A of the next: weights never leave their lanes.
#pragma once
#include "attention_runs.cuh"

// C: HEADS, KV_HEADS, HEAD_DIM, SCALE, WINDOW, Cache, KV_ROW, KV_SCALES, KV_HELD, Q_STRIDE, OUT_STRIDE, WARPS, KEYS, ROW_BYTES (from
// row to row of a tile in shared memory: an odd number of 16 bytes, so that eight rows share no banks), STAGE_BYTES; for a
// cache with scales also places in shared memory, TILE_AT and SCALES_AT.
template <class C>
struct AttentionHalves {
    static constexpr int QUERIES = 16 * C::WARPS, THREADS = C::WARPS * WARP;
    static constexpr int STEPS = C::HEAD_DIM / 16, TILE_BYTES = C::KEYS * C::ROW_BYTES;
    static constexpr int COLUMNS = C::KEYS / 8, DIMS = C::HEAD_DIM / 8;  // fragments of D: of scores, of results
    static_assert(C::HEAD_DIM % 16 == 0 && C::KEYS % 16 == 0 && C::ROW_BYTES % 32 == 16, "whole fragments, odd strides");

    using Element = typename C::Cache::Element;
    // Of a row of int8, in a stage: its values, and the 16 bytes in which the head's scale is.
    static constexpr int PIECES = C::HEAD_DIM / 16, SCALES_OF_STAGE = 2 * C::KEYS * C::HEAD_DIM;

    // Queries first .. last, at most QUERIES, are a run.
    static __device__ __forceinline__ void run(const float* q, const Element* k_cache, const Element* v_cache, float* out,
                                               const int* state, int first, int last) {
        // [2 stages, keys and values, KEYS, ROW_BYTES]; where there are scales, [2 stages, STAGE_BYTES], then halves [keys
        // and values, KEYS, ROW_BYTES], then f32 [3, KEYS]: scales of keys, of values, and exponents of the latter.
        GQSA_DYNAMIC_SHARED(unsigned char, shared);
        const int lane = threadIdx.x % WARP, pair = lane / 4, quarter = lane % 4, head = blockIdx.x;
        const int own = threadIdx.x / WARP * 16;  // the warp's first query, from the run's
        const int position = position_of(state, first), count = last - first + 1;
        const KvSlot<C> slot(state, first);
        const int kv_head = head / (C::HEADS / C::KV_HEADS);
        // Rows that some query of this run sees; no others are read.
        const int end = position + count, begin = C::WINDOW > 0 ? max(0, position + 1 - C::WINDOW) : 0;

        const auto fetch = [&](int start) {
            if (start < end) {
                unsigned char* const stage = shared + (start - begin) / C::KEYS % 2 * C::STAGE_BYTES;
                if constexpr (C::Cache::SCALED) {
                    for (int i = threadIdx.x; i < C::KEYS * (PIECES + 1); i += THREADS) {
                        const int row = i / (PIECES + 1), piece = i % (PIECES + 1);
                        const bool is_scale = piece == PIECES;
                        const size_t from = slot.row(min(start + row, end - 1)) +
                                            (is_scale ? C::KV_SCALES + kv_head / 8 * 16 : kv_head * C::HEAD_DIM + piece * 16);
                        unsigned char* const to =
                            stage + (is_scale ? SCALES_OF_STAGE + row * 16 : row * C::HEAD_DIM + piece * 16);
                        copy_16(to, k_cache + from);
                        copy_16(to + C::KEYS * (is_scale ? 16 : C::HEAD_DIM), v_cache + from);
                    }
                } else {
                    for (int i = threadIdx.x; i < C::KEYS * DIMS; i += THREADS) {
                        const int row = i / DIMS, piece = i % DIMS;
                        const size_t from = slot.row(min(start + row, end - 1)) + kv_head * C::HEAD_DIM + piece * 8;
                        copy_16(stage + row * C::ROW_BYTES + piece * 16, k_cache + from);
                        copy_16(stage + TILE_BYTES + row * C::ROW_BYTES + piece * 16, v_cache + from);
                    }
                }
            }
            copy_commit();
        };
        fetch(begin);

        // The queries as A, times what makes exponentials powers of two. Those past the last repeat it.
        unsigned query[STEPS][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int token = first + min(own + pair + 8 * r, count - 1);
            const float* const row = q + static_cast<size_t>(token) * C::Q_STRIDE + head * C::HEAD_DIM + 2 * quarter;
            constexpr float FACTOR = C::SCALE * 1.4426950408889634f;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float* const two = row + step * 16 + 8 * h;
                    query[step][2 * h + r] = to_halves(two[0] * FACTOR, two[1] * FACTOR);
                }
        }
        float values[DIMS][4] = {}, largest[2] = {LOWEST, LOWEST}, sum[2] = {};

        for (int start = begin; start < end; start += C::KEYS) {
            fetch(start + C::KEYS);
            copy_wait<1>();
            __syncthreads();
            const unsigned char* keys = shared + (start - begin) / C::KEYS % 2 * C::STAGE_BYTES;
            const float* const scales = reinterpret_cast<const float*>(shared + C::SCALES_AT);
            if constexpr (C::Cache::SCALED) {
                unpack(keys, shared + C::TILE_AT, kv_head);
                __syncthreads();
                keys = shared + C::TILE_AT;
            }
            if (own < count && start <= position + min(own + 15, count - 1)) {
                float score[COLUMNS][4] = {};
                multiply_keys(query, keys, lane, score);
                if constexpr (C::Cache::SCALED) scale_columns(score, scales, lane);
                if (start + C::KEYS - 1 > position + own || C::WINDOW > 0) mask(score, start, position + own, lane);
                soften(score, largest, sum, values, scales + 2 * C::KEYS, lane);
                if constexpr (C::Cache::SCALED) scale_columns(score, scales + C::KEYS, lane);
                add_values(score, keys + TILE_BYTES, lane, values);
            }
            __syncthreads();
        }

#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int index = own + pair + 8 * r;
            const float factor = 1.0f / segment_sum<4>(sum[r]);
            if (index >= count) continue;
            float* const row = out + static_cast<size_t>(first + index) * C::OUT_STRIDE + head * C::HEAD_DIM;
#pragma unroll
            for (int d = 0; d < DIMS; ++d)
#pragma unroll
                for (int e = 0; e < 2; ++e) row[d * 8 + 2 * quarter + e] = values[d][2 * r + e] * factor;
        }
    }

private:
    // A stage of int8 becomes halves and scales.
    static __device__ __forceinline__ void unpack(const unsigned char* stage, unsigned char* tile, int kv_head) {
        for (int i = threadIdx.x; i < 2 * C::KEYS * DIMS; i += THREADS) {
            const uint2 bytes = *reinterpret_cast<const uint2*>(stage + i * 8);
            const unsigned low = bytes.x ^ 0x80808080, high = bytes.y ^ 0x80808080;
            *reinterpret_cast<uint4*>(tile + i / DIMS * C::ROW_BYTES + i % DIMS * 16) =
                uint4{bytes_to_halves<0x4140>(low), bytes_to_halves<0x4342>(low), bytes_to_halves<0x4140>(high),
                      bytes_to_halves<0x4342>(high)};
        }
        float* const scales = reinterpret_cast<float*>(tile + 2 * TILE_BYTES);
        for (int i = threadIdx.x; i < 2 * C::KEYS; i += THREADS) {
            const float scale = half_to_float(
                *reinterpret_cast<const unsigned short*>(stage + SCALES_OF_STAGE + i * 16 + kv_head % 8 * 2));
            scales[i] = scale;
            if (i >= C::KEYS) scales[i + C::KEYS] = exponent_of(scale);
        }
    }

    static __device__ __forceinline__ void scale_columns(float (&score)[COLUMNS][4], const float* scales, int lane) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) {
            const float2 two = *reinterpret_cast<const float2*>(scales + c * 8 + lane % 4 * 2);
            score[c][0] *= two.x, score[c][1] *= two.y, score[c][2] *= two.x, score[c][3] *= two.y;
        }
    }

    // score = query keys^T. keys [KEYS, HEAD_DIM].
    static __device__ __forceinline__ void multiply_keys(const unsigned (&query)[STEPS][4], const unsigned char* keys,
                                                         int lane, float (&score)[COLUMNS][4]) {
        const unsigned char* const row = keys + (lane / 16 * 8 + lane % 8) * C::ROW_BYTES + lane / 8 % 2 * 16;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
            for (int two = 0; two < COLUMNS / 2; ++two) {
                unsigned b[4];
                load_matrices(b, row + two * 16 * C::ROW_BYTES + step * 32);
                mma_halves(score[2 * two], query[step], b[0], b[1]);
                mma_halves(score[2 * two + 1], query[step], b[2], b[3]);
            }
    }

    // What a query must not see becomes LOWEST. first_row: position of the warp's first query.
    static __device__ __forceinline__ void mask(float (&score)[COLUMNS][4], int start, int first_row, int lane) {
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = first_row + lane / 4 + i / 2 * 8, column = start + c * 8 + lane % 4 * 2 + i % 2;
                if (column > row || (C::WINDOW > 0 && column <= row - C::WINDOW)) score[c][i] = LOWEST;
            }
    }

    // Scores become weights, relative to the largest score so far; what has been summed follows it. Where values have
    // scales, the largest is of scores plus exponents.
    static __device__ __forceinline__ void soften(float (&score)[COLUMNS][4], float (&largest)[2], float (&sum)[2],
                                                  float (&values)[DIMS][4], const float* exponents, int lane) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = largest[r];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c) {
                float low = score[c][2 * r], high = score[c][2 * r + 1];
                if constexpr (C::Cache::SCALED) {
                    const float2 two = *reinterpret_cast<const float2*>(exponents + c * 8 + lane % 4 * 2);
                    low += two.x, high += two.y;
                }
                top = fmaxf(top, fmaxf(low, high));
            }
            top = segment_max<4>(top);
            const float shrink = exp2f(largest[r] - top);
            largest[r] = top, sum[r] *= shrink;
#pragma unroll
            for (int d = 0; d < DIMS; ++d) values[d][2 * r] *= shrink, values[d][2 * r + 1] *= shrink;
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& one = score[c][2 * r + e];
                    one = one == LOWEST ? 0.0f : exp2f(one - top);
                    sum[r] += one;
                }
        }
    }

    // values += weights rows. rows [KEYS, HEAD_DIM].
    static __device__ __forceinline__ void add_values(const float (&weight)[COLUMNS][4], const unsigned char* rows,
                                                      int lane, float (&values)[DIMS][4]) {
        const unsigned char* const row = rows + lane % 16 * C::ROW_BYTES + lane / 16 * 16;
#pragma unroll
        for (int step = 0; step < C::KEYS / 16; ++step) {
            const float(&low)[4] = weight[2 * step], (&high)[4] = weight[2 * step + 1];
            const unsigned a[4] = {to_halves(low[0], low[1]), to_halves(low[2], low[3]), to_halves(high[0], high[1]),
                                   to_halves(high[2], high[3])};
#pragma unroll
            for (int two = 0; two < DIMS / 2; ++two) {
                unsigned b[4];
                load_matrices_transposed(b, row + step * 16 * C::ROW_BYTES + two * 32);
                mma_halves(values[2 * two], a, b[0], b[1]);
                mma_halves(values[2 * two + 1], a, b[2], b[3]);
            }
        }
    }
};
