"""Perplexity of a torch model, over the same windows that the runtime scores."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from gqsa_runtime.errors import InputError, ModelError
from gqsa_runtime.perplexity import PerplexityResult, windows

_LOGITS_AT_ONCE = 1 << 26  # f32 elements of logits that are held at a time


def cut(
    token_ids, window: int, stride: int | None, max_windows: int | None, context: int | None, who: str = "the model"
) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """(tokens, int64 [n]; the windows to score, see gqsa_runtime.perplexity.windows) of a text.

    context: tokens that a window may have, None where nobody knows. who: has it. Raises InputError where the numbers
    make no window or one that is too long.
    """
    tokens = torch.as_tensor(token_ids, dtype=torch.int64)
    if tokens.ndim != 1:
        raise InputError(f"token_ids has shape {list(tokens.shape)}, expected one text as a flat list")
    if context is not None and window > context:
        raise InputError(
            f"the window is {window} tokens, but {who} has a context of {context}; use a window of at most that"
        )
    if max_windows is not None and max_windows < 1:
        raise InputError(f"the number of windows is {max_windows}, expected at least 1")
    return tokens, list(windows(len(tokens), window, stride))[:max_windows]


@torch.no_grad()
def perplexity(
    model,
    token_ids,
    window: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Callable | None = None,
    context: int | None = None,
) -> PerplexityResult:
    """exp of the mean negative log-probability of a text's tokens under a transformers causal LM.

    token_ids: the whole text, a list or 1-D int array or tensor. window, stride: see
    gqsa_runtime.perplexity.windows. max_windows: score only the first so many. progress: wraps the list of
    windows, as `tqdm.tqdm` does. context: tokens that a window may have; default: what the model is made for.
    Log-probabilities are computed in f32 and summed in f64. Raises InputError where the numbers make no window or
    one that is too long, ModelError where the model's logits are not finite.
    """
    tokens, cuts = cut(token_ids, window, stride, max_windows, context or made_for(model))
    total, n_scored, began_s = 0.0, 0, time.perf_counter()
    for start, stop, first_scored in progress(cuts) if progress else cuts:
        piece = tokens[start:stop].to(model.device)
        logits = model(piece[None], use_cache=False).logits[0]  # [n_tokens, vocab]
        # The token at position p is predicted from position p - 1.
        predictions = logits[first_scored - start - 1 : -1]
        targets = piece[first_scored - start :]
        for rows, wanted in zip(_pieces(predictions), _pieces(targets, logits.shape[1]), strict=True):
            log_probs = torch.log_softmax(rows.float(), dim=1).gather(1, wanted[:, None])
            total -= float(log_probs.double().sum())
        n_scored += len(targets)
    if math.isnan(total):
        raise ModelError("the model's logits hold a NaN; load it with dtype float32, or is the model damaged?")
    mean = total / n_scored
    value = math.exp(mean) if mean < 700 else math.inf  # exp overflows a float64 near 709
    return PerplexityResult(value, n_scored, len(cuts), time.perf_counter() - began_s)


def made_for(model) -> int | None:
    """The longest context that a transformers model is made for, None if it does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or None


def _pieces(tensor: torch.Tensor, vocabulary: int | None = None):
    return tensor.split(max(1, _LOGITS_AT_ONCE // (vocabulary or tensor.shape[1])))
