"""What scores token sequences: the contract that the runtime and PyTorch share, and how text becomes tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gqsa_runtime.errors import InputError, ModelError
from gqsa_runtime.perplexity import PerplexityResult
from gqsa_runtime.sampling import SamplingOptions
from gqsa_runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class ScoreRequest:
    """tokens: context, then what is scored. n_context: tokens of context, 1 to len(tokens) - 1."""

    tokens: tuple[int, ...]
    n_context: int


@dataclass(frozen=True)
class Score:
    """log_prob: sum over the scored tokens, natural logarithm. greedy: whether each was the likeliest."""

    log_prob: float
    greedy: bool


class Scorer(Protocol):
    """A model on a device. vocab_size, context: in tokens. device_reason: what runs it, for people.

    bos_token_id, eos_token_ids: as the model's config has them, None and () where it has none.
    """

    tokenizer: Tokenizer
    vocab_size: int
    context: int
    device_reason: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def score(self, requests: Sequence[ScoreRequest], progress: Callable | None = None) -> list[Score]:
        """Scores in the order of the requests. progress: wraps the list of pieces of work, as `tqdm.tqdm` does."""

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        options: SamplingOptions,
        stop: Sequence[str] = (),
    ) -> str:
        """Continues token ids up to a stop string, end of text or max_new_tokens."""

    def perplexity(
        self,
        text: str,
        window: int,
        stride: int | None = None,
        max_windows: int | None = None,
        progress: Callable | None = None,
    ) -> PerplexityResult:
        """Perplexity of a text, see gqsa_runtime.perplexity. Raises InputError for windows longer than the context."""

    def close(self) -> None:
        """Frees the model's memory."""


class Encoder:
    """Texts to ScoreRequests for one scorer. n_truncated: requests whose context was cut to fit so far."""

    def __init__(self, scorer: Scorer):
        self._scorer, self._tokenizer = scorer, scorer.tokenizer
        self._leading = leading_tokens(scorer.tokenizer)
        self.n_truncated = 0

    def text(self, text: str, leading: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that belong before it, but none after it.

        leading: whether with those before it. Raises ModelError where the tokenizer makes tokens that the
        model does not have.
        """
        ids = [*(self._leading if leading else ()), *self._tokenizer.encode(text, add_special_tokens=False)]
        if ids and max(ids) >= self._scorer.vocab_size:
            raise ModelError(
                f"the tokenizer makes token {max(ids)}, but the model's vocabulary is {self._scorer.vocab_size}; "
                "they do not belong together"
            )
        return ids

    def prefix_token(self) -> int:
        """What stands before a text without context: begin-of-text, else end-of-text. Raises InputError for neither."""
        for token in (*self._leading[:1], self._scorer.bos_token_id, *self._scorer.eos_token_ids):
            if token is not None:
                return token
        raise InputError("the model has no begin- or end-of-text token, so a text needs a context to be scored")

    def pair(self, context: str, continuation: str) -> ScoreRequest:
        """A continuation after a context. Blanks at the context's end count as the continuation's.

        The pair is tokenised as one text. A context longer than the model's loses its beginning. Raises
        InputError where the continuation is empty or alone is too long.
        """
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole = self.text(stripped + continuation)
        # Where a token spans the seam, all of it counts as the continuation's.
        n_context = _common_length(self.text(stripped), whole)
        if n_context == 0:
            whole, n_context = [self.prefix_token(), *whole], 1
        return self.tokens(whole, n_context)

    def tokens(self, tokens: Sequence[int], n_context: int) -> ScoreRequest:
        """The request for these tokens, its context cut from the left to fit the model."""
        n_scored = len(tokens) - n_context
        if n_scored < 1:
            raise InputError("a continuation holds no tokens; expected at least one character")
        # The last token is scored, never run.
        excess = len(tokens) - 1 - self._scorer.context
        if excess > 0:
            if excess >= n_context:
                raise InputError(
                    f"a continuation of {n_scored} tokens does not fit the context of {self._scorer.context}; "
                    "open the model with a larger context"
                )
            self.n_truncated += 1
            tokens, n_context = tokens[excess:], n_context - excess
        return ScoreRequest(tuple(tokens), n_context)


def leading_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text; those that it puts after are not among them."""
    bare, dressed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return tuple(dressed[:start])
    raise ModelError("the tokenizer changes a text's own tokens when it adds special tokens; it cannot be scored")


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    for place, (one, other) in enumerate(zip(first, second)):  # noqa: B905  lengths differ
        if one != other:
            return place
    return min(len(first), len(second))
