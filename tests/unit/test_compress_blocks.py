"""Calibration samples on their way through the blocks: how their activations are held, and where."""

import pytest
import torch

from gqsac.compress import activations, blocks
from gqsac.compress.blocks import BlockRunner, find_blocks
from gqsac.errors import InputError, ModelError
from gqsac.source import load_source
from tests.unit.compress_models import save_model

TOKENS = torch.arange(60).view(5, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def passed(source, **options):
    """A runner whose samples have passed through the first block."""
    model = load_source(source).model
    runner = BlockRunner(model, find_blocks(model)[1], TOKENS, torch.device("cpu"), reference=True, **options)
    runner.run_reference(0, find_blocks(model)[1][0])
    runner.run(0, find_blocks(model)[1][0], keep=True)
    runner.check("model.layers.0")
    return runner


@torch.no_grad()
def test_samples_pass_as_in_the_model_itself(llama):
    expected = load_source(llama).model(TOKENS, output_hidden_states=True).hidden_states[1]
    runner = passed(llama)
    assert runner.hidden.dtype == torch.float32
    torch.testing.assert_close(runner.hidden, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(runner.hidden, runner.reference)


def test_large_models_hold_bf16_and_compute_in_f32(llama, monkeypatch):
    expected = passed(llama).hidden
    monkeypatch.setattr(blocks, "is_large", lambda model: True)
    runner = passed(llama)
    assert runner.hidden.dtype == runner.reference.dtype == torch.bfloat16
    torch.testing.assert_close(runner.hidden.float(), expected, rtol=2**-7, atol=2**-7 * float(expected.std()))
    model = load_source(llama).model.float()
    assert runner.call(1, find_blocks(model)[1][1], runner.hidden[:1]).dtype == torch.float32


@pytest.mark.parametrize("large", [False, True])
def test_what_memory_does_not_hold_is_kept_in_files_that_vanish(llama, tmp_path, monkeypatch, large):
    monkeypatch.setattr(blocks, "is_large", lambda model: large)
    expected = passed(llama, folder=tmp_path)
    size = 2 * expected.hidden.nbytes
    mapped = []
    monkeypatch.setattr(activations, "_mapped", lambda *args, made=activations._mapped: mapped.append(1) or made(*args))
    monkeypatch.setattr(activations, "free_cpu_bytes", lambda: 2 * size)
    passed(llama, folder=tmp_path)
    assert not mapped
    monkeypatch.setattr(activations, "free_cpu_bytes", lambda: 2 * size - 1)
    runner = passed(llama, folder=tmp_path)
    assert len(mapped) == 2
    assert torch.equal(runner.hidden, expected.hidden) and torch.equal(runner.reference, expected.reference)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "free_cpu_bytes", lambda: 0)
    with pytest.raises(InputError, match=r"has no room for files of 4611686018.4 GB \((No space|File too large)"):
        activations.empty_states(2, (1 << 62,), torch.uint8, tmp_path)
    assert not list(tmp_path.iterdir())


def test_activations_that_are_not_finite_stop_the_run(llama):
    runner = passed(llama)
    model = load_source(llama).model.float()
    block = find_blocks(model)[1][1]
    block.mlp.down_proj.weight.data[0, 0] = torch.inf
    runner.run(1, block, keep=True)
    with pytest.raises(ModelError, match=r"the activations after model\.layers\.1 hold a NaN"):
        runner.check("model.layers.1")
