"""Zero-shot tasks through the harness: accuracies by hand, its LM interface, and the command."""

import json
import math

import pytest
from gqsa_runtime.tokenizer import Tokenizer

from gqsac.errors import InputError
from gqsac.evaluate import tasks
from gqsac.evaluate.score_runtime import RuntimeScorer
from gqsac.evaluate.scoring import Score
from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import gqsac, refusal, succeed
from tests.format import tiny
from tests.unit import fake_device

COSTS = {"a": 1.0, "b": 2.0, " ": 0.5}  # of a letter; others cost 4


class LetterScorer:
    """Log-probabilities that can be added up by hand: minus a cost for each letter, whatever stands before."""

    vocab_size, context, bos_token_id, eos_token_ids = tiny.VOCAB, 1000, tiny.BOS, ()
    device_reason = "by hand"

    def __init__(self):
        self.tokenizer = Tokenizer(tiny.tokenizer_json())
        self.asked = []

    def score(self, requests, progress=None):
        self.asked += requests
        scored = [self.tokenizer.decode(request.tokens[request.n_context :]) for request in requests]
        return [Score(-sum(COSTS.get(letter, 4.0) for letter in text), False) for text in scored]


def rows(*pairs, query="Question: q\nAnswer:"):
    return [{"query": query, "choices": choices, "gold": gold} for choices, gold in pairs]


@pytest.fixture(scope="module", autouse=True)
def harness():
    pytest.importorskip("lm_eval", reason='needs the lm-eval harness: pip install "gqsac[eval]"')


def test_accuracy_by_hand():
    # By sum: a (1) before b (2) before aaa (3). By length: aaa and a tie at 1 a letter without the blank.
    scorer = LetterScorer()
    result = tasks.evaluate_task(
        scorer,
        "arc_easy",
        rows(
            (["a", "b", "bb"], 0),  # right both ways
            (["b", "aaaa"], 0),  # 2.5 against 4.5; by length 2.5 against 1.125: right, wrong
            (["b", "aaaa"], 1),  # wrong, right
            (["ab", "aa"], 0),  # wrong both ways
        ),
    )
    assert (result.n_rows, result.acc, result.acc_norm, result.n_truncated) == (4, 0.5, 0.5, 0)
    # Standard error of a mean: sample deviation over the root of the count.
    assert result.acc_stderr == result.acc_norm_stderr == pytest.approx(math.sqrt(4 * 0.25 / 3) / 2)
    decoded = [scorer.tokenizer.decode(request.tokens) for request in scorer.asked[:3]]
    assert decoded == ["Question: q\nAnswer: a", "Question: q\nAnswer: b", "Question: q\nAnswer: bb"]


def test_multiple_inputs_score_the_continuation():
    class SecondWord(LetterScorer):
        """The continuation is likelier after a context that ends in b."""

        def score(self, requests, progress=None):
            self.asked += requests
            contexts = [self.tokenizer.decode(request.tokens[: request.n_context]) for request in requests]
            return [Score(-1.0 if context.endswith("b") else -2.0, False) for context in contexts]

    scorer = SecondWord()
    data = [{"choices": ["so a", "so b"], "continuation": "ran.", "gold": gold} for gold in (1, 1, 0)]
    result = tasks.evaluate_task(scorer, "winogrande", data)
    assert result.acc == pytest.approx(2 / 3)
    assert result.acc_stderr == pytest.approx(math.sqrt(2 / 3 / 2) / math.sqrt(3))
    assert (result.acc_norm, result.acc_norm_stderr) == (None, None)
    request = scorer.asked[0]
    assert scorer.tokenizer.decode(request.tokens[request.n_context :]) == " ran."


def test_a_single_row_has_no_error():
    result = tasks.evaluate_task(LetterScorer(), "piqa", rows((["a", "b"], 0)))
    assert (result.acc, result.acc_stderr, result.acc_norm_stderr) == (1.0, None, None)


def test_the_harness_stays_quiet(capfd, caplog):
    tasks.evaluate_task(LetterScorer(), "piqa", rows((["a", "b"], 0), (["a", "b"], 1)))
    assert capfd.readouterr() == ("", "") and caplog.records == []


def test_progress_sees_every_request():
    from gqsac.evaluate.harness import HarnessModel, run_task

    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    scorer = RuntimeScorer(fake_device.model())
    data = rows((["a", "b"], 0), (["a", "b", "c"], 1), query="q:")
    metrics, samples = run_task(HarnessModel(scorer, progress), "hellaswag", data)
    assert len(seen) == 5 and set(metrics) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"}
    assert [len(sample["filtered_resps"]) for sample in samples] == [2, 3]


def test_long_contexts_are_counted():
    result = tasks.evaluate_task(RuntimeScorer(fake_device.model()), "hellaswag", rows((["a", "b"], 0), query="q" * 40))
    assert result.n_truncated == 2


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_rolling_log_likelihood_counts_each_token_once():
    from gqsac.evaluate.harness import HarnessModel

    model = fake_device.model()  # a context of 32
    text = "The quick brown fox jumps over the lazy dog, and once more."
    (total,) = HarnessModel(RuntimeScorer(model)).loglikelihood_rolling([instance("loglikelihood_rolling", text)])
    ids = [tiny.BOS, *model.tokenize(text)]
    first, rest = ids[:33], ids[len(ids) - 33 :]  # the last window is a whole one, of which 27 tokens are new
    n_new = len(ids) - 33
    expected = model.score(first[:32]).log_probs.sum() + _last(model, first, 1) + _last(model, rest, n_new)
    assert total == pytest.approx(expected, abs=1e-3)


def _last(model, ids, count):
    """Log-probability of the last tokens of ids, one more of which than the context are there."""
    import numpy as np

    total = 0.0
    for place in range(len(ids) - count, len(ids)):
        model.engine.reset()
        row = model.engine.prefill(ids[:place]).astype(np.float64)
        total += row[ids[place]] - np.log(np.exp(row).sum())
    return total


def test_generation_stops_where_the_task_says():
    from gqsac.evaluate.harness import HarnessModel

    model = HarnessModel(RuntimeScorer(fake_device.model("ab", "cdefgh")))
    asked = [
        ("ab", {"until": ["f"], "max_gen_toks": 10}),
        ("ab", {"until": "ef", "do_sample": False, "temperature": 1.0, "max_gen_toks": 10}),
        ("ab", {"max_gen_toks": 3}),
        ("ab", {"max_gen_toks": 10}),
    ]
    assert model.generate_until([instance("generate_until", *pair) for pair in asked]) == ["cde", "cd", "cde", "cdefgh"]
    with pytest.raises(InputError, match="asks for the generation option 'num_beams'"):
        model.generate_until([instance("generate_until", "ab", {"num_beams": 4})])
    with pytest.raises(InputError, match="256 new tokens, but the context is 32"):
        model.generate_until([instance("generate_until", "ab", {})])
    long = instance("generate_until", "x" * 50, {"max_gen_toks": 12})
    assert len(model.generate_until([long])) == 1 and model.encoder.n_truncated == 1


def test_the_command(tmp_path):
    folder = save_checkpoint(tmp_path / "model", "llama")
    data = rows((["the sun", "a stone"], 0), (["ice", "fire", "rain"], 1), query="Question: what is hot?\n" * 20)
    for file in ("piqa.jsonl", "arc_easy.jsonl"):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in data))
    shared = ("--task", "piqa", "--task", "arc_easy", "--data", tmp_path, "--device", "cpu")
    spoken = succeed("eval", "tasks", folder, *shared)
    assert "PyTorch on cpu" in spoken.stderr
    assert "note: 5 requests of piqa were longer than the context of 320 tokens" in spoken.stderr
    lines = spoken.stdout.splitlines()
    assert lines[0].split() == ["task", "rows", "acc", "acc_norm"] and len(lines) == 3
    assert lines[2].split()[:2] == ["arc_easy", "2"] and "±" in lines[2]
    facts = json.loads(succeed("eval", "tasks", folder, *shared, "--limit", 1, "--json").stdout)
    assert [result["task"] for result in facts["results"]] == ["piqa", "arc_easy"]
    assert all(result["n_rows"] == 1 and result["acc"] in (0.0, 1.0) for result in facts["results"])
    assert facts["limit"] == 1 and facts["lm_eval"]
    refused = gqsac("eval", "tasks", folder, "--task", "boolq", "--data", tmp_path)
    assert "'boolq' is not known" in refusal(refused)
    assert "limit is 0 rows" in refusal(gqsac("eval", "tasks", folder, *shared, "--limit", 0))
    assert "does not exist" in refusal(gqsac("eval", "tasks", tmp_path / "none", *shared))
    nowhere = gqsac("eval", "tasks", folder, "--task", "piqa", "--data", tmp_path / "nowhere")
    assert "nowhere does not exist" in refusal(nowhere)
    assert gqsac("eval", "tasks", folder).exit_code == 2  # no --data
    signed = ("--require-signature", tmp_path / "none.pem")
    assert gqsac("eval", "tasks", folder, *shared, *signed).exit_code == 2  # no compiled file
    assert "none.pem: the key cannot be read" in refusal(gqsac("eval", "tasks", tmp_path / "x.gqsa", *shared, *signed))
