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

    def score(self, requests: Sequence[ScoreRequest], progress: Callable | None = None) -> list[Score]:
        """See Scorer. Requests that begin alike should stand together, as the choices of a question do."""
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
        scored = self.model.score(request.tokens, first=request.n_context)
        total = float(scored.log_probs.astype(np.float64).sum())
        if np.isnan(total):
            raise ModelError("the model's log-probabilities hold a NaN; check the file with `gqsac verify`")
        return Score(total, bool(scored.greedy.all()))
