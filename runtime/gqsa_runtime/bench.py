"""Speed of a model on its device: prompt and decode, at chosen context lengths, as medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from gqsa_runtime.errors import InputError
from gqsa_runtime.model import Model

DEFAULT_CONTEXTS = (128, 1024)


def bench(
    model: Model,
    contexts: Sequence[int] | None = None,
    n_decode: int = 64,
    repeats: int = 3,
    progress: Callable | None = None,
) -> list[dict]:
    """Measures each context length: a prompt of that many tokens, then n_decode single steps after it.

    Prompts are random tokens (speed does not depend on which). One untimed round warms up each length;
    then come `repeats` timed ones. A decode step is timed from token to logits on the host.
    contexts: default 128 and 1024 tokens, or what the model's context has room for.
    Returns a row per length: context, prefill_tokens_per_s (median of the rounds), decode_tokens_per_s
    and decode_ms (median of all steps), decode_ms_p90, mb_per_token (weights and KV cache that a decode
    step reads), gb_per_s (of those, at the median), and on a GPU share, of its copy bandwidth measured in
    the same run. progress: wraps the list of lengths.
    Raises InputError where a length and its decode steps do not fit the model's context.
    """
    if n_decode < 1 or repeats < 1:
        raise InputError(f"{n_decode} decode steps in {repeats} rounds measure nothing; expected at least 1 of each")
    if contexts is None:
        room = model.context - n_decode
        contexts = [length for length in DEFAULT_CONTEXTS if length <= room] or [max(1, room)]
    for length in contexts:
        if not 1 <= length <= model.context - n_decode:
            raise InputError(
                f"context length {length} with {n_decode} decode steps does not fit the model's context of "
                f"{model.context}; open it with a larger --context or measure shorter lengths"
            )
    lengths = list(contexts)
    rows = [_measure(model, length, n_decode, repeats) for length in (progress(lengths) if progress else lengths)]
    measure_bandwidth = getattr(model.device, "copy_bandwidth", None)
    if measure_bandwidth:
        bandwidth_gb_per_s = measure_bandwidth() / 1e9
        rows = [{**row, "share": row["gb_per_s"] / bandwidth_gb_per_s} for row in rows]
    return rows


def _measure(model: Model, length: int, n_decode: int, repeats: int) -> dict:
    engine = model.engine
    random = np.random.default_rng(length)
    prompt = random.integers(0, model.program.vocab_size, length)
    steps = random.integers(0, model.program.vocab_size, n_decode)
    prefill_s, decode_s = [], []
    for turn in range(repeats + 1):
        engine.reset()
        began_s = time.perf_counter()
        engine.prefill(prompt)
        prefill_time_s = time.perf_counter() - began_s
        step_times_s = []
        for token in steps:
            began_s = time.perf_counter()
            engine.decode(int(token))
            step_times_s.append(time.perf_counter() - began_s)
        if turn:  # the first round warms up
            prefill_s.append(prefill_time_s)
            decode_s += step_times_s
    engine.reset()
    median_s = statistics.median(decode_s)
    n_bytes = model.decode_weight_bytes + (length + n_decode // 2) * model.program.kv_bytes_per_token()
    return {
        "context": length,
        "prefill_tokens_per_s": length / statistics.median(prefill_s),
        "decode_tokens_per_s": 1 / median_s,
        "decode_ms": 1e3 * median_s,
        "decode_ms_p90": 1e3 * float(np.quantile(decode_s, 0.9)),
        "steps": len(decode_s),
        "mb_per_token": n_bytes / 1e6,
        "gb_per_s": n_bytes / 1e9 / median_s,
    }
