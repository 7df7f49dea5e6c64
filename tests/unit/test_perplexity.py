"""Windows by their definition, and perplexity against one sum over all scored tokens."""

import json
import math

import numpy as np
import pytest
from gqsa_runtime.errors import InputError
from gqsa_runtime.perplexity import first_tokens, needed_tokens, perplexity, windows
from gqsa_runtime.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.tokenizers import FAMILIES
from tests.unit import fake_device


def test_windows_without_overlap():
    assert list(windows(10, 4)) == [(0, 4, 1), (4, 8, 5)]
    assert list(windows(8, 4, 4)) == [(0, 4, 1), (4, 8, 5)]


def test_windows_that_overlap():
    assert list(windows(10, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert list(windows(9, 6, 1)) == [(0, 6, 1), (1, 7, 6), (2, 8, 7), (3, 9, 8)]


def test_text_shorter_than_a_window():
    assert list(windows(3, 4)) == [(0, 3, 1)]


@given(st.integers(2, 200), st.integers(2, 50), st.data())
def test_windows_in_general(n_tokens, window, data):
    stride = data.draw(st.integers(1, window))
    cuts = list(windows(n_tokens, window, stride))
    scored = [token for _, stop, first in cuts for token in range(first, stop)]
    assert scored == sorted(set(scored)) and scored[0] == 1
    assert all(
        start < first < stop <= n_tokens and stop - start == min(window, n_tokens) for start, stop, first in cuts
    )
    assert [start for start, _, _ in cuts] == [stride * index for index in range(len(cuts))]
    assert n_tokens < window or n_tokens - cuts[-1][1] < stride


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((1, 4), "at least 2"), ((9, 1), "window is 1"), ((9, 4, 0), "stride is 0"), ((9, 4, 5), "stride is 5")],
)
def test_bad_numbers(arguments, match):
    with pytest.raises(InputError, match=match):
        windows(*arguments)


@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 3), (32, None)])
def test_perplexity(window, stride):
    model = fake_device.model()
    text = "The quick brown fox jumps."
    result = perplexity(model, text, window, stride)
    tokens, total, count = model.tokenize(text), 0.0, 0
    for start, stop, first in windows(len(tokens), window, stride):
        for place in range(first, stop):
            model.engine.reset()
            row = model.engine.prefill(tokens[start:place]).astype(np.float64)
            total += row[tokens[place]] - np.log(np.exp(row).sum())
            count += 1
    assert result.n_tokens == count
    assert result.n_windows == len(list(windows(len(tokens), window, stride)))
    assert result.perplexity == pytest.approx(math.exp(-total / count), rel=1e-5)
    assert result.seconds > 0


def test_max_windows_and_progress():
    seen = []

    def progress(cuts):
        for cut in cuts:
            seen.append(cut)
            yield cut

    result = perplexity(fake_device.model(), "a" * 30, 8, max_windows=2, progress=progress)
    assert result.n_windows == 2 and result.n_tokens == 14
    assert seen == [(0, 8, 1), (8, 16, 9)]


def test_window_larger_than_the_context():
    with pytest.raises(InputError, match="window is 33 tokens.*context of 32"):
        perplexity(fake_device.model(), "abc", 33)
    with pytest.raises(InputError, match="number of windows is 0"):
        perplexity(fake_device.model(), "abc", 8, max_windows=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_tokens_are_those_of_the_whole_text(family):
    tokenizer, read = Tokenizer(json.dumps(FAMILIES[family]())), []

    def tokenize(text):
        read.append(len(text))
        return tokenizer.encode(text)

    text = "He said: the world, they tell, isn't 1234 years old.\n\nHello  there\nworld " * 200
    whole = tokenizer.encode(text)
    for count in (1, 100, 333):
        assert first_tokens(tokenize, text, count)[:count] == whole[:count]
        assert max(read) < len(text)
    assert first_tokens(tokenize, text, None) == first_tokens(tokenize, text, len(whole)) == whole


def test_no_more_is_read_than_the_windows_need(monkeypatch):
    assert needed_tokens(8, None, 3) == 24 and needed_tokens(8, 2, 3) == 12 and needed_tokens(8, 2, None) is None
    model, read = fake_device.model(), []
    tokenize = model.tokenize
    monkeypatch.setattr(model, "tokenize", lambda text: read.append(len(text)) or tokenize(text))
    text = "a few words " * 1000
    few = perplexity(model, text, 8, max_windows=2)
    assert (few.n_windows, few.n_tokens) == (2, 14) and sum(read) < 1000
    assert few.perplexity == pytest.approx(perplexity(fake_device.model(), text[:16], 8).perplexity)
