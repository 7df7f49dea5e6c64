"""Regular expressions of tokenizers: those of real models pass, those that backtrack for ever are refused by reason."""

import pytest
from gqsa_runtime.patterns import PatternError, shortest_match

from tests.fuzz.tokenizers import DEEPSEEK_SPLITS, GPT2_SPLIT, GPT4O_SPLIT, LLAMA3_SPLIT


@pytest.mark.parametrize(
    ("pattern", "shortest"),
    [
        *[(pattern, 1) for pattern in (GPT2_SPLIT, LLAMA3_SPLIT, GPT4O_SPLIT, *DEEPSEEK_SPLITS)],
        (" {2,}", 2),
        ("[0-9][0-9][0-9]", 3),
        (r" ?[^(\s|[.,!?…。，、।۔،])]+", 1),
        (r"(?=(\d{3})+(?!\d))", 0),
        (r"\d{1,3}(?=(?:\d{3})*\b)", 1),
        (r"(?<=\d)(?=x)", 0),
        (r"[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}&&[^\p{Han}]]+(?i:'s|'t)?", 1),
        (r"[^\r\n\p{L}\p{N}]?+\p{L}+| ?[^\s\p{L}\p{N}]++[\r\n]*", 1),
        (r"[[:alpha:]_]+\x41\x{1F600}A", 4),
        ("a{,3}b{}", 3),
        ("[]a]|x", 1),
        ("a{2}?", 0),  # Oniguruma takes the sign for a repetition
        ("", 0),
    ],
)
def test_accepted(pattern, shortest):
    assert shortest_match(pattern) == shortest


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(a+)+b", "many lengths or alternatives"),
        ("(a|a)*b", "many lengths or alternatives"),
        ("(a?){30}a", "many lengths or alternatives"),
        ("(a*)*", "many lengths or alternatives"),
        ("a+*", "many lengths or alternatives"),
        ("a{1,3}+", "many lengths or alternatives"),
        ("a*a*b", "against each other"),
        (r"\s+x\s+y", "against each other"),
        (r"(?=\s+x)\s+y", "against each other"),
        ("(?:a+)?b+c", "against each other"),
        ("a?" * 15, "too many ways"),
        ("(a{200}){200}", "too many ways"),
        ("(^)*", "takes no character"),
        ("a{300}", "allowed are up to 256"),
        ("a{3,2}", "repeats something {3,2} times"),
        ("(?<=a+)b", "looks behind for any number"),
        ("(" * 20 + ")" * 20, "nested more than 16 deep"),
        ("[" * 20 + "]" * 20, "nested more than 16 deep"),
        ("a" * 5000, "5000 characters"),
        (r"(a)\1", r"a \1, which is not supported"),
        (r"\k<a>", r"a \k, which is not supported"),
        (r"\g<0>", r"a \g, which is not supported"),
        ("(?<n>a)", "(?<, which is not supported"),
        ("(?~a)", "(?~, which is not supported"),
        ("(?x)a", "(?x, which is not supported"),
        ("(*FAIL)", "a call"),
        ("(", "not closed"),
        (")", "closes nothing"),
        ("[a", "ends too early"),
        ("\\", "ends too early"),
        ("*", "repeats nothing"),
        (r"\p", "names no property"),
    ],
)
def test_refused(pattern, reason):
    with pytest.raises(PatternError) as refused:
        shortest_match(pattern)
    assert reason in str(refused.value)
