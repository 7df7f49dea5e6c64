// Causal attention of many tokens, flash style on CUDA cores in f32: a block takes QUERIES tokens of one
// head and walks the cache in tiles of KEYS rows that all its queries share through shared memory. Tokens
// share rows where they follow one another in one slot, so the block takes its tokens run by run.
//
// 256 threads stand as 16 x 16: thread (ty, tx) owns queries ty * PER_THREAD .., keys tx + 16 j of each
// tile and dims (tx + 16 j) * 4 .. + 3 of the output. The 16 threads of a ty are half a warp, so the
// softmax of their queries needs shuffles only.
#pragma once
#include "attention_runs.cuh"

// C: QUERIES, KEYS; floats from row to row: STRIDE of the tiles, WEIGHT_STRIDE of the weights.
template <class C>
struct AttentionTile {
    static constexpr int PER_THREAD = C::QUERIES / 16;
    static constexpr int DIMS = ceil_div(C::HEAD_DIM, 4) * 4;
    static constexpr int PIECES = ceil_div(DIMS / 4, 16);  // float4 pieces of the output per query and thread
};

// C: HEADS, KV_HEADS, HEAD_DIM, SCALE, WINDOW, Cache, KV_ROW, KV_SCALES, KV_HELD, Q_STRIDE, OUT_STRIDE and what AttentionTile needs.
// Shared memory, floats: queries [QUERIES, STRIDE], keys and values [KEYS, STRIDE], weights [QUERIES, WEIGHT_STRIDE].
// Queries first_query .. last_query are a run.
template <class C>
__device__ __forceinline__ void attend_run(const float* q, const typename C::Cache::Element* k_cache,
                                           const typename C::Cache::Element* v_cache, float* out, const int* state,
                                           int first_query, int last_query) {
    using T = AttentionTile<C>;
    GQSA_DYNAMIC_SHARED(float4, shared);
    float* const q_tile = reinterpret_cast<float*>(shared);
    float* const k_tile = q_tile + C::QUERIES * C::STRIDE;
    float* const v_tile = k_tile + C::KEYS * C::STRIDE;
    float* const p_tile = v_tile + C::KEYS * C::STRIDE;

    const int head = blockIdx.x, kv_head = head / (C::HEADS / C::KV_HEADS);
    const int position = position_of(state, first_query);
    const KvSlot<C> slot(state, first_query);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;

    for (int i = threadIdx.x; i < C::QUERIES * T::DIMS; i += blockDim.x) {
        const int row = i / T::DIMS, d = i % T::DIMS;
        q_tile[row * C::STRIDE + d] = first_query + row <= last_query && d < C::HEAD_DIM
            ? q[(size_t)(first_query + row) * C::Q_STRIDE + head * C::HEAD_DIM + d] * C::SCALE
            : 0.0f;
    }

    float4 values[T::PER_THREAD][T::PIECES] = {};
    float largest[T::PER_THREAD], sum[T::PER_THREAD] = {};
#pragma unroll
    for (int i = 0; i < T::PER_THREAD; ++i) largest[i] = LOWEST;

    // Rows that some query of this run sees; all others count as zero and are never read.
    const int rows_end = position + last_query - first_query + 1;
    const int rows_begin = C::WINDOW > 0 ? max(0, position + 1 - C::WINDOW) : 0;
    for (int start = rows_begin; start < rows_end; start += C::KEYS) {
        __syncthreads();
        for (int i = threadIdx.x; i < C::KEYS * T::DIMS; i += blockDim.x) {
            const int row = i / T::DIMS, d = i % T::DIMS;
            const bool valid = start + row < rows_end && d < C::HEAD_DIM;
            const auto value = [&](const typename C::Cache::Element* at) {
                return C::Cache::load(at + kv_head * C::HEAD_DIM + d) * kv_scale<C>(at, kv_head);
            };
            k_tile[row * C::STRIDE + d] = valid ? value(k_cache + slot.row(start + row)) : 0.0f;
            v_tile[row * C::STRIDE + d] = valid ? value(v_cache + slot.row(start + row)) : 0.0f;
        }
        __syncthreads();

        float score[T::PER_THREAD][C::KEYS / 16] = {};
#pragma unroll 4
        for (int d = 0; d < T::DIMS; d += 4) {
            float4 key[C::KEYS / 16];
#pragma unroll
            for (int j = 0; j < C::KEYS / 16; ++j)
                key[j] = *reinterpret_cast<const float4*>(k_tile + (tx + 16 * j) * C::STRIDE + d);
#pragma unroll
            for (int i = 0; i < T::PER_THREAD; ++i) {
                const float4 query =
                    *reinterpret_cast<const float4*>(q_tile + (ty * T::PER_THREAD + i) * C::STRIDE + d);
#pragma unroll
                for (int j = 0; j < C::KEYS / 16; ++j) {
                    score[i][j] = fmaf(query.x, key[j].x, score[i][j]);
                    score[i][j] = fmaf(query.y, key[j].y, score[i][j]);
                    score[i][j] = fmaf(query.z, key[j].z, score[i][j]);
                    score[i][j] = fmaf(query.w, key[j].w, score[i][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < T::PER_THREAD; ++i) {
            const int query = ty * T::PER_THREAD + i, row = position + query;
            bool seen[C::KEYS / 16];
            float new_largest = largest[i];
#pragma unroll
            for (int j = 0; j < C::KEYS / 16; ++j) {
                const int column = start + tx + 16 * j;
                seen[j] = column <= row && column < rows_end && (C::WINDOW == 0 || column > row - C::WINDOW);
                if (seen[j]) new_largest = fmaxf(new_largest, score[i][j]);
            }
            new_largest = segment_max<16>(new_largest);
            const float shrink = expf(largest[i] - new_largest);
            largest[i] = new_largest;
            float tile_sum = 0.0f;
#pragma unroll
            for (int j = 0; j < C::KEYS / 16; ++j) {
                const float weight = seen[j] ? expf(score[i][j] - new_largest) : 0.0f;
                tile_sum += weight;
                p_tile[query * C::WEIGHT_STRIDE + tx + 16 * j] = weight;
            }
            sum[i] = sum[i] * shrink + segment_sum<16>(tile_sum);
#pragma unroll
            for (int j = 0; j < T::PIECES; ++j) {
                values[i][j].x *= shrink, values[i][j].y *= shrink;
                values[i][j].z *= shrink, values[i][j].w *= shrink;
            }
        }
        __syncwarp();  // a query's weights are written and read by the same half warp
#pragma unroll 4
        for (int key = 0; key < C::KEYS; ++key) {
            float weight[T::PER_THREAD];
#pragma unroll
            for (int i = 0; i < T::PER_THREAD; ++i)
                weight[i] = p_tile[(ty * T::PER_THREAD + i) * C::WEIGHT_STRIDE + key];
#pragma unroll
            for (int j = 0; j < T::PIECES; ++j) {
                const int d = (tx + 16 * j) * 4;
                if (d >= T::DIMS) continue;
                const float4 value = *reinterpret_cast<const float4*>(v_tile + key * C::STRIDE + d);
#pragma unroll
                for (int i = 0; i < T::PER_THREAD; ++i) {
                    values[i][j].x = fmaf(weight[i], value.x, values[i][j].x);
                    values[i][j].y = fmaf(weight[i], value.y, values[i][j].y);
                    values[i][j].z = fmaf(weight[i], value.z, values[i][j].z);
                    values[i][j].w = fmaf(weight[i], value.w, values[i][j].w);
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < T::PER_THREAD; ++i) {
        const int query = first_query + ty * T::PER_THREAD + i;
        if (query > last_query) continue;
        float* row = out + (size_t)query * C::OUT_STRIDE + head * C::HEAD_DIM;
#pragma unroll
        for (int j = 0; j < T::PIECES; ++j) {
            const float v[4] = {values[i][j].x, values[i][j].y, values[i][j].z, values[i][j].w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int d = (tx + 16 * j) * 4 + e;
                if (d < C::HEAD_DIM) row[d] = v[e] / sum[i];
            }
        }
    }
}

template <class C>
__device__ __forceinline__ void attention_prefill(const float* q, const typename C::Cache::Element* k_cache,
                                                  const typename C::Cache::Element* v_cache, float* out,
                                                  const int* state) {
    by_runs<C::QUERIES>(state, [&](int first, int last) {
        attend_run<C>(q, k_cache, v_cache, out, state, first, last);
    });
}
