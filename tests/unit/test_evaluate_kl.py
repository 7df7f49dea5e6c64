"""KL, flips and percentiles between two models, by their definition, and the command."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gqsac.cli import cli
from gqsac.errors import InputError, ModelError
from gqsac.evaluate.divergence import compare, divergence
from gqsac.evaluate.perplexity import perplexity
from tests.unit.compress_models import TEXT, byte_tokenizer, save_model

WINDOW = 32
TOKENS = byte_tokenizer().encode(TEXT[:300]).ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model, and the same with its weights moved."""
    root = tmp_path_factory.mktemp("models")
    first = save_model(root / "first")
    model = AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    model.save_pretrained(root / "second")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (root / "second" / name).write_bytes((first / name).read_bytes())
    return str(first), str(root / "second")


@pytest.fixture(scope="module")
def models(folders):
    return [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]


def by_definition(model, reference):
    """In f64, one position after another."""
    kls, flips = [], 0
    for start in range(0, len(TOKENS) - WINDOW + 1, WINDOW):
        piece = torch.tensor([TOKENS[start : start + WINDOW]])
        with torch.no_grad():
            q, p = (torch.softmax(m(piece).logits[0, :-1].double(), 1).numpy() for m in (model, reference))
        kls += [(b * np.log(b / a)).sum() for a, b in zip(q, p, strict=True)]
        flips += (q.argmax(1) != p.argmax(1)).sum()
    return np.array(kls), flips


def test_the_figures_are_those_of_the_definition(models):
    reference, model = models
    found = divergence(model, reference, TOKENS, WINDOW)
    kls, flips = by_definition(model, reference)
    assert found.n_tokens == len(kls) and found.n_windows == len(TOKENS) // WINDOW
    assert found.kl == pytest.approx(kls.mean(), rel=1e-4)
    assert found.kl_99 == pytest.approx(np.sort(kls)[math.ceil(0.99 * len(kls)) - 1], rel=1e-4)
    assert found.flips == pytest.approx(flips / len(kls)) and 0 < flips < len(kls)
    assert found.perplexity == pytest.approx(perplexity(model, TOKENS, WINDOW).perplexity, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(perplexity(reference, TOKENS, WINDOW).perplexity, rel=1e-6)


def test_pieces_of_a_window_and_overlapping_windows_change_nothing_that_they_should_not(models, monkeypatch):
    reference, model = models
    whole = divergence(model, reference, TOKENS, WINDOW, stride=16)
    monkeypatch.setattr("gqsac.evaluate.divergence._LOGITS_AT_ONCE", 5 * 300)
    assert vars(divergence(model, reference, TOKENS, WINDOW, stride=16)) == pytest.approx(vars(whole))
    assert whole.n_tokens > divergence(model, reference, TOKENS, WINDOW, max_windows=2).n_tokens


def test_a_model_is_next_to_itself(models):
    found = divergence(models[0], models[0], TOKENS, WINDOW)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.flips == 0


def test_bad_input_is_named(models, folders, tmp_path):
    reference, model = models
    with pytest.raises(InputError, match="the window is 65 tokens, but a model has a context of 64"):
        divergence(model, reference, TOKENS, 65)
    with pytest.raises(InputError, match="the number of windows is 0"):
        divergence(model, reference, TOKENS, WINDOW, max_windows=0)
    broken = AutoModelForCausalLM.from_pretrained(folders[0])
    broken.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="not finite"):
        divergence(broken, reference, TOKENS, WINDOW)
    other = save_model(tmp_path / "other", "opt")
    larger = AutoModelForCausalLM.from_pretrained(other)
    larger.resize_token_embeddings(310)
    with pytest.raises(InputError, match="a vocabulary of 310 tokens and the reference one of 300"):
        divergence(larger, reference, TOKENS, WINDOW)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="the tokenizers of .* make different tokens of the text"):
        compare(str(other), folders[0], TEXT, WINDOW)
    (tmp_path / "model.gqsa").write_bytes(b"GGUF")
    with pytest.raises(InputError, match="is a .gqsa file, which gives no whole distributions"):
        compare(str(tmp_path / "model.gqsa"), folders[0], TEXT, WINDOW)


def test_the_command_prints_all_figures(folders, tmp_path):
    from click.testing import CliRunner

    (tmp_path / "text").write_text(TEXT[:300])
    arguments = ["eval", "kl", folders[1], "--reference", folders[0], "--text", str(tmp_path / "text")]
    arguments += ["--window", str(WINDOW), "--device", "cpu"]
    said = CliRunner().invoke(cli, arguments)
    assert said.exit_code == 0, said.output
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert f"KL {found['kl']:.4f} nats a token, 99th percentile {found['kl_99']:.3f}" in said.stdout
    assert f"{found['flips']:.2%} of likeliest tokens flip" in said.stdout
    assert found["reference"] == folders[0] and found["window"] == WINDOW
