"""Scores token sequences on a transformers causal LM, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from gqsa_runtime.errors import DeviceError, InputError, ModelError
from gqsa_runtime.perplexity import PerplexityResult, first_tokens, needed_tokens
from gqsa_runtime.sampling import SamplingOptions, choose, first_draw, next_draw, penalize
from gqsa_runtime.tokenizer import StopFilter, TextStream, Tokenizer

from gqsac.evaluate.perplexity import made_for, perplexity
from gqsac.evaluate.scoring import Score, ScoreRequest

_LOGITS_AT_ONCE = {"cpu": 1 << 26, "cuda": 1 << 28}  # f32 elements of a batch's logits


def torch_device(device: str) -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises InputError for another name, DeviceError for a GPU that PyTorch does not find.
    """
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdecimal())):
        raise InputError(f"the device is {device!r}, expected auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count()
    if kind == "auto":
        return torch.device("cuda" if found else "cpu")
    if kind == "cuda" and int(number or 0) >= found:
        raise DeviceError(f"PyTorch finds {found} GPU(s), so {device} cannot be used; use --device cpu")
    return torch.device(device)


class TorchScorer:
    """A Scorer over a transformers causal LM in eval mode, moved to a device.

    context: positions to use at most; default: all that the model is made for.
    """

    def __init__(self, model, tokenizer: Tokenizer, device: str = "auto", context: int | None = None):
        where = torch_device(device)
        most = made_for(model) or 1 << 30
        if context is not None and not 1 <= context <= most:
            raise InputError(f"the context is {context}, but this model is made for 1 to {most}")
        try:
            self.model = model.to(where)
        except torch.cuda.OutOfMemoryError:
            raise DeviceError(f"the model does not fit the memory of {where}; use --device cpu") from None
        self.tokenizer, self.device = tokenizer, where
        self.context = context or most
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        generation = getattr(model, "generation_config", None) or model.config
        self.bos_token_id, self.eos_token_ids = generation.bos_token_id, _ids(generation.eos_token_id)
        name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{torch.get_num_threads()} thread(s)"
        self.device_reason = f"PyTorch on {where} ({name}), {model.dtype}".replace("torch.", "")

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], progress: Callable | None = None) -> list[Score]:
        """See Scorer. The longest come first, so that a lack of memory shows at once. Logits in f32."""
        batches = self._batches(requests)
        scores: list[Score | None] = [None] * len(requests)
        for batch in progress(batches) if progress else batches:
            try:
                found = self._score([requests[index] for index in batch])
            except torch.cuda.OutOfMemoryError:
                raise DeviceError(
                    f"{len(batch)} texts of up to {len(requests[batch[0]].tokens)} tokens do not fit the memory of "
                    f"{self.device} beside the model; free memory, or use --device cpu"
                ) from None
            for index, score in zip(batch, found, strict=True):
                scores[index] = score
        return scores

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], max_new_tokens: int, options: SamplingOptions, stop: Sequence[str] = ()
    ) -> str:
        """See Scorer. Samples and stops as the runtime does."""
        draw, stream, stops = first_draw(options, seed=0), TextStream(self.tokenizer, prompt), StopFilter(stop)
        seen, text = list(prompt), []
        inputs, cache = torch.tensor([seen], device=self.device), None
        for _ in range(min(max_new_tokens, self.context - len(prompt) + 1)):
            output = self.model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[0, -1].float().cpu().numpy()
            token, draw = choose(penalize(logits, seen, options.repetition_penalty), draw), next_draw(draw)
            if token in self.eos_token_ids:
                break
            seen.append(token)
            text.append(stops.push(stream.push(token)))
            if stops.stopped:
                break
            inputs = torch.tensor([[token]], device=self.device)
        return "".join([*text, stops.push(stream.flush()), stops.flush()])

    def perplexity(
        self,
        text: str,
        window: int,
        stride: int | None = None,
        max_windows: int | None = None,
        progress: Callable | None = None,
    ) -> PerplexityResult:
        """See Scorer."""
        tokens = first_tokens(self.tokenizer.encode, text, needed_tokens(window, stride, max_windows))
        try:
            return perplexity(self.model, tokens, window, stride, max_windows, progress, self.context)
        except torch.cuda.OutOfMemoryError:
            raise DeviceError(
                f"a window of {window} tokens does not fit the memory of {self.device} beside the model; use a "
                "smaller one, or --device cpu"
            ) from None

    def close(self) -> None:
        """Frees the model's memory."""
        self.model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batches(self, requests: Sequence[ScoreRequest]) -> list[list[int]]:
        most = max(1, _LOGITS_AT_ONCE[self.device.type] // self.vocab_size)  # tokens, padding included
        batches: list[list[int]] = []
        for index in sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens)):
            if not batches or (len(batches[-1]) + 1) * len(requests[batches[-1][0]].tokens) > most:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        # Padding stands on the right, where a causal model's earlier positions do not see it.
        width = max(len(request.tokens) for request in requests) - 1
        inputs = torch.zeros(len(requests), width, dtype=torch.int64)
        rows, places, targets = [], [], []
        for row, request in enumerate(requests):
            n_inputs = len(request.tokens) - 1
            inputs[row, :n_inputs] = torch.tensor(request.tokens[:-1])
            scored = range(request.n_context - 1, n_inputs)
            rows += [row] * len(scored)
            places += scored
            targets += request.tokens[request.n_context :]
        logits = self.model(inputs.to(self.device), use_cache=False).logits[rows, places].float()  # [n_scored, vocab]
        wanted = torch.tensor(targets, device=logits.device)
        log_probs = torch.log_softmax(logits, dim=1).gather(1, wanted[:, None])[:, 0].double().cpu()
        greedy = (logits.argmax(1) == wanted).cpu()
        if log_probs.isnan().any():
            raise ModelError("the model's logits hold a NaN; load it with dtype float32, or is the model damaged?")
        counts = [len(request.tokens) - request.n_context for request in requests]
        return [
            Score(float(values.sum()), bool(best.all()))
            for values, best in zip(log_probs.split(counts), greedy.split(counts), strict=True)
        ]


def _ids(value) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
