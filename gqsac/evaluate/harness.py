"""The lm-eval harness over a Scorer: its `LM` interface, and tasks that it builds from local rows.

Needs the optional dependency lm-eval; `gqsac.evaluate.tasks` imports this file only where it is there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import datasets
import lm_eval.api.task
from gqsa_runtime.errors import InputError
from gqsa_runtime.sampling import SamplingOptions
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from gqsac.evaluate.scoring import Encoder, Scorer
from gqsac.evaluate.task_data import task_spec

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(LM):
    """A Scorer as the harness sees a model. progress: wraps lists of work, as `tqdm.tqdm` does.

    encoder.n_truncated counts the requests whose context was too long and lost its beginning.
    """

    def __init__(self, scorer: Scorer, progress: Callable | None = None):
        super().__init__()
        self._scorer, self._progress = scorer, progress
        self.encoder = Encoder(scorer)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each request's continuation after its context."""
        scores = self._scorer.score([self.encoder.pair(*request.args) for request in requests], self._progress)
        answers = [(score.log_prob, score.greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-probability of each request's whole text, in windows as long as the model's context."""
        totals = []
        for request in self._progress(requests) if self._progress else requests:
            (text,) = request.args
            ids = self.encoder.text(text, leading=False)
            windows = get_rolling_token_windows(ids, self.encoder.prefix_token(), self._scorer.context, 1)
            pieces = []
            for window in windows:
                context, continuation = make_disjoint_window(window)
                pieces.append(self.encoder.tokens([*context, *continuation], len(context)))
            totals.append(sum(score.log_prob for score in self._scorer.score(pieces)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Each request's context continued up to one of its stop strings. Greedy unless do_sample is set.

        Raises InputError for a generation option that is not known.
        """
        texts = []
        for request in self._progress(requests) if self._progress else requests:
            prompt, raw = request.args
            given = dict(raw)
            stop = given.pop("until", None) or []
            max_new_tokens = given.pop("max_gen_toks", 256)
            sampled = given.pop("do_sample", given.get("temperature", 0) > 0)
            options = {key: given.pop(key) for key in _SAMPLING if key in given}
            if given:
                raise InputError(
                    f"the task asks for the generation option {next(iter(given))!r}; known are until, "
                    f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
                )
            options["temperature"] = options.get("temperature", 1.0) if sampled else 0.0
            ids = self.encoder.text(prompt) or [self.encoder.prefix_token()]
            room = self._scorer.context - max_new_tokens
            if room < 1:
                raise InputError(
                    f"the task asks for {max_new_tokens} new tokens, but the context is {self._scorer.context}; "
                    "open the model with a larger context"
                )
            if len(ids) > room:
                self.encoder.n_truncated += 1
            stops = [stop] if isinstance(stop, str) else list(stop)
            texts.append(self._scorer.generate(ids[-room:], max_new_tokens, SamplingOptions(**options), stops))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts


def build_task(name: str, rows: list[dict]) -> ConfigurableTask:
    """The harness's own multiple-choice task over rows of `task_data.read_rows`."""
    spec = task_spec(name)
    metrics = ["acc", "acc_norm"] if spec.normalised else ["acc"]
    # With multiple inputs the harness wants the number of the right one where a prompt stands otherwise.
    fields = ("gold", "continuation") if spec.multiple_inputs else ("query", "gold")
    with _quiet():
        return ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": lambda **_: {"validation": datasets.Dataset.from_list(rows)},
                "validation_split": "validation",
                "output_type": "multiple_choice",
                "doc_to_text": fields[0],
                "doc_to_target": fields[1],
                "doc_to_choice": "choices",
                "num_fewshot": 0,
                "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
            }
        )


def run_task(model: LM, name: str, rows: list[dict]) -> tuple[dict, list[dict]]:
    """Runs a task over rows: (metric -> value, the harness's samples in the order of the rows).

    Metrics are acc, acc_norm where it means anything, and their _stderr, None for a single row.
    """
    task = build_task(name, rows)
    with _quiet():
        outcome = evaluate(model, {name: task}, log_samples=True)
    metrics = {}
    for key, value in outcome["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered:
            metrics[metric] = value if isinstance(value, float) else None
    return metrics, outcome["samples"][name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the harness's own bars and notes off standard error; its errors still show."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
