"""The engine's bookkeeping: chunks, positions, rewinding and scores, against one long computation."""

import dataclasses

import numpy as np
import pytest
from gqsa_runtime.engine import Engine
from gqsa_runtime.errors import ClosedError, InputError, ModelError
from gqsa_runtime.sampling import SamplingOptions, choose, first_draw, next_draw
from gqsa_runtime.sequence import Sequence

from tests.format import tiny
from tests.unit.fake_device import LONG, FakeDevice

TOKENS = [5, 9, 200, 3, 3, 17, 256, 90, 41, 8, 120]


def engine(context: int = tiny.CONTEXT) -> Engine:
    program = tiny.program()
    return Engine(program, FakeDevice(program, context), context)


def logits_after(tokens) -> np.ndarray:
    device = FakeDevice(tiny.program(), tiny.CONTEXT)
    device.cache[: len(tokens)] = tokens
    return device.row(len(tokens) - 1)


@pytest.mark.parametrize("n_tokens", range(1, len(TOKENS) + 1))
def test_prefill_of_any_length(n_tokens):
    made = engine()
    np.testing.assert_array_equal(made.prefill(TOKENS[:n_tokens]), logits_after(TOKENS[:n_tokens]))
    assert made.tokens == tuple(TOKENS[:n_tokens])
    bodies = [launch for launch in made.device.launches if launch[0] != "last_logits"]
    assert len(bodies) == -(-n_tokens // tiny.CHUNK)
    assert [phase for phase, _, _ in made.device.launches].count("last_logits") == (n_tokens > 1)


def test_decode_after_prefill():
    made = engine()
    made.prefill(TOKENS[:6])
    for count in range(7, len(TOKENS) + 1):
        np.testing.assert_array_equal(made.decode(TOKENS[count - 1]), logits_after(TOKENS[:count]))
    assert made.position == len(TOKENS)


def test_prefill_twice_continues():
    made = engine()
    made.prefill(TOKENS[:5])
    np.testing.assert_array_equal(made.prefill(TOKENS[5:]), logits_after(TOKENS))


def without_choice(program):
    """The program as files hold it whose vocabulary is too large to choose from on a device."""
    plan = program.plans["cpu"]
    phases = {name: tuple(step for step in steps if step.kernel != "choose") for name, steps in plan.phases.items()}
    return dataclasses.replace(program, plans={"cpu": dataclasses.replace(plan, phases=phases)})


class Counting(FakeDevice):
    """Counts what is copied to the host. spoil: changes logits before they are looked at."""

    downloaded = 0

    def download(self, buffer, count):
        self.downloaded += count
        return super().download(buffer, count)

    def spoil(self, row):
        return row

    def row(self, position):
        return self.spoil(super().row(position))


@pytest.mark.parametrize("change, per_token", [(lambda program: program, 1), (without_choice, tiny.VOCAB)])
def test_greedy_tokens_are_chosen_where_the_file_can(change, per_token):
    program = change(tiny.program())
    assert program.plans["cpu"].chooses == (per_token == 1)
    device = Counting(program, tiny.CONTEXT)
    made, sequence, seen = Engine(program, device, tiny.CONTEXT), Sequence(), TOKENS[:6]
    new = seen
    for _ in range(5):
        token = made.extend_choosing(sequence, new)
        assert token == logits_after(seen).argmax()
        seen, new = [*seen, token], [token]
    assert sequence.tokens == seen[:-1] and device.downloaded == 5 * per_token


@pytest.mark.parametrize("change", [lambda program: program, without_choice])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_greedy_tokens_are_not_taken_from_logits_that_are_not_finite(change, value):
    def spoil(row):
        row[9] = value
        return row

    program = change(tiny.program())
    device = Counting(program, tiny.CONTEXT)
    made, sequence = Engine(program, device, tiny.CONTEXT), Sequence()
    made.extend_choosing(sequence, TOKENS[:3])
    device.spoil = spoil
    with pytest.raises(ModelError, match="not finite"):
        made.extend_choosing(sequence, [4])
    del device.spoil
    assert made.extend_choosing(sequence, [5]) == logits_after([*TOKENS[:3], 5]).argmax()


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 20, "min_p": 0.01}])
def test_drawn_tokens_are_those_of_the_host(options):
    draw, texts = first_draw(SamplingOptions(temperature=1.2, **options), seed=4), []
    for change in (lambda program: program, without_choice):
        program = change(tiny.program())
        made, sequence, new, now, text = Engine(program, FakeDevice(program, 40), 40), Sequence(), TOKENS[:6], draw, []
        for _ in range(8):
            text.append(made.extend_choosing(sequence, new, now))
            assert text[-1] == choose(made.device.row(made.position - 1), now)
            new, now = text[-1:], next_draw(now)
        texts.append(text)
    assert texts[0] == texts[1] and len(set(texts[0])) > 4


def test_rewind_and_reset():
    made = engine()
    made.prefill(TOKENS)
    made.rewind(3)
    np.testing.assert_array_equal(made.prefill([1, 2]), logits_after([*TOKENS[:3], 1, 2]))
    made.reset()
    np.testing.assert_array_equal(made.prefill([1, 2]), logits_after([1, 2]))
    with pytest.raises(InputError, match="rewind to 3 tokens: the cache holds 2"):
        made.rewind(3)


@pytest.mark.parametrize(
    ("second", "kept"),
    [(TOKENS[:6] + [1, 2, 3], 6), (TOKENS, 10), (TOKENS[:4], 3), ([1, 2], 0), (TOKENS + [4], 11), ([TOKENS[0]], 0)],
)
def test_sequences_keep_their_common_prefix(second, kept):
    made = engine()
    made.prefill(TOKENS)
    before = len(made.device.launches)
    sequence = Sequence()
    logits = made.extend(sequence, second)
    assert sequence.n_reused == kept
    assert made.tokens == tuple(second) == tuple(sequence.tokens)
    assert sum(n for phase, n, _ in made.device.launches[before:] if phase != "last_logits") == len(second) - kept
    np.testing.assert_array_equal(logits, logits_after(second))


def test_a_sequence_goes_on_where_it_was():
    made = engine()
    first, second = Sequence(), Sequence()
    made.extend(first, TOKENS[:4])
    np.testing.assert_array_equal(made.extend(first, [1]), logits_after([*TOKENS[:4], 1]))
    assert made.device.launches[-1] == ("decode", 1, 4)
    made.extend(second, [TOKENS[0], 7])
    np.testing.assert_array_equal(made.extend(first, [2]), logits_after([*TOKENS[:4], 1, 2]))
    assert first.tokens == [*TOKENS[:4], 1, 2] and second.tokens == [TOKENS[0], 7] and first.n_reused == 1
    made.score(TOKENS)
    np.testing.assert_array_equal(made.extend(second, [3]), logits_after([TOKENS[0], 7, 3]))


@pytest.mark.parametrize("change", [lambda made: made.rewind(2), lambda made: made.decode(1), Engine.reset])
def test_a_sequence_notices_what_others_did_to_the_cache(change):
    made, sequence = engine(), Sequence()
    made.extend(sequence, TOKENS[:4])
    change(made)
    np.testing.assert_array_equal(made.extend(sequence, [9]), logits_after([*TOKENS[:4], 9]))


def test_a_refused_extension_leaves_the_sequence():
    made, sequence = engine(context=6), Sequence()
    made.extend(sequence, TOKENS[:4])
    for tokens in ([1, 2, 3], [-1], []):
        with pytest.raises(InputError):
            made.extend(sequence, tokens)
    assert sequence.tokens == TOKENS[:4]
    np.testing.assert_array_equal(made.extend(sequence, [9]), logits_after([*TOKENS[:4], 9]))


def long_engine(original: int = 4) -> Engine:
    """Over a program whose sequences of more than `original` tokens have a rotary table of their own."""
    rope = dataclasses.replace(tiny.program().ropes["main"], long_inv_freq="inv_freq", original_context=original)
    program = tiny.program(ropes={"main": rope})
    return Engine(program, FakeDevice(program, tiny.CONTEXT), tiny.CONTEXT)


def long_logits_after(tokens, original: int = 4) -> np.ndarray:
    return logits_after([token + LONG * (len(tokens) > original) for token in tokens])


def test_a_sequence_that_grows_long_is_computed_again():
    made, sequence = long_engine(), Sequence()
    made.extend(sequence, TOKENS[:3])
    for count in range(4, 9):
        np.testing.assert_array_equal(made.extend(sequence, [TOKENS[count - 1]]), long_logits_after(TOKENS[:count]))
        assert sequence.tokens == TOKENS[:count] == list(made.tokens) and sequence.n_reused == 0
    runs = [(n, position) for phase, n, position in made.device.launches if phase != "last_logits"]
    assert runs == [(3, 0), (1, 3), (4, 0), (1, 4), (1, 5), (1, 6), (1, 7)]  # once, when the fifth token came
    other = Sequence()
    np.testing.assert_array_equal(made.extend(other, TOKENS[:4]), long_logits_after(TOKENS[:4]))
    assert other.n_reused == 0  # the same tokens, but turned otherwise
    np.testing.assert_array_equal(made.extend(sequence, [7]), long_logits_after([*TOKENS[:8], 7]))
    made.rewind(2)
    np.testing.assert_array_equal(made.prefill([1]), long_logits_after([*TOKENS[:2], 1]))
    np.testing.assert_array_equal(made.prefill(TOKENS[:7]), long_logits_after([*TOKENS[:2], 1, *TOKENS[:7]]))


def test_scores_and_sessions_of_long_sequences():
    made, fresh = long_engine(), long_engine()
    made.prefill(TOKENS[:3])
    scored = made.score(TOKENS)
    np.testing.assert_array_equal(scored.log_probs, fresh.score(TOKENS).log_probs)
    assert made.position == len(TOKENS) - 1
    for n_tokens in (8, 3):  # what is saved fits its own length
        made.rewind(n_tokens)
        session = made.save()
        other = long_engine()
        other.prefill([1, 2])
        other.restore(session)
        assert other.tokens == tuple(TOKENS[:n_tokens])
        np.testing.assert_array_equal(other.decode(6), long_logits_after([*TOKENS[:n_tokens], 6]))
        np.testing.assert_array_equal(other.decode(7), long_logits_after([*TOKENS[:n_tokens], 6, 7]))


def test_a_closed_engine():
    made = engine()
    made.close()
    made.close()
    assert made.device.closed
    for call in (made.reset, lambda: made.decode(1), lambda: made.score([1, 2]), lambda: made.extend(Sequence(), [1])):
        with pytest.raises(ClosedError, match="the model is closed"):
            call()
    assert made.device.launches == []


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5, 6, 9, 11])
def test_scores(n_tokens):
    made = engine()
    made.prefill([7, 7, 7])
    result = made.score(TOKENS[:n_tokens])
    assert result.log_probs.shape == result.greedy.shape == (n_tokens - 1,)
    assert result.log_probs.dtype == np.float32 and result.greedy.dtype == bool
    for index in range(n_tokens - 1):
        row = logits_after(TOKENS[: index + 1]).astype(np.float64)
        expected = row[TOKENS[index + 1]] - np.log(np.exp(row).sum())
        assert result.log_probs[index] == pytest.approx(expected, abs=1e-5)
        assert result.greedy[index] == (row.argmax() == TOKENS[index + 1])


@pytest.mark.parametrize("first", range(1, len(TOKENS) + 1))
@pytest.mark.parametrize("before", [[], TOKENS[:5], [*TOKENS[:3], 1, 1, 1], TOKENS])
def test_scores_of_a_part_keep_what_the_cache_shares(first, before):
    made = engine()
    if before:
        made.prefill(before)
    whole = engine().score(TOKENS)
    launched = len(made.device.launches)
    part = made.score(TOKENS, first)
    np.testing.assert_array_equal(part.log_probs, whole.log_probs[first - 1 :])
    np.testing.assert_array_equal(part.greedy, whole.greedy[first - 1 :])
    shared = min(first - 1, 3 if before[3:4] == [1] else len(before))
    n_run = sum(n for phase, n, _ in made.device.launches[launched:] if phase == "few_body")
    assert n_run == len(TOKENS) - 1 - shared


def test_scores_from_a_token_that_is_not_there():
    for first in (0, 4):
        with pytest.raises(InputError, match=f"from token {first} on, expected 1 to 3"):
            engine().score(TOKENS[:3], first)


def test_greedy_is_true_where_the_likeliest_token_came():
    made = engine()
    best = int(logits_after([5]).argmax())
    assert made.score([5, best]).greedy.tolist() == [True]


def test_a_score_may_fill_the_context():
    assert engine(context=8).score(TOKENS[:9]).log_probs.shape == (8,)
    with pytest.raises(InputError, match="10 tokens do not fit the context of 8;"):
        engine(context=8).score(TOKENS[:10])


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        ([], "at least one"),
        ([[1, 2]], "shape"),
        ([1, 258], "token 258 at place 1 is outside the vocabulary of 258; expected 0 to 257"),
        ([-1], "token -1"),
        ([1.5], "expected integers"),
        (["a"], "expected integers"),
        ([2**80], "expected integers"),
        ([1] * (tiny.CONTEXT + 2), "34 tokens do not fit the context of 32"),
    ],
)
def test_bad_tokens(tokens, match):
    made = engine()
    for method in (made.prefill, made.score):
        with pytest.raises(InputError, match=match):
            method(tokens)
    assert made.device.launches == []


def test_context_full():
    made = engine(context=4)
    made.prefill([1, 2, 3, 4])
    with pytest.raises(InputError, match="1 tokens do not fit the context of 4 after the 4"):
        made.decode(1)
