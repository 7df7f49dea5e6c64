"""Scores token sequences on a compiled model. What one shares with the one before is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from gqsa_runtime.errors import ModelError
from gqsa_runtime.model import Model
from gqsa_runtime.perplexity import PerplexityResult, perplexity
from gqsa_runtime.sampling import SamplingOptions

from gqsac.evaluate.scoring import Score, ScoreRequest


class RuntimeScorer:
    """A Scorer over an open `gqsa_runtime.Model`, which it closes."""

    def __init__(self, model: Model):
        self.model, self.tokenizer = model, model.tokenizer
        self.vocab_size, self.context = model.program.vocab_size, model.context
        self.bos_token_id, self.eos_token_ids = model.program.bos_token_id, model.program.eos_token_ids
        self.device_reason = model.device_reason
        self._cached: tuple[int, ...] = ()  # tokens whose rows of the KV cache are valid

    def score(self, requests: Sequence[ScoreRequest], progress: Callable | None = None) -> list[Score]:
        """See Scorer. Requests that begin alike should stand together, as the choices of a question do."""
        self.model.engine.reset()  # the device's cache is written past the engine
        self._cached = ()
        return [self._score(request) for request in (progress(requests) if progress else requests)]

    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, options: SamplingOptions, stop: Sequence[str] = ()
    ) -> str:
        """See Scorer."""
        return "".join(self.model.generate(prompt, max_new_tokens, **vars(options), seed=0, stop=stop))

    def perplexity(
        self,
        text: str,
        window: int,
        stride: int | None = None,
        max_windows: int | None = None,
        progress: Callable | None = None,
    ) -> PerplexityResult:
        """See Scorer."""
        return perplexity(self.model, text, window, stride, max_windows, progress)

    def close(self) -> None:
        """Frees the device's memory."""
        self.model.close()

    def _score(self, request: ScoreRequest) -> Score:
        tokens, first = np.array(request.tokens, np.int32), request.n_context
        device, chunk = self.model.device, self.model.program.prefill_chunk
        log_probs, greedy = [], []
        # The last token of the context runs again: its logits predict the first scored token.
        start = min(_common_length(self._cached, request.tokens), first - 1)
        while start < len(tokens) - 1:
            stop = min(start + chunk, len(tokens) - 1)
            device.upload("tokens", tokens[start:stop])
            device.upload("state", np.array([stop - start, start], np.int32))
            device.launch("prefill_body")
            if stop >= first:
                targets = tokens[start + 1 : stop + 1]
                device.upload("targets", targets)
                device.launch("all_log_probs")
                scored = slice(max(first - 1 - start, 0), None)
                log_probs.append(device.download("log_probs", len(targets))[scored])
                greedy.append((device.download("argmax", len(targets)) == targets)[scored])
            start = stop
        self._cached = request.tokens[:-1]
        total = float(np.concatenate(log_probs).astype(np.float64).sum())
        if np.isnan(total):
            raise ModelError("the model's log-probabilities hold a NaN; check the file with `gqsac verify`")
        return Score(total, bool(np.concatenate(greedy).all()))


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    length = min(len(first), len(second))
    differs = np.array(first[:length], np.int32) != np.array(second[:length], np.int32)
    return int(differs.argmax()) if differs.any() else length
