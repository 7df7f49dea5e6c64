"""Tokenizers from strangers: those of real models are accepted, hostile ones end in one clear sentence."""

import base64
import copy
import json
import struct
import time

import pytest
from gqsa_runtime import tokenizer_schema
from gqsa_runtime.errors import FormatError, InputError
from gqsa_runtime.tokenizer import Tokenizer

from tests.fuzz import tokenizers as families
from tests.fuzz.limited import run_limited

SECONDS, MEMORY_BYTES = 5, 64 << 20


def outcome(raw, vocab_size=families.VOCAB_SIZE):
    """How a child ends that uses the tokenizer."""
    text = raw if isinstance(raw, str) else json.dumps(raw)
    return run_limited(lambda: families.use(text, vocab_size), SECONDS, MEMORY_BYTES)


def refused(raw, match: str, vocab_size=families.VOCAB_SIZE) -> None:
    found = outcome(raw, vocab_size)
    assert found.kind == "refused" and match in found.detail, found
    assert found.detail.startswith("the file's tokenizer cannot be read (") and len(found.detail) < 400


def changed(family: str, *path, to) -> dict:
    """A family's tokenizer with the field at a path set."""
    raw = copy.deepcopy(families.FAMILIES[family]())
    place = raw
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return raw


@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_of_models_are_accepted(family):
    raw = families.FAMILIES[family]()
    assert outcome(raw).kind == "accepted"
    tokenizer = Tokenizer(json.dumps(raw), families.VOCAB_SIZE)
    if family not in ("unigram", "word_piece", "word_level"):
        for text in families.TEXTS:
            assert tokenizer.decode(tokenizer.encode(text)).strip(" ") == text.strip(" ")


@pytest.mark.parametrize("name", ["qwen2-novels", "opt-novels"])
def test_trained_tokenizers_are_accepted(shared_model, name):
    text = (shared_model(name) / "tokenizer.json").read_text()
    assert families.use(text, 8192) == "used"


def replaced(pattern: dict, content: str = "x") -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(units: list[int], strings: bytes = b"x\0") -> dict:
    data = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + strings
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def test_a_table_of_characters():
    # Each unit: label in bits 0-7, a leaf's mark in bit 8, where children are counted from in bits 10 up.
    units = [256 << 10] + [0] * 767
    units[256 ^ ord("a")] = ord("a") | 1 << 8 | (256 ^ ord("a") ^ 512) << 10
    units[512] = 1 << 31
    raw = changed("unigram", "normalizer", to=charsmap(units))
    assert outcome(raw).kind == "accepted"
    assert Tokenizer(json.dumps(raw)).decode(Tokenizer(json.dumps(raw)).encode("a")) == "x"
    wild = list(units)
    wild[256 ^ ord("a")] = ord("a") | 1 << 8 | 0x1FFFF << 10
    refused(changed("unigram", "normalizer", to=charsmap(wild)), "precompiled_charsmap: its trie points past its end")
    refused(changed("unigram", "normalizer", to=charsmap([1 << 20])), "its trie points past its end")
    lost = [*units[:512], 1 << 31 | 77, *units[513:]]
    refused(changed("unigram", "normalizer", to=charsmap(lost)), "its trie points to no string")
    refused(changed("unigram", "normalizer", to=charsmap(lost, "é".encode() + b"\0")), "its trie points to no string")
    refused(changed("unigram", "normalizer", to=charsmap(units, b"x" * 300 + b"\0")), "more than 256 bytes")
    refused(changed("unigram", "normalizer", to=charsmap(units, b"\xff\0")), "its strings are not UTF-8")
    for text, match in (("é", "it is not base64"), ("AAAA", "it has 3 bytes"), ("/////w==", "its trie has")):
        table = {"type": "Precompiled", "precompiled_charsmap": text}
        refused(changed("unigram", "normalizer", to=table), match)


@pytest.mark.parametrize(
    ("family", "path", "value", "match"),
    [
        # Counts and patterns on which the library panics or aborts
        ("llama2", ("normalizer",), replaced({"String": ""}), "normalizer.pattern is '0 characters', expected 1 to"),
        ("llama2", ("normalizer",), replaced({"Regex": "a*"}), "normalizer.pattern matches the empty string"),
        ("llama2", ("decoder",), replaced({"String": ""}), "decoder.pattern is '0 characters'"),
        ("word_level", ("pre_tokenizer", "pretokenizers", 6, "length"), 0, "length is 0, expected an integer from 1"),
        ("llama2", ("decoder", "decoders", 3, "stop"), 5, "stop is 5, expected an integer from 0 to 0"),
        ("llama2", ("decoder", "decoders", 3, "start"), -1, "start is -1"),
        ("llama3", ("post_processor", "processors", 1, "special_tokens"), {}, "single[0].id is '<|begin_of_text|>'"),
        ("llama2", ("post_processor", "special_tokens", "<s>", "ids"), [], "name, ids and tokens do not fit"),
        ("llama2", ("post_processor", "single"), [], "single holds the sequences []"),
        ("word_level", ("model", "unk_token"), "<none>", "model.unk_token is '<none>', which its vocabulary has not"),
        ("word_piece", ("model", "unk_token"), "<none>", "model.unk_token is '<none>', which its vocabulary has not"),
        ("unigram", ("model", "unk_id"), None, "model.unk_id is None, expected an integer from 0 to 30"),
        ("unigram", ("model", "unk_id"), 31, "model.unk_id is 31, expected an integer from 0 to 30"),
        ("unigram", ("model", "vocab"), [], "the number of tokens in model.vocab is 0"),
        ("gpt2", ("model", "continuing_subword_prefix"), "##", "continuing_subword_prefix '##'"),
        # Ids
        ("gpt2", ("model", "vocab", "he"), 1024, "model.vocab['he'] is 1024, expected an integer from 0 to 1023"),
        ("gpt2", ("model", "vocab", "he"), -1, "model.vocab['he'] is -1"),
        ("gpt2", ("added_tokens", 0, "id"), 4096, "added_tokens[0].id is 4096"),
        ("llama2", ("post_processor", "special_tokens", "<s>", "ids"), [1 << 31], "ids[0] is 2147483648"),
        ("word_piece", ("post_processor", "sep"), ["[SEP]", 5000], "post_processor.sep[1] is 5000"),
        # Types and names
        ("gpt2", ("pre_tokenizer", "use_regex"), 1, "pre_tokenizer.use_regex is 1, expected true or false"),
        ("gpt2", ("pre_tokenizer", "type"), "Magic", "pre_tokenizer.type is 'Magic', expected one of Sequence, "),
        ("gpt2", ("decoder", "type"), "CTC", "decoder.type is 'CTC', expected one of"),
        ("llama2", ("model", "type"), "Neural", "model.type is 'Neural', expected one of BPE, "),
        ("llama2", ("model", "dropout"), 0.5, "model.dropout is 0.5"),
        ("llama2", ("model", "spell"), 1, "model has the field 'spell', which is not known here"),
        ("llama2", ("normalizer", "normalizers", 1, "pattern"), {"Glob": "*"}, "pattern is 'Glob'"),
        ("word_piece", ("model", "max_input_chars_per_word"), 1 << 40, "max_input_chars_per_word is 1099511627776"),
        ("gpt2", ("added_tokens", 0, "content"), "", "added_tokens[0].content is '0 characters'"),
        ("gpt2", ("added_tokens", 0, "content"), "x" * 5000, "added_tokens[0].content is '5000 characters'"),
        # Patterns that backtrack for ever
        ("llama3", ("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(a+)+b"}, "it repeats something"),
        ("llama3", ("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(a|a)*b"}, "it repeats something"),
        ("llama3", ("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": r"\s*\s*\s*b"}, "it tries several"),
        ("llama3", ("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "a?" * 30 + "b"}, "too many ways"),
        ("llama3", ("pre_tokenizer", "pretokenizers", 0, "pattern"), {"Regex": "(?<a>x)"}, "which is not supported"),
        # Growth, numbers of components, nesting
        ("llama2", ("normalizer", "normalizers"), [replaced({"String": "a"}, "aa")] * 30, "lengthen a text up to"),
        ("llama2", ("normalizer", "normalizers"), [replaced({"String": "a"}, "aa")] * 40, "at most 32"),
        ("llama2", ("decoder", "decoders"), [replaced({"String": "a"}, "aa")] * 30, "its decoder lengthens a text"),
        ("llama2", ("normalizer",), replaced({"String": "a"}, "b" * 65), "content is '65 characters'"),
    ],
)  # fmt: skip
def test_hostile_tokenizers(family, path, value, match):
    refused(changed(family, *path, to=value), match)


def test_deep_nesting():
    part = {"type": "NFC"}
    for _ in range(5):
        part = {"type": "Sequence", "normalizers": [part]}
    refused(changed("llama2", "normalizer", to=part), "nested at most 4 deep")
    refused('{"model": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep")


def test_floods_are_refused_before_they_are_parsed():
    refused('{"model": [' + "[]," * 3_000_000 + "0]}", "more than 2097152 lists and objects")
    refused('{"model": [' + "0," * 17_000_000 + "0]}", "or 16777216 values")


def test_a_name_twice():
    text = json.dumps(families.gpt2())
    refused(text.replace('"vocab":', '"vocab": {}, "vocab":'), "names 'vocab' twice in one object")


def test_what_panics_after_all_is_typed(monkeypatch):
    """Should a component slip through the schema, a panic of the library is still a FormatError."""
    monkeypatch.setattr(tokenizer_schema, "check", lambda text, vocab_size: 16)
    found = outcome(changed("word_level", "pre_tokenizer", "pretokenizers", 6, "length", to=0))
    assert found.kind == "refused" and "tokenizer fails on this text" in found.detail, found


def test_the_length_of_a_prompt():
    tokenizer = Tokenizer(json.dumps(families.gpt2()))
    assert len(tokenizer.encode("a" * 640, max_tokens=10)) == 640  # the tokens are for the caller to count
    with pytest.raises(InputError, match="the text has 641 characters, which is more than 10 tokens can hold"):
        tokenizer.encode("a" * 641, max_tokens=10)
    long = Tokenizer(json.dumps(changed("gpt2", "model", "vocab", "x" * 100, to=300)))
    assert tokenizer.longest_token == len("<|endoftext|>") and long.longest_token == 100
    assert len(long.encode("a" * 1000, max_tokens=10)) == 1000


def test_a_long_text_is_read_aside_and_gives_the_same():
    tokenizer = Tokenizer(json.dumps(families.llama3()))
    text = "The answer's 1234.\n" * 4000
    short = tokenizer.encode("The answer's 1234.\n", add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False) == short * 4000
    assert tokenizer.encode(text)[1:] == short * 4000


def test_tokens_that_are_no_tokens():
    with pytest.raises(FormatError, match="fails on these tokens"):
        Tokenizer(json.dumps(families.gpt2())).decode([-1])


def test_a_message_costs_no_more_for_what_is_nested_in_its_value():
    """repr() takes a time that grows with depth times length."""
    value = "0" * 40
    for _ in range(600):
        value = [value, "x" * 5000]
    raw = changed("gpt2", "added_tokens", 0, "id", to=value)
    began_s = time.thread_time()
    with pytest.raises(FormatError, match=r"added_tokens\[0\].id is \[\["):
        Tokenizer(json.dumps(raw))
    assert time.thread_time() - began_s < 0.5
