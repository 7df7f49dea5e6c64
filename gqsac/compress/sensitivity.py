"""How much weights matter to the model's loss: groups that may be removed, and scale groups that are to be rounded.

For removal (`allocation="global"`), measured once before compression:

    s_g = mean over samples of (w_g . dL/dw_g)^2

for a group's weights w_g and the language-model loss L of a sample: the second-order cost of removing the
group with the empirical Fisher matrix as the Hessian, and its diagonal block alone (oBERT, arXiv 2203.07259).
Unlike a layer's own Hessian it compares across layers; so it sets how many groups each linear gives up, and
the layer's Hessian, which is known much more exactly, sets which.

For widths by row, the diagonal of the Fisher matrix itself: the mean over tokens of (d log p(y) / dw)^2 for next
tokens y that are sampled from the model. It is the Hessian of KL(model || changed model), needs no text of any kind but
the contexts, and rounding a group by errors e costs about half of the mean of its entries times |e|^2.
"""

from __future__ import annotations

import torch
from gqsa_runtime.errors import ModelError
from tqdm import tqdm

from gqsac.compress.finite import first_not_finite
from gqsac.compress.losses import LOGITS_AT_ONCE, token_loss
from gqsac.compress.options import Options
from gqsac.compress.select import LEAST_ROW_SHARE, protect_rows, select_globally
from gqsac.compress.trainable import autocast, prepare_large

_SAMPLES = 16
_SAMPLES_ON_GPU = 64  # of sensitivities


def allocate(model, blocks, paths: list[str], tokens: torch.Tensor, options: Options, device) -> dict[str, float]:
    """Path -> share of the linear's groups to remove; over all, round(sparsity * groups) of them.

    model: is taken over. blocks: its decoder blocks. tokens: int64 [samples, seq_len], of which the first 16 are used.
    """
    prepare_large(model, blocks, device)
    scores = group_scores(model.to(device), paths, tokens[:_SAMPLES], options.group_size)
    model.to("meta")  # its memory is not needed any more
    share = min(LEAST_ROW_SHARE, 1 - options.sparsity)
    keeps = select_globally({path: protect_rows(score, share) for path, score in scores.items()}, options.sparsity)
    return {path: int((~keep).sum()) / keep.numel() for path, keep in keeps.items()}


def sensitivities(model, blocks, paths: list[str], tokens: torch.Tensor, options: Options, device, shown: bool):
    """Path -> f32 [rows, columns / quant_group_size] on the CPU: `fisher_scores` before compression.

    The arguments are as in `allocate`; on a GPU the first 64 samples are used.
    """
    prepare_large(model, blocks, device)
    generator = torch.Generator(device).manual_seed(options.seed)
    most = _SAMPLES if device.type == "cpu" else _SAMPLES_ON_GPU
    scores = fisher_scores(model.to(device), paths, tokens[:most], options.quant_group_size, generator, shown)
    return {path: score.cpu() for path, score in scores.items()}


def group_scores(model, paths: list[str], tokens: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """Path -> f32 [rows, n_groups], see above. No more than one linear's gradient is held at a time."""

    def score(weight):
        return (weight.detach() * weight.grad).float().view(len(weight), -1, group_size).sum(2).square()

    scores = _summed(model, paths, tokens, score, lambda logits, row: token_loss(logits, row)[1])
    return {path: total / len(tokens) for path, total in scores.items()}


def fisher_scores(
    model, paths: list[str], tokens: torch.Tensor, group_size: int, generator: torch.Generator, shown: bool = False
) -> dict[str, torch.Tensor]:
    """Path -> f32 [rows, columns / group_size]: the mean of the Fisher diagonal over each group, see above.

    tokens: int64 [samples, seq_len], contexts. generator: on the model's device. shown: a bar on a terminal.
    """

    def score(weight):
        return fisher_of(weight.grad, group_size)

    scores = _summed(model, paths, tokens, score, lambda logits, row: sampled_gradient(logits, generator), shown)
    return {path: total / tokens.numel() for path, total in scores.items()}


def fisher_of(gradient: torch.Tensor, group_size: int) -> torch.Tensor:
    """f32 [rows, columns / group_size]: mean squares over groups of columns. gradient: [rows, columns]."""
    return gradient.float().view(len(gradient), -1, group_size).square().mean(2)


@torch.no_grad()
def sampled_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradient by the logits of -sum log p(y), y sampled from them at every position; like `logits` [batch, n, vocab].

    Some rows at a time, as in losses.token_loss.
    """
    gradient = torch.empty_like(logits).view(-1, logits.shape[-1])
    at_once = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    for rows, out in zip(logits.reshape(gradient.shape).split(at_once), gradient.split(at_once), strict=True):
        p = torch.softmax(rows.float(), 1)
        picked = torch.multinomial(p, 1, generator=generator)
        out.copy_(p.scatter_add_(1, picked, torch.full_like(p[:, :1], -1.0)))
    return gradient.view_as(logits)


def _summed(model, paths: list[str], tokens: torch.Tensor, score, gradient, shown: bool = False):
    """Path -> sum over samples of score(weight with its gradient). gradient: of a sample's logits, tokens -> theirs."""
    scores: dict[str, torch.Tensor] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = []
    for path in paths:
        weight = model.get_submodule(path).weight.requires_grad_(True)

        def take(weight, path=path):
            found = score(weight)
            scores[path] = scores[path] + found if path in scores else found
            weight.grad = None

        handles.append(weight.register_post_accumulate_grad_hook(take))
    device = weight.device
    try:
        for row in tqdm(tokens, desc="sensitivities", unit="sample", disable=None if shown else True):
            row = row[None].to(device)
            with autocast(device):
                logits = model(row, use_cache=False).logits
            if not torch.isfinite(logits).all():
                raise ModelError(
                    "the uncompressed model's outputs are not finite for the calibration text, first that of "
                    f"{first_not_finite(model, row)}; is the model damaged?"
                )
            logits.backward(gradient(logits, row))
    finally:
        for handle in handles:
            handle.remove()
    for path in paths:
        if not torch.isfinite(scores[path]).all():
            raise ModelError(f"the gradients of {path} hold a NaN or an infinity for the calibration text")
    return {path: scores[path] for path in paths}
