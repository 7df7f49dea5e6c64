// The next token: the likeliest, or one drawn as `gqsa_runtime/sampling.py` defines it, bit for bit.
//
// Every block sorts the tokens of a slice by octave, counts them and sums their weights; whichever is done last adds up
// and goes on alone: it finds the octave in which a place in the order lies (the last token that top-k or top-p keeps,
// the one that is drawn), and among its tokens the one, nine bits of their keys at a time. All counts and sums are of
// integers, so that neither the order of atomics nor which block is last can matter.
#pragma once
#include "common.cuh"

// C: VOCAB, SLICE (logits of a block), SLICES, THREADS (of a block: a quarter of SLICE, and the bins of a tally), and
// of the definition OCTAVES, STEP_BITS, LIMIT, EXPONENTIAL_0 up.
// partials: [SLICES] Partial. counters: [1], 0 before and after.
template <class C>
struct Choose {
    using u64 = unsigned long long;
    static constexpr int OCTAVES = C::OCTAVES, STEPS = 1 << C::STEP_BITS;
    static constexpr int INDEX_BITS = 20, KEY_BITS = INDEX_BITS + C::STEP_BITS;
    static constexpr int DIGIT_BITS = 9, BINS = 1 << DIGIT_BITS, WARPS = C::THREADS / WARP;
    static constexpr int LISTED = 2048;  // most tokens of an octave that are listed, and not looked for again
    // A slice's octave in a word: the sum of its weights, from these bits on how many tokens it has and where they begin.
    static constexpr int COUNT_BIT = 36, START_BIT = 48;
    static constexpr int OFFSET_BITS = 11;  // of a token in its slice
    static_assert(C::THREADS == BINS && C::SLICE == 4 * C::THREADS && C::SLICES <= C::THREADS, "one thread each");
    static_assert(C::SLICE == 1 << OFFSET_BITS && LISTED * 2 >= C::SLICE, "a slice is sorted in the list");

    struct Partial {
        float largest;
        int index, octave, unused;
        u64 octaves[OCTAVES];  // from that of the slice's largest down
        unsigned tokens[C::SLICE];  // by octave: step, place in the slice
    };

    // Tokens of one octave in a slice.
    struct Run {
        unsigned short slice, start, count;
    };

    struct Shared {
        unsigned count[BINS], low[BINS], high[BINS];  // low, high: sums of the halves of weights, 12 bits each
        alignas(16) u64 list[LISTED];  // while a slice is counted, its tokens, sorted
        u64 masses[OCTAVES];
        unsigned counts[OCTAVES];
        u64 totals[WARPS];
        float largest[WARPS];
        int indices[WARPS];
        int octaves[C::SLICES], starts[OCTAVES];
        Run runs[C::SLICES];
        u64 found;
        int n_runs, n_listed, is_last;
    };

    const float* const logits;
    Partial* const partials;
    Shared& shared;
    const float scale;
    int top = 0;  // whole part of the largest scaled logit
    int last_octave = OCTAVES - 1;  // no token behind this octave and key is kept
    u64 last_key = (1ull << KEY_BITS) - 1;
    int collected = -1;  // the octave whose slices, and tokens if `listed`, are known
    bool listed = false;

    static __device__ __forceinline__ void run(const float* logits, int* partials, int* counters, int* token,
                                               const int* state) {
        __shared__ Shared shared;
        wait_for_inputs();
        let_dependents_start();
        const int* const draw = draw_of(state);
        Choose self{logits, reinterpret_cast<Partial*>(partials), shared, __uint_as_float(draw[0])};
        self.count_slice();
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) shared.is_last = atomicAdd(counters, 1) == C::SLICES - 1;
        __syncthreads();
        if (!shared.is_last) return;
        __threadfence();
        const int chosen = self.choose(draw);
        if (threadIdx.x == 0) {
            *token = static_cast<unsigned>(chosen) < C::VOCAB ? chosen : -1;
            *counters = 0;
        }
    }

private:
    static __device__ __forceinline__ float infinite() { return __uint_as_float(0x7f800000u); }

    // Four logits from `first` on, -infinite behind the last.
    __device__ __forceinline__ float4 load_four(int first) const {
        if (first + 4 <= C::VOCAB) return *reinterpret_cast<const float4*>(logits + first);
        const float none = -infinite();
        return make_float4(first < C::VOCAB ? logits[first] : none, first + 1 < C::VOCAB ? logits[first + 1] : none,
                           first + 2 < C::VOCAB ? logits[first + 2] : none, none);
    }

    // The block's largest and its first index, in every thread.
    __device__ __forceinline__ void block_largest(float& best, int& index) const {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        take_largest(best, index);
        if (lane == 0) shared.largest[warp] = best, shared.indices[warp] = index;
        __syncthreads();
        best = lane < WARPS ? shared.largest[lane] : -infinite();
        index = lane < WARPS ? shared.indices[lane] : C::VOCAB;
        take_largest(best, index);
    }

    // One product, not fused with what follows.
    __device__ __forceinline__ float scaled(float logit) const {
        return fminf(fmaxf(__fmul_rn(logit, scale), -C::LIMIT), C::LIMIT);
    }

    static __device__ __forceinline__ int octave_of(float scaled) { return static_cast<int>(floorf(scaled)); }

    // Just below a whole number the difference is rounded up to 1.
    static __device__ __forceinline__ int step_of(float scaled) {
        return min(static_cast<int>((scaled - floorf(scaled)) * STEPS), STEPS - 1);
    }

    // 2^(step / STEPS) in units of 2^-23.
    static __device__ __forceinline__ unsigned weight_of(int step) {
        const unsigned x = static_cast<unsigned>(step) << 16;
        unsigned power = C::EXPONENTIAL_4;
        power = C::EXPONENTIAL_3 + __umulhi(power, x);
        power = C::EXPONENTIAL_2 + __umulhi(power, x);
        power = C::EXPONENTIAL_1 + __umulhi(power, x);
        power = C::EXPONENTIAL_0 + __umulhi(power, x);
        return ((1u << 31) + __umulhi(power, x)) >> 8;
    }

    // Returns how many have been added to the bin before.
    __device__ __forceinline__ unsigned add(int bin, int step) const {
        const unsigned weight = weight_of(step);
        atomicAdd(&shared.low[bin], weight & 0xfff);
        atomicAdd(&shared.high[bin], weight >> 12);
        return atomicAdd(&shared.count[bin], 1u);
    }

    __device__ __forceinline__ u64 mass(int bin) const {
        return (static_cast<u64>(shared.high[bin]) << 12) + shared.low[bin];
    }

    __device__ __forceinline__ void clear_tally() const {
        __syncthreads();
        shared.count[threadIdx.x] = shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
        __syncthreads();
    }

    // This block's slice. A NaN makes its largest infinite.
    __device__ __forceinline__ void count_slice() {
        const int first = blockIdx.x * C::SLICE + 4 * threadIdx.x;
        const float4 four = load_four(first);
        const float values[4] = {four.x, four.y, four.z, four.w};
        float best = -infinite();
        int index = C::VOCAB;
        bool nan = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (values[i] > best) best = values[i], index = first + i;
            nan |= values[i] != values[i];
        }
        if (nan) best = infinite();
        block_largest(best, index);
        Partial& mine = partials[blockIdx.x];
        if (threadIdx.x == 0) mine.largest = best, mine.index = index;
        if (scale == 0.0f) return;
        const int octave = octave_of(scaled(best));
        if (threadIdx.x == 0) mine.octave = octave;
        clear_tally();
        int downs[4], steps[4];
        unsigned ranks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float value = scaled(values[i]);
            downs[i] = values[i] > -infinite() ? octave - octave_of(value) : OCTAVES, steps[i] = step_of(value);
            if (downs[i] < OCTAVES) ranks[i] = add(downs[i], steps[i]);
        }
        __syncthreads();
        const int lane = threadIdx.x % WARP;
        if (threadIdx.x < WARP) {
            const unsigned first = shared.count[2 * lane], both = first + shared.count[2 * lane + 1];
            const int start = static_cast<int>(scan(both) - both);
            shared.starts[2 * lane] = start, shared.starts[2 * lane + 1] = start + first;
        }
        __syncthreads();
        unsigned* const sorted = reinterpret_cast<unsigned*>(shared.list);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (downs[i] < OCTAVES)
                sorted[shared.starts[downs[i]] + ranks[i]] = steps[i] << OFFSET_BITS | (4 * threadIdx.x + i);
        if (threadIdx.x < OCTAVES) {
            const u64 start = shared.starts[threadIdx.x], count = shared.count[threadIdx.x];
            mine.octaves[threadIdx.x] = start << START_BIT | count << COUNT_BIT | mass(threadIdx.x);
        }
        __syncthreads();
        reinterpret_cast<uint4*>(mine.tokens)[threadIdx.x] = reinterpret_cast<const uint4*>(sorted)[threadIdx.x];
    }

    // By the last block, once all slices are counted.
    __device__ __forceinline__ int choose(const int* draw) {
        const int t = threadIdx.x;
        float best = t < C::SLICES ? partials[t].largest : -infinite();
        int index = t < C::SLICES ? partials[t].index : C::VOCAB;
        if (t < C::SLICES && scale != 0.0f) shared.octaves[t] = partials[t].octave;
        block_largest(best, index);
        if (!(best > -infinite() && best < infinite())) return -1;
        if (scale == 0.0f) return index;
        top = octave_of(scaled(best));
        add_up_slices();
        // One loop for all, and in it one for each kind of work: code that runs once a token is not in any cache.
#pragma unroll 1
        for (int search = TOP_K;; ++search) {
            Place at;
            u64 key = 0;
            int shift = KEY_BITS - DIGIT_BITS;
            if (search == TOP_K) {
                const u64 top_k = draw[1];
                if (top_k == 0 || top_k >= sum_octaves(true)) continue;
                at = find_octave(true, top_k - 1);
            } else if (search == MIN_P) {
                if (draw[2] >= OCTAVES * STEPS) continue;
                const int last = STEPS - 1 - step_of(scaled(best)) + draw[2];
                at = {last / STEPS, 0}, key = (static_cast<u64>(last % STEPS + 1) << INDEX_BITS) - 1;
                if (!is_kept(at.octave, key)) continue;
                shift = CUT;
            } else {
                if (search == TOP_P && draw[3] == 0) continue;
                at = share(search == TOP_P ? word(draw, 3) << 32 : mixed(word(draw, 4) | word(draw, 5) << 32));
            }
            key = find_key(search, at, key, shift);
            if (search == DRAWN) return static_cast<int>(key & ((1 << INDEX_BITS) - 1));
        }
    }

    enum Search { TOP_K, TOP_P, MIN_P, DRAWN };
    static constexpr int CUT = -DIGIT_BITS;  // in place of a digit's shift: all behind the key is dropped

    static __device__ __forceinline__ u64 word(const int* draw, int i) { return static_cast<unsigned>(draw[i]); }

    // SplitMix64.
    static __device__ __forceinline__ u64 mixed(u64 counter) {
        counter = (counter ^ counter >> 30) * 0xBF58476D1CE4E5B9ull;
        counter = (counter ^ counter >> 27) * 0x94D049BB133111EBull;
        return counter ^ counter >> 31;
    }

    __device__ __forceinline__ void add_up_slices() const {
        if (threadIdx.x < OCTAVES) shared.masses[threadIdx.x] = 0, shared.counts[threadIdx.x] = 0;
        __syncthreads();
        const int octave = threadIdx.x % OCTAVES;
        u64 sum = 0;
        unsigned count = 0;
#pragma unroll 8
        for (int slice = threadIdx.x / OCTAVES; slice < C::SLICES; slice += C::THREADS / OCTAVES) {
            const u64 found = of_slice(slice, octave);
            sum += found & ((1ull << COUNT_BIT) - 1), count += count_of(found);
        }
        if (count > 0) atomicAdd(&shared.masses[octave], sum), atomicAdd(&shared.counts[octave], count);
        __syncthreads();
    }

    static __device__ __forceinline__ unsigned count_of(u64 octave) { return octave >> COUNT_BIT & 0xfff; }

    __device__ __forceinline__ u64 of_slice(int slice, int octave) const {
        const int down = octave - (top - shared.octaves[slice]);
        return down >= 0 && down < OCTAVES ? partials[slice].octaves[down] : 0;
    }

    // counted: in tokens, else in weights.
    __device__ __forceinline__ u64 of_octave(bool counted, int octave) const {
        return counted ? shared.counts[octave] : shared.masses[octave] >> octave;
    }

    static __device__ __forceinline__ u64 scan(u64 value) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int offset = 1; offset < WARP; offset *= 2) {
            const u64 other = __shfl_sync(ALL_LANES, value, max(lane - offset, 0));
            if (lane >= offset) value += other;
        }
        return value;
    }

    // The lane whose amount holds a position in the sum of all; takes those before from the position.
    static __device__ __forceinline__ int find_lane(u64 amount, u64& position) {
        const u64 up_to = scan(amount);
        const unsigned beyond = __ballot_sync(ALL_LANES, position < up_to);
        const int lane = beyond ? __popc((beyond & (0u - beyond)) - 1) : WARP - 1;
        position -= __shfl_sync(ALL_LANES, up_to - amount, lane);
        return lane;
    }

    // Every warp does it for itself: lanes have two octaves each.
    __device__ __forceinline__ u64 of_lane(bool counted) const {
        const int lane = threadIdx.x % WARP;
        return of_octave(counted, 2 * lane) + of_octave(counted, 2 * lane + 1);
    }

    __device__ __forceinline__ u64 sum_octaves(bool counted) const {
        return __shfl_sync(ALL_LANES, scan(of_lane(counted)), WARP - 1);
    }

    struct Place {
        int octave;
        u64 position;
    };

    __device__ __forceinline__ Place find_octave(bool counted, u64 position) const {
        int octave = 2 * find_lane(of_lane(counted), position);
        const u64 first = of_octave(counted, octave);
        if (position >= first) ++octave, position -= first;
        return {octave, position};
    }

    // Where the share fraction / 2^64 of all weights falls; position: in the octave's own units.
    __device__ __forceinline__ Place share(u64 fraction) const {
        const u64 total = sum_octaves(false), behind = total * fraction;
        Place at = find_octave(false, __umul64hi(total, fraction));
        if (at.octave > 0) at.position = at.position << at.octave | behind >> (64 - at.octave);
        return at;
    }

    __device__ __forceinline__ bool is_kept(int octave, u64 key) const {
        return octave < last_octave || (octave == last_octave && key <= last_key);
    }

    // A token's key is its step turned round, then its index. Of those that are kept: counted in bin (key - begin) >> shift,
    // if there is such a one, or listed where that is 0.
    __device__ __forceinline__ void take(int octave, u64 key, u64 begin, int shift, bool listing) const {
        const u64 bin = (key - begin) >> shift;
        if (!is_kept(octave, key) || bin >= (listing ? 1 : BINS)) return;
        if (listing) {
            const int place = atomicAdd(&shared.n_listed, 1);
            if (place < LISTED) shared.list[place] = key;
        } else {
            add(static_cast<int>(bin), STEPS - 1 - static_cast<int>(key >> INDEX_BITS));
        }
    }

    // All tokens of an octave, from the runs found; 1 << bits threads take a run together.
    __device__ __forceinline__ void take_from_slices(int octave, u64 begin, int shift, bool listing, int bits) const {
        constexpr int AT_ONCE = 8;  // loads in flight
        const int n_runs = min(shared.n_runs, C::SLICES);
#pragma unroll 1
        for (int i = threadIdx.x >> bits; i < n_runs; i += C::THREADS >> bits) {
            const Run run = shared.runs[i];
            const unsigned* const from = partials[run.slice].tokens + run.start;
#pragma unroll 1
            for (int first = threadIdx.x & ((1 << bits) - 1); first < run.count; first += AT_ONCE << bits) {
                unsigned tokens[AT_ONCE];
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j)
                    if (first + (j << bits) < run.count) tokens[j] = from[first + (j << bits)];
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    if (first + (j << bits) >= run.count) break;
                    const u64 step = tokens[j] >> OFFSET_BITS;
                    const int index = run.slice * C::SLICE + tokens[j] % C::SLICE;
                    take(octave, (STEPS - 1 - step) << INDEX_BITS | index, begin, shift, listing);
                }
            }
        }
    }

    // Which slices have tokens of an octave.
    __device__ __forceinline__ void find_runs(int octave) const {
        __syncthreads();
        if (threadIdx.x == 0) shared.n_runs = shared.n_listed = 0;
        __syncthreads();
        const u64 held = threadIdx.x < C::SLICES ? of_slice(threadIdx.x, octave) : 0;
        if (count_of(held) > 0) {
            Run& run = shared.runs[atomicAdd(&shared.n_runs, 1)];
            run.slice = threadIdx.x, run.start = held >> START_BIT & (C::SLICE - 1), run.count = count_of(held);
        }
        __syncthreads();
    }

    // The key of the token that holds a place, found from its digit of a shift on down to the last; with the shift CUT the
    // key is known. All but DRAWN drop the tokens behind it.
    __device__ __forceinline__ u64 find_key(int search, Place at, u64 key, int shift) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const bool few = shared.counts[at.octave] <= LISTED;
        bool listing = false, partly = false;  // partly: what is listed begins with `begin` and the digits of list_shift
        int list_shift = KEY_BITS;
        if (at.octave != collected) {
            find_runs(at.octave);
            collected = at.octave, listed = false, listing = few;
        }
#pragma unroll 1
        for (;;) {
            const bool cutting = shift == CUT && !listing;
            if (cutting && search == DRAWN) return key;
            const u64 begin = cutting || (listing && !partly) ? 0 : key;
            const int by = listing ? list_shift : cutting ? KEY_BITS : shift;
            if (cutting) last_octave = at.octave, last_key = key;
            clear_tally();
            if (listed && !(cutting && partly)) {
                for (int i = threadIdx.x; i < min(shared.n_listed, LISTED); i += C::THREADS)
                    take(at.octave, shared.list[i], begin, by, false);
            } else {
                take_from_slices(at.octave, begin, by, listing, few ? 3 : 5);
            }
            __syncthreads();
            if (listing) {
                listed = true, listing = false;
                continue;
            }
            if (cutting) break;
            const bool counted = search == TOP_K;
            const auto amount = [&](int bin) { return counted ? static_cast<u64>(shared.count[bin]) : mass(bin); };
            const u64 total = scan(amount(threadIdx.x));
            if (lane == WARP - 1) shared.totals[warp] = total;
            __syncthreads();
            const int from = WARP * find_lane(lane < WARPS ? shared.totals[lane] : 0, at.position);
            const int bin = from + find_lane(amount(from + lane), at.position);
            key += static_cast<u64>(bin) << shift;
            if (listed && shared.count[bin] == 1) {  // no other digit has to be counted
                for (int i = threadIdx.x; i < min(shared.n_listed, LISTED); i += C::THREADS)
                    if (shared.list[i] >> shift == key >> shift && is_kept(at.octave, shared.list[i]))
                        shared.found = shared.list[i];
                __syncthreads();
                key = shared.found, shift = 0;
            } else if (!listed && shift > 0 && shared.count[bin] <= LISTED) {  // those of this bin are few enough now
                if (threadIdx.x == 0) shared.n_listed = 0;
                listing = partly = true, list_shift = shift, collected = -1;
            }
            shift -= DIGIT_BITS;
        }
        if (threadIdx.x < OCTAVES && threadIdx.x >= at.octave) {
            const bool same = threadIdx.x == at.octave;
            shared.masses[threadIdx.x] = same ? mass(0) : 0, shared.counts[threadIdx.x] = same ? shared.count[0] : 0;
        }
        __syncthreads();
        return key;
    }
};
