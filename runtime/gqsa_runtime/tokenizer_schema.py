"""What we accept in a tokenizer.json, checked before the `tokenizers` library sees it.

The library trusts its file: a count of 0, an index that points nowhere or a token that is missing ends in a Rust panic
or in the end of the process, and nothing bounds what a chain of replacements makes of a text. The fields and types of
each component stand here, with the bounds that keep each of them harmless; what is not here is refused by name.
Source: the components of tokenizers 0.20 to 0.23 (https://huggingface.co/docs/tokenizers/api/).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gqsa_runtime import charsmap, patterns
from gqsa_runtime.typecheck import brief

MAX_CHARACTERS = 128 << 20  # a vocabulary of 262 144 with its merges, indented, has 33 million
_MAX_CONTAINERS = 2 << 20  # that vocabulary has 580 604 merges, a list each
_MAX_VALUES = 16 << 20
_MAX_TOKENS = 4 << 20
_MAX_ADDED = 1 << 16
_MAX_TOKEN_CHARACTERS = 4096
_MAX_AFFIX = 64
_MAX_COMPONENTS = 32
_MAX_NESTING = 4
_MAX_GROWTH = 64
_MAX_SPECIAL_TOKENS = 64
_MAX_WORD_CHARACTERS = 256  # each part of a word is looked up: cubic in its length


class TokenizerError(ValueError):
    """A tokenizer.json that is refused; the message says where, what was found and what was expected."""


def check(text: str, vocab_size: int | None = None) -> int:
    """Characters of the longest token of a tokenizer.json. Raises TokenizerError where it is not accepted.

    vocab_size: of the model; every id must be below it.
    """
    raw = _parse(text)
    ids = _Integer(0, _MAX_TOKENS if vocab_size is None else vocab_size)
    _fields(
        raw,
        "the tokenizer",
        {"model": _object},
        {"version": _optional(_Text()), "truncation": _optional(_object), "padding": _optional(_object),
         "added_tokens": _optional(_Listed(_object, _MAX_ADDED)), **dict.fromkeys(_KINDS, _optional(_object))},
    )  # fmt: skip
    longest = max(1, _check_model(raw["model"], ids))
    for index, token in enumerate(raw.get("added_tokens") or ()):
        where = f"added_tokens[{index}]"
        _fields(token, where, {"id": ids, "content": _Text(1, _MAX_TOKEN_CHARACTERS)}, dict.fromkeys(_FLAGS, _boolean))
        longest = max(longest, len(token["content"]))
    growth = {
        name: 1.0 if raw.get(name) is None else _Walk(kinds, ids).component(raw[name], name, 1)
        for name, kinds in _KINDS.items()
    }
    encoding, decoding = growth["normalizer"] * growth["pre_tokenizer"], growth["decoder"]
    if max(encoding, decoding) > _MAX_GROWTH:
        what = "its normalizer and pre_tokenizer lengthen" if encoding > _MAX_GROWTH else "its decoder lengthens"
        raise TokenizerError(f"{what} a text up to {max(encoding, decoding):.3g} times, allowed are {_MAX_GROWTH}")
    return longest


def _parse(text: str) -> dict[str, Any]:
    # Counted first: parsed JSON takes up to 25 times the memory of its text.
    if len(text) > MAX_CHARACTERS:
        raise TokenizerError(f"it has {len(text)} characters, allowed are {MAX_CHARACTERS}")
    if text.count("[") + text.count("{") > _MAX_CONTAINERS or text.count(",") > _MAX_VALUES:
        raise TokenizerError(f"it has more than {_MAX_CONTAINERS} lists and objects, or {_MAX_VALUES} values")
    try:
        raw = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise TokenizerError("its JSON is nested too deep") from None
    except TokenizerError:
        raise
    except ValueError as error:
        raise TokenizerError(f"it is not JSON: {error}") from None
    return _object(raw, "the tokenizer")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):  # the library could take the other one
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TokenizerError(f"its JSON names {twice[:80]!r} twice in one object")
    return made


def _no_constant(name: str) -> NoReturn:
    raise TokenizerError(f"its JSON holds {name}, which is no number")


# Values: functions of (value, where) that return the value or raise TokenizerError.

_Check = Callable[[Any, str], Any]


def _wrong(value: object, where: str, expected: str) -> NoReturn:
    raise TokenizerError(f"{where} is {brief(value)}, expected {expected}")


def _anything(value: Any, where: str) -> Any:
    """For what is checked elsewhere."""
    return value


def _boolean(value: Any, where: str) -> bool:
    return value if type(value) is bool else _wrong(value, where, "true or false")


def _object(value: Any, where: str) -> dict[str, Any]:
    return value if isinstance(value, dict) else _wrong(value, where, "an object")


def _number(value: Any, where: str) -> Any:
    finite = type(value) in (int, float) and math.isfinite(value if type(value) is float else 0.0)
    return value if finite else _wrong(value, where, "a number")


@dataclass(frozen=True)
class _Integer:
    low: int
    end: int

    def __call__(self, value: Any, where: str) -> int:
        if type(value) is int and self.low <= value < self.end:
            return value
        _wrong(value, where, f"an integer from {self.low} to {self.end - 1}")


@dataclass(frozen=True)
class _Text:
    shortest: int = 0
    longest: int = _MAX_AFFIX

    def __call__(self, value: Any, where: str) -> str:
        if type(value) is str and self.shortest <= len(value) <= self.longest:
            return value
        if type(value) is str:
            _wrong(f"{len(value)} characters", where, f"{self.shortest} to {self.longest}")
        _wrong(value, where, "a string")


@dataclass(frozen=True)
class _Listed:
    item: _Check
    longest: int

    def __call__(self, value: Any, where: str) -> list[Any]:
        if type(value) is not list:
            _wrong(value, where, "a list")
        if len(value) > self.longest:
            _wrong(f"{len(value)} items", where, f"at most {self.longest}")
        for index, item in enumerate(value):
            self.item(item, f"{where}[{index}]")
        return value


def _optional(check: _Check) -> _Check:
    return lambda value, where: None if value is None else check(value, where)


def _one_of(*names: str) -> Callable[[Any, str], str]:
    def check(value: Any, where: str) -> str:
        return value if type(value) is str and value in names else _wrong(value, where, f"one of {', '.join(names)}")

    return check


def _fields(raw: dict[str, Any], where: str, needed: Mapping[str, _Check], others: Mapping[str, _Check]) -> None:
    """Checks the fields of an object: all that are needed, and no other than those that may be there."""
    for name in needed:
        if name not in raw:
            raise TokenizerError(f"{where} has no {name!r}")
    for name, value in raw.items():
        known = needed.get(name) or others.get(name)
        if known is None:
            raise TokenizerError(f"{where} has the field {name[:80]!r}, which is not known here")
        known(value, f"{where}.{name}" if where != "the tokenizer" else name)


def _pattern(value: Any, where: str) -> int:
    """The fewest characters that a pattern matches."""
    if type(value) is not dict or len(value) != 1:
        _wrong(value, where, 'a pattern such as {"String": " "}')
    ((kind, text),) = value.items()
    _one_of("String", "Regex")(kind, where)
    _Text(1, patterns.MAX_CHARACTERS)(text, where)
    if kind == "String":
        return len(text)
    try:
        return patterns.shortest_match(text)
    except patterns.PatternError as error:
        raise TokenizerError(f"{where} is the regular expression {brief(text)}: {error}") from None


# Models: functions of (model, ids) that return the characters of the longest token.

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_AFFIX = _optional(_Text(0, _MAX_AFFIX))


def _check_model(model: dict[str, Any], ids: _Integer) -> int:
    kind = model.get("type", "BPE" if "merges" in model else None)  # GPT-2's own file names none
    if not isinstance(kind, str) or kind not in _MODELS:
        _wrong(kind, "model.type", f"one of {', '.join(_MODELS)}")
    return _MODELS[kind]({key: value for key, value in model.items() if key != "type"}, ids)


def _vocabulary(value: Any, ids: _Integer) -> int:
    vocabulary = _object(value, "model.vocab")
    if not 0 < len(vocabulary) <= _MAX_TOKENS:
        _wrong(f"{len(vocabulary)} tokens", "model.vocab", f"1 to {_MAX_TOKENS}")
    low, end = ids.low, ids.end
    for token, number in vocabulary.items():  # a hundred thousand: no function for each
        if type(number) is not int or not low <= number < end:
            ids(number, f"model.vocab[{brief(token)}]")
    return _longest(vocabulary, "model.vocab")


def _longest(tokens: Iterable[str], where: str) -> int:
    longest = max(map(len, tokens))
    if longest > _MAX_TOKEN_CHARACTERS:
        _wrong(f"a token of {longest} characters", where, f"at most {_MAX_TOKEN_CHARACTERS}")
    return longest


def _needs_unknown(model: dict[str, Any]) -> None:
    unknown = _Text(1, _MAX_TOKEN_CHARACTERS)(model["unk_token"], "model.unk_token")
    if unknown not in model["vocab"]:
        raise TokenizerError(f"model.unk_token is {brief(unknown)}, which its vocabulary has not")


def _bpe(model: dict[str, Any], ids: _Integer) -> int:
    _fields(model, "model", {"vocab": _object, "merges": _Listed(_anything, _MAX_TOKENS)},
            {"dropout": _optional(_number), "unk_token": _optional(_Text(0, _MAX_TOKEN_CHARACTERS)),
             "continuing_subword_prefix": _AFFIX, "end_of_word_suffix": _AFFIX, "fuse_unk": _boolean,
             "byte_fallback": _boolean, "ignore_merges": _boolean})  # fmt: skip
    if model.get("dropout"):
        _wrong(model["dropout"], "model.dropout", "none, for a text has one way to become tokens")
    prefix = model.get("continuing_subword_prefix")
    # The library cuts as many bytes from the right part of each merge; without a prefix it checks merges itself.
    for index, merge in enumerate(model["merges"] if prefix else ()):
        parts = merge.split(" ") if type(merge) is str else merge
        if type(parts) is not list or len(parts) != 2 or not str(parts[1]).startswith(str(prefix)):
            _wrong(
                merge, f"model.merges[{index}]", f"two tokens, the second one with continuing_subword_prefix {prefix!r}"
            )
    return _vocabulary(model["vocab"], ids)


def _word_level(model: dict[str, Any], ids: _Integer) -> int:
    _fields(model, "model", {"vocab": _object, "unk_token": _Text(1, _MAX_TOKEN_CHARACTERS)}, {})
    _needs_unknown(model)
    return _vocabulary(model["vocab"], ids)


def _word_piece(model: dict[str, Any], ids: _Integer) -> int:
    _fields(model, "model", {"vocab": _object, "unk_token": _Text(1, _MAX_TOKEN_CHARACTERS)},
            {"continuing_subword_prefix": _Text(0, _MAX_AFFIX),
             "max_input_chars_per_word": _Integer(1, _MAX_WORD_CHARACTERS + 1)})  # fmt: skip
    _needs_unknown(model)
    return _vocabulary(model["vocab"], ids)


def _unigram(model: dict[str, Any], ids: _Integer) -> int:
    _fields(model, "model", {"vocab": _Listed(_anything, _MAX_TOKENS), "unk_id": _anything},
            {"byte_fallback": _boolean})  # fmt: skip
    vocabulary = model["vocab"]
    _Integer(1, ids.end + 1)(len(vocabulary), "the number of tokens in model.vocab")
    _Integer(0, len(vocabulary))(model["unk_id"], "model.unk_id")
    for index, item in enumerate(vocabulary):
        if type(item) is not list or len(item) != 2 or type(item[0]) is not str:
            _wrong(item, f"model.vocab[{index}]", "a token and its score")
        _number(item[1], f"model.vocab[{index}][1]")
    return _longest((token for token, _ in vocabulary), "model.vocab")


_MODELS = {"BPE": _bpe, "WordLevel": _word_level, "WordPiece": _word_piece, "Unigram": _unigram}


# Components: what stands before and behind a model.


@dataclass(frozen=True)
class _Kind:
    """Fields of a component, those that must be there and others. growth: how much longer a text may become.

    parts: the field that lists other components. ids: fields that hold token ids, checked against the vocabulary.
    """

    needed: Mapping[str, _Check] = field(default_factory=dict)
    others: Mapping[str, _Check] = field(default_factory=dict)
    growth: Callable[[dict[str, Any], str], float] = lambda raw, where: 1.0
    parts: str | None = None
    check: Callable[[dict[str, Any], str, _Integer], None] | None = None


class _Walk:
    """Checks the components of one kind, nested ones included."""

    def __init__(self, kinds: Mapping[str, _Kind], ids: _Integer) -> None:
        self._kinds, self._ids, self._count = kinds, ids, 0

    def component(self, raw: Any, where: str, depth: int) -> float:
        """How much longer a component makes a text at most."""
        self._count += 1
        if depth > _MAX_NESTING or self._count > _MAX_COMPONENTS:
            raise TokenizerError(
                f"{where}: expected at most {_MAX_COMPONENTS} components, nested at most {_MAX_NESTING} deep"
            )
        name = _object(raw, where).get("type")
        if not isinstance(name, str) or name not in self._kinds:
            _wrong(name, f"{where}.type", f"one of {', '.join(self._kinds)}")
        kind = self._kinds[name]
        fields = {key: value for key, value in raw.items() if key != "type"}
        _fields(fields, where, kind.needed, kind.others)
        if kind.check:
            kind.check(fields, where, self._ids)
        if not kind.parts:
            return kind.growth(fields, where)
        factors = [
            self.component(part, f"{where}.{kind.parts}[{index}]", depth + 1)
            for index, part in enumerate(fields[kind.parts])
        ]
        return math.prod(factors)


def _replaced(raw: dict[str, Any], where: str) -> float:
    shortest = _pattern(raw["pattern"], f"{where}.pattern")
    if not shortest:
        raise TokenizerError(f"{where}.pattern matches the empty string, expected at least one character")
    return max(1.0, len(raw["content"].encode("utf-8", "surrogatepass")) / shortest)


def _mapped(raw: dict[str, Any], where: str) -> float:
    try:
        return charsmap.check(raw["precompiled_charsmap"])
    except charsmap.CharsmapError as error:
        raise TokenizerError(f"{where}.precompiled_charsmap: {error}") from None


def _replacement(raw: dict[str, Any], where: str) -> float:
    return float(len(raw["replacement"].encode("utf-8", "surrogatepass")))


def _sequence(parts: str) -> _Kind:
    return _Kind({parts: _Listed(_object, _MAX_COMPONENTS)}, parts=parts)


def _check_template(raw: dict[str, Any], where: str, ids: _Integer) -> None:
    for name, special in raw["special_tokens"].items():
        place = f"{where}.special_tokens[{brief(name)}]"
        _fields(_object(special, place), place,
                {"id": _Text(0, _MAX_TOKEN_CHARACTERS), "ids": _Listed(ids, _MAX_SPECIAL_TOKENS),
                 "tokens": _Listed(_Text(0, _MAX_TOKEN_CHARACTERS), _MAX_SPECIAL_TOKENS)}, {})  # fmt: skip
        if special["id"] != name or len(special["ids"]) != len(special["tokens"]):
            raise TokenizerError(f"{place}: its name, ids and tokens do not fit each other")
    for side in ("single", "pair"):
        for index, piece in enumerate(raw[side]):
            place = f"{where}.{side}[{index}]"
            if len(piece) != 1 or not piece.keys() <= {"Sequence", "SpecialToken"}:
                _wrong(piece, place, 'a "Sequence" or a "SpecialToken"')
            ((kind, content),) = piece.items()
            name = _one_of("A", "B") if kind == "Sequence" else _Text(0, _MAX_TOKEN_CHARACTERS)
            _fields(_object(content, place), place, {"id": name, "type_id": _Integer(0, 1 << 16)}, {})
            if kind == "SpecialToken" and content["id"] not in raw["special_tokens"]:
                _wrong(content["id"], f"{place}.id", "a name among its special_tokens")
        sequences = [piece["Sequence"]["id"] for piece in raw[side] if "Sequence" in piece]
        if len(set(sequences)) != len(sequences) or (side == "single" and sequences != ["A"]):
            raise TokenizerError(f"{where}.{side} holds the sequences {sequences}, expected each once")


def _check_frame(raw: dict[str, Any], where: str, ids: _Integer) -> None:
    for name in ("sep", "cls"):
        if len(raw[name]) != 2:
            _wrong(raw[name], f"{where}.{name}", "a token and its id")
        _Text(0, _MAX_TOKEN_CHARACTERS)(raw[name][0], f"{where}.{name}[0]")
        ids(raw[name][1], f"{where}.{name}[1]")


_ANY = _Listed(_anything, 2)
_CHARACTER = _Text(1, 1)
_BYTE_LEVEL = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), _boolean)
_METASPACE = _Kind(
    {"replacement": _CHARACTER},
    {"add_prefix_space": _boolean, "split": _boolean, "str_rep": _CHARACTER,
     "prepend_scheme": _one_of("first", "never", "always")},
    _replacement,
)  # fmt: skip
_REPLACE = _Kind({"pattern": _object, "content": _Text(0, _MAX_AFFIX)}, growth=_replaced)
_BEHAVIOR = _one_of("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")

# Growth of Unicode's forms: U+FDFA becomes 33 bytes of 3, U+1D1C0 9 of 4, U+023E lower 3 of 2.
_KINDS: dict[str, dict[str, _Kind]] = {
    "normalizer": {
        "Sequence": _sequence("normalizers"),
        "BertNormalizer": _Kind(
            others={"clean_text": _boolean, "handle_chinese_chars": _boolean, "strip_accents": _optional(_boolean),
                    "lowercase": _boolean},
            growth=lambda raw, where: 3.0,
        ),
        "ByteLevel": _Kind(others=_BYTE_LEVEL, growth=lambda raw, where: 2.0),
        "Lowercase": _Kind(growth=lambda raw, where: 1.5),
        "NFC": _Kind(growth=lambda raw, where: 3.0),
        "NFD": _Kind(growth=lambda raw, where: 3.0),
        "NFKC": _Kind(growth=lambda raw, where: 11.0),
        "NFKD": _Kind(growth=lambda raw, where: 11.0),
        "Nmt": _Kind(),
        "Precompiled": _Kind({"precompiled_charsmap": _Text(0, 8 << 20)}, growth=_mapped),
        "Prepend": _Kind({"prepend": _Text(0, _MAX_AFFIX)}),
        "Replace": _REPLACE,
        "Strip": _Kind(others={"strip_left": _boolean, "strip_right": _boolean}),
        "StripAccents": _Kind(),
    },
    "pre_tokenizer": {
        "Sequence": _sequence("pretokenizers"),
        "BertPreTokenizer": _Kind(),
        "ByteLevel": _Kind(others=_BYTE_LEVEL, growth=lambda raw, where: 2.0),
        "CharDelimiterSplit": _Kind({"delimiter": _CHARACTER}),
        "Digits": _Kind(others={"individual_digits": _boolean}),
        "FixedLength": _Kind({"length": _Integer(1, _MAX_TOKEN_CHARACTERS + 1)}),
        "Metaspace": _METASPACE,
        "Punctuation": _Kind(others={"behavior": _BEHAVIOR}),
        "Split": _Kind({"pattern": _pattern, "behavior": _BEHAVIOR}, {"invert": _boolean}),
        "UnicodeScripts": _Kind(),
        "Whitespace": _Kind(),
        "WhitespaceSplit": _Kind(),
    },
    "post_processor": {
        "Sequence": _sequence("processors"),
        "BertProcessing": _Kind({"sep": _ANY, "cls": _ANY}, check=_check_frame),
        "ByteLevel": _Kind(others=_BYTE_LEVEL),
        "RobertaProcessing": _Kind(
            {"sep": _ANY, "cls": _ANY}, {"trim_offsets": _boolean, "add_prefix_space": _boolean}, check=_check_frame
        ),
        "TemplateProcessing": _Kind(
            {"single": _Listed(_object, _MAX_SPECIAL_TOKENS), "pair": _Listed(_object, _MAX_SPECIAL_TOKENS),
             "special_tokens": _object},
            check=_check_template,
        ),
    },
    "decoder": {
        "Sequence": _sequence("decoders"),
        "BPEDecoder": _Kind({"suffix": _Text(1, _MAX_AFFIX)}),
        "ByteFallback": _Kind(),
        "ByteLevel": _Kind(others=_BYTE_LEVEL),
        "Fuse": _Kind(),
        "Metaspace": _METASPACE,
        "Replace": _REPLACE,
        # It counts characters of the end of each token without looking how many there are.
        "Strip": _Kind({"content": _CHARACTER, "start": _Integer(0, _MAX_AFFIX), "stop": _Integer(0, 1)}),
        "WordPiece": _Kind({"prefix": _Text(0, _MAX_AFFIX)}, {"cleanup": _boolean}),
    },
}  # fmt: skip
