"""Sampling against the definition of each option, and against straight-forward code."""

import time

import numpy as np
import pytest
from gqsa_runtime.errors import InputError, ModelError
from gqsa_runtime.sampling import SamplingOptions, penalize, sample


def shares(logits, options, n=4000, seen=()) -> np.ndarray:
    generator = np.random.default_rng(0)
    logits = np.asarray(logits, np.float32)
    picks = [sample(logits, options, generator, seen) for _ in range(n)]
    return np.bincount(picks, minlength=len(logits)) / n


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


def test_temperature_zero_is_the_first_largest():
    assert sample(np.array([1, 3, 3], np.float32), SamplingOptions(), np.random.default_rng(0)) == 1


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


def test_top_p_over_more_tokens_than_are_sorted_first():
    n = 5000
    observed = shares(np.zeros(n), SamplingOptions(temperature=1, top_p=0.5), n=8000)
    # Half of the equal tokens are kept; of those 96 % are expected to be drawn at least once.
    assert 2300 <= np.count_nonzero(observed) <= 2500


def test_top_k_one_is_greedy():
    assert shares(LOGITS, SamplingOptions(temperature=5, top_k=1), n=50)[1] == 1


def test_same_seed_same_tokens():
    options, logits = SamplingOptions(temperature=1), np.random.default_rng(1).normal(size=1000).astype(np.float32)
    runs = [
        [sample(logits, options, generator) for _ in range(20)] for generator in map(np.random.default_rng, (3, 3, 4))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_repetition_penalty():
    logits = np.array([2.0, -1.0, 1.9, 0.5], np.float32)
    np.testing.assert_allclose(penalize(logits, [0, 1, 1], 2.0), [1.0, -2.0, 1.9, 0.5])
    assert logits[0] == 2.0
    options = SamplingOptions(repetition_penalty=1.5)
    assert sample(logits, options, np.random.default_rng(0), seen=[0]) == 2
    assert sample(logits, options, np.random.default_rng(0), seen=[]) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(temperature, bad):
    with pytest.raises(ModelError, match="gqsa verify"):
        sample(np.array([0, bad, 1], np.float32), SamplingOptions(temperature=temperature), np.random.default_rng(0))


@pytest.mark.filterwarnings("error")
def test_extreme_values():
    logits = np.array([-np.inf, 0, 1e30], np.float32)
    for temperature in (1e-300, 1e-3, 1e30):
        assert sample(logits, SamplingOptions(temperature=temperature), np.random.default_rng(0)) in (1, 2)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 1.0},
     {"min_p": -0.1}, {"repetition_penalty": 0}, {"repetition_penalty": 1e-320}],
)  # fmt: skip
def test_options_out_of_range(options):
    with pytest.raises(InputError, match=f"{next(iter(options))} is .*, expected"):
        SamplingOptions(**options)


@pytest.mark.parametrize("more", [{}, {"min_p": 0.01}, {"top_p": 0.95, "min_p": 0.01}, {"top_p": 0.95}])
def test_speed_with_a_large_vocabulary(more):
    logits = np.random.default_rng(0).normal(scale=3, size=128_256).astype(np.float32)
    generator, options = np.random.default_rng(0), SamplingOptions(temperature=0.8, **more)
    times_s = []
    for _ in range(10):
        began_s = time.perf_counter()
        sample(logits, options, generator)
        times_s.append(time.perf_counter() - began_s)
    assert min(times_s) < 0.01  # a full sort alone takes longer
