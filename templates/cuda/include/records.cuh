// Records: 16 rows by up to 4 tiles of 64 columns, multiplied on the tensor cores' 8-bit integers; the bytes are
// described in gqsa_runtime/layouts/records.py. lane = 4 * pair + quarter: rows pair and pair + 8 of the block,
// columns 16 * quarter .. + 15 of a tile.
//
// Activations are 16-bit integers q with a scale per token and tile: two planes of bytes, high and low (signed,
// 256 * high + low = q). Levels are masked out of their bytes, never shifted: what stands higher is a class of its
// own, whose sums are put right at the end. All sums within a tile are exact integers, so neither the order nor
// the number of tokens matters; only sums over tiles round, in f32.
#pragma once
#include "common.cuh"

constexpr int TILE = 64, TILES = 4;
constexpr float Q_MAX = 32639.0f;  // 127 * 256 + 127: its high byte is still a signed one

// Whether two sets of widths have one element together.
__device__ __forceinline__ constexpr bool one_kind(int widths, int masked_widths) {
    return (widths & (widths - 1)) == 0 && (masked_widths & (masked_widths - 1)) == 0 && !(widths && masked_widths);
}

// Whether records are bare: they have no header, all are of one size, and a row block holds all tiles, four by four.
// C: WIDTHS, MASKED_WIDTHS (bit w is set where records of w bits occur), WHOLE (all records have four tiles).
template <class C>
constexpr bool BARE = C::WHOLE && C::WIDTHS && !C::MASKED_WIDTHS && one_kind(C::WIDTHS, 0);

// Records of a row block where each holds all of its tiles, else 0.
template <class C>
constexpr int RECORDS_OF_BLOCK = C::WHOLE ? C::K / (TILE * TILES) : 0;

// A record in shared memory. C: as for BARE.
template <class C>
struct Record {
    static constexpr int HEADER = BARE<C> ? 0 : 16;

    const unsigned char* bytes;
    int first;  // tile, where a row block holds all tiles

    __device__ __forceinline__ int tile(int slot) const {
        return C::WHOLE ? first + slot : reinterpret_cast<const unsigned short*>(bytes)[slot];
    }
    // For by_kind and tiles_of.
    __device__ __forceinline__ unsigned kind() const {
        return BARE<C> ? 0 : reinterpret_cast<const unsigned*>(bytes)[2];
    }
    __device__ __forceinline__ const unsigned char* whole_fields() const { return bytes + HEADER; }
    __device__ __forceinline__ const uint2* mask() const { return reinterpret_cast<const uint2*>(bytes + HEADER); }
    __device__ __forceinline__ const unsigned char* masked_fields() const { return bytes + HEADER + 32; }
};

// What one lane holds of a tile: its group's levels of both rows, as words in the order of mma fragments.
template <int WIDTH>
struct Groups {
    // Sums of a tile or a record come in CLASSES parts, class c times 2^SHIFT(c).
    static constexpr int WIDTH_ = WIDTH;
    static constexpr int CLASSES = WIDTH == 8 ? 1 : WIDTH >= 3 ? 2 : 4;
    static constexpr int SHIFT = WIDTH >= 3 ? 4 : 2;
    static constexpr int WORDS = WIDTH == 8 ? 4 : WIDTH == 4 ? 2 : 1;  // of a row
    static constexpr int ENTRY_BYTES = 2 * WIDTH;

    unsigned row[2][WORDS];  // 1 bit: of both rows in row[0]
    unsigned high;           // 3 bits: the high bits of both rows

    // values: of a whole tile.
    __device__ __forceinline__ void load(const unsigned char* values, int lane) {
        if constexpr (WIDTH == 8) {
            copy(reinterpret_cast<const uint4*>(values)[lane], row[0]);
            copy(reinterpret_cast<const uint4*>(values)[WARP + lane], row[1]);
        } else if constexpr (WIDTH == 4) {
            unsigned four[4];
            copy(reinterpret_cast<const uint4*>(values)[lane], four);
            row[0][0] = four[0], row[0][1] = four[1], row[1][0] = four[2], row[1][1] = four[3];
        } else if constexpr (WIDTH == 1) {
            row[0][0] = reinterpret_cast<const unsigned*>(values)[lane];
        } else {
            const uint2 two = reinterpret_cast<const uint2*>(values)[lane];
            row[0][0] = two.x, row[1][0] = two.y;
            if constexpr (WIDTH == 3) high = reinterpret_cast<const unsigned*>(values + WARP * 8)[lane];
        }
    }

    // kept: a bit per lane for each row. zeros: of both rows, a nibble each; removed groups have the level of
    // their zero throughout, which is a weight of 0. values moves on past the tile's kept groups.
    __device__ __forceinline__ void load_masked(const unsigned char*& values, const unsigned* kept, unsigned zeros,
                                                int lane) {
        constexpr unsigned EACH = WIDTH == 8 ? 0x01010101u : WIDTH == 4 ? 0x11111111u : 0x55555555u;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const unsigned zero = zeros >> 4 * r & 15;
            const unsigned removed = EACH * (WIDTH == 8 ? zero << 4 : zero >> (4 - WIDTH) % 32);
            const unsigned before = kept[r] & ((1u << lane) - 1);
            const unsigned char* entry = values + __popc(before) * ENTRY_BYTES;
#pragma unroll
            for (int i = 0; i < WORDS; ++i) row[r][i] = removed;
            if (kept[r] >> lane & 1) {
                if constexpr (WIDTH == 8) copy(*reinterpret_cast<const uint4*>(entry), row[r]);
                if constexpr (WIDTH == 4) {
                    const uint2 two = *reinterpret_cast<const uint2*>(entry);
                    row[r][0] = two.x, row[r][1] = two.y;
                }
                if constexpr (WIDTH == 2) row[r][0] = *reinterpret_cast<const unsigned*>(entry);
            }
            values += __popc(kept[r]) * ENTRY_BYTES;
        }
    }

    // sums [CLASSES][4] += levels times activations; x: the four words of a plane that this lane's column of B has.
    __device__ __forceinline__ void multiply(const unsigned* x, int (*sums)[4]) const {
        if constexpr (WIDTH == 8) {
            mma_32(sums[0], row[0][0], row[1][0], row[0][1], row[1][1], x[0], x[1]);
            mma_32(sums[0], row[0][2], row[1][2], row[0][3], row[1][3], x[2], x[3]);
        } else if constexpr (WIDTH == 4) {
            constexpr unsigned LOW = 0x0f0f0f0fu, HIGH = 0xf0f0f0f0u;
            mma_32(sums[0], row[0][0] & LOW, row[1][0] & LOW, row[0][1] & LOW, row[1][1] & LOW, x[0], x[1]);
            mma_32(sums[1], row[0][0] & HIGH, row[1][0] & HIGH, row[0][1] & HIGH, row[1][1] & HIGH, x[2], x[3]);
        } else if constexpr (WIDTH == 3) {
            // Four columns of a byte, two at a time as nibbles of their low bits and the high ones that stand above them.
            constexpr unsigned LOW = 0x07070707u, HIGH = 0x70707070u, TWO = 0x33333333u;
            const unsigned even[2] = {row[0][0] & TWO | high << 2 & ~TWO, row[1][0] & TWO | high << 1 & ~TWO};
            const unsigned odd[2] = {row[0][0] >> 2 & TWO | high & ~TWO, row[1][0] >> 2 & TWO | high >> 1 & ~TWO};
            mma_32(sums[0], even[0] & LOW, even[1] & LOW, odd[0] & LOW, odd[1] & LOW, x[0], x[1]);
            mma_32(sums[1], even[0] & HIGH, even[1] & HIGH, odd[0] & HIGH, odd[1] & HIGH, x[2], x[3]);
        } else {
            constexpr unsigned LEVEL = WIDTH == 2 ? 0x03030303u : 0x01010101u;
            const unsigned second = WIDTH == 2 ? row[1][0] : row[0][0] >> 1;
            mma_16(sums[0], row[0][0] & LEVEL, second & LEVEL, x[0]);
            mma_16(sums[1], row[0][0] & LEVEL << 2, second & LEVEL << 2, x[1]);
            mma_16(sums[2], row[0][0] & LEVEL << 4, second & LEVEL << 4, x[2]);
            mma_16(sums[3], row[0][0] & LEVEL << 6, second & LEVEL << 6, x[3]);
        }
    }

    static __device__ __forceinline__ void clear(int (*sums)[4]) {
#pragma unroll
        for (int c = 0; c < CLASSES; ++c) sums[c][0] = sums[c][1] = sums[c][2] = sums[c][3] = 0;
    }

    // The levels' sum from its classes, times 2^SHIFTED: element i of a lane's four. One operation a class, where
    // shifting down would take two.
    static constexpr int SHIFTED = SHIFT * (CLASSES - 1);
    static __device__ __forceinline__ int total(const int (*sums)[4], int i) {
        int sum = sums[0][i];
#pragma unroll
        for (int c = 1; c < CLASSES; ++c) sum = sum * (1 << SHIFT) + sums[c][i];
        return sum;
    }

private:
    static __device__ __forceinline__ void copy(uint4 from, unsigned* to) {
        to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
    }
};

// Scales and zeros of one tile slot of a record, for rows pair and pair + 8. place: 8 * slot + pair.
struct Steps {
    float scale[2];
    int zero[2];  // sixteenths of the range of a width

    __device__ __forceinline__ Steps(const unsigned char* fields, int n_tiles, int place) {
        const unsigned both = reinterpret_cast<const unsigned*>(fields)[place];
        const unsigned nibbles = fields[32 * n_tiles + place];
        scale[0] = half_to_float(both & 0xffff), scale[1] = half_to_float(both >> 16);
        zero[0] = nibbles & 15, zero[1] = nibbles >> 4;
    }

    // scale * (levels - zero) . x for row half r, from G::total of both planes. range: {scale, bits of the sum} of the
    // integers q. Sums are exact: of 64 columns, |level - zero| in sixteenths of the range is at most 15, and 15 for
    // the highest level times 2^SHIFTED: below 2^31 throughout.
    template <class G>
    __device__ __forceinline__ float product(int r, int high, int low, float2 range) const {
        constexpr int WIDTH = G::WIDTH_, UP = WIDTH == 8 ? 0 : 4 - WIDTH, ZERO = (WIDTH == 8 ? 4 : 0) + G::SHIFTED;
        const int levels = high * (256 << UP) + low * (1 << UP), q_sum = static_cast<int>(__float_as_uint(range.y));
        const int steps = levels - (zero[r] << ZERO) * q_sum;
        constexpr float STEP = 1.0f / (1 << (UP + G::SHIFTED));
        return static_cast<float>(steps) * (scale[r] * (range.x * STEP));
    }
};

// Bytes of the scales and zeros of n tiles.
__device__ __forceinline__ constexpr int fields_bytes(int n) { return 32 * n + ceil_div(8 * n, 16) * 16; }

// Calls whole(Groups<W>()) or masked(Groups<W>()), by a record's kind. C: as for BARE; code for
// widths that do not occur is not made.
template <class C, class Whole, class Masked>
__device__ __forceinline__ void by_kind(unsigned kind, Whole whole, Masked masked) {
    const int width = kind & 0xff;
    if (C::MASKED_WIDTHS && (!C::WIDTHS || (kind >> 16 & 0xff))) {
        constexpr int ALONE = one_kind(C::MASKED_WIDTHS, 0);
        if ((C::MASKED_WIDTHS & 1 << 4) && (ALONE || width == 4)) masked(Groups<4>());
        if ((C::MASKED_WIDTHS & 1 << 2) && (ALONE || width == 2)) masked(Groups<2>());
        if ((C::MASKED_WIDTHS & 1 << 8) && (ALONE || width == 8)) masked(Groups<8>());
        return;
    }
    constexpr int ALONE = one_kind(C::WIDTHS, 0);
    if ((C::WIDTHS & 1 << 4) && (ALONE || width == 4)) whole(Groups<4>());
    if ((C::WIDTHS & 1 << 3) && (ALONE || width == 3)) whole(Groups<3>());
    if ((C::WIDTHS & 1 << 2) && (ALONE || width == 2)) whole(Groups<2>());
    if ((C::WIDTHS & 1 << 1) && (ALONE || width == 1)) whole(Groups<1>());
    if ((C::WIDTHS & 1 << 8) && (ALONE || width == 8)) whole(Groups<8>());
}

template <class C>
__device__ __forceinline__ int tiles_of(unsigned kind) {
    return C::WHOLE ? TILES : kind >> 8 & 0xff;
}

// Reads a record. body(kind, n, fields, load) is called once; kind is a Groups<W> to tell the width by, load(t) gives
// the groups of tile t and is called for each t < n in turn.
template <class C, class Body>
__device__ __forceinline__ void with_record(Record<C> record, int lane, Body body) {
    const unsigned kind = record.kind();
    const int n = tiles_of<C>(kind);
    const auto whole = [&](auto of_width) {
        using G = decltype(of_width);
        const unsigned char* const steps = record.whole_fields();
        const unsigned char* const values = steps + fields_bytes(n);
        body(of_width, n, steps, [&](int t) {
            G groups;
            groups.load(values + t * (G::ENTRY_BYTES * 2 * WARP), lane);
            return groups;
        });
    };
    const auto masked = [&](auto of_width) {
        using G = decltype(of_width);
        const uint2* const mask = record.mask();
        const unsigned char* const steps = record.masked_fields();
        const unsigned char* values = steps + fields_bytes(n);
        body(of_width, n, steps, [&](int t) {
            G groups;
            const uint2 kept = mask[t];
            const unsigned both[2] = {kept.x, kept.y};
            groups.load_masked(values, both, steps[32 * n + 8 * t + lane / 4], lane);
            return groups;
        });
    };
    by_kind<C>(kind, whole, masked);
}

// Element (row, column) of a matrix [rows, K] in whole records of one width, 4 or 8 bits, whose rows stand in order.
// C: K, and what BARE needs.
template <class C>
__device__ __forceinline__ float record_element(const signed char* records, const int* starts, const int* blocks,
                                                int row, int column) {
    constexpr int WIDTH = C::WIDTHS == 1 << 8 ? 8 : 4, UNITS = (fields_bytes(TILES) + TILES * 128 * WIDTH) / 16;
    const int tile = column / TILE, slot = tile % TILES, half = row % 16 / 8, pair = row % 8;
    const long long start = BARE<C> ? (row / 16 * RECORDS_OF_BLOCK<C> + tile / TILES) * static_cast<long long>(UNITS)
                                    : starts[blocks[row / 16] + tile / TILES];
    const Record<C> record{reinterpret_cast<const unsigned char*>(records) + start * 16, tile - slot};
    const int n = tiles_of<C>(record.kind()), lane = pair * 4 + column % TILE / 16, i = column % 16;
    const unsigned char* const fields = record.whole_fields();
    const unsigned char* const values = fields + fields_bytes(n) + slot * (128 * WIDTH);
    const int level = WIDTH == 8 ? values[(half * WARP + lane) * 16 + i]
                                 : values[(lane * 2 + half) * 8 + i % 8] >> i / 8 * 4 & 15;
    const float scale = half_to_float(reinterpret_cast<const unsigned short*>(fields)[(slot * 8 + pair) * 2 + half]);
    const int zero = fields[32 * n + slot * 8 + pair] >> half * 4 & 15;
    return scale * static_cast<float>(level - (WIDTH == 8 ? zero * 16 : zero));
}
