"""The .gqsa file format: every name and number that the writer and the reader share.

A .gqsa file is a strict subset of GGUF v3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
`docs/format.md` explains it in prose; this module is its only definition in code.
"""

import json
from typing import Any, Final

GGUF_MAGIC: Final = b"GGUF"
GGUF_VERSION: Final = 3
ARCHITECTURE: Final = "gqsa"
FORMAT_VERSION: Final = 4
ALIGNMENT: Final = 64  # bytes; every tensor starts on a cache line and on a 16-byte load boundary
MAX_NAME_BYTES: Final = 63  # llama.cpp refuses longer tensor names
MAX_NAME_CHARACTERS: Final = 256  # of the names that are shown to people
MAX_PROGRAM_CHARACTERS: Final = 8 << 20  # two plans of 126 layers have a quarter; parsing can take 25 times it
MAX_HEADER_BYTES: Final = 256 << 20  # a header larger than this is refused before it is read

KEY_ARCHITECTURE: Final = "general.architecture"
KEY_ALIGNMENT: Final = "general.alignment"
KEY_NAME: Final = "general.name"
KEY_FORMAT_VERSION: Final = "gqsa.format_version"
KEY_PROGRAM: Final = "gqsa.program"  # JSON, see program.Program
KEY_TOKENIZER: Final = "tokenizer.huggingface.json"
KEY_CHAT_TEMPLATE: Final = "tokenizer.chat_template"
KEY_COMPILER: Final = "gqsa.compiler"  # JSON: gqsac version, NVRTC version, build options
KEY_FACTS: Final = "gqsa.facts"  # JSON, see facts.py; may be missing
FACTS_CHARACTERS: Final = 256

# The last tensor of a file: sha256 of the header bytes, then of every other tensor in table order.
DIGESTS_TENSOR: Final = "gqsa.digests"  # I8 [n_tensors, 32]

# GGML type id -> (name, bytes per element). No other type may occur.
TENSOR_TYPES: Final = {
    0: ("f32", 4),
    1: ("f16", 2),
    24: ("i8", 1),
    25: ("i16", 2),
    26: ("i32", 4),
}


def canonical_json(value: Any) -> str:
    """JSON text that is the same for the same value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
