// Attention of one token, or of each of a few, in one launch: rotates q and k, appends k and v to the cache, and splits
// the context among blocks, so that one sequence fills the GPU at any length.
//
// A block takes QUERIES heads that share a KV head, for a token or for the few that follow one another in a sequence, and
// a run of the context. Its warps take tiles of 16 rows in turn through rings of their own in shared memory. Scores and
// weighted values are products of halves on the tensor cores, but nothing is rounded to a half that the cache does not
// hold as one: a query, and later a weight, is the sum of two halves, which are rows h and 8 + h of an mma's A. Scores
// stand in the layout of D of one mma, which is that of A of the next, so weights never leave their lanes. Each warp runs
// its own softmax over the rows it meets (online: running maximum, sum and weighted values); warps and at last runs are
// merged in a fixed order, the runs by whichever block is done last.
//
// Where a row is, that alone decides which run, warp and tile it belongs to, and how many runs there are, the token's
// position. So a token's sums have one order, whichever tokens share its block: rows that it does not see add zeros.
//
// A cache of int8 goes through the rings as it is, and becomes halves, which hold its integers exactly, in the registers.
// There a lane finds four bytes that lie side by side: so the columns of queries are in another order (`column`), and so
// are those of the results. The scale of a row's key multiplies its scores, that of its value its weights.
//
// Rows of earlier steps are in the cache, so the first are on their way before the inputs are waited for. Rows of this
// launch, the token's own and those of the tokens before it in its sequence, never come from the cache: who needs them
// makes them itself, and the same bits as a step for each of them would.
#pragma once
#include "kv_cache.cuh"

// C: TOKENS (most of a launch), AT_ONCE (tokens that a block takes together), HEADS, KV_HEADS, HEAD_DIM (a multiple of
// 16), ROTARY_DIM, SCALE, WINDOW, Cache, KV_ROW, KV_SCALES, KV_HELD, QUERIES (times AT_ONCE at most 8), SPLITS (most runs), KEYS (fewest rows worth a run),
// Q_STRIDE, K_STRIDE, V_STRIDE, OUT_STRIDE, BLOCKS (of the grid), WARPS, STAGES (of a ring), ROW_BYTES and TILE_ROW_BYTES (from row to row of the queries and of a
// tile in shared memory: an odd number of 16 bytes, so that eight rows share no banks), places in shared memory (OWN_AT, RING_AT).
// partials: values [TOKENS, HEADS / QUERIES, SPLITS, QUERIES, HEAD_DIM], then {largest score, sum} [TOKENS, HEADS /
// QUERIES, SPLITS, QUERIES]. counters: [TOKENS, HEADS / QUERIES], 0 before and after; a block counts for its first token.
template <class C>
struct AppendAttention {
    using Element = typename C::Cache::Element;
    static constexpr bool SCALED = C::Cache::SCALED;
    static constexpr int HALF = C::ROTARY_DIM / 2, ROWS = 16, STEPS = C::HEAD_DIM / 16, DIMS = C::HEAD_DIM / 8;
    static constexpr int TILE_BYTES = ROWS * C::TILE_ROW_BYTES, STAGE_BYTES = 2 * TILE_BYTES;  // keys, then values
    // Pieces of 16 bytes of a row in shared memory: its elements, and where there are scales those of eight heads.
    static constexpr int ELEMENTS_OF_PIECE = 16 / sizeof(Element), PIECES = C::HEAD_DIM / ELEMENTS_OF_PIECE + SCALED;
    static constexpr int RING_BYTES = C::STAGES * STAGE_BYTES;
    static constexpr int THREADS = C::WARPS * WARP, GROUPS = C::HEADS / C::QUERIES;
    static constexpr int USED = C::AT_ONCE * C::QUERIES;  // queries of a block: rows of A
    static constexpr int TURN = C::WARPS * ROWS;          // rows that a block takes at once
    static_assert(C::HEAD_DIM % 16 == 0 && USED <= 8 && C::ROW_BYTES % 32 == 16 && C::TILE_ROW_BYTES % 32 == 16,
                  "whole fragments, odd strides");

    // What runs hand over.
    struct Partials {
        float4* values;
        float2* ends;  // {largest score, sum}

        __device__ __forceinline__ Partials(float* partials, int place)
            : values(reinterpret_cast<float4*>(partials) + place * (C::SPLITS * C::QUERIES * C::HEAD_DIM / 4)),
              ends(reinterpret_cast<float2*>(partials + C::TOKENS * C::HEADS * C::SPLITS * C::HEAD_DIM) +
                   place * (C::SPLITS * C::QUERIES)) {}
    };

    // Tokens first .. first + n - 1 of a launch, n at most AT_ONCE: of one slot, at positions that follow one another, and
    // with as many runs. run, place: what a block does for them; n is 0 where it has nothing to do.
    struct Work {
        int first, n, position, n_runs, place, run;

        __device__ __forceinline__ Work(const int* state, int n_tokens, int item) {
            for (first = 0; first < n_tokens; first += n) {
                position = position_of(state, first), n_runs = runs_at(position), n = 1;
                while (n < C::AT_ONCE && first + n < n_tokens && follows(state, first + n) &&
                       runs_at(position + n) == n_runs)
                    ++n;
                place = item % GROUPS, run = item / GROUPS;
                if (run < n_runs) return;
                item -= GROUPS * n_runs;
            }
            n = 0;
        }
    };

    // The first row that a token sees.
    static __device__ __forceinline__ int first_seen(int position) {
        return C::WINDOW > 0 ? max(0, position + 1 - C::WINDOW) : 0;
    }

    static __device__ __forceinline__ int runs_at(int position) {
        return min(C::SPLITS, ceil_div(position + 1 - first_seen(position), C::KEYS));
    }

    // Whether a token stands behind the one before it in a sequence.
    static __device__ __forceinline__ bool follows(const int* state, int token) {
        return slot_of(state, token) == slot_of(state, token - 1) &&
               position_of(state, token) == position_of(state, token - 1) + 1;
    }

    static __device__ __forceinline__ void run(const float* q, const float* k, const float* v, const float* rope,
                                               Element* k_cache, Element* v_cache, float* partials, int* counters,
                                               float* out, const int* state) {
        let_dependents_start();
        // The host wrote the state before any kernel of this launch plan began: it needs no wait.
        const int n_tokens = C::TOKENS == 1 ? 1 : count_tokens(state);
        for (int item = blockIdx.x;; item += C::BLOCKS) {
            const Work work(state, n_tokens, item);
            if (work.n == 0) break;
            if (item >= C::BLOCKS) __syncthreads();  // shared memory is free
            attend(work, q, k, v, rope, k_cache, v_cache, partials, counters, out, state);
            if (C::TOKENS == 1) return;
        }
        // It keeps its place until then: blocks of the next kernel would crowd into room that is free too early.
        wait_for_inputs();
    }

private:
    static __device__ __forceinline__ void attend(const Work& work, const float* q, const float* k, const float* v,
                                                  const float* rope, Element* k_cache, Element* v_cache,
                                                  float* partials, int* counters, float* out, const int* state) {
        GQSA_DYNAMIC_SHARED(unsigned char, shared);
        __shared__ int is_last;
        const int n_runs = work.n_runs, run = work.run;
        const int first = first_seen(work.position), end = work.position + work.n;  // rows that one of the tokens sees
        int n_before = 0;  // tokens of the sequence that stand before them in this launch
        while (n_before < work.first && follows(state, work.first - n_before)) ++n_before;
        const int first_own = work.position - n_before;
        // Turns of the block: every n_runs-th, from the first that is its own.
        const int first_turn = first / TURN, begin = (first_turn + (run + n_runs - first_turn % n_runs) % n_runs) * TURN;
        const bool has_own = first_own / TURN % n_runs == run || (end - 1) / TURN % n_runs == run;
        const int head = work.place * C::QUERIES, kv_head = head / (C::HEADS / C::KV_HEADS);
        const KvSlot<C> slot(state, work.first);
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pair = lane / 4, quarter = lane % 4;
        k_cache += kv_head * C::HEAD_DIM;
        v_cache += kv_head * C::HEAD_DIM;

        // Rows that nobody sees, or that the cache lacks, are zeros: a weight of 0 times what lies there might be no number.
        unsigned char* const ring = shared + C::RING_AT + warp * RING_BYTES;
        const auto fetch = [&](int stage, int start) {
            if (start < end)
                for (int i = lane; i < ROWS * PIECES; i += WARP) {
                    const int row = i / PIECES, piece = i % PIECES;
                    const bool cached = start + row < first_own && (C::WINDOW == 0 || start + row >= first);
                    const size_t from = slot.row(start + row) +
                                        (SCALED && piece == PIECES - 1 ? scales_of(kv_head) - kv_head % 8 * 2
                                                                       : piece * ELEMENTS_OF_PIECE);
                    unsigned char* const to = ring + stage * STAGE_BYTES + row * C::TILE_ROW_BYTES + piece * 16;
                    copy_16_or_zeros(to, k_cache + from, cached);
                    copy_16_or_zeros(to + TILE_BYTES, v_cache + from, cached);
                }
            copy_commit();
        };
        const int next_turn = TURN * n_runs;
        int start = begin + warp * ROWS, stage = 0;
#pragma unroll
        for (int s = 0; s < C::STAGES; ++s) fetch(s, start + s * next_turn);
        // What comes next is at least on its way to the L2.
        constexpr int LINE = 128 / sizeof(Element), LINES = ceil_div(C::HEAD_DIM, LINE);
        for (int i = threadIdx.x; i < 2 * C::STAGES * TURN * LINES; i += THREADS) {
            const int row = begin + (C::STAGES + i / (TURN * LINES)) * next_turn + i / LINES % TURN;
            if (row >= first_own) break;
            const size_t at = slot.row(row) + i % LINES * LINE;
            prefetch_l2(k_cache + at);
            prefetch_l2(v_cache + at);
        }
        // A thread's elements of the queries, [AT_ONCE, QUERIES, HEAD_DIM]; past the last token they are the last one's.
        // Angles are no kernel's output.
        constexpr int ELEMENTS = ceil_div(USED * C::HEAD_DIM, THREADS);
        const auto token_of = [&](int j) {
            return C::AT_ONCE == 1 ? 0 : min(element(j) / (C::QUERIES * C::HEAD_DIM), work.n - 1);
        };
        Rotation rotations[ELEMENTS];
#pragma unroll
        for (int j = 0; j < ELEMENTS; ++j)
            rotations[j] = Rotation(rope, work.position + token_of(j), element(j) % C::HEAD_DIM);
        const int n_own = has_own ? end - first_own : 0;
        OwnRows own = {k + kv_head * C::HEAD_DIM, v + kv_head * C::HEAD_DIM, rope, work.first - n_before, n_own, first_own};
        own.prefetch(0);
        // Rows of A without a query.
        for (int i = threadIdx.x; i < (8 - USED) * 2 * DIMS; i += THREADS) {
            const int row = i / DIMS, unused = USED + row / 2 + row % 2 * 8;
            *reinterpret_cast<uint4*>(shared + unused * C::ROW_BYTES + i % DIMS * 16) = uint4{0, 0, 0, 0};
        }
        wait_for_inputs();

        q += static_cast<size_t>(work.first) * C::Q_STRIDE + head * C::HEAD_DIM;
        float elements[ELEMENTS], partners[ELEMENTS];  // all are asked for before the first is needed
#pragma unroll
        for (int j = 0; j < ELEMENTS; ++j) {
            const int d = element(j) % C::HEAD_DIM;
            const bool there = element(j) < USED * C::HEAD_DIM;
            const float* const vector = q + token_of(j) * C::Q_STRIDE + element(j) % (C::QUERIES * C::HEAD_DIM) - d;
            elements[j] = there ? vector[d] : 0.0f;
            partners[j] = there ? vector[Rotation::partner(d)] : 0.0f;
        }
        own.load(0);
#pragma unroll
        for (int j = 0; j < ELEMENTS; ++j) {
            const int which = element(j) / C::HEAD_DIM, d = element(j) % C::HEAD_DIM;
            if (which >= USED) break;
            // Times what makes exponentials powers of two.
            constexpr float FACTOR = C::SCALE * 1.4426950408889634f;
            const float turned = rounded_product(rotations[j].of(elements[j], partners[j]), FACTOR);
            const unsigned short high = float_to_half(turned);
            unsigned short* const to = reinterpret_cast<unsigned short*>(shared + which * C::ROW_BYTES) + column(d);
            to[0] = high;
            to[8 * C::ROW_BYTES / 2] = float_to_half(turned - half_to_float(high));
        }
        // Heads of one KV head in several blocks all append the same. Rows of tokens before are appended for those.
        const auto appended = [&](int row) {
            return row >= work.position && row / TURN % n_runs == run ? slot.row(row) : NOWHERE;
        };
        unsigned char* const own_rows = shared + C::OWN_AT;
        own.store(0, own_rows, k_cache, v_cache, kv_head, appended);
        for (int i = OwnRows::BATCH; i < n_own; i += OwnRows::BATCH) {
            own.prefetch(i);
            own.load(i);
            own.store(i, own_rows, k_cache, v_cache, kv_head, appended);
        }
        __syncthreads();

        const int matrix_row = lane % 8, matrix = lane / 8;
        const unsigned char* const queries = shared + (matrix % 2 * 8 + matrix_row) * C::ROW_BYTES + matrix / 2 * 16;
        float values[DIMS][4] = {}, largest = LOWEST, sum = 0.0f;  // rows pair and 8 + pair of D are one query's
        const int own_position = work.position + (C::AT_ONCE == 1 ? 0 : min(pair / C::QUERIES, work.n - 1));
        for (; start < end; start += next_turn) {
            copy_wait<C::STAGES - 1>();
            __syncwarp();
            unsigned char* const tile = ring + stage * STAGE_BYTES;
            if (start + ROWS > first_own) {
                const int from = max(start, first_own), n_rows = min(start + ROWS, end) - from;
                for (int i = lane; i < n_rows * 2 * PIECES; i += WARP) {
                    const int row = from + i / (2 * PIECES), part = i / PIECES % 2, piece = i % PIECES;
                    *reinterpret_cast<uint4*>(tile + part * TILE_BYTES + (row - start) * C::TILE_ROW_BYTES + piece * 16) =
                        *reinterpret_cast<const uint4*>(own_rows + (((row - first_own) * 2 + part) * PIECES + piece) * 16);
                }
                __syncwarp();
            }
            float score[2][4] = {};
            // Matrices are 8 keys by 16 bytes; of elements that are bytes they last for two steps.
            const unsigned char* const keys =
                SCALED ? tile + (matrix % 2 * 8 + matrix_row) * C::TILE_ROW_BYTES + matrix / 2 * 16
                       : tile + (matrix / 2 * 8 + matrix_row) * C::TILE_ROW_BYTES + matrix % 2 * 16;
            unsigned bytes[4];
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                unsigned a[4], b[4];
                load_matrices(a, queries + step * 32);
                if constexpr (SCALED) {
                    if (step % 2 == 0) load_matrices(bytes, keys + step * 16);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned word = bytes[step % 2 * 2 + i] ^ 0x80808080;
                        b[2 * i] = bytes_to_halves<0x4140>(word), b[2 * i + 1] = bytes_to_halves<0x4342>(word);
                    }
                } else {
                    load_matrices(b, keys + step * 32);
                }
                mma_halves(score[0], a, b[0], b[1]);
                mma_halves(score[1], a, b[2], b[3]);
            }
            float weight[2][2], value_scale[2][2], top = largest;
#pragma unroll
            for (int c = 0; c < 2; ++c)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = start + c * 8 + 2 * quarter + e;
                    const bool counts = row <= own_position && (C::WINDOW == 0 || row >= first_seen(own_position));
                    weight[c][e] = counts ? score[c][e] + score[c][2 + e] : LOWEST;
                    if constexpr (SCALED) {
                        const unsigned char* const at =
                            tile + (c * 8 + 2 * quarter + e) * C::TILE_ROW_BYTES + C::HEAD_DIM + kv_head % 8 * 2;
                        const float key_scale = half_to_float(*reinterpret_cast<const unsigned short*>(at));
                        if (counts) weight[c][e] = rounded_product(weight[c][e], key_scale);
                        value_scale[c][e] = half_to_float(*reinterpret_cast<const unsigned short*>(at + TILE_BYTES));
                        top = fmaxf(top, weight[c][e] + exponent_of(value_scale[c][e]));
                    } else {
                        top = fmaxf(top, weight[c][e]);
                    }
                }
            top = segment_max<4>(top);
            if (top > largest) {  // seldom, after the first tiles
                const float shrink = exp2f(largest - top);
                largest = top, sum = rounded_product(sum, shrink);
#pragma unroll
                for (int d = 0; d < DIMS; ++d)
#pragma unroll
                    for (int i = 0; i < 4; ++i) values[d][i] *= shrink;
            }
            unsigned a[4];
#pragma unroll
            for (int c = 0; c < 2; ++c) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& one = weight[c][e];
                    one = one == LOWEST ? 0.0f : exp2f(one - top);
                    sum += one;
                    if constexpr (SCALED) one = rounded_product(one, value_scale[c][e]);
                }
                a[2 * c] = to_halves(weight[c][0], weight[c][1]);
                a[2 * c + 1] = to_halves(weight[c][0] - half_to_float(a[2 * c] & 0xffff),
                                         weight[c][1] - half_to_float(a[2 * c] >> 16));
            }
            const unsigned char* const rows =
                tile + TILE_BYTES + (matrix % 2 * 8 + matrix_row) * C::TILE_ROW_BYTES + matrix / 2 * 16;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                unsigned b[4];
                if constexpr (SCALED) {  // even dims, then odd ones
                    if (step % 2 == 0) load_matrices_transposed(bytes, rows + step * 16);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const unsigned word = bytes[step % 2 * 2 + i] ^ 0x80808080;
                        b[i] = bytes_to_halves<0x4240>(word), b[2 + i] = bytes_to_halves<0x4341>(word);
                    }
                } else {
                    load_matrices_transposed(b, rows + step * 32);
                }
                mma_halves(values[2 * step], a, b[0], b[1]);
                mma_halves(values[2 * step + 1], a, b[2], b[3]);
            }
            __syncwarp();
            fetch(stage, start + C::STAGES * next_turn);
            stage = stage + 1 == C::STAGES ? 0 : stage + 1;
        }

        // A warp hands over in the place of its ring: {values [HEAD_DIM], largest score, sum} of each query.
        __syncwarp();
        constexpr int PARTIAL = C::HEAD_DIM + 2, BETWEEN_WARPS = RING_BYTES / 4;
        static_assert(USED * PARTIAL <= BETWEEN_WARPS, "the ring holds what its warp hands over");
        sum = segment_sum<4>(sum);
        if (pair < USED) {
            float* const to = reinterpret_cast<float*>(ring) + pair * PARTIAL;
#pragma unroll
            for (int d = 0; d < DIMS; ++d) {
                const float low = values[d][0] + values[d][2], high = values[d][1] + values[d][3];
                if constexpr (SCALED) {
                    float* const at = to + d / 2 * 16 + 4 * quarter + d % 2;
                    at[0] = low, at[2] = high;
                } else {
                    *reinterpret_cast<float2*>(to + d * 8 + 2 * quarter) = {low, high};
                }
            }
            if (quarter == 0) to[C::HEAD_DIM] = largest, to[C::HEAD_DIM + 1] = sum;
        }
        __syncthreads();
        const int n_elements = (C::AT_ONCE == 1 ? 1 : work.n) * C::QUERIES * C::HEAD_DIM;
        for (int i = threadIdx.x; i < n_elements; i += THREADS) {
            const float* const from = reinterpret_cast<const float*>(shared + C::RING_AT) + i / C::HEAD_DIM * PARTIAL;
            float most = LOWEST, total = 0.0f, value = 0.0f;
#pragma unroll
            for (int w = 0; w < C::WARPS; ++w) most = fmaxf(most, from[w * BETWEEN_WARPS + C::HEAD_DIM]);
#pragma unroll
            for (int w = 0; w < C::WARPS; ++w) {
                const float* const one = from + w * BETWEEN_WARPS;
                const float factor = exp2f(one[C::HEAD_DIM] - most);
                total = fmaf(one[C::HEAD_DIM + 1], factor, total);
                value = fmaf(one[i % C::HEAD_DIM], factor, value);
            }
            const int token = work.first + i / (C::QUERIES * C::HEAD_DIM), at = i % (C::QUERIES * C::HEAD_DIM);
            if (n_runs == 1) {
                out[static_cast<size_t>(token) * C::OUT_STRIDE + head * C::HEAD_DIM + at] = __fdividef(value, total);
            } else {
                const Partials parts(partials, token * GROUPS + work.place);
                reinterpret_cast<float*>(parts.values)[run * C::QUERIES * C::HEAD_DIM + at] = value;
                if (i % C::HEAD_DIM == 0) parts.ends[run * C::QUERIES + at / C::HEAD_DIM] = {most, total};
            }
        }
        if (n_runs == 1) return;
        __threadfence();
        __syncthreads();
        int* const counter = counters + work.first * GROUPS + work.place;
        if (threadIdx.x == 0) is_last = atomicAdd(counter, 1) == n_runs - 1;
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        for (int token = work.first; token < work.first + (C::AT_ONCE == 1 ? 1 : work.n); ++token)
            merge_runs(Partials(partials, token * GROUPS + work.place), n_runs,
                       out + static_cast<size_t>(token) * C::OUT_STRIDE + head * C::HEAD_DIM);
        if (threadIdx.x == 0) *counter = 0;
    }

    static constexpr size_t NOWHERE = ~static_cast<size_t>(0);

    static __device__ __forceinline__ int element(int j) { return threadIdx.x + j * THREADS; }

    // Where element d of a query stands.
    static __device__ __forceinline__ int column(int d) {
        return SCALED ? (d & ~15) + (d & 2) * 4 + (d >> 1 & 6) + (d & 1) : d;
    }

    // Where a head's scale is, from the head's elements on.
    static __device__ __forceinline__ int scales_of(int kv_head) { return C::KV_SCALES + kv_head * (2 - C::HEAD_DIM); }

    // How element d of a head vector turns, in pairs (i, i + HALF).
    struct Rotation {
        float cosine, sine;

        __device__ __forceinline__ Rotation() {}
        __device__ __forceinline__ Rotation(const float* rope, int position, int d) : cosine(1.0f), sine(0.0f) {
            const float* const angles = rope + static_cast<size_t>(position) * C::ROTARY_DIM;
            if (d < C::ROTARY_DIM) cosine = angles[d % max(HALF, 1)], sine = angles[HALF + d % max(HALF, 1)];
            if (d < HALF) sine = -sine;
        }
        static __device__ __forceinline__ int partner(int d) {
            return d >= C::ROTARY_DIM ? d : d < HALF ? d + HALF : d - HALF;
        }
        __device__ __forceinline__ float of(float element, float partner) const {
            return fmaf(partner, sine, rounded_product(element, cosine));
        }
    };

    // The rows of this launch that a token sees: keys, rotated, and values, a BATCH of rows at a time.
    struct OwnRows {
        // As many as a thread has registers for: four elements.
        static constexpr int ROOM = 4 * THREADS >= C::HEAD_DIM ? 4 * THREADS / C::HEAD_DIM : 1;
        static constexpr int BATCH = C::TOKENS < ROOM ? C::TOKENS : ROOM, EACH = ceil_div(BATCH * C::HEAD_DIM, THREADS);
        const float *k, *v, *rope;  // of the KV head
        int token, n_rows, position;  // of the first row
        Rotation rotations[EACH];
        float keys[EACH], partners[EACH], values[EACH];

        static __device__ __forceinline__ int row(int j, int begin) { return begin + element(j) / C::HEAD_DIM; }
        static __device__ __forceinline__ int dim(int j) { return element(j) % C::HEAD_DIM; }
        __device__ __forceinline__ bool has(int j, int begin) const {
            return element(j) < BATCH * C::HEAD_DIM && row(j, begin) < n_rows;
        }

        __device__ __forceinline__ void prefetch(int begin) {
#pragma unroll
            for (int j = 0; j < EACH; ++j)
                if (has(j, begin)) rotations[j] = Rotation(rope, position + row(j, begin), dim(j));
        }

        __device__ __forceinline__ void load(int begin) {
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                if (!has(j, begin)) continue;
                const float* const key = k + static_cast<size_t>(token + row(j, begin)) * C::K_STRIDE;
                keys[j] = key[dim(j)], partners[j] = key[Rotation::partner(dim(j))];
                values[j] = v[static_cast<size_t>(token + row(j, begin)) * C::V_STRIDE + dim(j)];
            }
        }

        // to: [rows, key and value, PIECES of 16 bytes]. They go to the caches, too, at appended(position), if it is not
        // NOWHERE.
        template <class Appended>
        __device__ __forceinline__ void store(int begin, unsigned char* to, Element* k_cache, Element* v_cache,
                                              int kv_head, Appended appended) const {
            if constexpr (SCALED) {
                if (n_rows > 0) store_scaled(begin, to, k_cache, v_cache, kv_head, appended);
            } else {
#pragma unroll
                for (int j = 0; j < EACH; ++j) {
                    if (!has(j, begin)) continue;
                    const unsigned short key = float_to_half(rotations[j].of(keys[j], partners[j]));
                    const unsigned short value = float_to_half(values[j]);
                    unsigned short* const place =
                        reinterpret_cast<unsigned short*>(to) + row(j, begin) * (2 * C::HEAD_DIM) + dim(j);
                    place[0] = key, place[C::HEAD_DIM] = value;
                    const size_t at = appended(position + row(j, begin));
                    if (at != NOWHERE) k_cache[at + dim(j)] = key, v_cache[at + dim(j)] = value;
                }
            }
        }

        // The largest of 16 elements is found by as many lanes, that of a head by each of its threads.
        template <class Appended>
        __device__ __forceinline__ void store_scaled(int begin, unsigned char* to, Element* k_cache, Element* v_cache,
                                                     int kv_head, Appended appended) const {
            __shared__ int largest[EACH * THREADS / 16][2];
            if (begin > 0) __syncthreads();
            float turned[EACH];
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                turned[j] = has(j, begin) ? rotations[j].of(keys[j], partners[j]) : 0.0f;
                int most[2] = {magnitude(turned[j]), has(j, begin) ? magnitude(values[j]) : 0};
#pragma unroll
                for (int offset = 8; offset > 0; offset /= 2)
#pragma unroll
                    for (int part = 0; part < 2; ++part)
                        most[part] = max(most[part], __shfl_xor_sync(ALL_LANES, most[part], offset));
                if (threadIdx.x % 16 == 0) largest[element(j) / 16][0] = most[0], largest[element(j) / 16][1] = most[1];
            }
            __syncthreads();
#pragma unroll
            for (int j = 0; j < EACH; ++j) {
                if (!has(j, begin)) continue;
                int most[2] = {};
#pragma unroll
                for (int i = 0; i < STEPS; ++i)
#pragma unroll
                    for (int part = 0; part < 2; ++part)
                        most[part] = max(most[part], largest[element(j) / C::HEAD_DIM * STEPS + i][part]);
                const size_t at = appended(position + row(j, begin));
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    const HeadScale scale(most[part]);
                    const signed char q = scale.quantized(part ? values[j] : turned[j]);
                    unsigned char* const own = to + (row(j, begin) * 2 + part) * (PIECES * 16);
                    Element* const cached = (part ? v_cache : k_cache) + at;
                    reinterpret_cast<signed char*>(own)[dim(j)] = q;
                    if (at != NOWHERE) cached[dim(j)] = q;
                    if (dim(j) == 0) {
                        *reinterpret_cast<unsigned short*>(own + C::HEAD_DIM + kv_head % 8 * 2) = scale.bits;
                        if (at != NOWHERE) *reinterpret_cast<unsigned short*>(cached + scales_of(kv_head)) = scale.bits;
                    }
                }
            }
        }
    };

    // Eight runs at a time, so that their loads do not wait for each other.
    static __device__ __forceinline__ void merge_runs(const Partials& parts, int n_runs, float* out) {
        constexpr int AT_ONCE = 8, FOURS = C::HEAD_DIM / 4;
        for (int i = threadIdx.x; i < C::QUERIES * FOURS; i += THREADS) {
            float most = LOWEST, total = 0.0f, sums[4] = {};
            for (int begin = 0; begin < n_runs; begin += AT_ONCE) {
                float2 ends[AT_ONCE];
                float4 values[AT_ONCE];
                float top = most;
#pragma unroll
                for (int r = 0; r < AT_ONCE; ++r) {
                    const int run = min(begin + r, n_runs - 1);
                    ends[r] = parts.ends[run * C::QUERIES + i / FOURS];
                    values[r] = parts.values[run * (C::QUERIES * FOURS) + i];
                }
#pragma unroll
                for (int r = 0; r < AT_ONCE; ++r) top = fmaxf(top, ends[r].x);
                const float shrink = exp2f(most - top);
                most = top, total *= shrink;
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[e] *= shrink;
#pragma unroll
                for (int r = 0; r < AT_ONCE; ++r) {
                    const float factor = begin + r < n_runs ? exp2f(ends[r].x - most) : 0.0f;
                    total = fmaf(ends[r].y, factor, total);
                    sums[0] = fmaf(values[r].x, factor, sums[0]), sums[1] = fmaf(values[r].y, factor, sums[1]);
                    sums[2] = fmaf(values[r].z, factor, sums[2]), sums[3] = fmaf(values[r].w, factor, sums[3]);
                }
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) out[4 * i + e] = __fdividef(sums[e], total);
        }
    }
};
