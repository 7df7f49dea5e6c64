"""Streaming text: whole characters only, and stop strings that never show."""

import pytest
from gqsa_runtime.errors import FormatError, InputError
from gqsa_runtime.tokenizer import StopFilter, TextStream, Tokenizer
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers

from tests.format import tiny

TOKENIZER = Tokenizer(tiny.tokenizer_json())
TEXT = "naïve 👍🏽 日本 ñ"


def pieces(tokens, prompt=(), tokenizer=TOKENIZER) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*(stream.push(token) for token in tokens), stream.flush()]


def test_round_trip():
    ids = TOKENIZER.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    assert TOKENIZER.decode(ids) == TEXT
    assert TOKENIZER.token(tiny.EOS) == "</s>"
    assert TOKENIZER.token(None) is None and TOKENIZER.token(999) is None


def test_stream_hands_out_whole_characters():
    got = pieces(TOKENIZER.encode(TEXT))
    assert "".join(got) == TEXT
    assert "\ufffd" not in "".join(got)
    assert [piece for piece in got if piece] == list(TEXT)


def test_stream_after_a_prompt():
    prompt = TOKENIZER.encode("日本")
    assert "".join(pieces(TOKENIZER.encode("語!"), prompt)) == "語!"
    # A prompt that ends inside a character: the rest of it comes with the first new token.
    assert "".join(pieces(TOKENIZER.encode("日本")[2:], TOKENIZER.encode("日本")[:2])).endswith("本")


def test_unfinished_character_at_the_end_becomes_a_replacement():
    assert "".join(pieces(TOKENIZER.encode("a日")[:-1])) == "a\ufffd"


def test_bytes_that_are_no_text_do_not_pile_up():
    broken = TOKENIZER.encode("日")[1]
    stream = TextStream(TOKENIZER)
    got = [stream.push(broken) for _ in range(100)]
    assert "".join(got).count("\ufffd") >= 80
    assert "".join([*got, stream.flush()]) == "\ufffd" * 100


def test_special_tokens_make_no_text():
    assert "".join(pieces([tiny.BOS, *TOKENIZER.encode("a"), tiny.EOS])) == "a"


def test_words_keep_their_spaces():
    """A decoder that strips the first space, as SentencePiece's does, must not strip every word's."""
    words = {"▁Hello": 0, "▁world": 1, "!": 2, "▁": 3, "<unk>": 4}
    raw = Raw(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(raw.to_str())
    assert pieces([0, 1, 2], tokenizer=tokenizer) == ["Hello", " world", "!", ""]
    assert "".join(pieces([1, 2], prompt=[0], tokenizer=tokenizer)) == " world!"


def test_truncation_in_the_file_is_ignored():
    raw = Raw.from_str(tiny.tokenizer_json())
    raw.enable_truncation(4)
    raw.enable_padding(length=50)
    assert len(Tokenizer(raw.to_str()).encode("abcdefgh")) == 8


@pytest.mark.parametrize("text", ["", "{}", "[1]", "not json", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_broken_tokenizers(text):
    with pytest.raises(FormatError, match="tokenizer cannot be read"):
        Tokenizer(text)


def test_half_a_surrogate_pair():
    with pytest.raises(InputError, match="surrogate"):
        TOKENIZER.encode("a\ud800")


def filtered(stops, chunks) -> tuple[str, list[str]]:
    stop = StopFilter(stops)
    got = [stop.push(chunk) for chunk in chunks]
    return "".join([*got, stop.flush()]), got


def test_stop_strings_never_show():
    assert filtered(["END"], ["abc", "E", "N", "D", "xyz"]) == ("abc", ["abc", "", "", "", ""])
    assert filtered("END", ["abcENDxyz"])[0] == "abc"
    assert filtered(["\n\n", "User:"], ["hi\n", "Us", "er", ": x"])[0] == "hi\n"
    assert filtered(["b", "abc"], ["xab"])[0] == "xa"


def test_held_back_text_comes_when_it_is_no_stop_string():
    assert filtered(["END"], ["E", "NE", "N", "E"])[0] == "ENENE"
    assert filtered(["END"], ["EN"])[0] == "EN"
    assert filtered([], ["a", "b"]) == ("ab", ["a", "b"])
    assert filtered(["aab"], ["a", "a", "a", "b", "c"])[0] == "a"


def test_empty_stop_string():
    with pytest.raises(InputError, match="stop string is empty"):
        StopFilter(["a", ""])
