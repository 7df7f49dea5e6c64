// y = W x over records (see records.cuh), for one token and for several.
//
// A block takes consecutive row blocks; records 2 p and 2 p + 1 of the linear belong to warp p % WARPS. A warp streams
// its records through its own ring of copies, keeps the sums of the current row block in registers and puts them
// into shared memory where a row block ends; the block adds the warps up in order at the end. So the order of
// every sum is a matter of constants: neither the grid nor the number of tokens changes a bit of a result.
#pragma once
#include "copy_ring.cuh"
#include "epilogue.cuh"
#include "quantized_rows.cuh"

// Kernels of one token leave half of a multiprocessor's registers to the next kernel, which then starts early. Other
// architectures than Hopper would spill for it.
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
constexpr int BESIDE_EACH_OTHER = 2;
#else
constexpr int BESIDE_EACH_OTHER = 1;
#endif

// The records of this warp, in order and in pairs: copied ahead into its ring, taken one pair by one.
template <class C>
struct RecordStream {
    CopyRing<2 * C::RECORD_BYTES, C::STAGES> ring;
    const unsigned char* records;
    const int* starts;
    int begin, end;           // records of the block; a pair's one outside is not copied
    int next;                 // pair to fetch
    int start, middle, stop;  // of its records, loaded a turn before they are needed
    int filled, taken, turn;  // stages, and how often all were taken
    unsigned middles;         // units before the second record of each stage, 16 bits each
    static_assert(C::STAGES <= 2 && C::RECORD_BYTES / 16 < 1 << 16, "middles hold two stages");

    __device__ __forceinline__ void open(int begin_, int end_) {
        begin = begin_, end = begin_ < end_ ? end_ : 0;
        const int first = begin / 2;
        next = first + (static_cast<int>(threadIdx.x / WARP) - first % C::WARPS + C::WARPS) % C::WARPS;
        filled = taken = turn = 0, middles = 0;
        ring.init();
        look_up();
    }

    __device__ __forceinline__ bool is_over(int pair) const { return 2 * pair >= end; }

    __device__ __forceinline__ void fetch() {
        ring.fetch(filled, records + static_cast<long long>(start) * 16, is_over(next) ? 0 : (stop - start) * 16);
        middles = middles & ~(0xffffu << 16 * filled) | static_cast<unsigned>(middle - start) << 16 * filled;
        filled = filled + 1 == C::STAGES ? 0 : filled + 1;
        next += C::WARPS;
        look_up();
    }

    // second: bytes of the pair before its second record.
    __device__ __forceinline__ const unsigned char* take(int& second) {
        const unsigned char* const bytes = ring.wait(taken, turn);
        second = (middles >> 16 * taken & 0xffff) * 16;
        if (++taken == C::STAGES) taken = 0, ++turn;
        return bytes;
    }

private:
    __device__ __forceinline__ void look_up() {
        if (is_over(next)) return;
        start = starts[max(2 * next, begin)], middle = starts[2 * next + 1], stop = starts[min(2 * next + 2, end)];
    }
};

// C: K, N_BLOCKS, WIDTHS, MASKED_WIDTHS, RECORD_BYTES, WARPS, STAGES, BLOCKS (of the grid, along x), LOCAL_BLOCKS
// (most row blocks of a block), NORM, EPS, EPILOGUE, places in shared memory (PLANES_AT, RANGES_AT, SUMS_AT, BLOCKS_AT, RING_AT, PHASES_AT) and
// what epilogue.cuh needs. TOKENS: in one tile (blockIdx.y); from 2 on x comes as planes and ranges.
template <class C, int TOKENS>
struct LinearRecords {
    static constexpr int TEAMS = (TOKENS + 3) / 4;  // four tokens share an mma
    static constexpr int SLOTS = TOKENS == 1 ? 1 : TILES;

    static __device__ __forceinline__ void run(const float* x, const signed char* planes, const float* ranges,
                                               const float* norm_weight, const float* norm_bias,
                                               const signed char* records, const int* starts, const int* blocks,
                                               const int* order, const float* bias, const float* residual, float* out,
                                               const int* state) {
        // The host wrote the state before any kernel of this launch plan began: it needs no wait.
        const int first_token = blockIdx.y * TOKENS;
        const int n_tokens = TOKENS == 1 ? 1 : min(TOKENS, count_tokens<TOKENS>(state) - first_token);
        if (n_tokens <= 0) return;

        GQSA_DYNAMIC_SHARED(unsigned char, shared);
        float* const sums = reinterpret_cast<float*>(shared + C::SUMS_AT);       // [LOCAL_BLOCKS, WARPS, 16, TOKENS]
        int* const bounds = reinterpret_cast<int*>(shared + C::BLOCKS_AT);       // [LOCAL_BLOCKS + 1] records
        unsigned* const own_planes = reinterpret_cast<unsigned*>(shared + C::PLANES_AT);
        float2* const own_ranges = reinterpret_cast<float2*>(shared + C::RANGES_AT);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        if (blockIdx.x >= C::BLOCKS) return;
        const int first_block = boundary(blockIdx.x), n_local = boundary(blockIdx.x + 1) - first_block;

        let_dependents_start();
        // Weights are no kernel's output: the first are on their way before the inputs are waited for.
        RecordStream<C> stream;
        stream.records = reinterpret_cast<const unsigned char*>(records);
        stream.starts = starts;
        stream.ring.stages = shared + C::RING_AT + warp * (C::STAGES * 2 * C::RECORD_BYTES);
        stream.ring.phases = reinterpret_cast<unsigned long long*>(shared + C::PHASES_AT) + warp * C::STAGES;
        stream.open(blocks[first_block], blocks[first_block + n_local]);
        int pair = stream.next;
#pragma unroll
        for (int s = 0; s < C::STAGES; ++s) stream.fetch();
        for (int i = threadIdx.x; i <= n_local; i += C::WARPS * WARP) bounds[i] = blocks[first_block + i];
        for (int i = threadIdx.x; i < n_local * C::WARPS * 16 * TOKENS; i += C::WARPS * WARP) sums[i] = 0.0f;
        RowQuantizer<C> quantizer;
        if (TOKENS == 1) quantizer.prefetch(norm_weight, norm_bias);
        // One token: a thread's first result is looked up ahead. Several need the registers.
        Result ahead(threadIdx.x, n_tokens);
        if (TOKENS == 1 && ahead.local < n_local) ahead.find(first_block, order);
        wait_for_inputs();

        float* const partials = reinterpret_cast<float*>(shared + C::PARTIALS_AT);
        if (TOKENS == 1) {
            quantizer.quantize(x, own_planes, own_ranges, partials);
        } else {
            planes += static_cast<long long>(first_token) * (2 * C::K);
            ranges += static_cast<long long>(first_token) * (C::K / TILE * 2);
        }
        if (TOKENS == 1 && ahead.to >= 0) ahead.load(first_token, bias, residual, out);
        __syncthreads();
        const float factor = TOKENS == 1 ? quantizer.factor(partials) : 1.0f;

        float y[TEAMS][SLOTS][2] = {};
        int local = 0, bound = bounds[1];
        const auto move_on = [&](int record) {
            while (record >= bound) {
                flush(y, sums, local, warp, lane);
                bound = bounds[++local + 1];
            }
        };
        const auto add_one = [&](int record, const float (&products)[2]) {
            move_on(record);
            y[0][0][0] += products[0], y[0][0][1] += products[1];
        };
        const auto add_several = [&](int record, const unsigned char* bytes) {
            move_on(record);
            multiply_several({bytes}, lane, planes, ranges, n_tokens, y);
        };
        for (; !stream.is_over(pair); pair += C::WARPS) {
            int second;
            const unsigned char* const bytes = stream.take(second);
            const bool has_both = 2 * pair >= stream.begin && 2 * pair + 1 < stream.end;
            const int first = max(2 * pair, stream.begin);
            if constexpr (TOKENS == 1) {
                float a[2] = {}, b[2] = {};
                // Both before either is added: the one's arithmetic may fill the other's waiting.
                multiply_one({bytes}, lane, own_planes, own_ranges, factor, a);
                if (has_both) multiply_one({bytes + second}, lane, own_planes, own_ranges, factor, b);
                add_one(first, a);
                if (has_both) add_one(first + 1, b);
            } else {
#pragma unroll 1
                for (int i = 0; i < 1 + has_both; ++i) add_several(first + i, bytes + i * second);
            }
            __syncwarp();
            stream.fetch();
        }
        if (local < n_local) flush(y, sums, local, warp, lane);
        __syncthreads();
        constexpr int THREADS = C::WARPS * WARP;
        for (int i = threadIdx.x; i < n_local * Result::HEIGHT * n_tokens; i += THREADS) {
            Result result = ahead;
            if (TOKENS > 1 || i >= THREADS) {
                result = Result(i, n_tokens);
                result.find(first_block, order);
                if (result.to >= 0) result.load(first_token, bias, residual, out);
            }
            if (result.to >= 0) result.store(sums, first_token, out);
        }
    }

    // The first row block of a block. A division by a constant: kernels start with it.
    static __device__ __forceinline__ int boundary(unsigned block) {
        return static_cast<int>(static_cast<unsigned long long>(block) * C::N_BLOCKS / C::BLOCKS);
    }

    // One token. Each tile slot has its own two of the eight columns of B, so the slots' sums end in different
    // lanes: lane (pair, quarter) gets slot `quarter`, high plane in elements 0 and 2, low plane in 1 and 3.
    // products: what the record adds to the lane's sums of its row block.
    static __device__ __forceinline__ void multiply_one(Record record, int lane, const unsigned* planes,
                                                        const float2* ranges, float factor, float (&products)[2]) {
        const int pair = lane / 4, quarter = lane % 4, slot = pair / 2;
        with_record<C>(record, lane, [&](auto of_width, int n, const unsigned char* fields, auto load) {
            using G = decltype(of_width);
            uint4 four = {0, 0, 0, 0};
            if (slot < n) four = reinterpret_cast<const uint4*>(planes)[record.tile(slot) * 8 + pair % 2 * 4 + quarter];
            int sums[G::CLASSES][4];
            G::clear(sums);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t >= n) break;
                const bool mine = slot == t;
                const unsigned words[4] = {mine ? four.x : 0, mine ? four.y : 0, mine ? four.z : 0, mine ? four.w : 0};
                load(t).multiply(words, sums);
            }
            if (quarter >= n) return;
            float2 range = ranges[record.tile(quarter)];
            range.x *= factor;
            const Steps steps(fields, n, quarter, pair);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                products[r] =
                    steps.template product<G::WIDTH_>(r, G::total(sums, 2 * r), G::total(sums, 2 * r + 1), range);
        });
    }

    // Several tokens: column 2 m (high plane) and 2 m + 1 (low) of B are token m of a team; lane (pair, quarter)
    // gets the sums of token `quarter`, added to y. Tokens past the last repeat it.
    static __device__ __forceinline__ void multiply_several(Record record, int lane, const signed char* planes,
                                                            const float* ranges, int n_tokens, float (*y)[SLOTS][2]) {
        const int pair = lane / 4, quarter = lane % 4;
        with_record<C>(record, lane, [&](auto of_width, int n, const unsigned char* fields, auto load) {
            using G = decltype(of_width);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t >= n) break;
                const G groups = load(t);
                const int tile = record.tile(t);
                const Steps steps(fields, n, t, pair);
#pragma unroll
                for (int team = 0; team < TEAMS; ++team) {
                    one_after_another();
                    const int from = min(team * 4 + pair / 2, n_tokens - 1), to = min(team * 4 + quarter, n_tokens - 1);
                    const uint4 four = reinterpret_cast<const uint4*>(planes + static_cast<long long>(from) * (2 * C::K))
                        [tile * 8 + pair % 2 * 4 + quarter];
                    const unsigned words[4] = {four.x, four.y, four.z, four.w};
                    int sums[G::CLASSES][4];
                    G::clear(sums);
                    groups.multiply(words, sums);
                    const float2 range =
                        reinterpret_cast<const float2*>(ranges)[static_cast<long long>(to) * (C::K / TILE) + tile];
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        y[team][t][r] +=
                            steps.template product<G::WIDTH_>(r, G::total(sums, 2 * r), G::total(sums, 2 * r + 1), range);
                }
            }
        });
    }

    // The warp's sums of a finished row block go to shared memory; slots are added in one order for any TOKENS.
    static __device__ __forceinline__ void flush(float (*y)[SLOTS][2], float* sums, int local, int warp, int lane) {
        const int pair = lane / 4, quarter = lane % 4;
        float* const to = sums + (local * C::WARPS + warp) * 16 * TOKENS;
#pragma unroll
        for (int team = 0; team < TEAMS; ++team)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float sum;
                if constexpr (TOKENS == 1) {
                    sum = y[team][0][r];
                    sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                    if (quarter == 0) to[pair + 8 * r] = sum;
                } else {
                    sum = (y[team][0][r] + y[team][1][r]) + (y[team][2][r] + y[team][3][r]);
                    if (team * 4 + quarter < TOKENS) to[(pair + 8 * r) * TOKENS + team * 4 + quarter] = sum;
                }
#pragma unroll
                for (int s = 0; s < SLOTS; ++s) y[team][s][r] = 0.0f;
            }
    }

    static __device__ __forceinline__ float add_warps(const float* sums, int local, int row, int token) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < C::WARPS; ++w) sum += sums[((local * C::WARPS + w) * 16 + row) * TOKENS + token];
        return sum;
    }

    // One element of out. What it needs beside the sums is loaded as soon as it can be.
    struct Result {
        static constexpr int HEIGHT = C::EPILOGUE == ROWS_ALONE ? 16 : 8;  // results of a row block and token
        int token, row, local, to;
        Addends addends;
        float second;  // gated: bias of the other row

        __device__ __forceinline__ Result(int index, int n_tokens)
            : token(index % n_tokens), row(index / n_tokens % HEIGHT), local(index / n_tokens / HEIGHT), to(-1),
              addends{0.0f, 0.0f}, second(0.0f) {}

        __device__ __forceinline__ void find(int first_block, const int* order) {
            to = order[(first_block + local) * 16 + row];
        }

        __device__ __forceinline__ void load(int first_token, const float* bias, const float* residual,
                                             const float* out) {
            if (C::EPILOGUE == GATED && C::BIAS) second = bias[C::ROWS / 2 + to];
            addends = load_addends<C>(to, first_token + token, bias, residual, out);
        }

        __device__ __forceinline__ void store(const float* sums, int first_token, float* out) const {
            float* const place = out + static_cast<long long>(first_token + token) * C::OUT_STRIDE + to;
            const float value = finish<C>(add_warps(sums, local, row, token), addends);
            *place = C::EPILOGUE == GATED ? value * (add_warps(sums, local, 8 + row, token) + second) : value;
        }
    };
};
