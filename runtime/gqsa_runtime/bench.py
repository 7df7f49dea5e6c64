"""Speed of a model on its device: opening, prompts and decode, as medians, and the time of each kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gqsa_runtime import memory
from gqsa_runtime.errors import InputError
from gqsa_runtime.model import Model
from gqsa_runtime.operators import OPERATORS
from gqsa_runtime.perplexity import Progress
from gqsa_runtime.program import Kernel, Step
from gqsa_runtime.sequence import Sequence as TokenSequence

DEFAULT_CONTEXTS = (128, 1024, 2048)
DEFAULT_PROMPTS = (128, 512, 2048, 8192)
_FIRST_PROMPT_TOKENS = 8
_PROFILE_REPEATS = 20
_ATTENTION = ("attention", "append_attention", "attention_halves")


def bench(
    model: Model,
    contexts: Sequence[int] | None = None,
    prompts: Sequence[int] | None = None,
    n_decode: int = 64,
    repeats: int = 3,
    profile: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model that has just been opened. Tokens are random: speed does not depend on which.

    contexts: tokens in the cache before n_decode single steps, default 128, 1024 and 2048, or as many as fit.
    prompts: numbers of tokens, default 128, 512, 2048 and 8192 where they fit. Of each one untimed round warms up; then
    come `repeats` timed ones. progress: wraps the list of what is measured.
    Returns
    "open_seconds": by stage, see `Model.open_seconds`; "first_token_seconds": from opening to the first token of a
    prompt of 8; "memory_bytes": of weights, activations and KV cache; "bandwidth_gb_per_s": measured now, see the
    devices' `bandwidth`;
    "decode": a row per context: tokens_per_s, ms and ms_p90 from a token to the next one on the host; mb,
    weights and KV cache that a step reads; gb_per_s, and share of the measured bandwidth; gflop, additions and
    multiplications of a step as if nothing were removed;
    "prefill": a row per prompt: tokens_per_s, ms and tflop_per_s, of additions and multiplications counted so;
    with `profile` "profile": a row per kernel of a decode step at the first context, and of a chunk of the longest
    prompt; us for all its launches, their part of_phase, gb_per_s of its weights and cache.
    Raises InputError for lengths that do not fit the model's context.
    """
    if n_decode < 1 or repeats < 1:
        raise InputError(f"{n_decode} decode steps in {repeats} rounds measure nothing; expected at least 1 of each")
    room = model.context - n_decode
    if contexts is None:
        contexts = sorted({max(1, min(length, room)) for length in DEFAULT_CONTEXTS})
    if prompts is None:
        prompts = [length for length in DEFAULT_PROMPTS if length <= model.context] or [model.context]
    for length in contexts:
        if not 1 <= length <= room:
            raise InputError(
                f"context length {length} with {n_decode} decode steps does not fit the model's context of "
                f"{model.context}; open it with a larger --context or measure shorter lengths"
            )
    for length in prompts:
        if not 1 <= length <= model.context:
            raise InputError(
                f"a prompt of {length} tokens does not fit the model's context of {model.context}; "
                "open it with a larger --context or measure shorter prompts"
            )
    first_s = _first_token(model)
    bandwidth = model.device.bandwidth()
    tasks: list[tuple[Any, ...]] = [(_decode, length, n_decode) for length in contexts] + [
        (_prefill, length) for length in prompts
    ]
    rows: dict[Callable[..., Any], list[dict[str, Any]]] = {_decode: [], _prefill: []}
    for measure, *sizes in progress(tasks) if progress else tasks:
        rows[measure].append(measure(model, *sizes, repeats))
    decode = [{**row, "share": 1e9 * row["gb_per_s"] / bandwidth} for row in rows[_decode]]
    found = {
        "open_seconds": model.open_seconds,
        "first_token_seconds": model.open_seconds.get("total", 0.0) + first_s,
        "memory_bytes": memory.needed_bytes(model.program, model.tensors, model.family, model.context),
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "decode": decode,
        "prefill": rows[_prefill],
    }
    if profile:
        found["profile"] = _profile(model, min(contexts), max(prompts))
    model.engine.reset()
    return found


def _operations(model: Model, phase: str, first: int, n_tokens: int = 1) -> int:
    """Multiplications and additions of a phase: of its linears as if dense, and of attention.

    n_tokens: of the launch; the i-th of them attends to first + i positions, or to its window.
    """
    plan = model.program.plans[model.family]
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    seen = np.arange(first, first + n_tokens)
    count = 0
    for step in plan.phases[phase]:
        op, params = kernels[step.kernel].op, kernels[step.kernel].params
        if op in _ATTENTION:
            rows = int(np.minimum(seen, params["window"] or seen).sum())
            count += 4 * rows * params["heads"] * params["head_dim"]
        elif OPERATORS[op].layout is not None and not op.startswith("embedding") and not params.get("accumulate"):
            count += 2 * params["rows"] * params["k"] * n_tokens
    return count


def _random_tokens(model: Model, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.program.vocab_size, count)


def _first_token(model: Model) -> float:
    model.engine.reset()
    began_s = time.perf_counter()
    model.engine.extend_choosing(TokenSequence(), _random_tokens(model, min(_FIRST_PROMPT_TOKENS, model.context)))
    return time.perf_counter() - began_s


def _decode(model: Model, length: int, n_decode: int, repeats: int) -> dict[str, Any]:
    prompt, seconds = _random_tokens(model, length), []
    for turn in range(repeats + 1):
        sequence = TokenSequence()  # of the prompt only the last token runs again
        token = model.engine.extend_choosing(sequence, prompt)
        for _ in range(n_decode):
            began_s = time.perf_counter()
            token = model.engine.extend_choosing(sequence, [token])
            if turn:  # the first round warms up
                seconds.append(time.perf_counter() - began_s)
    median_s = statistics.median(seconds)
    plan = model.program.plans[model.family]
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    middle = length + n_decode // 2
    n_bytes = sum(_step_bytes(model, kernels[step.kernel], step, middle) for step in plan.phases["decode"])
    return {
        "context": length,
        "tokens_per_s": 1 / median_s,
        "ms": 1e3 * median_s,
        "ms_p90": 1e3 * float(np.quantile(seconds, 0.9)),
        "steps": len(seconds),
        "mb": n_bytes / 1e6,
        "gb_per_s": n_bytes / 1e9 / median_s,
        "gflop": _operations(model, "decode", middle) / 1e9,
    }


def _prefill(model: Model, length: int, repeats: int) -> dict[str, Any]:
    prompt, seconds = _random_tokens(model, length), []
    for _ in range(repeats + 1):
        model.engine.reset()
        began_s = time.perf_counter()
        model.engine.prefill(prompt)
        seconds.append(time.perf_counter() - began_s)
    median_s = statistics.median(seconds[1:])
    if length == 1:
        operations = _operations(model, "decode", 1)
    else:
        operations = _operations(model, "prefill_body", 1, length) + _operations(model, "last_logits", length)
    return {
        "prompt": length,
        "tokens_per_s": length / median_s,
        "ms": 1e3 * median_s,
        "tflop_per_s": operations / 1e12 / median_s,
    }


def _profile(model: Model, context: int, prompt: int) -> list[dict[str, Any]]:
    chunk = min(model.device.plan.prefill_chunk, prompt)
    rows = []
    for held, n_tokens in ((context, 1), (prompt - chunk, chunk)):
        model.engine.reset()
        if held:
            model.engine.prefill(_random_tokens(model, held))
        phase, seconds = model.engine.step_seconds(_random_tokens(model, n_tokens, 1), _PROFILE_REPEATS)
        rows += _profile_rows(model, phase, seconds, held + n_tokens)
    return rows


def _profile_rows(model: Model, phase: str, seconds: Sequence[float], context: int) -> list[dict[str, Any]]:
    plan = model.program.plans[model.family]
    kernels = {kernel.name: kernel for kernel in plan.kernels}
    rows = []
    for name in dict.fromkeys(step.kernel for step in plan.phases[phase]):
        timed = [(step, s) for step, s in zip(plan.phases[phase], seconds, strict=True) if step.kernel == name]
        total_s = sum(s for _, s in timed)
        n_bytes = sum(_step_bytes(model, kernels[name], step, context) for step, _ in timed)
        rows.append(
            {
                "phase": phase,
                "operator": kernels[name].op,
                "kernel": name,
                "launches": len(timed),
                "us": 1e6 * total_s,
                "of_phase": total_s / sum(seconds),
                "gb_per_s": n_bytes / 1e9 / total_s,
            }
        )
    return sorted(rows, key=lambda row: -row["us"])


def _step_bytes(model: Model, kernel: Kernel, step: Step, context: int) -> int:
    """Weights and cache that a step reads; of a table it reads a few rows, which do not count."""
    if kernel.op.startswith("embedding"):
        return 0
    tensors = {arg.named for arg in step.args if arg.kind == "tensor"}
    n_bytes = sum(model.tensors[name].size for name in tensors)
    if kernel.op in _ATTENTION:
        p = kernel.params
        cache = next(arg.name for arg in step.args if arg.kind == "k_cache")
        assert isinstance(cache, int)
        n_bytes += 2 * min(context, p["window"] or context) * model.program.kv_row_bytes(cache)
    return n_bytes


def render(found: Mapping[str, Any], table: Callable[[list[dict[str, Any]]], str]) -> str:
    """What `bench` found as text. table: draws rows of equal keys."""
    seconds = found["open_seconds"]
    beside = ("tokenizer", "read", "check")
    stages = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in seconds if stage not in (*beside, "total"))
    aside = ", ".join(f"{stage} {seconds[stage]:.2f}" for stage in beside if stage in seconds)
    parts = [
        f"first token {found['first_token_seconds']:.2f} s after opening, which took {seconds.get('total', 0):.2f} s: "
        f"{stages}; in threads beside it: {aside}",
        f"memory {found['memory_bytes'] / 1e9:.2f} GB, bandwidth {found['bandwidth_gb_per_s']:.1f} GB/s",
        f"\ndecode\n{table(found['decode'])}",
        f"\nprefill\n{table(found['prefill'])}",
    ]
    if "profile" in found:
        parts.append(f"\nkernels, each by itself\n{table(found['profile'])}")
    return "\n".join(parts)
