"""The steps of compression one by one, against their definitions."""

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

from gqsac.compress.calibrate import calibration_tokens
from gqsac.compress.hessian import collect_hessians, inverse
from gqsac.compress.quantize import candidate_grids, quantize
from gqsac.compress.saliency import diagonal_blocks, saliency_metrics, saliency_under
from gqsac.compress.select import select_groups
from gqsac.errors import InputError, ModelError
from gqsac.evaluate.perplexity import perplexity
from tests.unit.compress_models import TEXT, byte_tokenizer


def hessian_of(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=generator) @ mix  # correlated inputs
    hessian = x.T @ x
    return hessian / hessian.diagonal().mean()


def test_saliency_is_the_error_left_after_the_best_adjustment():
    hessian = hessian_of(32)
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    saliency = saliency_under(weight, saliency_metrics(torch.linalg.inv(hessian), 8))
    for row in range(3):
        for group in range(4):
            gone = torch.zeros(32, dtype=torch.bool)
            gone[8 * group : 8 * group + 8] = True
            # min over d with d[gone] = -w[gone] of d H d^T, by solving for the others
            fixed = -weight[row, gone]
            others = -torch.linalg.solve(hessian[~gone][:, ~gone], hessian[~gone][:, gone] @ fixed)
            d = torch.zeros(32)
            d[gone], d[~gone] = fixed, others
            torch.testing.assert_close(saliency[row, group], d @ hessian @ d, rtol=1e-3, atol=1e-4)


def test_diagonal_blocks():
    matrix = torch.arange(36.0).view(6, 6)
    torch.testing.assert_close(diagonal_blocks(matrix, 2)[1], matrix[2:4, 2:4])


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.3, 0.5, 0.97])
def test_rows_lose_the_same_number_and_the_total_is_exact(sparsity):
    saliency = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    keep = select_groups(saliency, sparsity)
    removed = (~keep).sum(1)
    assert removed.sum() == round(sparsity * 63)
    assert removed.max() - removed.min() <= 1
    for row in range(7):  # what goes is less salient than what stays
        if 0 < removed[row] < 9:
            assert saliency[row][~keep[row]].max() < saliency[row][keep[row]].min()


def test_layer_selection_removes_the_least_salient_of_all():
    saliency = torch.arange(12.0).view(3, 4)
    assert select_groups(saliency, 0.5, "layer").tolist() == [[False] * 4, [False, False, True, True], [True] * 4]


def all_of(bits, rows):
    return torch.full((rows,), bits, dtype=torch.uint8)


@pytest.mark.parametrize("between_levels", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_grids_hold_zero_and_are_float16(bits, between_levels):
    group = torch.tensor([[0.0] * 8, [1.0, 2, 3, 4, 5, 6, 7, 8], [-1e-9] * 8, [-3.0, 0, 0, 0, 0, 0, 0, 5.0]])
    scales, zeros = candidate_grids(group, all_of(bits, 4), between_levels)
    assert torch.equal(scales, scales.half().float())
    assert (scales > 0).all()
    assert torch.equal(zeros, zeros.round())
    assert zeros.min() >= 0 and zeros.max() < 16
    if bits == 8:
        assert (zeros == 8).all()
    elif not between_levels:
        assert ((zeros * 2**bits) % 16 == 0).all()


def test_grids_of_rows_are_those_of_their_widths():
    group = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    widths = torch.tensor([1, 8, 3, 2, 4], dtype=torch.uint8)
    for between_levels in (False, True):
        scales, zeros = candidate_grids(group, widths, between_levels)
        for row, bits in enumerate(widths.tolist()):
            alone = candidate_grids(group[row : row + 1], all_of(bits, 1), between_levels)
            assert torch.equal(scales[:, row], alone[0][:, 0]) and torch.equal(zeros[:, row], alone[1][:, 0])


def test_a_zero_between_levels_costs_less_than_one_on_a_level():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) + 0.4
    errors = []
    for between_levels in (False, True):
        rounded = quantize(
            weight, torch.ones(64, 1, dtype=bool), torch.eye(64), torch.ones(64), all_of(2, 64), 64, between_levels
        )
        errors.append(float((rounded.dequantize() - weight).square().sum()))
    assert errors[1] < 0.9 * errors[0]


def loss(error, hessian):
    return ((error @ hessian) * error).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_handing_errors_on_beats_rounding_to_nearest(bits):
    hessian = hessian_of(64)
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    keep = select_groups(torch.rand(40, 4, generator=torch.Generator().manual_seed(3)), 0.25)
    hessian_inverse = inverse(hessian, 0.01)
    ours = quantize(weight, keep, hessian_inverse, hessian.diagonal(), all_of(bits, 40)).dequantize()
    # Uncorrelated inputs make quantize round each weight on its own, over the same candidate ranges.
    alone = quantize(weight, keep, torch.eye(64), torch.ones(64), all_of(bits, 40)).dequantize()
    assert loss(ours - weight, hessian) < 0.7 * loss(alone - weight, hessian)
    assert torch.equal(ours.view(40, 4, 16).abs().sum(2) == 0, ~keep)


def test_levels_stay_in_range_and_weights_on_a_grid_are_kept():
    generator = torch.Generator().manual_seed(4)
    levels = torch.randint(0, 16, (5, 2, 16), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15  # so that the full range is the true grid
    weight = ((levels - 7) * 0.125).flatten(1)
    everything = torch.ones(5, 2, dtype=torch.bool)
    result = quantize(weight, everything, inverse(hessian_of(32), 0.01), torch.ones(32), all_of(4, 5))
    assert result.levels.max() <= 15
    torch.testing.assert_close(result.dequantize(), weight)


def test_hessians_are_shared_by_siblings_and_scaled():
    block = torch.nn.ModuleDict({name: torch.nn.Linear(8, 4) for name in ("a", "b", "c")})
    x, other = torch.randn(5, 8), torch.randn(5, 8)

    def run():
        block["a"](x), block["b"](x), block["c"](other)

    hessians = collect_hessians(dict(block.items()), run)
    precisions = []
    collect_hessians(
        dict(block.items()), lambda: precisions.append(torch.get_float32_matmul_precision()) or run(), True
    )
    assert precisions == ["high"] and torch.get_float32_matmul_precision() == "highest"
    assert hessians["a"] is hessians["b"]
    moments = x.T @ x
    torch.testing.assert_close(hessians["a"], moments / moments.diagonal().mean())
    assert not torch.equal(hessians["a"], hessians["c"])
    with pytest.raises(ModelError, match="^c got no input"):
        collect_hessians(dict(block.items()), lambda: block["a"](x) + block["b"](x))
    with pytest.raises(ModelError, match="inputs of a hold a NaN"):
        collect_hessians({"a": block["a"]}, lambda: block["a"](x * float("nan")))


def test_calibration_windows_are_seeded_and_disjoint(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + i % 90) for i in range(5000)) + TEXT)
    first = calibration_tokens(byte_tokenizer(), [file], 8, 32, seed=1)
    assert first.shape == (8, 32)
    assert np.array_equal(first, calibration_tokens(byte_tokenizer(), [file], 8, 32, seed=1))
    assert not np.array_equal(first, calibration_tokens(byte_tokenizer(), [file], 8, 32, seed=2))
    built_in = calibration_tokens(byte_tokenizer(), None, 16, 1024, seed=0)  # the default size is there
    assert len({row.tobytes() for row in built_in}) == 16
    with pytest.raises(InputError, match="the built-in text gives"):
        calibration_tokens(byte_tokenizer(), None, 4000, 1024, seed=0)


class _Bigram(torch.nn.Module):
    """Logits depend on the last token alone, so that every window scores a token alike."""

    device, config = torch.device("cpu"), PreTrainedConfig()

    def __init__(self):
        super().__init__()
        self.table = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens, use_cache=False):
        return type("Output", (), {"logits": self.table[tokens]})


@pytest.mark.parametrize("window, stride, scored", [(16, None, 3 * 15), (16, 4, 15 + 9 * 4), (16, 7, 15 + 5 * 7)])
def test_perplexity_scores_each_token_of_the_protocol(window, stride, scored):
    tokens = torch.randint(0, 50, (53,), generator=torch.Generator().manual_seed(1))
    model = _Bigram()
    result = perplexity(model, tokens.tolist(), window, stride)
    assert result.n_tokens == scored
    log_probs = torch.log_softmax(model.table, 1)[tokens[:-1], tokens[1:]]  # of tokens 1, 2, …
    step = stride or window
    starts = range(0, 53 - window + 1, step)
    positions = [p for s in starts for p in range(s + 1 if s == 0 or stride is None else s + window - step, s + window)]
    expected = torch.exp(-log_probs[torch.tensor(positions) - 1].mean())
    assert result.perplexity == pytest.approx(float(expected), rel=1e-5)
    assert perplexity(model, tokens, window, stride, max_windows=1).n_tokens == 15
    with pytest.raises(InputError, match="windows is 0"):
        perplexity(model, tokens, window, stride, max_windows=0)
