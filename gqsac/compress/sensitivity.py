"""How much each group matters to the model's loss, measured once before compression (`allocation="global"`).

    s_g = mean over samples of (w_g . dL/dw_g)^2

for a group's weights w_g and the language-model loss L of a sample: the second-order cost of removing the
group with the empirical Fisher matrix as the Hessian, and its diagonal block alone (oBERT, arXiv 2203.07259).
Unlike a layer's own Hessian it compares across layers; so it sets how many groups each linear gives up, and
the layer's Hessian, which is known much more exactly, sets which.
"""

from __future__ import annotations

import torch

from gqsac.compress.losses import token_loss
from gqsac.compress.options import Options
from gqsac.compress.select import LEAST_ROW_SHARE, protect_rows, select_globally
from gqsac.compress.trainable import autocast, prepare_large

_SAMPLES = 16


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


def group_scores(model, paths: list[str], tokens: torch.Tensor, group_size: int) -> dict[str, torch.Tensor]:
    """Path -> f32 [rows, n_groups], see above. No more than one linear's gradient is held at a time."""
    scores: dict[str, torch.Tensor] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = []
    for path in paths:
        weight = model.get_submodule(path).weight.requires_grad_(True)

        def take(weight, path=path):
            product = (weight.detach() * weight.grad).float().view(len(weight), -1, group_size).sum(2).square()
            scores[path] = scores[path] + product if path in scores else product
            weight.grad = None

        handles.append(weight.register_post_accumulate_grad_hook(take))
    device = weight.device
    try:
        for row in tokens:
            row = row[None].to(device)
            with autocast(device):
                logits = model(row, use_cache=False).logits
            logits.backward(token_loss(logits, row)[1])
    finally:
        for handle in handles:
            handle.remove()
    return {path: scores[path] / len(tokens) for path in paths}
