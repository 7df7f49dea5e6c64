"""Training steps as CUDA graphs: what they do on a GPU, and what is told where they cannot be captured."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM

from gqsac.compress import captured
from gqsac.compress.captured import CapturedStep, attend_without_masks, captures
from tests.unit.compress_models import save_model


def test_a_cpu_does_not_capture_and_a_switch_says_no(monkeypatch):
    assert not captures(torch.device("cpu"))
    monkeypatch.setattr(captured, "compiles", lambda device: True)
    assert captures(torch.device("cuda"))
    monkeypatch.setenv("GQSAC_CAPTURE", "0")
    assert not captures(torch.device("cuda"))


def test_attention_without_masks_is_the_same(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "llama")).eval()
    tokens = torch.arange(24).view(2, 12) % 7 + 3
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits
        attend_without_masks(model, 12)
        assert model.config._attn_implementation != "sdpa"
        torch.testing.assert_close(model(tokens, use_cache=False).logits, before)


def test_models_that_see_less_than_a_sample_keep_their_masks(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "llama"))
    model.config.sliding_window = 8
    attend_without_masks(model, 12)
    assert model.config._attn_implementation == "sdpa"
    attend_without_masks(model, 8)
    assert model.config._attn_implementation != "sdpa"


class _Stream:
    def wait_stream(self, other):
        pass


def test_a_step_that_cannot_be_captured_goes_on_and_says_so(monkeypatch, capsys):
    @contextlib.contextmanager
    def refused(graph, stream):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    for name, value in {
        "Stream": lambda device: _Stream(),
        "current_stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": object,
        "graph": refused,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    weight = torch.nn.Parameter(torch.tensor([2.0]))

    def function(tokens):
        assert weight.grad is None
        loss = (weight * tokens.float()).sum()
        loss.backward()
        return loss.detach()

    step = CapturedStep(function, [weight], torch.device("cpu"))
    losses = [float(step(torch.tensor([[n, 1]]))) for n in range(6)]
    assert losses == [2.0 * (n + 1) for n in range(6)] and float(weight.grad) == 6.0
    assert step.graph is False
    told = capsys.readouterr().err
    assert told.count("could not be captured as a CUDA graph (operation not permitted when stream is capturing)") == 1


@pytest.mark.gpu
def test_a_captured_step_is_the_step_itself():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    device = torch.device("cuda")
    weight = torch.nn.Parameter(torch.ones(4, 4, device=device))

    def function(tokens):
        loss = (tokens.float() @ weight).square().mean()
        loss.backward(inputs=[weight])
        return loss.detach()

    step = CapturedStep(function, [weight], device)
    for n in range(8):
        tokens = torch.arange(8).view(2, 4) + n
        loss = float(step(tokens))
        reference = weight.detach().clone().requires_grad_()
        expected = (tokens.to(device).float() @ reference).square().mean()
        expected.backward()
        torch.testing.assert_close(loss, float(expected))
        torch.testing.assert_close(weight.grad, reference.grad)
        with torch.no_grad():
            weight -= 1e-3 * weight.grad  # in place: the graph sees it
    assert step.graph is True
