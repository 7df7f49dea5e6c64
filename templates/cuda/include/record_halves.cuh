// Levels of records as halves, for the tensor cores: (level - zero) is exact, times its scale it is rounded once.
//
// Bits of a level are put into the mantissa of 1024 = 0x6400, where bit PLACE counts 2^PLACE; one multiply-add takes
// the 1024 and the zero off. Two levels a byte and 16 bits apart share a word.
#pragma once
#include "records.cuh"

__device__ __forceinline__ constexpr unsigned twice(unsigned half) { return half * 0x10001u; }

// What a lane needs to turn the levels of one tile, its rows pair and pair + 8, into halves.
template <int WIDTH>
struct LevelHalves {
    unsigned scale[2];
    unsigned zero[2];  // nibbles, in both halves of a word

    // fields, slot: as for Steps.
    __device__ __forceinline__ LevelHalves(const unsigned char* fields, int n_tiles, int slot, int pair) {
        const unsigned both = reinterpret_cast<const unsigned*>(fields)[slot * 8 + pair];
        const unsigned nibbles = fields[32 * n_tiles + slot * 8 + pair];
        scale[0] = twice(both & 0xffff), scale[1] = twice(both >> 16);
        zero[0] = twice(nibbles & 15), zero[1] = twice(nibbles >> 4);
    }

    // Step STEP of a tile's four, as mma_halves takes A: columns 16 q + 4 STEP + {0, 2} of both rows, then + {1, 3}.
    template <int STEP>
    __device__ __forceinline__ void fragment(const Groups<WIDTH>& groups, unsigned* a) const {
        constexpr int PLACE = WIDTH == 8 ? 0 : WIDTH == 1 ? 4 : WIDTH == 4 ? STEP / 2 * 4 : 2;
        // -(2^(10 - PLACE) + zero * 2^(WIDTH - 4)); the unit in its last place is 2^-PLACE.
        constexpr unsigned MINUS_BASE = twice(0x8000u | (25 - PLACE) << 10), FACTOR = twice((15u - PLACE) << 10);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const unsigned offset = MINUS_BASE + (zero[r] << (WIDTH - 4 + PLACE));
#pragma unroll
            for (int h = 0; h < 2; ++h)
                a[2 * h + r] = multiply_halves(multiply_add_halves(raised<STEP>(groups, r, h), FACTOR, offset), scale[r]);
        }
    }

private:
    // 1024 + level * 2^PLACE.
    template <int STEP>
    static __device__ __forceinline__ unsigned raised(const Groups<WIDTH>& groups, int r, int h) {
        constexpr unsigned BASE = twice(0x6400u);
        if constexpr (WIDTH == 8) return and_or<0x00ff00ffu>(groups.row[r][STEP] >> 8 * h, BASE);
        if constexpr (WIDTH == 4) {
            constexpr unsigned MASK = STEP < 2 ? 0x000f000fu : 0x00f000f0u;
            return and_or<MASK>(groups.row[r][STEP % 2] >> 8 * h, BASE);
        }
        if constexpr (WIDTH == 2) return and_or<0x000c000cu>(moved(groups.row[r][0], 8 * h + 2 * STEP - 2), BASE);
        if constexpr (WIDTH == 3)
            return and_or<0x000c000cu>(
                moved(groups.row[r][0], 8 * h + 2 * STEP - 2),
                and_or<0x00100010u>(moved(groups.high, 8 * h + 2 * STEP + r - 4), BASE));
        return and_or<0x00100010u>(moved(groups.row[0][0], 8 * h + 2 * STEP + r - 4), BASE);
    }

    static __device__ __forceinline__ unsigned moved(unsigned word, int right) {
        return right >= 0 ? word >> right : word << -right;
    }
};
