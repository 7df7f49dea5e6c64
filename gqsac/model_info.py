"""What a checkpoint says of the model beside its graph: its name, special tokens, tokenizer and chat template."""

import json

from gqsa_runtime.chat import ChatTemplate
from gqsa_runtime.facts import MEASURES, is_measured
from gqsa_runtime.format import MAX_NAME_CHARACTERS
from gqsa_runtime.tokenizer import Tokenizer

from gqsac.checkpoint import Checkpoint
from gqsac.errors import FormatError, ModelError
from gqsac.model_folder import read_json


def model_name(checkpoint: Checkpoint) -> str:
    """The name given at compression, else the folder's, as printable characters."""
    details = checkpoint.quantization.details if checkpoint.quantization else {}
    name = str(details.get("name") or checkpoint.path.resolve().name)
    return "".join(c if c.isprintable() else "?" for c in name)[:MAX_NAME_CHARACTERS]


def bos_token_id(checkpoint: Checkpoint) -> int | None:
    """Beginning-of-sequence token from generation_config.json, else config.json."""
    ids = _token_ids(checkpoint, "bos_token_id")
    return ids[0] if ids else None


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """All tokens that end a text; chat models often have two."""
    return _token_ids(checkpoint, "eos_token_id")


def tokenizer_json(checkpoint: Checkpoint) -> str:
    """What tokenizer.json says, one that the runtime can use, in the fewest characters: most have half their bytes in
    white space and escapes. Raises ModelError if there is none, FormatError."""
    text = checkpoint.tokenizer_json()
    vocab_size = checkpoint.config.get("vocab_size")
    try:
        Tokenizer(text, vocab_size if type(vocab_size) is int else None)
    except FormatError as error:
        raise FormatError(f"{checkpoint.path / 'tokenizer.json'}: {error}") from error
    return json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False)


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template if there is one, such that the runtime can use it. Raises FormatError."""
    template = checkpoint.chat_template()
    if template is not None:
        try:
            ChatTemplate(template).check()
        except FormatError as error:
            raise FormatError(f"{checkpoint.path}: {error}") from error
    return template


def measured(checkpoint: Checkpoint) -> dict | None:
    """What `gqsac compress` measured of the model, MEASURES; None where its report.json is missing or says nothing of
    it. Raises FormatError where it says something else."""
    file = checkpoint.path / "report.json"
    if checkpoint.quantization is None or not file.is_file():
        return None
    found = read_json(file).get("measured")
    if found is not None and not is_measured(found):
        raise FormatError(
            f"{file}: measured is {found!r}, expected {', '.join(MEASURES)}; is the file damaged? The folder can be "
            "built without it"
        )
    return found


def _token_ids(checkpoint: Checkpoint, key: str) -> tuple[int, ...]:
    for source in (checkpoint.generation_config, checkpoint.config):
        value = source.get(key)
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ModelError(f"{checkpoint.path}: {key} is {value!r}, expected a token id or a list of them")
        return tuple(ids)
    return ()
