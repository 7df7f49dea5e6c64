"""The custom operators are sound for torch.export, and probes accept nothing but what they look for."""

import pytest
import torch
from torch import nn

from gqsac.compiler import opaque, probe


@pytest.mark.parametrize(
    "operator, args",
    [
        (torch.ops.gqsa.rms_norm, (torch.randn(2, 3, 8), torch.randn(8), 1e-5, 1.0)),
        (torch.ops.gqsa.rope_table, (torch.arange(3)[None], torch.rand(4), 1.5, "rope0")),
        (torch.ops.gqsa.rope, (torch.randn(1, 4, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8), 1)),
        (torch.ops.gqsa.rope, (torch.randn(1, 3, 4, 8), torch.randn(1, 3, 6), torch.randn(1, 3, 6), 2)),
        (torch.ops.gqsa.causal_mask, (torch.zeros(5), 2)),
        (
            torch.ops.gqsa.attention,
            (
                torch.randn(1, 4, 3, 8),
                torch.randn(1, 2, 3, 8),
                torch.randn(1, 2, 3, 8),
                torch.ones(1, 1, 3, 3) > 0,
                0.3,
                0,
            ),
        ),
    ],
    ids=lambda value: str(value) if not isinstance(value, tuple) else "",
)
def test_fake_and_reference_agree(operator, args):
    torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


def test_attention_reference_is_scaled_dot_product_attention():
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    got = opaque.attention(q, k, v, opaque.causal_mask(torch.zeros(6), 0), 0.3, 0)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_causal_mask_with_a_window():
    assert opaque.causal_mask(torch.zeros(4), 2)[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


class Norm(nn.Module):
    """An RMSNorm with a twist given by its kind."""

    def __init__(self, kind: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.eps = 1e-5
        self.kind = kind

    def forward(self, x):
        mean_square = x.pow(2).mean(-1, keepdim=True)
        if self.kind == "eps outside the root":
            return self.weight * x / (mean_square.sqrt() + self.eps)
        if self.kind == "l2":
            mean_square = x.pow(2).sum(-1, keepdim=True)
        if self.kind == "centred":
            x = x - x.mean(-1, keepdim=True)
        normal = x * torch.rsqrt(mean_square + self.eps)
        return normal * (1 + self.weight) if self.kind == "offset" else normal * self.weight


@pytest.mark.parametrize(
    "kind, expected",
    [("plain", (1e-5, 0.0)), ("offset", (1e-5, 1.0)), ("eps outside the root", None), ("l2", None), ("centred", None)],
)
def test_rms_norm_is_known_by_its_numbers(kind, expected):
    assert probe.as_rms_norm(Norm(kind)) == expected


def test_torch_rms_norm_with_its_default_eps():
    assert probe.as_rms_norm(nn.RMSNorm(16)) == (torch.finfo(torch.float32).eps, 0.0)


@pytest.mark.parametrize(
    "module, expected",
    [
        (nn.ReLU(), "relu"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU6(), None),
        (nn.Hardswish(), None),
        (nn.Identity(), None),
        (nn.Dropout(0.0), None),
    ],
)
def test_activation_is_known_by_its_numbers(module, expected):
    found = probe.as_activation(module)
    assert found is (None if expected is None else probe.ACTIVATIONS[expected])


def rotate_halves(q, k, cos, sin, unsqueeze_dim=1):
    return opaque.rope(q, cos, sin, unsqueeze_dim), opaque.rope(k, cos, sin, unsqueeze_dim)


def rotate_whole_heads_only(q, k, cos, sin):
    assert q.shape[-1] == cos.shape[-1]
    return rotate_halves(q, k, cos, sin)


def rotate_interleaved(q, k, cos, sin):
    def rotate(x):
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, None] + turned * sin[:, None]

    return rotate(q), rotate(k)


@pytest.mark.parametrize(
    "function, form",
    [
        (rotate_halves, "partial"),
        (rotate_whole_heads_only, "full"),
        (rotate_interleaved, "none"),
        (lambda x, cos, sin: x, "none"),
    ],
)
def test_rotation_is_known_by_its_numbers(function, form):
    assert probe.rotation_form(function) == form


def test_masks_are_known_by_their_numbers():
    def causal(batch, head, query, key):
        return key <= query

    def window_of_3(batch, head, query, key):
        return (key <= query) & (key > query - 3)

    def chunks_of_4(batch, head, query, key):
        return (key <= query) & (key // 4 == query // 4)

    def everything(batch, head, query, key):
        return key >= 0

    assert probe.is_causal_mask(causal, 0, 64)
    assert probe.is_causal_mask(window_of_3, 3, 64)
    assert not probe.is_causal_mask(window_of_3, 0, 64)
    assert not probe.is_causal_mask(window_of_3, 4, 64)
    assert not probe.is_causal_mask(causal, 3, 64)
    assert not probe.is_causal_mask(chunks_of_4, 4, 64)
    assert not probe.is_causal_mask(everything, 0, 64)
