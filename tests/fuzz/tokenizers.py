"""Small tokenizers of the families that models have, faithful in every component, and what is asked of each."""

from __future__ import annotations

from gqsa_runtime.tokenizer import TextStream, Tokenizer
from tokenizers import pre_tokenizers

WORDS = ("he", "ll", "lo", "wor", "ld", " t", "he ")
TEXTS = ("Hello, world!\n\n  The answer's 1234.\t", "naïve 👍🏽 日本 \ufdfa \x00 \u1d16f", "   ", "", "a" * 300)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)


def added(*contents: str, first: int) -> list[dict]:
    """Special tokens as tokenizer.json lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": first + index, "content": content, **flags} for index, content in enumerate(contents)]


def _file(model: dict, **parts) -> dict:
    empty = {"truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
             "post_processor": None, "decoder": None}  # fmt: skip
    return {"version": "1.0", **empty, **parts, "model": model}


def _byte_level(**changes) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False, **changes}


def _split(pattern: str, **changes) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False, **changes}


def _begins_with(token: str, token_id: int) -> dict:
    def pieces(*names: str) -> list[dict]:
        return [
            piece
            for index, name in enumerate(names)
            for piece in (
                {"SpecialToken": {"id": token, "type_id": index}},
                {"Sequence": {"id": name, "type_id": index}},
            )
        ]

    special = {token: {"id": token, "ids": [token_id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": pieces("A"), "pair": pieces("A", "B"), "special_tokens": special}


def _bpe(vocabulary: list[str], merges: list[list[str]], **changes) -> dict:
    return {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(vocabulary)}, "merges": merges, **changes,
    }  # fmt: skip


_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGES = [["h", "e"], ["l", "l"], ["Ġ", "t"], ["Ġt", "he"]]
_BYTE_VOCABULARY = [*_BYTES, *("".join(merge) for merge in _MERGES)]
_FIRST_SPECIAL = len(_BYTE_VOCABULARY)
VOCAB_SIZE = 1024


def gpt2() -> dict:
    """GPT-2's own file: a model without a type, an unknown token that is no token."""
    model = _bpe(_BYTE_VOCABULARY, [" ".join(merge) for merge in _MERGES], unk_token="", continuing_subword_prefix="",
                 end_of_word_suffix="")  # fmt: skip
    for name in ("type", "byte_fallback", "ignore_merges"):
        del model[name]
    return _file(
        model,
        added_tokens=added("<|endoftext|>", first=_FIRST_SPECIAL),
        pre_tokenizer=_byte_level(use_regex=True),
        post_processor=_byte_level(add_prefix_space=True),
        decoder=_byte_level(),
    )


def llama2() -> dict:
    """SentencePiece as transformers converts it: BPE with bytes for what it does not know."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "he", "▁he"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return _file(
        _bpe(vocabulary, [["h", "e"], ["▁", "he"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True),
        added_tokens=added("<unk>", "<s>", "</s>", first=0),
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
        post_processor=_begins_with("<s>", 1),
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )


def mistral() -> dict:
    """The same with Metaspace in place of the normalizer."""
    made = llama2()
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {**made, "normalizer": None, "pre_tokenizer": metaspace}


def gemma() -> dict:
    """Spaces replaced, and a split that keeps them with the word before."""
    made = llama2()
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return {**made, "normalizer": made["normalizer"]["normalizers"][1], "pre_tokenizer": split}


def _split_bytes(*patterns: str, **parts) -> dict:
    special = added("<|begin_of_text|>", "<|end_of_text|>", first=_FIRST_SPECIAL)
    return _file(
        _bpe(_BYTE_VOCABULARY, _MERGES, ignore_merges=True),
        **{
            "added_tokens": special,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(_split, patterns), _byte_level()]},
            "post_processor": {
                "type": "Sequence",
                "processors": [_byte_level(), _begins_with("<|begin_of_text|>", _FIRST_SPECIAL)],
            },
            "decoder": _byte_level(),
            **parts,
        },
    )


def llama3() -> dict:
    """A regular expression that splits, then bytes."""
    return _split_bytes(LLAMA3_SPLIT)


def qwen2() -> dict:
    """The same over composed characters, without a begin of text."""
    return _split_bytes(
        LLAMA3_SPLIT.replace("{1,3}", ""), normalizer={"type": "NFC"}, post_processor=_byte_level(trim_offsets=False)
    )


def gpt4o() -> dict:
    """Capitals split apart, as GPT-4o and its kin have it."""
    made = _split_bytes(GPT4O_SPLIT)
    made["pre_tokenizer"]["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    return made


def deepseek() -> dict:
    """Three splits one after another."""
    return _split_bytes(*DEEPSEEK_SPLITS, normalizer={"type": "Sequence", "normalizers": []})


def unigram() -> dict:
    """SentencePiece's other model, with scores."""
    tokens = ["<unk>", "▁", *(chr(code) for code in range(97, 123)), "▁he", "llo", "▁world"]
    scored = [[token, -float(index)] for index, token in enumerate(tokens)]
    return _file(
        {"type": "Unigram", "unk_id": 0, "byte_fallback": False, "vocab": scored},
        added_tokens=added("<unk>", first=0),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Nmt"}, {"type": "NFKC"}, {"type": "Strip", "strip_left": False, "strip_right": True},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"},
            ],
        },
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    )  # fmt: skip


def word_piece() -> dict:
    """BERT's."""
    tokens = ["[UNK]", "[CLS]", "[SEP]", *(chr(code) for code in range(97, 123)), "##e", "##l", "##o", "he"]
    return _file(
        {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
         "vocab": {token: index for index, token in enumerate(tokens)}},
        added_tokens=added("[UNK]", "[CLS]", "[SEP]", first=0),
        normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                    "lowercase": True},
        pre_tokenizer={"type": "BertPreTokenizer"},
        post_processor={"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 1]},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    )  # fmt: skip


def word_level() -> dict:
    """Whole words, after every pre-tokenizer that is left."""
    steps = [{"type": "Whitespace"}, {"type": "Digits", "individual_digits": True},
             {"type": "Punctuation", "behavior": "Isolated"}, {"type": "CharDelimiterSplit", "delimiter": "-"},
             {"type": "UnicodeScripts"}, {"type": "WhitespaceSplit"}, {"type": "FixedLength", "length": 5}]  # fmt: skip
    return _file(
        {"type": "WordLevel", "unk_token": "<unk>", "vocab": {"<unk>": 0, "Hello": 1, "world": 2, "The": 3}},
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": name} for name in ("NFD", "StripAccents", "Lowercase", "NFKD")],
        },
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        post_processor={"type": "RobertaProcessing", "sep": ["<unk>", 0], "cls": ["<unk>", 0], "trim_offsets": True,
                        "add_prefix_space": True},
        decoder={"type": "BPEDecoder", "suffix": "</w>"},
    )  # fmt: skip


FAMILIES = {
    made.__name__: made
    for made in (gpt2, llama2, mistral, gemma, llama3, qwen2, gpt4o, deepseek, unigram, word_piece, word_level)
}


def use(text: str, vocab_size: int | None = VOCAB_SIZE) -> str:
    """Does all that a runtime does with a tokenizer: reads it, encodes, decodes, streams."""
    tokenizer = Tokenizer(text, vocab_size)
    for prompt in TEXTS:
        ids = tokenizer.encode(prompt, max_tokens=4096)
        assert all(0 <= token < (vocab_size or 1 << 32) for token in ids), "a token outside the vocabulary"
        tokenizer.encode(prompt, add_special_tokens=False)
        tokenizer.decode(ids)
        stream = TextStream(tokenizer, ids)
        for token in (*ids[:20], 0, 1, VOCAB_SIZE - 1):
            stream.push(token)
        stream.flush()
    tokenizer.token(0)
    return "used"
