"""Layout of records: 16 rows by up to 4 tiles of 64 columns, as a tensor core's fragments want them.

A block is 16 output rows of one width. Its records stand one behind another, each a multiple of 16 bytes:

    16 B            header: u16 numbers of its tiles [4], u8 width in bits, u8 tiles n, u8 masked, 0
    32 B, if masked u32 [4 tiles, 2 halves], bit `lane`: whether that lane's group is kept
    32 n B          scales f16 [n, 8, 2 halves]
    8 n B           zeros u4 [n, 8, 2 halves], in sixteenths of the width's range; padded to 16 B
    values          n * 128 * width bytes, or the kept groups' alone, padded to 16 B

Row 8 * half + pair of a block, columns 16 * quarter .. + 15 of a tile are one group; lane = 4 * pair + quarter.
A group's levels are an entry of 2 * width bytes: 8 bits: a byte each, in order; 4 bits: byte i holds columns i
(low) and 8 + i; 2 bits: byte i holds columns i, 4 + i, 8 + i, 12 + i from the low bits up. 3 bits: the low two
bits so, and the high bits apart; high bits (and 1-bit levels) of both halves share a u32 a lane: column 4 s + i
of half h stands at bit 8 i + 2 s + h. Whole tiles: entries [32 lanes, 2 halves], at 8 bits [2 halves, 32 lanes],
at 3 bits all low parts before all high ones. Masked: entries of kept groups in the order [tile, half, lane]; their
zeros are levels, so that a removed group can be multiplied as one that has the level of its zero throughout.

Where a tile of a block keeps no group it is not stored, where all its groups stay no mask is: one layout for
dense, tile-sparse, group-sparse and mixed widths. `order` says which row of the output each row of a block is,
so rows may be sorted by width or paired for an epilogue.

Where a linear has one width, no masks and four tiles in every record, headers and starts would say what is known.
Its records are bare (see `is_bare`): no header, no starts; record i of a block holds tiles 4 i .. 4 i + 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from gqsa_runtime.constants import COUNT, FLAG, SIZE, Params
from gqsa_runtime.errors import ModelError
from gqsa_runtime.layouts.base import ContentRule, Layout, Part
from gqsa_runtime.layouts.group_words import RisesTo

ROWS, TILE, TILES, GROUP = 16, 64, 4, 16  # of a block, of a tile in columns, of a record, of a mask bit
ALIGNMENT = 16  # bytes: records begin at multiples of it, which starts count
WIDTHS = (1, 2, 3, 4, 8)
MASKED_WIDTHS = (2, 4, 8)
RECORD_COLUMNS = TILES * TILE
MAX_RECORD_BYTES = 16 + 32 + TILES * (32 + 8 + 128 * 8)
_HEADER = 16
_ZERO_STEPS = 16

_Bytes = TypeVar("_Bytes", int, np.ndarray)


def is_bare(params: Params) -> bool:
    """Whether records have no header and need no `starts`. params: the layout's constants."""
    return bool(params["whole"]) and not params["masked_widths"] and params["widths"].bit_count() == 1


@dataclass(frozen=True)
class Plan:
    """Which records a linear has. Per record: block, tiles int16 [TILES] (-1: none), masked, size in multiples
    of ALIGNMENT.

    order: int32 [blocks * 16], -1 where a block has no such row. widths: uint8 [blocks].
    kept: bool [blocks, 16, tiles, 4], None where nothing is removed. constants: what the layout adds to a kernel's.
    """

    columns: int
    constants: dict[str, Any]
    order: np.ndarray
    widths: np.ndarray
    kept: np.ndarray | None
    block: np.ndarray
    tiles: np.ndarray
    masked: np.ndarray
    sizes: np.ndarray

    @property
    def n_bytes(self) -> int:
        """Of all parts of the layout together."""
        n_starts = 0 if is_bare(self.constants) else len(self.block) + 1
        return int(self.sizes.sum()) * ALIGNMENT + 4 * (n_starts + (len(self.widths) + 1) + len(self.order))


def make_plan(
    row_bits: np.ndarray, columns: int, keep: np.ndarray | None = None, pairs: np.ndarray | None = None
) -> Plan:
    """The plan of a linear from its widths and mask alone.

    row_bits: uint8 [rows], 0 for a row without weights. keep: bool [rows, columns / 16] or None.
    pairs: int32 [n, 2], rows that must stand in one block, 8 apart; every row once. Default: rows r and r + 8
    of 16 consecutive ones. Raises ModelError for what records cannot hold.
    """
    rows, n_tiles = len(row_bits), columns // TILE
    if columns % TILE:
        raise ModelError(f"{columns} columns are no whole tiles of {TILE}")
    order, widths = _blocks(row_bits, pairs)
    kept = None
    present = np.broadcast_to(widths[:, None] > 0, (len(widths), n_tiles))
    full = present
    if keep is not None:
        padded = np.concatenate([keep, np.zeros((1, keep.shape[1]), bool)])  # row -1: nothing
        kept = padded[np.where(order < 0, rows, order)].reshape(len(widths), ROWS, n_tiles, TILES)
        present = kept.any((1, 3)) & (widths > 0)[:, None]
        full = kept.all(3).sum(1) == (order.reshape(-1, ROWS) >= 0).sum(1)[:, None]
    counts = present.sum(1)
    per_block = -(-counts // TILES)
    block = np.repeat(np.arange(len(widths)), per_block)
    # Number of a present tile within its block: which record, and which place in it.
    of_block, tile = np.nonzero(present)
    place = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
    record = (np.cumsum(per_block) - per_block)[of_block] + place // TILES
    tiles = np.full((len(block), TILES), -1, np.int16)
    tiles[record, place % TILES] = tile
    masked = np.zeros(len(block), bool)
    masked[record[~full[of_block, tile]]] = True
    n = (tiles >= 0).sum(1)
    width = widths[block].astype(np.int64)
    value_bytes = n * 128 * width
    if kept is not None and masked.any():
        if not np.isin(width[masked], MASKED_WIDTHS).all():
            raise ModelError("groups can be removed from rows of 2, 4 or 8 bits only")
        groups = np.where(tiles[..., None] >= 0, kept.sum(1)[block[:, None], np.maximum(tiles, 0)], 0).sum((1, 2))
        value_bytes = np.where(masked, groups * 2 * width, value_bytes)
    kinds = {
        "n_blocks": len(widths),
        "widths": _bits(width[~masked]),
        "masked_widths": _bits(width[masked]),
        "whole": bool((n == TILES).all()) and len(block) * TILES == present.size,
    }
    header = 0 if is_bare(kinds) else _HEADER
    size = (header + 32 * masked + 32 * n + _padded(8 * n) + _padded(value_bytes)) // ALIGNMENT
    constants = {**kinds, "record_bytes": int(size.max(initial=1)) * ALIGNMENT}
    return Plan(columns, constants, order, widths, kept, block, tiles, masked, size.astype(np.int64))


def _bits(widths: np.ndarray) -> int:
    """Bit w is set where width w occurs."""
    return sum(1 << width for width in set(widths.tolist()))


def _padded(n_bytes: _Bytes) -> _Bytes:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _blocks(row_bits: np.ndarray, pairs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(order int32 [blocks * 16], widths uint8 [blocks]): pairs of equal widths, widest first."""
    rows = len(row_bits)
    if pairs is None:
        by_width = np.argsort(-row_bits.astype(np.int64), kind="stable").astype(np.int32)
        runs = np.split(by_width, np.flatnonzero(np.diff(row_bits[by_width])) + 1)
    else:
        first, second = row_bits[pairs[:, 0]], row_bits[pairs[:, 1]]
        if (first != second).any():
            raise ModelError("two rows that an operator takes together have different widths")
        by_width = pairs[np.argsort(-first.astype(np.int64), kind="stable")].astype(np.int32)
        runs = np.split(by_width, np.flatnonzero(np.diff(row_bits[by_width[:, 0]])) + 1)
    blocks, widths = [], []
    for run in runs:
        n_blocks = -(-run.size // ROWS)
        filled = np.full((n_blocks * ROWS // 2, 2) if pairs is not None else n_blocks * ROWS, -1, np.int32)
        filled[: len(run)] = run
        if pairs is not None:  # [block, pair, half] -> [block, half, pair]
            filled = filled.reshape(n_blocks, ROWS // 2, 2).transpose(0, 2, 1)
        blocks.append(filled.reshape(-1))
        widths += [row_bits[run.flat[0]]] * n_blocks
    order = np.concatenate(blocks)
    assert (order >= 0).sum() == rows
    return order, np.array(widths, np.uint8)


class Records(Layout):
    """records i8 [bytes], starts i32 [records + 1] in multiples of 16 bytes, blocks i32 [n_blocks + 1] records.

    starts is i32 [0] where records are bare. order i32 [n_blocks * 16], see `Plan`. widths, masked_widths: bit `w` is
    set where whole (masked) records of w bits occur. record_bytes: of the largest. whole: all have four tiles, and no
    block lacks a tile. pack's source: (QuantizedMatrix, Plan).
    """

    op = "linear_records"
    parts = (Part("records", "i8"), Part("starts", "i32"), Part("blocks", "i32"), Part("order", "i32"))
    constants = {
        "n_blocks": SIZE,
        "widths": COUNT,
        "masked_widths": COUNT,
        "record_bytes": SIZE,
        "whole": FLAG,
    }
    headers = {"cuda": "linear_records.cuh", "cpu": "linear_records.h"}
    compressed = True

    def shapes(self, params: Params, n_groups: Any) -> dict[str, tuple[int, ...]]:
        """See Layout. n_groups: (records, size of all in multiples of ALIGNMENT), not asked of bare ones."""
        bare = is_bare(params)
        n_records, size = _bare_groups(params) if bare else n_groups or (0, 0)
        return {
            "records": (size * ALIGNMENT,),
            "starts": (0 if bare else n_records + 1,),
            "blocks": (params["n_blocks"] + 1,),
            "order": (params["n_blocks"] * ROWS,),
        }

    def n_weights(self, params: Params, n_groups: Any) -> int | None:
        """See Layout. n_groups: kept groups of 16, or (records, size), which tell only where nothing is removed."""
        if isinstance(n_groups, int):
            return n_groups * GROUP
        nothing_removed = params["whole"] and not params["masked_widths"]
        return params["rows"] * params["k"] if nothing_removed else None

    def count_groups(self, params: Params, elements: Mapping[str, int]) -> tuple[int, int]:
        """See Layout."""
        if is_bare(params):
            return _bare_groups(params)
        return elements["starts"] - 1, elements["records"] // ALIGNMENT

    def rows_by_width(self, params: Params, read: Callable[[str], np.ndarray]) -> dict[int, int] | None:
        """See Layout. From the sizes of the blocks' first records: without masks each number of tiles has a remainder
        of its own, and a byte of levels in 16 rows of a tile is 128 of a record for each bit."""
        if is_bare(params):
            return {_bare_width(params): params["rows"]}
        if params["masked_widths"]:
            return None
        starts, blocks = (read(part).reshape(-1).astype(np.int64) for part in ("starts", "blocks"))
        order = read("order").reshape(-1, ROWS)[: params["n_blocks"]]
        first = blocks[: params["n_blocks"]]
        if (np.diff(blocks[: params["n_blocks"] + 1]) < 1).any():
            return None  # all of a block is removed
        sizes = (starts[first + 1] - starts[first]) * ALIGNMENT
        n = np.arange(1, TILES + 1)
        without_values = _HEADER + 32 * n + _padded(8 * n)
        tiles = (sizes[:, None] % 128 == without_values % 128).argmax(1)
        widths = (sizes - without_values[tiles]) // (128 * n[tiles])
        if not np.isin(widths, WIDTHS).all():
            return None
        rows = np.bincount(widths, (order >= 0).sum(1), max(WIDTHS) + 1).astype(int)
        return {width: int(rows[width]) for width in WIDTHS if rows[width]}

    def check_constants(self, params: Params) -> str | None:
        """See Layout."""
        k, n_blocks, record_bytes = params["k"], params["n_blocks"], params["record_bytes"]
        if k % TILE or k // TILE >= 1 << 15:
            return f"k is {k}, expected whole tiles of {TILE} columns, below {1 << 15} of them"
        if not params["rows"] <= n_blocks * ROWS < 1 << 31:  # kernels count the places of rows with 32 bits
            return f"n_blocks is {n_blocks}, expected blocks of {ROWS} rows that hold {params['rows']}"
        if record_bytes % ALIGNMENT or record_bytes > MAX_RECORD_BYTES:
            return f"record_bytes is {record_bytes}, expected a multiple of {ALIGNMENT} up to {MAX_RECORD_BYTES}"
        for name, possible in (("widths", WIDTHS), ("masked_widths", MASKED_WIDTHS)):
            if params[name] & ~sum(1 << width for width in possible):
                return f"{name} is {params[name]}, expected bits {', '.join(map(str, possible))} alone"
        if not is_bare(params):
            return None
        # Nothing in the file says it again: kernels work everything out from these numbers.
        if k % RECORD_COLUMNS:
            return f"k is {k}, expected whole records of {RECORD_COLUMNS} columns"
        expected = _without_header(TILES, _bare_width(params))
        if record_bytes != expected:
            return f"record_bytes is {record_bytes}, expected {expected} for four tiles of {_bare_width(params)} bits"
        if _bare_groups(params)[1] >= 1 << 31:  # kernels count pieces of ALIGNMENT bytes with 32 bits
            return f"n_blocks is {n_blocks}, whose records take {ALIGNMENT << 31} bytes or more"
        return None

    def rules(self, params: Params, n_groups: Any) -> dict[str, ContentRule]:
        """See Layout."""
        n_records, size = n_groups
        n_tiles = params["k"] // TILE
        if is_bare(params):
            return {
                "blocks": RisesBy(n_tiles // TILES, n_records),
                "order": OrderOf(params["rows"], params.get("epilogue", "table")),
            }
        widths = params["widths"], params["masked_widths"]
        # Without an epilogue it is a table, whose elements are found by their row and column alone.
        use = params.get("epilogue", "table")
        return {
            "starts": Starts(size, params["record_bytes"] // ALIGNMENT),
            "records": WellFormed(n_tiles, *widths, TILES if params["whole"] else 1, use == "table"),
            "blocks": RisesBy(-(-n_tiles // TILES), n_records)
            if use == "table" or params["whole"]
            else RisesTo(n_records),
            "order": OrderOf(params["rows"], use),
        }

    def pack(self, part: str, source: Any, params: Params) -> np.ndarray:
        """See Layout."""
        plan: Plan
        matrix, plan = source
        if part == "order":
            return plan.order
        if part == "blocks":
            return np.searchsorted(plan.block, np.arange(params["n_blocks"] + 1)).astype(np.int32)
        starts = np.concatenate([[0], np.cumsum(plan.sizes)])
        if part == "starts":
            return np.zeros(0, np.int32) if is_bare(params) else starts.astype(np.int32)
        return _pack_records(matrix, plan, starts).view(np.int8)

    def unpack(self, arrays: Mapping[str, np.ndarray], params: Params) -> np.ndarray:
        """See Layout."""
        order = arrays["order"].reshape(-1)[: params["n_blocks"] * ROWS]
        blocks = arrays["blocks"].reshape(-1)[: params["n_blocks"] + 1]
        bare = is_bare(params)
        if bare:
            starts = np.arange(blocks[-1] + 1, dtype=np.int64) * (params["record_bytes"] // ALIGNMENT)
        else:
            starts = arrays["starts"].reshape(-1)[: blocks[-1] + 1].astype(np.int64)
        data = arrays["records"].reshape(-1).view(np.uint8)[: starts[-1] * ALIGNMENT]
        dense = np.zeros((len(order), params["k"] // TILE, TILE), np.float32)
        for index, block in enumerate(np.repeat(np.arange(params["n_blocks"]), np.diff(blocks))):
            record = data[starts[index] * ALIGNMENT : starts[index + 1] * ALIGNMENT]
            if bare:
                tiles = np.arange(TILES) + (index - blocks[block]) * TILES
                weights = _unpack_tiles(record, _bare_width(params), TILES)
            else:
                tiles, weights = _unpack_record(record)
            dense[block * ROWS : (block + 1) * ROWS, tiles] = weights
        result = np.zeros((params["rows"], params["k"]), np.float32)
        result[order[order >= 0]] = dense.reshape(len(order), -1)[order >= 0]
        return result


def _bare_width(params: Params) -> int:
    return int(params["widths"]).bit_length() - 1


def _without_header(n: int, width: int) -> int:
    """Bytes of n whole tiles."""
    return 32 * n + _padded(8 * n) + 128 * n * width


def _bare_groups(params: Params) -> tuple[int, int]:
    """(records, size of all in multiples of ALIGNMENT) where records are bare."""
    n_records = params["n_blocks"] * (params["k"] // RECORD_COLUMNS)
    return n_records, n_records * (_without_header(TILES, _bare_width(params)) // ALIGNMENT)


@dataclass(frozen=True)
class Starts(ContentRule):
    """Numbers that rise from 0 to `last` by 1 to `most` at a time."""

    last: int
    most: int

    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """See ContentRule."""
        flat = array.reshape(-1).astype(np.int64)
        steps = np.diff(flat)
        if not flat.size or flat[0] != 0 or flat[-1] != self.last or (steps < 1).any() or (steps > self.most).any():
            return f"does not rise from 0 to {self.last} by at most {self.most} at a time"
        return None


@dataclass(frozen=True)
class RisesBy(ContentRule):
    """Numbers that rise from 0 to `last` by `step` at a time."""

    step: int
    last: int

    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """See ContentRule."""
        flat = array.reshape(-1)
        if flat[0] != 0 or flat[-1] != self.last or (np.diff(flat.astype(np.int64)) != self.step).any():
            return f"does not rise from 0 to {self.last} by {self.step} at a time"
        return None


@dataclass(frozen=True)
class OrderOf(ContentRule):
    """Each of the rows 0 .. rows - 1 once, and -1.

    use "gated": row r and r + rows / 2 stand 8 apart in a block. "table": rows stand in order.
    """

    rows: int
    use: str

    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """See ContentRule."""
        flat = array.reshape(-1)
        if flat.min(initial=-1) < -1 or flat.max(initial=-1) >= self.rows:
            return f"holds rows outside -1 to {self.rows - 1}"
        if (np.bincount(flat[flat >= 0], minlength=self.rows) != 1).any():
            return f"does not hold each of {self.rows} rows once"
        first, second = flat.reshape(-1, 2, 8)[:, 0], flat.reshape(-1, 2, 8)[:, 1]
        if self.use == "gated" and (second != np.where(first < 0, -1, first + self.rows // 2)).any():
            return f"does not pair rows {self.rows // 2} apart"
        if self.use == "table" and (flat[: self.rows] != np.arange(self.rows)).any():
            return "does not hold a table's rows in order"
        return None


@dataclass(frozen=True)
class WellFormed(ContentRule):
    """Records whose headers, masks and sizes agree with each other, with `starts` and with the constants.

    The tiles of a block's records rise, and all of its records but the last have as many as fit: kernels that walk
    several blocks side by side rely on it.
    table: the records of each block hold all tiles in order, four by four.
    """

    n_tiles: int
    widths: int
    masked_widths: int
    fewest: int  # tiles of a record
    table: bool
    needs = ("starts", "blocks")

    def broken(self, array: np.ndarray, *needed: np.ndarray) -> str | None:
        """See ContentRule. The starts have passed their own rule."""
        starts, blocks = needed
        # As items of 16 bytes: NumPy gathers those six times as fast as rows of 16.
        pieces = array.reshape(-1).view(f"V{ALIGNMENT}")
        starts = starts.reshape(-1).astype(np.int64)
        first, size = starts[:-1], np.diff(starts)
        headers = pieces[first].view(np.uint8).reshape(-1, ALIGNMENT)
        tiles, width, n, masked = headers[:, :8].copy().view(np.uint16), headers[:, 8], headers[:, 9], headers[:, 10]
        if ((n < self.fewest) | (n > TILES) | (masked > 1)).any():
            return f"holds a record with {int(n.min())} to {int(n.max())} tiles, expected {self.fewest} to {TILES}"
        if (tiles >= self.n_tiles).any():
            return f"holds tile {int(tiles.max())}, expected below {self.n_tiles}"
        slot = np.arange(TILES)
        here = slot < n[:, None]
        if self.table:
            tile = np.arange(len(first))[:, None] % -(-self.n_tiles // TILES) * TILES + slot
            if (here != (tile < self.n_tiles)).any() or (tiles != tile)[here].any():
                return "does not hold all tiles of a table's rows in order"
        allowed = np.where(masked == 1, self.masked_widths, self.widths)
        if ((width > 8) | ((allowed >> np.minimum(width, 8).astype(np.int64)) & 1 == 0)).any():
            return "holds a record of a width that its kernel does not read"
        n, width = n.astype(np.int64), width.astype(np.int64)
        value_bytes = n * 128 * width
        if masked.any():
            where = np.flatnonzero(masked)
            if (size[where] < 3).any():
                return "holds a record that is too short for its mask"
            masks = pieces[first[where, None] + [1, 2]].view(np.uint64)  # [masked records, 4 tiles]
            groups = _count_bits(masks)
            if (groups * (np.arange(TILES) >= n[where, None])).any():
                return "holds a mask with groups of a tile that its record lacks"
            value_bytes[where] = groups.sum(1) * 2 * width[where]
        expected = (
            _HEADER + 32 * masked.astype(np.int64) + 32 * n + _padded(8 * n) + _padded(value_bytes)
        ) // ALIGNMENT
        if (size != expected).any():
            record = int((size != expected).argmax())
            n_bytes, of_header = ALIGNMENT * size[record], ALIGNMENT * expected[record]
            return f"holds record {record} of {n_bytes} bytes where its header makes it {of_header}"
        goes_on = ~np.isin(np.arange(1, len(first) + 1), blocks)  # another record of the block follows
        if (n[goes_on] != TILES).any():
            return f"holds a record with fewer than {TILES} tiles that is not its block's last"
        last_tile = tiles[np.arange(len(first)), n - 1]
        falls = tiles[:, 1:] <= tiles[:, :-1]
        if (here[:, 1:] & falls).any() or (tiles[1:, 0] <= last_tile[:-1])[goes_on[:-1]].any():
            return "holds a block whose tiles do not rise"
        return None


def _count_bits(words: np.ndarray) -> np.ndarray:
    """How many bits are set in each uint64, as int64. numpy.bitwise_count is not in NumPy 1."""
    sums = words - (words >> 1 & 0x5555555555555555)  # of 2 bits each, then of 4, then of 8
    sums = (sums & 0x3333333333333333) + (sums >> 2 & 0x3333333333333333)
    sums = sums + (sums >> 4) & 0x0F0F0F0F0F0F0F0F
    counts: np.ndarray = (sums * 0x0101010101010101 >> 56).astype(np.int64)
    return counts


def _entries(levels: np.ndarray, width: int) -> np.ndarray:
    """uint8 [..., 2 * width] of levels uint8 [..., 16]; of 3-bit levels the low two bits alone."""
    if width == 8:
        return levels
    s = levels.reshape(*levels.shape[:-1], -1, 4 if width < 4 else 8)
    if width == 4:
        halves: np.ndarray = s[..., 0, :] | s[..., 1, :] << 4
        return halves
    s = s & 3
    entries: np.ndarray = s[..., 0, :] | s[..., 1, :] << 2 | s[..., 2, :] << 4 | s[..., 3, :] << 6
    return entries


def _bit_words(bits: np.ndarray) -> np.ndarray:
    """uint8 [..., 4], little-endian words, of bits [..., 2 halves, 16]."""
    s = bits.reshape(*bits.shape[:-1], 4, 4)
    shifts = (2 * np.arange(4)[:, None] + np.arange(2)[:, None, None]).astype(np.uint8)  # [half, s, 1]
    words: np.ndarray = np.bitwise_or.reduce(np.bitwise_or.reduce(s << shifts, axis=-3), axis=-2)
    return words


def _tile_values(levels: np.ndarray, width: int) -> np.ndarray:
    """uint8 [n, 128 * width] of whole tiles: levels uint8 [n, 2 halves, 8 pairs, 4 quarters, 16]."""
    n = len(levels)
    if width == 8:
        return levels.reshape(n, -1)
    by_lane = levels.transpose(0, 2, 3, 1, 4)  # [n, pair, quarter, half, 16]
    parts = []
    if width > 1:
        parts.append(_entries(by_lane, width).reshape(n, -1))
    if width in (1, 3):
        parts.append(_bit_words(by_lane >> (width - 1)).reshape(n, -1))
    return np.concatenate(parts, axis=1)


def _pack_records(matrix: Any, plan: Plan, starts: np.ndarray) -> np.ndarray:
    n_blocks, n_tiles = len(plan.widths), matrix.columns // TILE
    real = (plan.order >= 0)[:, None]
    levels = np.where(real, matrix.levels[plan.order], 0).reshape(n_blocks, 2, 8, n_tiles, 4, GROUP)
    repeats = matrix.quant_group_size // TILE
    scales, zeros = (
        np.repeat(np.where(real, array[plan.order], 0).astype(array.dtype), repeats, axis=1)
        .reshape(n_blocks, 2, 8, n_tiles)
        .transpose(0, 3, 2, 1)  # [block, tile, pair, half]
        for array in (matrix.scales, matrix.zeros)
    )
    nibbles = zeros[..., 0] | zeros[..., 1] << 4  # [block, tile, pair]
    out = np.zeros((int(starts[-1]), ALIGNMENT), np.uint8)
    n = (plan.tiles >= 0).sum(1)
    width = plan.widths[plan.block]
    for w, count, masked in sorted(set(zip(width.tolist(), n.tolist(), plan.masked.tolist(), strict=True))):
        chosen = np.flatnonzero((width == w) & (n == count) & (plan.masked == masked))
        # A few thousand records at a time: copies of a large linear would double the memory of a build.
        for some in np.array_split(chosen, -(-len(chosen) // 4096)):
            block, tiles = plan.block[some, None], plan.tiles[some, :count]
            header = np.zeros((len(some), ALIGNMENT), np.uint8)
            header[:, :8].view(np.uint16)[:, :count] = tiles
            header[:, 8], header[:, 9], header[:, 10] = w, count, masked
            zero_bytes = np.zeros((len(some), _padded(8 * count)), np.uint8)
            zero_bytes[:, : 8 * count] = nibbles[block, tiles].reshape(len(some), -1)
            # Bare records are all of one kind.
            fields = [] if is_bare(plan.constants) else [header]
            fields += [scales[block, tiles].reshape(len(some), -1).view(np.uint8), zero_bytes]
            tile_levels = levels[block, :, :, tiles]  # [record, tile, half, pair, quarter, 16]
            if masked:
                assert plan.kept is not None  # a mask says what is kept
                if w == 2 and (nibbles[block, tiles] & 0x33).any():
                    raise ModelError("where groups are removed, zeros must be levels; 2-bit rows have others")
                kept = plan.kept.reshape(n_blocks, 2, 8, n_tiles, 4)[block, :, :, tiles]
                mask = np.zeros((len(some), TILES * 2, 4), np.uint8)
                bits = np.packbits(kept.reshape(len(some), count * 2, 32), axis=2, bitorder="little")
                mask[:, : count * 2] = bits
                fields.insert(1, mask.reshape(len(some), -1))
            else:
                values = _tile_values(tile_levels.reshape(-1, 2, 8, 4, GROUP), w)
                fields.append(values.reshape(len(some), -1))
            body = np.concatenate(fields, axis=1).reshape(len(some), -1, ALIGNMENT)
            out[starts[some, None] + np.arange(body.shape[1])] = body
            if masked:
                values = _entries(tile_levels[kept], w)
                counts = kept.sum((1, 2, 3, 4))
                begin = (starts[some] + body.shape[1]) * (ALIGNMENT // (2 * w))
                within = np.arange(len(values)) - np.repeat(np.cumsum(counts) - counts, counts)
                out.reshape(-1, 2 * w)[np.repeat(begin, counts) + within] = values
    return out.reshape(-1)


def _levels_of(entries: np.ndarray, width: int) -> np.ndarray:
    """Inverse of _entries: uint8 [..., 16]."""
    if width == 8:
        return entries
    shifts = np.arange(0, 8, 4 if width == 4 else 2, dtype=np.uint8)[:, None]
    levels = entries[..., None, :] >> shifts & (15 if width == 4 else 3)
    return levels.reshape(*entries.shape[:-1], GROUP)


def _bits_of(words: np.ndarray) -> np.ndarray:
    """Inverse of _bit_words: uint8 [..., 2, 16]."""
    shifts = (2 * np.arange(4)[:, None] + np.arange(2)[:, None, None]).astype(np.uint8)
    bits = words[..., None, None, :] >> shifts & 1
    return bits.reshape(*words.shape[:-1], 2, GROUP)


def _unpack_record(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tile numbers [n], float32 [16 rows, n, 64 columns]) of one record's bytes."""
    tiles, width, n, masked = data[:8].view(np.uint16), int(data[8]), int(data[9]), data[10]
    kept, at = None, _HEADER
    if masked:
        kept = np.unpackbits(data[at : at + 8 * n], bitorder="little").reshape(n, 2, 8, 4).astype(bool)
        at += 32
    return tiles[:n], _unpack_tiles(data[at:], width, n, kept)


def _unpack_tiles(data: np.ndarray, width: int, n: int, kept: np.ndarray | None = None) -> np.ndarray:
    """float32 [16 rows, n, 64 columns] of a record's bytes behind its header and mask.

    kept: bool [n, 2 halves, 8 pairs, 4 quarters], None for whole tiles.
    """
    scales = data[: 32 * n].view(np.float16).reshape(n, 8, 2).astype(np.float32)
    nibbles = data[32 * n : 40 * n].reshape(n, 8, 1) >> np.array([0, 4], np.uint8) & 15
    at = 32 * n + _padded(8 * n)
    levels = np.zeros((n, 2, 8, 4, GROUP), np.uint8)
    if kept is not None:
        count = int(kept.sum())
        levels[kept] = _levels_of(data[at : at + count * 2 * width].reshape(count, 2 * width), width)
    elif width == 8:
        levels = data[at:].reshape(levels.shape)
    else:
        values = data[at : at + n * 128 * width].reshape(n, -1)
        lanes = np.zeros((n, 8, 4, 2, GROUP), np.uint8)
        low = values[:, : 512 if width == 4 else 256]
        if width > 1:
            lanes = _levels_of(low.reshape(n, 8, 4, 2, -1), 2 if width == 3 else width)
        if width in (1, 3):
            lanes = lanes | _bits_of(values[:, -128:].reshape(n, 8, 4, 4)) << np.uint8(width - 1)
        levels = lanes.transpose(0, 3, 1, 2, 4)
    steps = nibbles * np.float32(2.0**width / _ZERO_STEPS)  # [n, pair, half]
    step = steps.transpose(0, 2, 1)[..., None, None]
    weights = (levels - step).astype(np.float32) * scales.transpose(0, 2, 1)[..., None, None]
    if kept is not None:
        weights = np.where(kept[..., None], weights, 0)
    return weights.reshape(n, ROWS, TILE).transpose(1, 0, 2)
