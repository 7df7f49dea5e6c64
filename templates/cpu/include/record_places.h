// Where the records of a linear begin; the bytes are described in gqsa_runtime/layouts/records.py.
//
// The kernel defines WIDTHS and MASKED_WIDTHS (bit w is set where whole, or masked, records of w bits occur: no other
// code is made), WHOLE (all have four tiles, and no block lacks a tile) and RECORD_BYTES, of the largest.
#ifndef GQSA_RECORD_PLACES_H
#define GQSA_RECORD_PLACES_H

#include "vec.h"

#define TILES 4  // of a record

#define ONE_KIND(set) (((set) & ((set) - 1)) == 0)
// Bare records have no header, and all are of one size.
#define BARE (WHOLE && WIDTHS && !MASKED_WIDTHS && ONE_KIND(WIDTHS))
#define HEADER (BARE ? 0 : 16)

// In multiples of 16 bytes.
INLINE int64_t start_of(const struct arguments *arg, int record) {
    return BARE ? (int64_t)record * (RECORD_BYTES / 16) : arg->starts[record];
}

INLINE const uint8_t *record_at(const struct arguments *arg, int record) {
    return (const uint8_t *)arg->records + start_of(arg, record) * 16;
}

// Bytes of the scales and zeros of n tiles.
INLINE int steps_bytes(int n) { return 32 * n + (8 * n + 15) / 16 * 16; }

// A tile's number. index: of the record in its block.
INLINE int tile_of(const uint8_t *record, int index, int slot) {
    return BARE ? index * TILES + slot : record[2 * slot] | record[2 * slot + 1] << 8;
}

#endif
