"""Sampling against the definition of each option, and against straight-forward code."""

import numpy as np
import pytest
from gqsa_runtime.errors import InputError, ModelError
from gqsa_runtime.sampling import (
    COUNTER,
    GREEDY,
    SamplingOptions,
    _mantissas,
    _mixed,
    choose,
    first_draw,
    next_draw,
    penalize,
)


def picks(logits, options, n, seed=0) -> list[int]:
    draw, chosen = first_draw(options, seed), []
    for _ in range(n):
        chosen.append(choose(np.asarray(logits, np.float32), draw))
        draw = next_draw(draw)
    return chosen


def shares(logits, options, n=4000) -> np.ndarray:
    return np.bincount(picks(logits, options, n), minlength=len(logits)) / n


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


def test_temperature_zero_is_the_first_largest():
    assert choose(np.array([1, 3, 3], np.float32), GREEDY) == 1
    assert (first_draw(SamplingOptions(), 5) == GREEDY).all() and (next_draw(GREEDY) == GREEDY).all()


def test_plain_sampling_follows_the_softmax():
    np.testing.assert_allclose(shares(LOGITS, SamplingOptions(temperature=1)), np.exp(LOGITS), atol=0.03)


def test_temperature_sharpens_and_flattens():
    for temperature in (0.5, 2.0):
        expected = np.exp(LOGITS / temperature)
        observed = shares(LOGITS, SamplingOptions(temperature=temperature))
        np.testing.assert_allclose(observed, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.86}, [1, 2, 3, 4]),
        ({"min_p": 0.6}, [1, 3]),
        ({"min_p": 0.45}, [1, 3, 4]),
        ({"top_k": 3, "top_p": 0.5}, [1, 3]),  # of the three's mass 0.85, 0.4 is 47 %
        ({"top_k": 4, "min_p": 0.3}, [1, 3, 4]),
    ],
)
def test_filters_keep_the_right_tokens_in_proportion(options, kept):
    observed = shares(LOGITS, SamplingOptions(temperature=1, **options))
    assert np.flatnonzero(observed).tolist() == kept
    expected = np.zeros(5)
    expected[kept] = np.exp(LOGITS[kept])
    np.testing.assert_allclose(observed, expected / expected.sum(), atol=0.03)


@pytest.mark.parametrize("options", [{"top_p": 0.5}, {"top_k": 250}])
def test_of_equal_tokens_the_first_are_kept(options):
    observed = shares(np.zeros(500), SamplingOptions(temperature=1, **options), n=2500)
    assert np.flatnonzero(observed).max() in (249, 250)  # the half is reached, not passed
    assert np.count_nonzero(observed) >= 245


def test_weights_are_powers_of_two():
    expected = np.exp2(np.arange(1 << 16) / (1 << 16) + 23)
    np.testing.assert_allclose(_mantissas(), expected, rtol=3e-7)
    assert (np.diff(_mantissas()) >= 0).all() and _mantissas()[0] == 1 << 23 and _mantissas()[-1] < 1 << 24


@pytest.mark.parametrize(
    "more", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 300, "top_p": 0.8, "min_p": 0.001}]
)
@pytest.mark.parametrize("temperature", [0.3, 0.8, 2.5])
def test_the_token_is_where_the_random_number_falls(temperature, more):
    """In floating point, over all tokens sorted: likeliest first, those that are kept from the first on."""
    logits = np.random.default_rng(5).normal(scale=3, size=3000).astype(np.float32)
    options = SamplingOptions(temperature=temperature, **more)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
    kept = weights[: options.top_k or None]
    kept = kept[np.cumsum(kept) - kept < options.top_p * kept.sum()]
    kept = kept[kept >= options.min_p]
    ends = np.cumsum(kept) / kept.sum()
    draw = first_draw(options, seed=1)
    for _ in range(200):
        random = _mixed(int(draw[COUNTER].view(np.uint64)[0])) / 2**64
        place = int(np.flatnonzero(order == choose(logits, draw))[0])
        assert place < len(kept)
        assert ends[place] - kept[place] / kept.sum() - 1e-4 <= random <= ends[place] + 1e-4
        draw = next_draw(draw)


def test_top_k_one_is_greedy():
    assert shares(LOGITS, SamplingOptions(temperature=5, top_k=1), n=50)[1] == 1


def test_same_seed_same_tokens():
    options, logits = SamplingOptions(temperature=1), np.random.default_rng(1).normal(size=1000).astype(np.float32)
    runs = [picks(logits, options, 20, seed) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert not (first_draw(options) == first_draw(options)).all()


@pytest.mark.filterwarnings("error")
def test_counters_begin_anew():
    draw = first_draw(SamplingOptions(temperature=1), seed=0)
    draw[COUNTER].view(np.uint64)[:] = 2**64 - 1
    assert next_draw(draw)[COUNTER].view(np.uint64)[0] == 0x9E3779B97F4A7C14


def test_repetition_penalty():
    logits = np.array([2.0, -1.0, 1.9, 0.5], np.float32)
    np.testing.assert_allclose(penalize(logits, [0, 1, 1], 2.0), [1.0, -2.0, 1.9, 0.5])
    assert logits[0] == 2.0
    assert choose(penalize(logits, [0], 1.5), GREEDY) == 2 and choose(penalize(logits, [], 1.5), GREEDY) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(temperature, bad):
    with pytest.raises(ModelError, match="gqsa verify"):
        choose(np.array([0, bad, 1], np.float32), first_draw(SamplingOptions(temperature=temperature)))


@pytest.mark.filterwarnings("error")
def test_extreme_values():
    logits = np.array([-np.inf, 0, 1e30], np.float32)
    for temperature in (1e-300, 1e-3, 1.0):
        assert picks(logits, SamplingOptions(temperature=temperature), 5) == [2] * 5
    assert set(picks(logits, SamplingOptions(temperature=1e30), 50)) == {1, 2}
    for options in ({"top_p": 1e-300}, {"min_p": 1 - 1e-16}, {"top_k": 2**40, "top_p": 1 - 1e-16, "min_p": 1e-300}):
        assert set(picks(logits, SamplingOptions(temperature=1e30, **options), 20)) <= {1, 2}


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1.0},
     {"min_p": -0.1}, {"repetition_penalty": 0}, {"repetition_penalty": 1e-320}],
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is .*, expected"):
        SamplingOptions(**options)
