"""docs/format.md says what the code has, and files of every version are met as they were when they were written."""

import gzip
import itertools
import re
from pathlib import Path

import pytest
from gqsa_runtime import chat, machine_code, patterns, reader, session, tokenizer, tokenizer_schema
from gqsa_runtime import format as gqsa
from gqsa_runtime.errors import FormatError
from gqsa_runtime.layouts import GROUP_WORDS, RECORDS, group_words, records
from gqsa_runtime.program import FAMILIES, PHASES
from gqsa_runtime.verify import verify_file

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"
# The tiny programs of this folder, as the sources of the day wrote them. They are never made anew; a new version of
# the format adds its own.
GOLDEN = Path(__file__).with_name("golden")
MI, KI = 1 << 20, 1 << 10


def words(text: str) -> str:
    """A text whose lines are broken anywhere."""
    return " ".join(text.split())


def thousands(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def listed(numbers) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}"


LIMITS = reader._MAX_VALUE_BYTES
STATEMENTS = {
    "magic": f"| 4 | magic `{gqsa.GGUF_MAGIC.decode()}` |",
    "gguf version": f"| 4 | uint32 GGUF version, {gqsa.GGUF_VERSION} |",
    "tensors": f"number of tensors (at most {thousands(reader.MAX_TENSORS)})",
    "keys": f"number of metadata keys (at most {thousands(reader.MAX_METADATA)})",
    "padding": f"each tensor followed by zeros up to a multiple of {gqsa.ALIGNMENT}",
    "header": f"is at most {gqsa.MAX_HEADER_BYTES // MI} MiB",
    "program": f"the launch plan at most {LIMITS[gqsa.KEY_PROGRAM] // MI} MiB",
    "record and template": f"the compiler's record and the chat template {LIMITS[gqsa.KEY_COMPILER] // MI} MiB each",
    "name": f"the name {LIMITS[gqsa.KEY_NAME] // KI} KiB",
    "value types": f"uint32 (type {reader._VALUE_UINT32}), bool ({reader._VALUE_BOOL}; 0 or 1) or "
    f"string ({reader._VALUE_STRING})",
    "architecture": f"`{gqsa.KEY_ARCHITECTURE}` is `{gqsa.ARCHITECTURE}`",
    "alignment": f"`{gqsa.KEY_ALIGNMENT}` is {gqsa.ALIGNMENT}",
    "version": f"`{gqsa.KEY_FORMAT_VERSION}` is {gqsa.FORMAT_VERSION}.",
    "version in the table": f"| `{gqsa.KEY_FORMAT_VERSION}` | uint32 | {gqsa.FORMAT_VERSION} |",
    "tensor name": f"is 1 to {gqsa.MAX_NAME_BYTES} bytes",
    "rank": f"its rank is 1 to {reader.MAX_DIMENSIONS}",
    "tensor types": listed(f"{name.upper()} ({number})" for number, (name, _) in gqsa.TENSOR_TYPES.items()),
    "digests": f"`{gqsa.DIGESTS_TENSOR}`, I8 `[number of tensors, {reader._DIGEST_BYTES}]`",
    "block": f"A block is {records.ROWS} rows of one width; a tile is {records.TILE} of their columns; a record holds "
    f"up to {records.TILES} tiles",
    "group": f"A group is {records.GROUP} columns of a row",
    "widths": f"one width of {listed(records.WIDTHS)} bits",
    "masked widths": f"is masked, which needs {listed(records.MASKED_WIDTHS)} bits",
    "zero steps": f"zero * 2^width / {records._ZERO_STEPS}",
    "record header": f"| {records._HEADER}, unless bare | uint16 numbers of its tiles [{records.TILES}]",
    "record alignment": f"where each begins, in multiples of {records.ALIGNMENT} bytes",
    "order": f"| order | I32 `[{records.ROWS} * n_blocks]`",
    "group bits": f"bit width `bits` ({listed(GROUP_WORDS.constants['bits'])})",
    "group sizes": f"group size `G` ({listed(GROUP_WORDS.constants['group_size'])})",
    "columns": f"limits a row to {group_words.MAX_COLUMNS} groups",
    "fixed zero": f"8-bit groups have the fixed zero {group_words.ZERO_OF_8_BIT}",
    "machine code": f"one LZMA2 stream with a dictionary of {machine_code.DICTIONARY_BYTES // MI} MiB",
    "code of a target": f"at most {machine_code.MAX_BYTES // MI} MiB. The stream",
    "piece of code": f"{machine_code._PIECE_BYTES // MI} MiB beyond `n_bytes`",
    "tokenizer": f"JSON of at most {tokenizer_schema.MAX_CHARACTERS // MI} Mi characters, "
    f"{tokenizer_schema._MAX_CONTAINERS // MI} Mi lists and objects and {tokenizer_schema._MAX_VALUES // MI} Mi values",
    "token": f"tokens of at most {tokenizer_schema._MAX_TOKEN_CHARACTERS} characters",
    "components": f"at most {tokenizer_schema._MAX_COMPONENTS} of a kind, nested at most "
    f"{tokenizer_schema._MAX_NESTING} deep",
    "patterns": f"regular expressions of at most {patterns.MAX_CHARACTERS} characters",
    "growth": f"lengthen a text at most {tokenizer_schema._MAX_GROWTH} times",
    "longest token": f"(the longest token's, but at least {tokenizer._MIN_LONGEST_TOKEN}, each)",
    "template": f"At most {chat.MAX_TEMPLATE_CHARACTERS // KI} Ki characters.",
    "template's limits": f"{chat._MEMORY_BYTES // MI} MB of memory and {chat._CPU_S} s of processor time",
    "template's time": f"After {chat._SECONDS:g} s the child is ended",
    "session": f"`{session._MAGIC.decode()}`, uint32 version ({session._VERSION})",
}


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_the_document_states(statement):
    assert words(statement) in words(DOCUMENT.read_text())


def table(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, without its head."""
    below = re.split(rf"^#+ {re.escape(heading)}\n", DOCUMENT.read_text(), flags=re.M)[1].splitlines()
    rows = itertools.takewhile(_is_row, itertools.dropwhile(lambda line: not _is_row(line), below))
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in list(rows)[2:]]


def _is_row(line: str) -> bool:
    return line.startswith("|")


def test_tables_name_what_there_is():
    keys = {value for name, value in vars(gqsa).items() if name.startswith("KEY_")}
    assert {row[0].strip("`") for row in table("Metadata")} == keys
    for heading, layout in (("Records", RECORDS), ("Groups with a word each", GROUP_WORDS)):
        held = [(name, dtype.split()[0].lower()) for name, dtype, *_ in table(heading)]
        assert held == [(part.name, part.dtype) for part in layout.parts]
    phases = {phase for row in table("The launch plan") for phase in re.findall(r"`(\w+)`", row[0])}
    assert phases == set(PHASES)
    binaries = DOCUMENT.read_text().partition("## Binaries")[2].partition("\n## ")[0]
    assert all(f"`{kind}` (" in binaries for kind in FAMILIES)


def golden(tmp_path, name: str) -> Path:
    path = tmp_path / "golden.gqsa"
    path.write_bytes(gzip.decompress((GOLDEN / f"{name}.gqsa.gz").read_bytes()))
    return path


@pytest.mark.parametrize("name", ["version-4", "version-4-records"])
def test_a_file_of_this_version_opens(tmp_path, name):
    assert verify_file(golden(tmp_path, name)).n_tensors > 5


@pytest.mark.parametrize("name", ["version-1", "version-2", "version-2-records", "version-3", "version-3-records"])
def test_a_file_of_an_older_version_is_told_how_to_be_made_anew(tmp_path, name):
    message = f"version {name[8]}, this runtime reads version 4; rebuild it with `gqsac build`"
    with pytest.raises(FormatError, match=message):
        verify_file(golden(tmp_path, name))


def test_every_version_has_a_golden_file():
    versions = {int(re.match(r"version-(\d+)", path.name).group(1)) for path in GOLDEN.iterdir()}
    assert versions == set(range(1, gqsa.FORMAT_VERSION + 1))
