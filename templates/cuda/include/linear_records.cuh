// y = W norm(x) over records (see records.cuh), for one token and for a few.
//
// A block takes consecutive row blocks; record r of the linear belongs to warp r % WARPS. A warp streams its records
// through its own ring of copies, keeps the sums of the current row block in registers and puts them into shared memory
// where a row block ends; the block adds the warps up in order at the end. So the order of every sum is a matter of
// constants: neither the grid nor the number of tokens changes a bit of a result.
#pragma once
#include "copy_ring.cuh"
#include "epilogue.cuh"
#include "quantized_rows.cuh"

// The records of this warp, in order: copied ahead into its ring, taken one by one.
template <class C>
struct RecordStream {
    CopyRing<C::RECORD_BYTES, C::STAGES> ring;
    const unsigned char* records;
    const int* starts;
    int end;          // of the block's records
    int next;         // record to fetch
    int start, stop;  // of its bytes, in units of 16; loaded a turn before they are needed
    int stage, turn;  // what is taken next, and how often all stages were

    // Once, before anything else.
    __device__ __forceinline__ void init() {
        stage = turn = 0;
        ring.init();
    }

    // Starts the first copies of the block's records begin .. end_ - 1. Returns the warp's first record.
    __device__ __forceinline__ int open(int begin, int end_) {
        end = end_;
        const int first = begin + (static_cast<int>(threadIdx.x / WARP) + C::WARPS - begin % C::WARPS) % C::WARPS;
        next = first;
        int all_starts[C::STAGES], all_stops[C::STAGES];
#pragma unroll
        for (int s = 0; s < C::STAGES; ++s) {
            look_up();
            all_starts[s] = start, all_stops[s] = stop;
            next += C::WARPS;
        }
#pragma unroll
        for (int s = 0; s < C::STAGES; ++s)
            copy(stage + s < C::STAGES ? stage + s : stage + s - C::STAGES, first + s * C::WARPS, all_starts[s], all_stops[s]);
        look_up();
        return first;
    }

    __device__ __forceinline__ const unsigned char* take() { return ring.wait(stage, turn); }

    // The record that was taken is read no more.
    __device__ __forceinline__ void go_on() {
        __syncwarp();
        copy(stage, next, start, stop);
        next += C::WARPS;
        look_up();
        if (++stage == C::STAGES) stage = 0, ++turn;
    }

private:
    __device__ __forceinline__ void copy(int to, int record, int from, int behind) {
        if (BARE<C>) from = record * (C::RECORD_BYTES / 16), behind = from + C::RECORD_BYTES / 16;
        ring.fetch(to, records + static_cast<long long>(from) * 16, record < end ? (behind - from) * 16 : 0);
    }

    __device__ __forceinline__ void look_up() {
        if (!BARE<C> && next < end) start = starts[next], stop = starts[next + 1];
    }
};

// C: K, N_BLOCKS, WIDTHS, MASKED_WIDTHS, RECORD_BYTES, WARPS, STAGES, BLOCKS (of the grid, along x), LOCAL_BLOCKS
// (most row blocks of a block), LEFT_TO_COPY (records of a warp, when the next kernel may start; 0: at once), NORM, EPS,
// EPILOGUE, places in shared memory (PLANES_AT, RANGES_AT, PARTIALS_AT, SUMS_AT, BLOCKS_AT, RING_AT, PHASES_AT) and what
// epilogue.cuh needs; ONE: a launch holds one token; AT_ONCE: tokens that a block takes at once, at most four. More
// take their turns: blocks of their own would only stand in the way of the next kernel's where there are none.
template <class C>
struct LinearRecords {
    static constexpr int TOKENS = C::AT_ONCE, SLOTS = TOKENS == 1 ? 1 : TILES;
    static constexpr bool PAIRED = GQSA_PAIRS && TOKENS > 1;
    static_assert(TOKENS <= 4, "four tokens share an mma");

    static __device__ __forceinline__ void run(const float* x, const float* norm_weight, const float* norm_bias,
                                               const signed char* records, const int* starts, const int* blocks,
                                               const int* order, const float* bias, const float* residual, float* out,
                                               const int* state) {
        // The host wrote the state before any kernel of this launch plan began: it needs no wait.
        const int all_tokens = C::ONE ? 1 : count_tokens(state);

        GQSA_DYNAMIC_SHARED(unsigned char, shared);
        float* const sums = reinterpret_cast<float*>(shared + C::SUMS_AT);       // [LOCAL_BLOCKS, WARPS, 16, TOKENS]
        int* const bounds = reinterpret_cast<int*>(shared + C::BLOCKS_AT);       // [LOCAL_BLOCKS + 1] records
        unsigned* const own_planes = reinterpret_cast<unsigned*>(shared + C::PLANES_AT);
        float2* const own_ranges = reinterpret_cast<float2*>(shared + C::RANGES_AT);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        if (blockIdx.x >= C::BLOCKS) return;
        const int first_block = boundary(blockIdx.x), n_local = boundary(blockIdx.x + 1) - first_block;

        if (!C::LEFT_TO_COPY) let_dependents_start();
        // Weights are no kernel's output: the first are on their way before the inputs are waited for.
        RecordStream<C> stream;
        stream.records = reinterpret_cast<const unsigned char*>(records);
        stream.starts = starts;
        stream.ring.stages = shared + held(C::RING_AT + warp * (C::STAGES * C::RECORD_BYTES));
        stream.ring.phases = reinterpret_cast<unsigned long long*>(shared + held(C::PHASES_AT + warp * (C::STAGES * 8)));
        const auto begins = [&](int block) {
            return C::WHOLE ? (first_block + block) * RECORDS_OF_BLOCK<C> : blocks[first_block + block];
        };
        stream.init();
        if (PAIRED) pair_arrive();  // its shared memory may be written to
        int record = stream.open(begins(0), begins(n_local));
        // Where it has many records to go, the next kernel's beginning would only take turns with it.
        const auto let_start = [&] {
            if (C::LEFT_TO_COPY && stream.next + C::LEFT_TO_COPY * C::WARPS >= stream.end) let_dependents_start();
        };
        let_start();
        if (!C::WHOLE)
            for (int i = threadIdx.x; i <= n_local; i += C::WARPS * WARP) bounds[i] = begins(i);
        RowQuantizer<C> quantizer;
        quantizer.prefetch(norm_weight, norm_bias);
        // One token: a thread's first result is looked up ahead. Several need the registers.
        Result ahead(threadIdx.x, 1);
        if (TOKENS == 1 && ahead.local < n_local) ahead.find(first_block, order);
        wait_for_inputs();

        float* const partials = reinterpret_cast<float*>(shared + C::PARTIALS_AT);
        // Two blocks make the integers of every second token, each for both: they are half of what several tokens cost.
        const int rank = PAIRED ? rank_in_pair() : 0;
        const auto put = [&](auto* to, auto value) {
            *to = value;
            if constexpr (PAIRED) store_in_pair(to, value, 1 - rank);
        };
        const auto barrier = [] {
            if constexpr (PAIRED)
                pair_arrive(), pair_wait();
            else
                __syncthreads();
        };
        for (int first_token = 0; first_token < all_tokens; first_token += TOKENS) {
            const int n_tokens = TOKENS == 1 ? 1 : min(TOKENS, all_tokens - first_token);
            if (first_token > 0) {
                barrier();  // results of the tokens before are out of shared memory
                record = stream.open(begins(0), begins(n_local));
            }
            float factor = 1.0f;  // of the token whose sums this lane gets
            // Two at a time, in a pair every second one; more would not fit the registers.
            constexpr int LOADED = TOKENS == 1 ? 1 : 2, STEP = PAIRED ? 2 : 1;
#pragma unroll
            for (int begin = 0; begin < TOKENS; begin += LOADED * STEP) {
                typename RowQuantizer<C>::Row rows[LOADED];
#pragma unroll
                for (int i = 0; i < LOADED; ++i) {
                    const int m = begin + i * STEP + rank;
                    if (m < n_tokens) rows[i] = quantizer.load(x + (first_token + m) * C::X_STRIDE);
                }
                if (PAIRED && first_token == 0) pair_wait();
#pragma unroll
                for (int i = 0; i < LOADED; ++i) {
                    const int m = begin + i * STEP + rank;
                    if (m < n_tokens)
                        quantizer.quantize(rows[i], own_planes + m * (C::K / 2), own_ranges + m * RANGE_STRIDE,
                                           partials + m * WARP, put);
                }
            }
            if (TOKENS == 1 && ahead.to >= 0) ahead.load(first_token, bias, residual, out);
            barrier();
#pragma unroll
            for (int m = 0; m < TOKENS; ++m) {
                const float one = quantizer.factor(partials + m * WARP);
                if (m == 0 || m == min(lane % 4, n_tokens - 1)) factor = one;
            }

            const Lane me(lane);
            float y[SLOTS][2] = {};
            float* const own_sums = sums + held(warp * (16 * TOKENS));
            int local = 0, bound = C::WHOLE ? begins(1) : bounds[1];
            // A warp has sums of every row block, zeros where none of the records is its own.
            const auto end_block = [&] {
                flush(y, own_sums + local * (C::WARPS * 16 * TOKENS), me);
                ++local, bound = C::WHOLE ? bound + RECORDS_OF_BLOCK<C> : bounds[local + 1];
            };
            for (; record < stream.end; record += C::WARPS) {
                const unsigned char* const taken = stream.take();
                while (record >= bound) end_block();
                const Record<C> bytes = {taken, (record - bound + RECORDS_OF_BLOCK<C>) * TILES};
                if constexpr (TOKENS == 1)
                    multiply_one(bytes, me, own_planes, own_ranges, factor, y[0]);
                else
                    multiply_few(bytes, me, own_planes, own_ranges, factor, n_tokens, y);
                stream.go_on();
                let_start();
            }
            while (local < n_local) end_block();
            __syncthreads();
            constexpr int THREADS = C::WARPS * WARP;
            for (int i = threadIdx.x; i < n_local * Result::HEIGHT * n_tokens; i += THREADS) {
                Result result = ahead;
                if (TOKENS > 1 || first_token > 0 || i >= THREADS) {
                    result = Result(i, n_tokens);
                    result.find(first_block, order);
                    if (result.to >= 0) result.load(first_token, bias, residual, out);
                }
                if (result.to >= 0) result.store(sums, first_token, out);
            }
        }
    }

    // The first row block of a block. A division by a constant: kernels start with it.
    static __device__ __forceinline__ int boundary(unsigned block) {
        return static_cast<int>(static_cast<unsigned long long>(block) * C::N_BLOCKS / C::BLOCKS);
    }

    // What a lane is to a record. Held: the compiler would work it all out again for each record.
    struct Lane {
        int lane, slot, quarter, piece, place;

        __device__ __forceinline__ explicit Lane(int lane_)
            : lane(held(lane_)), slot(held(lane_ / 8)), quarter(held(lane_ % 4)), piece(held(lane_ / 4 % 2 * 4 + lane_ % 4)),
              place(held(lane_ % 4 * 8 + lane_ / 4)) {}
    };

    // One token. Each tile slot has its own two of the eight columns of B, so the slots' sums end in different
    // lanes: lane (pair, quarter) gets slot `quarter`, high plane in elements 0 and 2, low plane in 1 and 3. It adds to
    // its sums y of the row block.
    static __device__ __forceinline__ void multiply_one(Record<C> record, const Lane& me, const unsigned* planes,
                                                        const float2* ranges, float factor, float (&y)[2]) {
        with_record<C>(record, me.lane, [&](auto of_width, int n, const unsigned char* fields, auto load) {
            using G = decltype(of_width);
            uint4 four = {0, 0, 0, 0};
            if (C::WHOLE || me.slot < n) four = reinterpret_cast<const uint4*>(planes)[record.tile(me.slot) * 8 + me.piece];
            int sums[G::CLASSES][4];
            G::clear(sums);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t >= n) break;
                const bool mine = me.slot == t;
                const unsigned words[4] = {mine ? four.x : 0, mine ? four.y : 0, mine ? four.z : 0, mine ? four.w : 0};
                load(t).multiply(words, sums);
            }
            if (!C::WHOLE && me.quarter >= n) return;
            float2 range = ranges[record.tile(me.quarter)];
            range.x *= factor;
            const Steps steps(fields, n, me.place);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                y[r] += steps.template product<G>(r, G::total(sums, 2 * r), G::total(sums, 2 * r + 1), range);
        });
    }

    // From one token's ranges to the next one's: an odd number, so that four tokens share no banks.
    static constexpr int RANGE_STRIDE = C::K / TILE | 1;

    // A few tokens: column 2 m (high plane) and 2 m + 1 (low) of B are token m; lane (pair, quarter) gets the sums of
    // token `quarter`, added to y. Tokens past the last repeat it.
    static __device__ __forceinline__ void multiply_few(Record<C> record, const Lane& me, const unsigned* planes,
                                                        const float2* ranges, float factor, int n_tokens,
                                                        float (&y)[SLOTS][2]) {
        const int pair = me.lane / 4, from = min(pair / 2, n_tokens - 1), to = min(me.quarter, n_tokens - 1);
        with_record<C>(record, me.lane, [&](auto of_width, int n, const unsigned char* fields, auto load) {
            using G = decltype(of_width);
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                if (t >= n) break;
                one_after_another();
                const G groups = load(t);
                const int tile = record.tile(t);
                const uint4 four = reinterpret_cast<const uint4*>(planes)[from * (C::K / 8) + tile * 8 + me.piece];
                const unsigned words[4] = {four.x, four.y, four.z, four.w};
                int sums[G::CLASSES][4];
                G::clear(sums);
                groups.multiply(words, sums);
                float2 range = ranges[to * RANGE_STRIDE + tile];
                range.x *= factor;
                const Steps steps(fields, n, t * 8 + pair);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    y[t][r] += steps.template product<G>(r, G::total(sums, 2 * r), G::total(sums, 2 * r + 1), range);
            }
        });
    }

    // The warp's sums of a finished row block go to shared memory; slots are added in one order for any TOKENS.
    static __device__ __forceinline__ void flush(float (&y)[SLOTS][2], float* to, const Lane& me) {
        if constexpr (TOKENS == 1) {
            // Lanes of even quarters go on with row pair, the others with row pair + 8.
            const bool odd = me.quarter % 2;
            float sum = odd ? y[0][1] : y[0][0];
            sum += __shfl_xor_sync(ALL_LANES, odd ? y[0][0] : y[0][1], 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            if (me.quarter < 2) to[me.place] = sum;
        } else {
            const int pair = me.lane / 4, quarter = me.quarter;
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (quarter < TOKENS)
                    to[(pair + 8 * r) * TOKENS + quarter] = (y[0][r] + y[1][r]) + (y[2][r] + y[3][r]);
        }
#pragma unroll
        for (int s = 0; s < SLOTS; ++s) y[s][0] = y[s][1] = 0.0f;
    }

    static __device__ __forceinline__ float add_warps(const float* sums, int local, int row, int token) {
        float sum[2] = {};  // of every other warp, so that one addition need not wait for the last
#pragma unroll
        for (int w = 0; w < C::WARPS; ++w) sum[w % 2] += sums[((local * C::WARPS + w) * 16 + row) * TOKENS + token];
        return sum[0] + sum[1];
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
