"""Text to tokens and back, over the Hugging Face tokenizer that a file carries as JSON."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence

import tokenizers

from gqsa_runtime import tokenizer_schema
from gqsa_runtime.errors import FormatError, InputError

_REPLACEMENT = "\ufffd"
# A character is at most 4 bytes; a longer run without a whole one is no character in the making.
_MAX_PENDING = 16
# Tokens of the prompt that are decoded again with the first new ones: decoders that strip a leading
# space, or join bytes to a character, need to see what stands before.
_PROMPT_TAIL = 6
# Normalizers may make one character of several, so a small vocabulary does not bound a text too tightly.
_MIN_LONGEST_TOKEN = 64
# Characters that take some hundredths of a second.
_LONG_TEXT = 1 << 16


@contextlib.contextmanager
def _typed(what: str) -> Iterator[None]:
    """Turns what the library raises, Rust panics too, into FormatError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a Rust panic is no Exception
        raise FormatError(f"the file's tokenizer {what} ({str(error)[:200]}); rebuild the file") from None


class Tokenizer:
    """A file's tokenizer. json_text: as `tokenizer.json` of a Hugging Face model. vocab_size: of the model, if known.

    longest_token: in characters. Raises FormatError where the text is no tokenizer, or one that is not accepted
    (see tokenizer_schema).
    """

    def __init__(self, json_text: str, vocab_size: int | None = None) -> None:
        try:
            self.longest_token = tokenizer_schema.check(json_text, vocab_size)
            with _typed("cannot be read"):
                self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
                # Limits that the training side left in the file would cut prompts in silence.
                self._tokenizer.no_truncation()
                self._tokenizer.no_padding()
        except tokenizer_schema.TokenizerError as error:
            raise FormatError(f"the file's tokenizer cannot be read ({error}); rebuild the file") from None

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text. add_special_tokens: begin-of-text and the like, where the model has them.

        max_tokens: a text that is too long to become so few is refused before it is read. Raises InputError, or
        FormatError where the tokenizer fails on this text.
        """
        if not isinstance(text, str):
            raise InputError("the text is no string; expected Unicode text")
        if max_tokens is not None and len(text) > max_tokens * max(self.longest_token, _MIN_LONGEST_TOKEN):
            raise InputError(
                f"the text has {len(text)} characters, which is more than {max_tokens} tokens can hold; shorten it"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                "the text holds half a surrogate pair, which is no character; expected Unicode text"
            ) from None
        with _typed("fails on this text"):
            if len(text) > _LONG_TEXT:
                return self._encode_aside(text, add_special_tokens)
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def _encode_aside(self, text: str, add_special_tokens: bool) -> list[int]:
        """In another thread, so that Ctrl-C is not kept waiting; a batch of one is read without Python's lock."""
        done: list[list[int] | BaseException] = []

        def work() -> None:
            try:
                done.append(self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
            except BaseException as error:  # a Rust panic is no Exception
                done.append(error)

        thread = threading.Thread(target=work, name="gqsa-encode", daemon=True)
        thread.start()
        thread.join()
        if isinstance(done[0], BaseException):
            raise done[0]
        return done[0]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Raises FormatError where the tokenizer fails on them."""
        with _typed("fails on these tokens"):
            return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def token(self, token_id: int | None) -> str | None:
        """The token's own spelling, for example "</s>", or None where there is none."""
        return None if token_id is None else self._tokenizer.id_to_token(token_id)


class TextStream:
    """Turns tokens into text one at a time, and never hands out half a character.

    prompt: the tokens before the first one pushed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_PROMPT_TAIL:])  # context, then what is not handed out yet
        self._context = len(self._tokens)

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._tokens.append(token)
        return self._take(force=len(self._tokens) - self._context >= _MAX_PENDING)

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        return self._take(force=True)

    def _take(self, force: bool) -> str:
        before = self._tokenizer.decode(self._tokens[: self._context])
        after = self._tokenizer.decode(self._tokens)
        if len(after) <= len(before) or (after.endswith(_REPLACEMENT) and not force):
            return ""
        # Only what was handed out last is kept as context, so a long text costs no more than a short one.
        self._tokens = self._tokens[self._context :]
        self._context = len(self._tokens)
        return after[len(before) :]


class StopFilter:
    """Ends a stream of text at the first of some strings, and holds back what may be one's beginning."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = [stops] if isinstance(stops, str) else list(stops)
        if not all(self._stops):
            raise InputError("a stop string is empty; expected at least one character")
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text that is certain to stand before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [index for index in (text.find(stop) for stop in self._stops) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a true beginning of the stop string."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
