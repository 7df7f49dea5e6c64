"""Records whose numbers would point a kernel outside its memory are refused, rule by rule, before anything runs."""

import numpy as np
import pytest
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.errors import FormatError
from gqsa_runtime.layouts import RECORDS
from gqsa_runtime.layouts.records import ALIGNMENT, MAX_RECORD_BYTES, is_bare, make_plan
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.validate import ContentChecks, validate

from tests.format import records_program, tiny
from tests.format.records_program import BARE_K, PARTS, ROWS, SOURCES, VOCAB, K
from tests.kernels.random_records import random_matrix


class Tensors(dict):
    """The sound tensors, and ways to break them."""

    def __init__(self):
        super().__init__(records_program.tensors())

    def record(self, name: str, index: int) -> np.ndarray:
        """Bytes of one record, a view."""
        start, stop = self[f"{name}.starts"][index : index + 2] * ALIGNMENT
        return self[f"{name}.records"].view(np.uint8)[start:stop]

    def first(self, masked: bool, width: int) -> np.ndarray:
        """The first record of such a kind."""
        plan = SOURCES["gate"][1]
        found = np.flatnonzero((plan.masked == masked) & (plan.widths[plan.block] == width))
        return self.record("gate", int(found[0]))

    def drop(self, name: str, n_pieces: int) -> None:
        self[name] = self[name].reshape(-1)[: -n_pieces * ALIGNMENT]


def read_all(arrays: dict, tmp_path, plan=None) -> None:
    """Opens a file of the program as the runtime does, and reads what a device would point its kernels to."""
    path = tmp_path / "records.gqsa"
    path.write_bytes(tiny.file_bytes(records_program.program(plan), dict(arrays)))
    with ArtifactFile.open(path) as file:
        validate(file.program, file.tensors)
        names = file.program.plans["cpu"].tensors(file.program.ropes)
        with CheckedTensors(file, names) as tensors:
            for name in names:
                assert tensors[name].size == arrays[name].size


def refuse(arrays: dict, message: str, tmp_path, tensor: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_all(arrays, tmp_path)
    assert f"'{tensor}'" in str(caught.value)


def test_the_program_is_sound(tmp_path):
    arrays = Tensors()
    validate(records_program.program(), records_program.infos(arrays))
    read_all(arrays, tmp_path)
    _, gated = SOURCES["gate"]
    assert [is_bare(plan.constants) for _, plan in SOURCES.values()] == [False, False, True]
    assert {8, 4, 2} == set(gated.widths) and gated.masked.any() and not gated.masked.all()


def test_every_part_has_a_rule():
    arrays = Tensors()
    checks = ContentChecks(records_program.program(), records_program.infos(arrays))
    # Bare records hold no number by which a kernel looks for anything.
    expected = {f"{name}.{part}" for name in SOURCES for part in PARTS} - {"bare.records", "bare.starts"}
    assert set(checks.names) == expected


def _set(array: str, place: int, value: int):
    def change(arrays: Tensors):
        arrays[array][place] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set("gate.starts", 0, 1),
        _set("gate.starts", 0, -1),
        _set("gate.starts", -1, 3),
        _set("gate.starts", -1, 2**31 - 1),
        _set("gate.starts", 2, 0),
        _set("gate.starts", 2, -(2**31)),
        _set("gate.starts", 2, 2**31 - 1),
        lambda arrays: arrays["gate.starts"].__setitem__(2, arrays["gate.starts"][1]),
        lambda arrays: arrays["gate.starts"].__setitem__(slice(1, 3), arrays["gate.starts"][2:0:-1].copy()),
        lambda arrays: arrays.drop("gate.records", 1),
        lambda arrays: arrays.update({"gate.records": np.append(arrays["gate.records"], np.zeros(ALIGNMENT, np.int8))}),
    ],
)
def test_starts_rise_to_the_end_of_the_records(tmp_path, change):
    arrays = Tensors()
    change(arrays)
    refuse(arrays, "does not rise from 0 to", tmp_path, "gate.starts")


def test_no_record_is_larger_than_the_kernels_ring(tmp_path):
    largest = SOURCES["gate"][1].constants["record_bytes"]
    plan = records_program.with_params("linear_records_t1", record_bytes=largest - ALIGNMENT)
    with pytest.raises(FormatError, match=f"at most {largest // ALIGNMENT - 1} at a time"):
        read_all(Tensors(), tmp_path, plan)
    with pytest.raises(FormatError, match="record_bytes is"):
        validate(
            records_program.program(
                records_program.with_params("linear_records_t1", record_bytes=MAX_RECORD_BYTES + 16)
            ),
            records_program.infos(Tensors()),
        )


def test_a_file_without_starts(tmp_path):
    arrays = Tensors()
    arrays["gate.starts"] = np.zeros(0, np.int32)
    refuse(arrays, "points to 0 elements of 'gate.starts', expected at least 1", tmp_path, "gate.starts")


@pytest.mark.parametrize(
    ("byte", "value", "message"),
    [
        (0, K // 64, "holds tile 5, expected below 5"),
        (6, K // 64, "holds tile 5"),
        (1, 255, "holds tile 65"),
        (8, 3, "a width that its kernel does not read"),
        (8, 0, "a width that its kernel does not read"),
        (8, 9, "a width that its kernel does not read"),
        (8, 255, "a width that its kernel does not read"),
        (8, 8, "a width that its kernel does not read"),  # of 8 bits only masked ones occur
        (9, 0, "holds a record with 0 to 4 tiles"),
        (9, 5, "holds a record with 1 to 5 tiles"),
        (9, 255, "holds a record with 1 to 255 tiles"),
        (9, 3, "bytes where its header makes it"),
        (10, 2, "holds a record with"),
        (10, 255, "holds a record with"),
        (10, 1, "a width that its kernel does not read"),  # of 4 bits only whole ones occur
    ],
)
def test_headers(tmp_path, byte, value, message):
    arrays = Tensors()
    arrays.first(masked=False, width=4)[byte] = value
    refuse(arrays, message, tmp_path, "gate.records")


def test_a_flag_that_hides_the_mask(tmp_path):
    for width in (2, 8):
        arrays = Tensors()
        arrays.first(masked=True, width=width)[10] = 0
        refuse(arrays, "width that its kernel does not read|bytes where its header", tmp_path, "gate.records")


def test_another_width_of_the_same_kind(tmp_path):
    arrays = Tensors()
    arrays.first(masked=True, width=2)[8] = 8
    refuse(arrays, "bytes where its header makes it", tmp_path, "gate.records")


def test_masks(tmp_path):
    plan = SOURCES["gate"][1]
    index = int(np.flatnonzero(plan.masked & ((plan.tiles >= 0).sum(1) < 4))[0])
    arrays = Tensors()
    arrays.record("gate", index)[16 + 31] = 1  # the last tile, which it lacks
    refuse(arrays, "groups of a tile that its record lacks", tmp_path, "gate.records")
    arrays = Tensors()
    arrays.first(masked=True, width=8)[16:48] = 255  # more groups than are stored
    refuse(arrays, "bytes where its header makes it", tmp_path, "gate.records")


def test_a_masked_record_without_room_for_its_mask():
    rule = RECORDS.rules({"rows": 16, "k": 64, "epilogue": "rows", "n_blocks": 1, "widths": 0, "masked_widths": 4,
                          "record_bytes": 64, "whole": False}, (1, 2))["records"]  # fmt: skip
    record = np.zeros(2 * ALIGNMENT, np.uint8)
    record[8:11] = 2, 1, 1
    assert "too short for its mask" in rule.broken(
        record.view(np.int8), np.array([0, 2], np.int32), np.array([0, 1], np.int32)
    )


def test_tiles_that_do_not_rise(tmp_path):
    index = int(np.flatnonzero((SOURCES["gate"][1].tiles >= 0).sum(1) == 4)[0])
    arrays = Tensors()
    tiles = arrays.record("gate", index)[:8].view(np.uint16)
    tiles[1] = tiles[0]
    refuse(arrays, "whose tiles do not rise", tmp_path, "gate.records")
    arrays = Tensors()  # the same first tile in the next record
    arrays.record("gate", index + 1)[:2] = arrays.record("gate", index)[:2]
    refuse(arrays, "whose tiles do not rise", tmp_path, "gate.records")


def test_a_record_that_is_short_before_the_last():
    matrix = random_matrix(16, 5 * 64, 4)
    plan = make_plan(matrix.row_bits, 5 * 64)
    params = {"rows": 16, "k": 5 * 64, "epilogue": "rows", **plan.constants}
    parts = {part: RECORDS.pack(part, (matrix, plan), params) for part in PARTS}
    rule = RECORDS.rules(params, (2, int(plan.sizes.sum())))["records"]
    assert rule.broken(parts["records"], parts["starts"], parts["blocks"]) is None
    records, starts = parts["records"].reshape(-1, ALIGNMENT), parts["starts"]
    swapped = np.concatenate([records[starts[1] :], records[: starts[1]]])
    swapped_starts = np.array([0, starts[2] - starts[1], starts[2]], np.int32)
    assert "not its block's last" in rule.broken(swapped.reshape(-1), swapped_starts, parts["blocks"])


def test_records_that_should_all_be_whole():
    matrix = random_matrix(32, 256, np.repeat([4, 2], 16))
    plan = make_plan(matrix.row_bits, 256)
    params = {"rows": 32, "k": 256, "epilogue": "rows", **plan.constants}
    parts = {part: RECORDS.pack(part, (matrix, plan), params) for part in PARTS}
    rule = RECORDS.rules(params, (2, int(plan.sizes.sum())))["records"]
    assert params["whole"] and rule.broken(parts["records"], parts["starts"], parts["blocks"]) is None
    parts["records"][9] = 3
    assert "3 to 4 tiles, expected 4 to 4" in rule.broken(parts["records"], parts["starts"], parts["blocks"])


@pytest.mark.parametrize(("place", "value"), [(0, 1), (0, -1), (1, 10_000), (1, -1), (-1, 0), (-1, 10_000)])
def test_blocks_rise_to_the_number_of_records(tmp_path, place, value):
    for name in SOURCES:
        arrays = Tensors()
        _set(f"{name}.blocks", place, value)(arrays)
        refuse(arrays, "does not rise from 0 to", tmp_path, f"{name}.blocks")


def _swap(name: str, a: int, b: int):
    def change(arrays: Tensors):
        order = arrays[f"{name}.order"]
        order[[a, b]] = order[[b, a]]

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gate", _set("gate.order", 0, -2), "holds rows outside"),
        ("gate", _set("gate.order", 0, ROWS), "holds rows outside"),
        ("gate", _set("gate.order", 0, 2**31 - 1), "holds rows outside"),
        ("gate", _set("gate.order", 0, 1), "does not hold each of 72 rows once"),
        ("gate", _set("gate.order", 0, -1), "does not hold each of 72 rows once"),
        ("gate", _swap("gate", 0, 1), "does not pair rows 36 apart"),
        ("gate", _swap("gate", 0, 8), "does not pair rows 36 apart"),
        ("gate", _swap("gate", 8, 15), "does not pair rows 36 apart|does not hold"),
        ("embed", _swap("embed", 0, 1), "does not hold a table's rows in order"),
        ("embed", _swap("embed", VOCAB - 1, VOCAB), "does not hold a table's rows in order"),
        ("embed", _set("embed.order", VOCAB, 0), "does not hold each of 258 rows once"),
        ("embed", _set("embed.order", 5, VOCAB), "holds rows outside"),
    ],
)
def test_order(tmp_path, name, change, message):
    arrays = Tensors()
    change(arrays)
    refuse(arrays, message, tmp_path, f"{name}.order")


def test_tables_hold_every_tile_where_kernels_look_for_it(tmp_path):
    """A kernel finds an element of a table by arithmetic: what it finds there must be what it looks for."""
    # The head's rule for the same tensor may come first.
    in_order = "all tiles of a table's rows in order|tiles do not rise|is not its block's last"
    arrays = Tensors()
    first = arrays.record("embed", 0)
    first[:8].view(np.uint16)[:2] = 1, 0
    refuse(arrays, in_order, tmp_path, "embed.records")
    # Blocks whose numbers of records differ: the last one's rows would be looked for behind all records.
    arrays = Tensors()
    arrays["embed.blocks"][1:-1] = arrays["embed.blocks"][-1]
    refuse(arrays, "does not rise from 0 to 34 by 2 at a time", tmp_path, "embed.blocks")
    # Records of one tile after another, which a linear may have.
    arrays = Tensors()
    four, one = arrays.record("embed", 0).copy(), arrays.record("embed", 1).copy()
    rest = arrays["embed.records"].view(np.uint8)[len(four) + len(one) :]
    arrays["embed.records"] = np.concatenate([one, four, rest]).view(np.int8)
    arrays["embed.starts"][1] = len(one) // ALIGNMENT
    refuse(arrays, in_order, tmp_path, "embed.records")


def test_blocks_of_whole_linears_hold_every_tile():
    """Where a kernel is told that all are there it finds a block's records by arithmetic."""
    for widths in (4, np.repeat([4, 2], 16)):  # bare ones, and such as have headers
        matrix = random_matrix(32, 512, widths)
        plan = make_plan(matrix.row_bits, 512)
        params = {"rows": 32, "k": 512, "epilogue": "rows", **plan.constants}
        assert params["whole"] and params["n_blocks"] == 2
        rule = RECORDS.rules(params, (4, int(plan.sizes.sum())))["blocks"]
        blocks = np.array([0, 2, 4], np.int32)
        assert rule.broken(blocks) is None
        assert "by 2 at a time" in rule.broken(np.array([0, 1, 4], np.int32))
    # Half of each block's tiles are gone, and still every record has four.
    keep = np.zeros((32, 32), bool)
    keep[:, :16] = True
    assert not make_plan(matrix.row_bits, 512, keep).constants["whole"]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("part", PARTS)
def test_numbers_of_elements(name, part):
    for change in (lambda array: array[:-1], lambda array: np.append(array, np.ones(1, array.dtype))):
        arrays = Tensors()
        arrays[f"{name}.{part}"] = change(arrays[f"{name}.{part}"])
        if arrays[f"{name}.{part}"].size == Tensors()[f"{name}.{part}"].size == 0:
            continue
        program, infos = records_program.program(), records_program.infos(arrays)
        if part == "starts" and name != "bare":  # says how many records there are: the blocks then end elsewhere
            with pytest.raises(FormatError, match="does not rise"):
                checks = ContentChecks(program, infos)
                for tensor in (f"{name}.starts", f"{name}.blocks"):
                    checks.check(tensor, arrays[tensor], arrays.__getitem__)
        else:
            with pytest.raises(FormatError, match="elements.*, expected"):
                validate(program, infos)


def test_a_table_smaller_than_the_vocabulary():
    plan = records_program.with_params("embedding_records_t1", rows=VOCAB - 1)
    with pytest.raises(FormatError, match="table has 257 rows for 258 tokens"):
        validate(records_program.program(plan), records_program.infos(Tensors()))


@pytest.mark.parametrize(
    ("kernel", "changes", "message"),
    [
        ("embedding_records_t1", {"widths": 1 << 2}, "4 or 8 bits alone"),
        ("embedding_records_t1", {"widths": 1 << 4 | 1 << 8}, "4 or 8 bits alone"),
        ("embedding_records_t1", {"masked_widths": 1 << 4}, "4 or 8 bits alone"),
        ("linear_records_t1", {"out_width": ROWS}, "72 rows make 72 results by the epilogue gated"),
        ("linear_records_t1", {"residual": True}, "by the epilogue gated"),
        ("head_t1", {"out_width": VOCAB - 1}, "258 rows make 257 results by the epilogue rows"),
        ("head_t1", {"n_blocks": 16}, "n_blocks is 16"),
        ("linear_records_t1", {"k": K + 8}, "whole tiles of 64"),
        ("quantize_t8", {"k": K + 8}, "expected a multiple of 64"),
        # Nothing but the constants says where bare records begin, and what is in them.
        ("embedding_records_t1", {"whole": True}, "k is 320, expected whole records of 256 columns"),
        ("bare_t1", {"k": BARE_K - 64}, "k is 192, expected whole records of 256 columns"),
        ("bare_t1", {"k": 2 * BARE_K}, "6624 elements of 'bare.records', expected at least 13248"),
        ("bare_t1", {"record_bytes": 2224}, "record_bytes is 2224, expected 2208 for four tiles of 4 bits"),
        ("bare_t1", {"record_bytes": 2192}, "record_bytes is 2192, expected 2208"),
        ("bare_t1", {"widths": 1 << 8}, "record_bytes is 2208, expected 4256"),
        ("bare_t1", {"widths": 1 << 8, "record_bytes": 4256}, "6624 elements of 'bare.records', expected"),
        ("bare_t1", {"widths": 1 << 2, "record_bytes": 1184}, "elements.*, expected"),
        ("bare_t1", {"n_blocks": 4}, "elements.*, expected"),
        ("bare_t1", {"n_blocks": (1 << 27) - 1}, "n_blocks is 134217727, whose records take"),
        ("bare_t1", {"n_blocks": 2}, "n_blocks is 2, expected blocks"),
        # Records that are not bare have starts.
        ("bare_t1", {"whole": False}, "points to 0 elements of 'bare.starts', expected at least 1"),
        ("bare_t1", {"widths": 1 << 2 | 1 << 4}, "points to 0 elements of 'bare.starts', expected at least 1"),
        ("bare_t1", {"masked_widths": 1 << 4}, "points to 0 elements of 'bare.starts', expected at least 1"),
        ("bare_t1", {"widths": 0}, "points to 0 elements of 'bare.starts', expected at least 1"),
    ],
)
def test_constants_that_do_not_fit_together(kernel, changes, message):
    plan = records_program.with_params(kernel, **changes)
    with pytest.raises(FormatError, match=message):
        validate(records_program.program(plan), records_program.infos(Tensors()))


def test_kernels_that_read_one_table_agree_on_it(tmp_path):
    """A kernel for 4 bits does not read a table of 8, whoever else may."""
    plan = records_program.with_params("embedding_records_t8", widths=1 << 4)
    with pytest.raises(FormatError, match="a width that its kernel does not read"):
        read_all(Tensors(), tmp_path, plan)
