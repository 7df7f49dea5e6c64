"""Text that the model writes itself: what is asked for, how it begins, what it is distributed as, and resuming."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gqsac.compress import self_text
from gqsac.compress.run import compress
from gqsac.compress.self_text import Starts, own_samples, sample, tokens_asked_for
from gqsac.errors import InputError, ModelError
from gqsac.source import load_source
from tests.unit.compress_models import TEXT, byte_tokenizer, folder_bytes, save_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"samples": 12, "seq_len": 16, "progress": False, "sparsity": 0.25}
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "llama")
    (folder / "tokenizer_config.json").write_text(f'{{"chat_template": "{CHAT}"}}')
    return folder


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a.txt"], (["a.txt"], 0)),
        (["self:200k"], ([], 200_000)),
        (["a.txt", "self:4M", "b.txt"], (["a.txt", "b.txt"], 4_000_000)),
        (["self:1.5m"], ([], 1_500_000)),
        (["self:4096"], ([], 4096)),
    ],
)
def test_a_number_of_tokens_is_asked_for(texts, expected):
    assert tokens_asked_for(texts) == expected


@pytest.mark.parametrize("text", ["self:", "self:k", "self:-3", "self:many", "self:nan", "self:1e30", "self:2g"])
def test_no_number_of_tokens_is_refused(text):
    with pytest.raises(
        InputError, match=re.escape(f"'{text}' names no number of tokens; expected one such as self:200k")
    ):
        tokens_asked_for([text])


def test_two_requests_are_refused():
    with pytest.raises(InputError, match="ask twice"):
        tokens_asked_for(["self:1k", "self:2k"])


def test_own_samples_are_all_without_files_and_at_most_half_with_them():
    wanted = {"calibration": 8, "training": 100}
    assert own_samples(wanted, 0, 16, True) == {"calibration": 0, "training": 0}
    assert own_samples(wanted, 1600, 16, False) == wanted
    assert own_samples(wanted, 1600, 16, True) == {"calibration": 4, "training": 50}
    assert own_samples(wanted, 320, 16, True) == {"calibration": 4, "training": 20}
    with pytest.raises(
        InputError, match="self:1584 are 99 samples of 16 tokens, but 100 are needed; ask for self:1600"
    ):
        own_samples(wanted, 1584, 16, False)


def test_texts_start_as_documents_words_and_chats(llama):
    starts = Starts.of(load_source(llama))
    assert starts.document == (1,) and starts.ends == (2,)  # bos, eos
    assert byte_tokenizer().decode(list(starts.chat)) == "<user>"
    rng = np.random.default_rng(0)
    found = [tuple(starts.draw(rng)) for _ in range(300)]
    assert 60 < found.count((1,)) < 140 and 60 < found.count(starts.chat) < 140
    words = {start[1] for start in found if len(start) == 2 and start != starts.chat}
    assert len(words) > 50 and words <= set(starts.words.tolist())


class Chain(torch.nn.Module):
    """A model of 5 tokens whose next token depends on the last alone. Token 4 ends a text."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))

    def forward(self, tokens, past_key_values, use_cache):
        return type("Output", (), {"logits": self.logits[tokens], "past_key_values": None})


def test_tokens_are_drawn_from_the_models_distribution():
    model = Chain()
    starts = Starts((0, 1), None, np.array([3]), (4,))
    tokens = sample(model, starts, 64, 400, (0, 0))
    assert tokens.shape == (64, 400) and tokens.dtype == np.int64
    assert (tokens[:, :2] == [0, 1]).all()
    probabilities = torch.softmax(model.logits, 1).numpy()
    last, following = tokens[:, 1:-1].ravel(), tokens[:, 2:].ravel()
    for token in (2, 3):  # 0 and 1 are in starts too, where what follows is given
        after = following[last == token]
        assert len(after) > 1000
        np.testing.assert_allclose(np.bincount(after, minlength=5) / len(after), probabilities[token], atol=0.03)
    rows, places = np.nonzero(tokens[:, :-2] == 4)
    assert len(rows) > 100  # behind an end another text begins
    assert (tokens[rows, places + 1] == 0).all() and (tokens[rows, places + 2] == 1).all()
    assert (sample(model, starts, 64, 400, (0, 0)) == tokens).all()
    assert (sample(model, starts, 64, 400, (0, 1)) != tokens).any()


def test_the_cache_gives_what_the_whole_text_would(llama):
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    seen = []

    def spy(tokens, past_key_values, use_cache):
        output = model(tokens, past_key_values=past_key_values, use_cache=use_cache)
        seen.append(output.logits[:, -1])
        return output

    spy.device = model.device
    tokens = sample(spy, Starts.of(load_source(llama)), 3, 20, (1, 0))
    with torch.no_grad():
        whole = model(torch.from_numpy(tokens)).logits
    torch.testing.assert_close(torch.stack(seen, 1), whole, rtol=1e-4, atol=1e-4)


def test_logits_that_are_not_finite_are_refused():
    model = Chain()
    model.logits[2, 3] = float("nan")
    with pytest.raises(ModelError, match="logits hold a NaN or an infinity, so no text can be sampled"):
        sample(model, Starts((0,), None, np.array([3]), (4,)), 8, 50, (0, 0))


def test_compress_trains_on_text_of_its_own_and_of_files(tmp_path, llama):
    (tmp_path / "text.txt").write_text(TEXT)
    options = {**SMALL, "stages": ("distill",), "train_samples": 40, "e2e_steps": 5, "batch_tokens": 64}
    report = compress(llama, tmp_path / "own", calibration="self:640", **options)
    assert report["calibration"] == "self:640 tokens: 12 samples of 16 tokens"
    assert report["stages"]["sampling"]["seconds"] > 0
    both = compress(llama, tmp_path / "both", calibration=["self:640", tmp_path / "text.txt"], **options)
    assert both["calibration"] == "self:640 tokens, text.txt: 12 samples of 16 tokens"
    files = {name: folder_bytes(tmp_path / name)["model.safetensors"] for name in ("own", "both")}
    assert files["own"] != files["both"]
    with pytest.raises(InputError, match="self:600 are 38 samples of 16 tokens, but 40 are needed"):
        compress(llama, tmp_path / "out", calibration="self:600", **options)
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_sampling_goes_on_with_what_it_has(tmp_path, llama, monkeypatch):
    monkeypatch.setitem(self_text._MOST_AT_ONCE, "cpu", 5)
    compress(llama, tmp_path / "whole", calibration="self:1k", **SMALL)
    real, sizes = self_text.sample, []

    class Killed(Exception):
        pass

    def killed(model, starts, count, *rest):
        sizes.append(count)
        if len(sizes) == 2:
            raise Killed
        return real(model, starts, count, *rest)

    monkeypatch.setattr(self_text, "sample", killed)
    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", calibration="self:1k", **SMALL)
    compress(llama, tmp_path / "out", calibration="self:1k", **SMALL)
    assert sizes == [5, 5, 5, 2]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_folder_keeps_text_for_other_runs(tmp_path, llama, monkeypatch):
    folder = tmp_path / "own"
    compress(llama, tmp_path / "first", calibration="self:320", own_text=folder, **SMALL)
    (file,) = folder.iterdir()
    assert np.load(file).shape == (20, 16)  # all that was asked for, where 12 samples were needed
    monkeypatch.setattr(self_text, "sample", lambda *rest: pytest.fail("sampled again"))
    compress(llama, tmp_path / "second", calibration="self:320", own_text=folder, **SMALL)
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "second")
    np.save(file, np.zeros((20, 8), np.uint8))
    with pytest.raises(InputError, match=r"holds uint8 \[20, 8\], expected tokens \[20, 16\]; delete it"):
        compress(llama, tmp_path / "third", calibration="self:320", own_text=folder, **SMALL)
    file.write_bytes(b"PK")
    with pytest.raises(InputError, match="is damaged .*; delete it, and the text is sampled anew"):
        compress(llama, tmp_path / "third", calibration="self:320", own_text=folder, **SMALL)
