// The records of one row block (see records.cuh), taken tile by tile as fragments of halves: two in shared memory.
#pragma once
#include "record_halves.cuh"

// C: RECORD_BYTES, and what by_kind needs.
template <class C>
struct RowBlock {
    unsigned char* places;         // [2, RECORD_BYTES], in shared memory
    const unsigned char* records;  // of the linear; bare ones: of the block
    const int* starts;             // of the block's records, unless they are bare
    int count, current, fetched;   // how many, the one under way, the next to copy
    int slot, offset;              // of the tile under way: which of its record, its first value behind the first tile's

    // block: of the linear's n_blocks; there is nothing in one behind them.
    __device__ __forceinline__ void open(const signed char* records_, const int* starts_, const int* blocks, int block,
                                         int n_blocks) {
        const int begin = block < n_blocks ? blocks[block] : 0, end = block < n_blocks ? blocks[block + 1] : 0;
        records = reinterpret_cast<const unsigned char*>(records_), starts = starts_;
        count = end - begin, current = fetched = slot = offset = 0;
        skip(begin);
    }

    // Where a record of the block begins, in units of 16 bytes.
    __device__ __forceinline__ int start(int record) const {
        return BARE<C> ? record * (C::RECORD_BYTES / 16) : starts[record];
    }

    // Forgets the records that begin with this tile or one behind it. All lanes of the warp call it. Where all tiles are
    // there it is a record's first.
    __device__ __forceinline__ void end_before(int tile, int lane) { count = count_before(tile, lane); }

    // Begins with this tile or the first behind it; the same holds.
    __device__ __forceinline__ void skip_to(int tile, int lane) {
        int n_skipped = count_before(tile, lane);
        if (!C::WHOLE && n_skipped > 0) {
            // The last record that begins before the tile may go on behind it.
            const Record<C> record{records + static_cast<long long>(starts[n_skipped - 1]) * 16};
            const int n = tiles_of<C>(record.kind());
            for (int s = 0; s < n && record.tile(s) < tile; ++s) ++slot;
            if (slot == n) {
                slot = 0;
            } else {
                --n_skipped;
                const uint2* const mask = record.mask();
                if (record.kind() >> 16 & 0xff)
                    for (int s = 0; s < slot; ++s) offset += __popc(mask[s].x) + __popc(mask[s].y);
                offset *= 2 * (record.kind() & 0xff);  // bytes of a group
            }
        }
        skip(n_skipped), count -= n_skipped;
    }

    // Whether there is another record and its place is free.
    __device__ __forceinline__ bool wants() const { return fetched < count && fetched < current + 2; }
    __device__ __forceinline__ unsigned char* place(int record) const { return places + record % 2 * C::RECORD_BYTES; }

    // Copies the next record, if it is wanted, by THREADS threads; this is number `thread` of them.
    template <int THREADS>
    __device__ __forceinline__ void fetch(int thread) {
        if (!wants()) return;
        const int from = start(fetched), units = start(fetched + 1) - from;
        unsigned char* const to = place(fetched++);
        for (int i = thread; i < units; i += THREADS)
            copy_16(to + i * 16, records + static_cast<long long>(from + i) * 16);
    }

    // Whether the block holds the tile, the next one in order; then a are its fragments.
    __device__ __forceinline__ bool take(int tile, int lane, unsigned (&a)[4][4]) {
        if (current >= count) return false;
        const Record<C> record{place(current), tile - slot};
        if (record.tile(slot) != tile) return false;
        const unsigned kind = record.kind();
        const int n = tiles_of<C>(kind);
        const auto whole = [&](auto groups) {
            using G = decltype(groups);
            const unsigned char* const fields = record.whole_fields();
            groups.load(fields + fields_bytes(n) + slot * (G::ENTRY_BYTES * 2 * WARP), lane);
            convert(groups, fields, n, lane, a);
        };
        const auto masked = [&](auto groups) {
            const uint2 kept = record.mask()[slot];
            const unsigned both[2] = {kept.x, kept.y};
            const unsigned char* const fields = record.masked_fields();
            const unsigned char* const first = fields + fields_bytes(n);
            const unsigned char* values = first + offset;
            groups.load_masked(values, both, fields[32 * n + 8 * slot + lane / 4], lane);
            offset = static_cast<int>(values - first);
            convert(groups, fields, n, lane, a);
        };
        by_kind<C>(kind, whole, masked);
        if (++slot == n) slot = offset = 0, ++current;
        return true;
    }

private:
    __device__ __forceinline__ void skip(int n_records) {
        if (BARE<C>) records += static_cast<long long>(n_records) * C::RECORD_BYTES;
        else starts += n_records;
    }

    // How many records begin before a tile.
    __device__ __forceinline__ int count_before(int tile, int lane) const {
        if (C::WHOLE) return tile / TILES;
        int n = 0;
        for (int i = 0; i < count; i += WARP) {
            bool before = false;
            if (i + lane < count)
                before = Record<C>{records + static_cast<long long>(starts[i + lane]) * 16}.tile(0) < tile;
            n += __popc(__ballot_sync(ALL_LANES, before));
        }
        return n;
    }

    template <class G>
    __device__ __forceinline__ void convert(const G& groups, const unsigned char* fields, int n, int lane,
                                            unsigned (&a)[4][4]) const {
        const LevelHalves<G::WIDTH_> levels(fields, n, slot, lane / 4);
        levels.template fragment<0>(groups, a[0]);
        levels.template fragment<1>(groups, a[1]);
        levels.template fragment<2>(groups, a[2]);
        levels.template fragment<3>(groups, a[3]);
    }
};
