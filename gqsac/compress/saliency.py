"""Saliency, step 3: what removing a 1xG group of weights would cost.

    s = w_g ([H^-1]_gg)^-1 w_g^T

for the G weights w_g of a row and the G x G diagonal block of the inverse Hessian: the rise of the
layer's output error E[|w x|^2] when the group is set to zero and the row's other weights are adjusted as
well as possible. It is the Optimal Brain Surgeon's saliency for a block of weights (oBERT, arXiv
2203.07259, eq. 6); GQSA (arXiv 2412.17560, section 3.2) averages its diagonal form w^2 / [H^-1]_jj over
a group, which ignores that the inputs of one group are correlated.
"""

from __future__ import annotations

import torch


def saliency_metrics(hessian_inverse: torch.Tensor, group_size: int) -> torch.Tensor:
    """f32 [n_groups, G, G]: ([H^-1]_gg)^-1 of every group of columns. hessian_inverse: f32 [columns, columns].

    A group size of 1 gives the saliency of single weights, w^2 / [H^-1]_jj.
    """
    return torch.linalg.inv(diagonal_blocks(hessian_inverse, group_size))


def saliency_under(weight: torch.Tensor, metrics: torch.Tensor) -> torch.Tensor:
    """f32 [rows, n_groups]: w_g M_g w_g^T for metrics [n_groups, G, G]. weight: f32 [rows, columns]."""
    n_groups, group_size = metrics.shape[:2]
    groups = weight.view(-1, n_groups, group_size).transpose(0, 1)  # [n_groups, rows, G]
    return ((groups @ metrics) * groups).sum(2).T.contiguous()


def diagonal_blocks(matrix: torch.Tensor, group_size: int) -> torch.Tensor:
    """[columns / G, G, G]: the blocks on the diagonal of a [columns, columns] matrix."""
    n_groups = len(matrix) // group_size
    index = torch.arange(n_groups, device=matrix.device)
    return matrix.view(n_groups, group_size, n_groups, group_size)[index, :, index]
