"""Scores of token sequences by their definition, on the runtime and in PyTorch, and the two against each other."""

import json

import numpy as np
import pytest
import torch
from gqsa_runtime import Model
from gqsa_runtime.device_cpu import supported_targets
from gqsa_runtime.sampling import SamplingOptions
from gqsa_runtime.tokenizer import Tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM

from gqsac.errors import DeviceError, InputError, ModelError
from gqsac.evaluate.load import is_artifact, open_scorer
from gqsac.evaluate.score_runtime import RuntimeScorer
from gqsac.evaluate.score_torch import TorchScorer, torch_device
from gqsac.evaluate.scoring import Encoder, ScoreRequest, leading_tokens
from tests.e2e.checkpoints import save_checkpoint, save_multi_stream
from tests.e2e.command import succeed
from tests.format import tiny
from tests.unit import fake_device

QUESTION = "Question: what is warm and gives light?\nAnswer:"
CHOICES = [" the sun", " the sea", " a stone", " sunlight on the sea, in summer"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("scoring") / "llama", "llama")


@pytest.fixture(scope="module")
def reference(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def torch_scorer(checkpoint):
    return open_scorer(str(checkpoint), device="cpu", threads=1)


def requests(encoder, context=QUESTION, continuations=CHOICES):
    return [encoder.pair(context, continuation) for continuation in continuations]


# Texts to tokens


def test_a_pair_is_one_text_cut_at_the_context(torch_scorer):
    encoder = Encoder(torch_scorer)
    request = encoder.pair("ab", " cd")
    assert torch_scorer.tokenizer.decode(request.tokens) == "ab cd"
    assert request.n_context == 2
    # Blanks at the context's end belong to the continuation, as in the harness.
    assert encoder.pair("ab ", "cd") == request
    with pytest.raises(InputError, match="a continuation holds no tokens"):
        encoder.pair("ab", "")


@pytest.mark.parametrize("template", [("<s> $A", (256,)), ("<s> $A </s>", (256,)), ("$A </s>", ()), ("$A", ())])
def test_special_tokens_stand_before_a_text_and_never_after(template):
    single, leading = template
    raw = RawTokenizer.from_str(tiny.tokenizer_json())
    raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 256), ("</s>", 257)])
    model = fake_device.model()
    model.tokenizer = Tokenizer(raw.to_str())
    assert leading_tokens(model.tokenizer) == leading
    encoder = Encoder(RuntimeScorer(model))
    letters = [model.tokenizer.encode(letter, False)[0] for letter in "ab c"]
    assert encoder.pair("ab", " c") == ScoreRequest((*leading, *letters), len(leading) + 2)
    # Without a context, begin-of-text is the context.
    assert encoder.pair("", "c") == ScoreRequest((tiny.BOS, letters[3]), 1)


def test_a_model_without_begin_of_text_uses_its_end_or_says_so(torch_scorer, monkeypatch):
    encoder = Encoder(torch_scorer)
    assert (torch_scorer.bos_token_id, torch_scorer.eos_token_ids) == (None, (255,))
    assert encoder.pair("", "c").tokens[0] == 255
    monkeypatch.setattr(torch_scorer, "eos_token_ids", ())
    with pytest.raises(InputError, match="no begin- or end-of-text token"):
        encoder.pair("", "c")


def test_a_long_context_loses_its_beginning_and_is_counted():
    encoder = Encoder(RuntimeScorer(fake_device.model()))  # a context of 32
    fits = encoder.pair("x" * 29, "abcd")
    assert len(fits.tokens) == 33 and encoder.n_truncated == 0
    cut = encoder.pair("y" + "x" * 40, "abcd")
    assert (cut, encoder.n_truncated) == (fits, 1)
    with pytest.raises(InputError, match="continuation of 33 tokens does not fit the context of 32"):
        encoder.pair("x", "a" * 33)


def test_a_foreign_tokenizer_is_refused(torch_scorer, monkeypatch):
    monkeypatch.setattr(torch_scorer, "vocab_size", 50)
    with pytest.raises(ModelError, match=r"makes token \d+, but the model's vocabulary is 50"):
        Encoder(torch_scorer).text("xyz")


# The runtime


def test_runtime_scores_by_their_definition():
    model = fake_device.model()
    scorer = RuntimeScorer(model)
    wanted = requests(Encoder(scorer), "what?", [" ab", " abc", " x", " abcdefghijk", " ab"])
    # A context that reaches past the last request's last token, which was scored but never run.
    wanted += [*requests(Encoder(scorer), "what?", [" xy"]), *requests(Encoder(scorer), "what? xy and", [" so"])]
    for request, score in zip(wanted, scorer.score(wanted), strict=True):
        total, greedy = 0.0, True
        for place in range(request.n_context, len(request.tokens)):
            model.engine.reset()
            row = model.engine.prefill(request.tokens[:place]).astype(np.float64)
            total += row[request.tokens[place]] - np.log(np.exp(row).sum())
            greedy &= int(row.argmax()) == request.tokens[place]
        assert score.log_prob == pytest.approx(total, abs=1e-5)
        assert score.greedy == greedy


def test_greedy_needs_every_token():
    model = fake_device.model("ab", "cd")
    scorer = RuntimeScorer(model)
    greedy = [score.greedy for score in scorer.score(requests(Encoder(scorer), "ab", ["cd", "c", "d", "cx", "xd"]))]
    assert greedy == [True, True, False, False, False]


def test_what_choices_share_is_run_once():
    model = fake_device.model()
    scorer = RuntimeScorer(model)
    scorer.score(requests(Encoder(scorer), "0123456789", [" abc", " abd", " x"]))
    runs = [(n_tokens, at) for phase, n_tokens, at in model.device.launches if phase == "few_body"]
    # In chunks of 4: all of the first; of the others what follows the context, whose last token runs again.
    assert runs == [(4, 0), (4, 4), (4, 8), (1, 12), (4, 9), (2, 9)]
    # Log-probabilities where something is scored, and nowhere else.
    scored = [(n_tokens, at) for phase, n_tokens, at in model.device.launches if phase == "all_log_probs"]
    assert scored == runs[2:]


def test_the_engine_is_sound_after_scoring():
    model = fake_device.model("ab", "cd")
    expected = "".join(model.generate("ab"))
    scorer = RuntimeScorer(model)
    scorer.score(requests(Encoder(scorer), "abx", ["cd", "zz"]))
    assert "".join(model.generate("ab")) == expected == "cd"
    assert scorer.score(requests(Encoder(scorer), "ab", ["cd"]))[0].greedy


# PyTorch


def test_torch_scores_by_their_definition(reference, torch_scorer):
    encoder = Encoder(torch_scorer)
    wanted = [*requests(encoder), *requests(encoder, "", ["x", "yz"]), *requests(encoder, "a", ["b" * 100])]
    for request, score in zip(wanted, torch_scorer.score(wanted), strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([request.tokens])).logits[0].double()
        log_probs = torch.log_softmax(logits, 1)
        scored = range(request.n_context, len(request.tokens))
        expected = sum(float(log_probs[place - 1, request.tokens[place]]) for place in scored)
        assert score.log_prob == pytest.approx(expected, abs=1e-4)
        assert score.greedy == all(int(logits[place - 1].argmax()) == request.tokens[place] for place in scored)


def test_torch_greedy_of_the_likeliest_continuation(reference, torch_scorer):
    tokens = torch_scorer.tokenizer.encode("abc")
    with torch.no_grad():
        best = int(reference(torch.tensor([tokens])).logits[0, -1].argmax())
    others = [token for token in range(3) if token != best]
    wanted = [ScoreRequest((*tokens, token), len(tokens)) for token in (best, *others)]
    assert [score.greedy for score in torch_scorer.score(wanted)] == [True] + [False] * len(others)


def test_batches_cover_all_requests_and_stay_small(torch_scorer, monkeypatch):
    wanted = requests(Encoder(torch_scorer), continuations=[" a" * n for n in (1, 9, 2, 7, 3)])
    whole = torch_scorer.score(wanted)
    monkeypatch.setattr("gqsac.evaluate.score_torch._LOGITS_AT_ONCE", {"cpu": 120 * torch_scorer.vocab_size})
    batches = torch_scorer._batches(wanted)
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4] and len(batches) > 1
    assert all(len(batch) * max(len(wanted[index].tokens) for index in batch) <= 120 for batch in batches)
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    again = torch_scorer.score(wanted, progress)
    assert [score.log_prob for score in again] == pytest.approx([score.log_prob for score in whole], abs=1e-4)
    assert seen == batches


def test_torch_refusals(reference, torch_scorer):
    tokenizer = torch_scorer.tokenizer
    with pytest.raises(InputError, match="the device is 'gpu', expected auto, cpu, cuda or cuda:N"):
        torch_device("gpu")
    with pytest.raises(DeviceError, match=r"PyTorch finds \d+ GPU\(s\), so cuda:99 cannot be used"):
        torch_device("cuda:99")
    with pytest.raises(InputError, match="the context is 321, but this model is made for 1 to 320"):
        TorchScorer(reference, tokenizer, "cpu", 321)
    with pytest.raises(InputError, match="number of threads is 0"):
        open_scorer("anything", threads=0)


def test_torch_nan_is_refused(checkpoint):
    scorer = open_scorer(str(checkpoint), device="cpu", threads=1)
    with torch.no_grad():
        scorer.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="logits hold a NaN"):
        scorer.score(requests(Encoder(scorer)))


def test_runtime_nan_is_refused(monkeypatch):
    scorer = RuntimeScorer(fake_device.model())
    monkeypatch.setattr(scorer.model.device, "row", lambda position: np.full(tiny.VOCAB, np.nan, np.float32))
    with pytest.raises(ModelError, match="log-probabilities hold a NaN"):
        scorer.score(requests(Encoder(scorer), "a", ["b"]))


# One against the other


@pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")
def test_runtime_and_torch_agree_request_for_request(tmp_path, checkpoint):
    save_multi_stream(tmp_path / "model", checkpoint)
    file = tmp_path / "model.gqsa"
    # f32 throughout, so that what differs is a fault and no rounding.
    exact = ("--exact", "--kv-dtype", "f32")
    succeed("build", tmp_path / "model", "-o", file, "--target", supported_targets()[0], *exact)
    theirs = open_scorer(str(tmp_path / "model"), device="cpu", threads=1)
    ours = open_scorer(str(file), device="cpu", threads=1)
    assert isinstance(ours, RuntimeScorer) and isinstance(ours.model, Model) and isinstance(theirs, TorchScorer)
    assert (ours.vocab_size, ours.context, ours.eos_token_ids) == (theirs.vocab_size, theirs.context, (255,))
    encoder = Encoder(ours)
    wanted = [
        *requests(encoder),
        *requests(encoder, QUESTION * 3),  # more than a chunk
        *requests(encoder, "", CHOICES),
        *requests(encoder, QUESTION * 8),  # more than the context
        *requests(encoder, "Bob saw the cat so Bob", [" ran."]),
        *requests(encoder, "Bob saw the cat so the cat", [" ran."]),
    ]
    assert encoder.n_truncated == len(CHOICES)
    assert wanted == [Encoder(theirs).tokens(request.tokens, request.n_context) for request in wanted]
    one, other = ours.score(wanted), theirs.score(wanted)
    assert [score.log_prob for score in one] == pytest.approx([score.log_prob for score in other], abs=1e-3)
    assert [score.greedy for score in one] == [score.greedy for score in other]
    assert len({round(score.log_prob, 2) for score in one}) > len(CHOICES)  # scores that tell requests apart
    prompt = ours.tokenizer.encode("The sun")
    for options in (SamplingOptions(temperature=0.0), SamplingOptions(temperature=0.9, top_k=20)):
        texts = [scorer.generate(prompt, 12, options, ["\x00"]) for scorer in (ours, theirs)]
        assert texts[0] == texts[1] and texts[0]
    text = QUESTION * 6
    assert ours.perplexity(text, 64).perplexity == pytest.approx(theirs.perplexity(text, 64).perplexity, rel=1e-3)
    for scorer in (ours, theirs):
        with pytest.raises(InputError, match="the window is 512 tokens, but .* context of"):
            scorer.perplexity(text, 512)
    ours.close()


def test_what_counts_as_an_artifact(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.gguf").write_bytes(b"")
    assert is_artifact("missing.gqsa") and is_artifact(str(tmp_path / "a.bin"))
    assert not is_artifact(str(tmp_path / "a.gguf")) and not is_artifact(str(tmp_path)) and not is_artifact("org/name")


def test_eos_of_a_folder_is_its_own(tmp_path, checkpoint):
    folder = save_checkpoint(tmp_path / "m", "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "bos_token_id": 3}))
    scorer = open_scorer(str(folder), device="cpu")
    assert (scorer.bos_token_id, scorer.eos_token_ids) == (3, (7, 9))
