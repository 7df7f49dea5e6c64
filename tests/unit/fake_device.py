"""A device of NumPy alone, whose next-token logits depend on every token in its cache, and models over it."""

import zlib

import numpy as np
from gqsa_runtime.errors import ModelError
from gqsa_runtime.model import Model
from gqsa_runtime.operators import FEW_TOKENS, STATE_DRAW, STATE_TOKENS, state_elements
from gqsa_runtime.sampling import choose
from gqsa_runtime.tokenizer import Tokenizer

from tests.format import tiny

LONG = 1 << 16  # added to a token in the cache, times the number of rotary tables that are long
DTYPES = {"f32": np.float32, "i32": np.int32}


class FakeDevice:
    """Implements the device protocol for `tiny.program`.

    script: tokens by position. Where given, the likeliest next token at position p is script[p + 1], and
    end of text after it; without it, logits are drawn from a hash of all tokens up to p.
    """

    name = "fake"

    def __init__(self, program, context: int, script=None):
        self.program, self.context, self.script = program, context, script
        self.plan = program.plans["cpu"]
        self.buffers = {b.name: np.zeros(b.elements, DTYPES[b.dtype]) for b in self.plan.buffers}
        self.cache = np.full(context, -1, np.int32)
        self.long = frozenset()  # rotary tables with long frequencies: a row made with other ones is another row
        self.launches: list[tuple[str, int, int]] = []  # (phase, n_tokens, position)
        self.closed = False

    def upload(self, buffer, values):
        self.buffers[buffer][: len(values)] = values

    def download(self, buffer, count):
        return self.buffers[buffer][:count].copy()

    def launch(self, *phases):
        for phase in phases:
            self._run(phase)

    def _run(self, phase):
        n_tokens, context = map(int, self.buffers["state"][:2])
        slots, positions = self.buffers["state"][STATE_TOKENS : state_elements(n_tokens)].reshape(-1, 2).T
        position = int(positions[0])
        assert context == self.context and not slots.any()
        assert positions.tolist() == list(range(position, position + n_tokens))
        self.launches.append((phase, n_tokens, position))
        if phase == "decode" or phase.endswith("_body"):
            most = {"decode": 1, "few_body": FEW_TOKENS, "prefill_body": self.plan.prefill_chunk}[phase]
            assert 1 <= n_tokens <= min(most, self.plan.prefill_chunk)
            assert position + n_tokens <= self.context
            self.cache[position : position + n_tokens] = self.buffers["tokens"][:n_tokens] + LONG * len(self.long)
        if phase in ("decode", "last_logits"):
            logits = self.row(position + n_tokens - 1)
            self.buffers["logits"][: self.program.vocab_size] = logits
            if self.plan.chooses:
                try:
                    self.buffers["argmax"][0] = choose(logits, self.buffers["state"][STATE_DRAW])
                except ModelError:
                    self.buffers["argmax"][0] = -1
        if phase == "all_log_probs":
            for index in range(n_tokens):
                row = self.row(position + index).astype(np.float64)
                log_softmax = row - np.log(np.exp(row - row.max()).sum()) - row.max()
                self.buffers["log_probs"][index] = log_softmax[self.buffers["targets"][index]]
                self.buffers["argmax"][index] = row.argmax()

    def row(self, position: int) -> np.ndarray:
        if self.script is None:
            seed = zlib.crc32(self.cache[: position + 1].tobytes())
            return np.random.default_rng(seed).normal(size=self.program.vocab_size).astype(np.float32)
        row = np.zeros(self.program.vocab_size, np.float32)
        row[self.script[position + 1] if position + 1 < len(self.script) else tiny.EOS] = 20
        return row

    def fill_ropes(self, long):
        self.long = long

    def bandwidth(self):
        return 1e9

    def step_seconds(self, phase, repeats):
        return [1e-6 * repeats] * len(self.program.plans["cpu"].phases[phase])

    def download_rows(self, cache, layer, count):
        rows = np.zeros((count, self._row_width(layer)), np.float32)
        rows[:, 0] = self.cache[:count]
        return rows

    def upload_rows(self, cache, layer, rows):
        assert rows.shape == (len(rows), self._row_width(layer)) and rows.dtype == np.float32
        self.cache[: len(rows)] = rows[:, 0]

    def _row_width(self, layer):
        return self.program.kv_row(layer)

    def close(self):
        self.closed = True


def model(prompt: str = "", answer: str | list[int] | None = None, context: int = tiny.CONTEXT, **options) -> Model:
    """A model that continues `prompt` with `answer` (text or token ids) and ends, or at random without one."""
    program = tiny.program()
    tokenizer = Tokenizer(tiny.tokenizer_json())
    script = None
    if answer is not None:
        script = tokenizer.encode(prompt) + (tokenizer.encode(answer) if isinstance(answer, str) else answer)
    options.setdefault("chat_template", tiny.CHAT_TEMPLATE)
    return Model(program, tokenizer, FakeDevice(program, context, script), context, **options)
