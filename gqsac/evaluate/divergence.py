"""How far a compressed model's distributions of next tokens are from the uncompressed model's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gqsa_runtime.errors import InputError, ModelError

from gqsac.evaluate.load import is_artifact, load_for_evaluation
from gqsac.evaluate.perplexity import cut, made_for
from gqsac.evaluate.score_torch import torch_device

_LOGITS_AT_ONCE = 1 << 26  # f32 elements of each model's logits that are held at a time


@dataclass(frozen=True)
class Divergence:
    """Over the n_tokens scored positions of n_windows windows of a text.

    kl: mean of KL(reference || model), nats a token. kl_99: its 99th percentile. flips: share of positions at which the
    likeliest next token is another. perplexity, reference_perplexity: of the text itself.
    """

    kl: float
    kl_99: float
    flips: float
    perplexity: float
    reference_perplexity: float
    n_tokens: int
    n_windows: int


@torch.no_grad()
def divergence(
    model,
    reference,
    token_ids,
    window: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Callable | None = None,
) -> Divergence:
    """Compares two transformers causal LMs of one vocabulary on one device, over the windows that `perplexity` scores.

    token_ids, window, stride, max_windows, progress: see gqsac.evaluate.perplexity. Distributions are computed in f32.
    Raises InputError where the vocabularies differ or no window can be made, ModelError where logits are not finite.
    """
    sizes = [len(m.get_input_embeddings().weight) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the model has a vocabulary of {sizes[0]} tokens and the reference one of {sizes[1]}; expected the model "
            "that it was compressed from"
        )
    known = [context for context in map(made_for, (model, reference)) if context is not None]
    tokens, cuts = cut(token_ids, window, stride, max_windows, min(known, default=None), "a model")
    kls, sums = [], torch.zeros(3, dtype=torch.float64)  # flips, log-likelihoods of model and reference
    for start, stop, first_scored in progress(cuts) if progress else cuts:
        piece = tokens[start:stop].to(model.device)
        # The token at position p is predicted from position p - 1.
        rows = slice(first_scored - start - 1, -1)
        ours, theirs = (m(piece[None], use_cache=False).logits[0, rows] for m in (model, reference))
        at_once = max(1, _LOGITS_AT_ONCE // ours.shape[1])
        parts = (tensor.split(at_once) for tensor in (ours, theirs, piece[first_scored - start :]))
        for mine, other, target in zip(*parts, strict=True):
            log_q, log_p = torch.log_softmax(mine.float(), 1), torch.log_softmax(other.float(), 1)
            kls.append((log_p.exp() * (log_p - log_q)).sum(1).double().cpu())
            flips = (mine.argmax(1) != other.argmax(1)).sum()
            likelihoods = [log.gather(1, target[:, None]).double().sum() for log in (log_q, log_p)]
            sums += torch.stack([flips.double(), *likelihoods]).cpu()
    kl = torch.cat(kls)
    if not torch.isfinite(kl).all() or not torch.isfinite(sums).all():
        raise ModelError("a model's logits are not finite; load it with dtype float32, or is the model damaged?")
    n = len(kl)
    flips, ours, theirs = (sums / n).tolist()
    # By sorting: torch.quantile takes at most 2^24 numbers.
    kl_99 = float(kl.sort().values[min(n - 1, math.ceil(0.99 * n) - 1)])
    return Divergence(
        kl=float(kl.mean()),
        kl_99=kl_99,
        flips=flips,
        perplexity=math.exp(min(-ours, 700)),
        reference_perplexity=math.exp(min(-theirs, 700)),
        n_tokens=n,
        n_windows=len(cuts),
    )


def compare(
    source: str,
    reference: str,
    text: str,
    window: int = 2048,
    stride: int | None = None,
    max_windows: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Callable | None = None,
) -> Divergence:
    """`divergence` of two model folders, hub ids or .gguf files on a text.

    device: auto, cpu, cuda or cuda:N. threads: of the CPU. Raises InputError for a .gqsa file and for models whose
    tokenizers differ on the text, and the errors of load_for_evaluation.
    """
    from gqsa_runtime.tokenizer import Tokenizer

    for one in (source, reference):
        if is_artifact(one):
            raise InputError(
                f"{one} is a .gqsa file, which gives no whole distributions of next tokens; compare the folder that it "
                "was built from"
            )
    if threads is not None:
        if threads < 1:
            raise InputError(f"the number of threads is {threads}, expected at least 1")
        torch.set_num_threads(threads)
    where = torch_device(device)  # before a long load
    (model, tokenizer_json), (other, other_json) = map(load_for_evaluation, (source, reference))
    tokens = Tokenizer(tokenizer_json).encode(text)
    if tokens != Tokenizer(other_json).encode(text):
        raise InputError(
            f"the tokenizers of {source} and {reference} make different tokens of the text; expected the model that "
            "it was compressed from"
        )
    return divergence(model.to(where), other.to(where), tokens, window, stride, max_windows, progress)
