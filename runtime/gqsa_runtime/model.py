"""A model that is ready to use: text in, text out."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gqsa_runtime import format as gqsa
from gqsa_runtime.chat import ChatTemplate
from gqsa_runtime.check import check_file
from gqsa_runtime.engine import Device, Engine, ScoreResult
from gqsa_runtime.errors import Cancelled, ClosedError, InputError
from gqsa_runtime.generation import AsyncGeneration, Generation, GenerationStats
from gqsa_runtime.load import open_device
from gqsa_runtime.program import Program
from gqsa_runtime.reader import ArtifactFile, TensorInfo, naming
from gqsa_runtime.sampling import SamplingOptions, choose, first_draw, next_draw, penalize
from gqsa_runtime.sequence import Sequence as TokenSequence
from gqsa_runtime.session import read_session, write_session
from gqsa_runtime.stopwatch import Stopwatch
from gqsa_runtime.tokenizer import StopFilter, TextStream, Tokenizer
from gqsa_runtime.turns import Turn, Turns
from gqsa_runtime.validate import validate

_log = logging.getLogger(__name__)


class Model:
    """One model on one device with one KV cache. Any number of threads may call it.

    Calls run one after another, in the order in which they came; with wait=False a call that would
    have to wait raises BusyError instead. A generation whose consumer asks for nothing for a second
    lets the next call go first and goes on after it: its text stays whole, the cache is made again.

    device_reason: which device runs it and why. context_reason: why the context is smaller than the
    default, or what "auto" has chosen and why, or None. family: of the plan that runs, tensors: name ->
    TensorInfo of the file. stats: GenerationStats of the generation that began last. engine: for
    token-level work. open_seconds: what `open` spent, by stage: "header", "tokenizer" and those of
    `load.open_device`, and "total".
    """

    def __init__(
        self,
        program: Program,
        tokenizer: Tokenizer,
        device: Device,
        context: int,
        chat_template: str | None = None,
        device_reason: str = "",
        context_reason: str | None = None,
        family: str = "cpu",
        tensors: Mapping[str, TensorInfo] | None = None,
        open_seconds: Mapping[str, float] | None = None,
        digest: bytes = bytes(32),
    ):
        self.program, self.tokenizer, self.device, self.context = program, tokenizer, device, context
        self.engine = Engine(program, device, context)
        self.device_reason, self.context_reason = device_reason, context_reason
        self.family, self.tensors = family, dict(tensors or {})
        self.open_seconds = dict(open_seconds or {})
        self._digest = digest  # of the file
        self.stats = GenerationStats()
        self._chat_source = chat_template
        self._chat_template: ChatTemplate | None = None
        self._turns = Turns()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        device: str = "auto",
        context: int | str | None = None,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        kernels: str = "file",
        require_signature: str | os.PathLike[str] | bytes | None = None,
        signature: str | os.PathLike[str] | None = None,
    ) -> Model:
        """Opens a .gqsa file.

        device: "auto" takes a GPU if the file has kernels for it, else the CPU; or "cuda", "cuda:N", "cpu".
        context: positions of the KV cache; default 4096, less where the model or the memory has less; "auto": as many
        as the model is made for and free memory allows, on the CPU half of what the weights leave free.
        threads: of the CPU. progress: called with (bytes read, bytes in all) while weights load.
        kernels: "file" runs the machine code that the file holds; "rebuild" takes weights and texts alone from it and
        has the package gqsac compile the kernels that its launch plan names, so that no code of the file ever runs.
        require_signature: who must have signed the file: a public key on P-256, P-384 or P-521, or trusted
        certificates, as a PEM file or its bytes. Nothing of the file is used before its signature was found to be
        theirs and of the bytes that are loaded. Needs gqsa-runtime[signature]. signature: where it lies; default: the
        file's name and ".sig".
        Raises FormatError (not a sound .gqsa file, or with "rebuild" a plan that gqsac would make otherwise),
        SignatureError (a signature is asked for and is not of this file and key, or cannot be checked), DeviceError
        (nothing to run it on, no gqsac to "rebuild" with, no memory: it says how much is needed and free, and the
        largest context that fits, before anything is allocated on the device) or InputError (no such file, a context
        that the model is not made for).
        """
        clock = Stopwatch()
        with clock.stage("total"), contextlib.ExitStack() as stack:
            with clock.stage("header"):
                file = stack.enter_context(ArtifactFile.open(path, require_signature, signature))
            stack.enter_context(naming(path))
            with clock.stage("header"):
                validate(file.program, file.tensors)
            text, template = file.text(gqsa.KEY_TOKENIZER), file.metadata.get(gqsa.KEY_CHAT_TEMPLATE)

            def make_tokenizer() -> Tokenizer:
                with clock.stage("tokenizer"):
                    return Tokenizer(text, file.program.vocab_size)

            # A large vocabulary takes as long as the driver does to make a GPU's context: side by side.
            with ThreadPoolExecutor(1, "gqsa-tokenizer") as aside:
                pending = aside.submit(make_tokenizer)
                opened = open_device(file, device, context, threads, progress, clock, kernels)
                try:
                    tokenizer = pending.result()
                except BaseException:
                    opened.device.close()
                    raise
        _log.info("%s: open in %.2f s, device %s", os.fspath(path), clock.seconds["total"], opened.device_reason)
        if opened.context_reason:
            # Less than the default was nobody's wish; what "auto" chose was.
            level = logging.WARNING if context is None else logging.INFO
            _log.log(level, "%s: %s", os.fspath(path), opened.context_reason)
        return cls(
            file.program,
            tokenizer,
            opened.device,
            opened.context,
            template if isinstance(template, str) else None,
            opened.device_reason,
            opened.context_reason,
            opened.family,
            file.tensors,
            clock.seconds,
            file.digest,
        )

    check = staticmethod(check_file)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self, wait: bool = False) -> None:
        """Frees the device's memory; afterwards every call raises ClosedError. Safe to call twice.

        What runs in other threads ends with ClosedError after its next step; with wait=True the calls
        that came before are finished first.
        """
        if wait:
            with contextlib.suppress(ClosedError):
                self._turns.take()
        self._turns.close()
        self.engine.close()

    @property
    def has_chat_template(self) -> bool:
        """Whether the file carries a chat template, so that `chat` works."""
        return self._chat_source is not None

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with begin-of-text and the like where the model has them."""
        self._turns.check_open()
        return self.tokenizer.encode(text, add_special_tokens)

    def _prompt_ids(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As `tokenize`, of a text that must fit the context: one that is far too long is not read at all."""
        return self.tokenizer.encode(text, add_special_tokens, self.context)

    @staticmethod
    def check_options(
        max_new_tokens: int = 256,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        context_shift: bool = False,
        n_keep: int = 0,
        **sampling: Any,
    ) -> SamplingOptions:
        """Raises InputError where options of `generate` are out of range, before there is a model."""
        options = SamplingOptions(**sampling)
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        if seed is not None and seed < 0:
            raise InputError(f"the seed is {seed}, expected 0 or more")
        if n_keep < 0:
            raise InputError(f"n_keep is {n_keep}, expected 0 or more")
        if n_keep and not context_shift:
            raise InputError(f"n_keep is {n_keep}, but nothing is forgotten without context_shift; ask for both")
        StopFilter(stop)
        return options

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        context_shift: bool = False,
        n_keep: int = 0,
        wait: bool = True,
    ) -> Generation:
        """Continues a text or token ids: an iterator over pieces of text as they come, whole characters each.

        Ends at an end-of-text token, before a stop string, after max_new_tokens, or where the context
        is full, or where `Generation.cancel` is called in any thread; `stats.finish_reason` says which. With
        context_shift a full context does not end it: the first n_keep tokens stay, and a begin-of-text token
        always; of the others the older half is forgotten and the rest read again, as if it were the prompt. A
        prompt must fit the context all the same.
        temperature 0 is deterministic; so is a seed: where logits are equal, on any device. A repetition_penalty other
        than 1 has the host choose, from logits copied to it: the same tokens, more slowly.
        Arguments are checked, and InputError is raised, before the first piece. Its turn begins with
        the first piece: there wait=False raises BusyError where another call runs.
        """
        self._turns.check_open()
        options = self.check_options(
            max_new_tokens, seed, stop, context_shift, n_keep,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        ids = self._prompt_ids(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        if not ids and self.program.bos_token_id is not None:
            ids = [self.program.bos_token_id]
        if not ids:
            raise InputError("the prompt is empty, and this model has no begin-of-text token; write a prompt")
        if len(ids) > self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but the context is {self.context}; "
                f"shorten it or open the model with a larger context (up to {self.program.max_context})"
            )
        kept = None
        if context_shift:
            kept = max(n_keep, int(ids[0] == self.program.bos_token_id))
            self._check_kept(kept)
        turn, stats = Turn(), GenerationStats(prompt_tokens=len(ids))
        pieces = self._pieces(ids, max_new_tokens, options, seed, StopFilter(stop), kept, stats, turn)
        return Generation(self._in_turn(pieces, turn, wait, stats), stats, functools.partial(self._turns.cancel, turn))

    def _check_kept(self, n_keep: int) -> None:
        # Of two tokens behind them one is forgotten, so that the text can go on.
        if not 0 <= n_keep <= self.context - 2:
            raise InputError(
                f"n_keep is {n_keep}, but of a context of {self.context} tokens 0 to {self.context - 2} can be kept; "
                "keep fewer, or open the model with a larger context"
            )

    def chat(
        self, messages: Sequence[Mapping[str, Any]], template_variables: Mapping[str, Any] | None = None, **options: Any
    ) -> Generation:
        """The assistant's answer to messages such as {"role": "user", "content": "Hello"}, in pieces.

        template_variables: what the template knows beyond messages, such as tools or enable_thinking.
        options: as for `generate`. What the new prompt shares with the last one is not computed again.
        """
        return self.generate(self.chat_tokens(messages, **(template_variables or {})), **options)

    def generate_async(self, prompt: str | Sequence[int], **options: Any) -> AsyncGeneration:
        """As `generate`, for `async for`: all work is done in a thread, and the event loop never waits.

        options: as for `generate`. A task that is cancelled cancels the generation. InputError and its like are
        raised with the first piece.
        """
        return AsyncGeneration(functools.partial(self.generate, prompt, **options))

    def chat_async(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> AsyncGeneration:
        """As `chat`, for `async for`; see `generate_async`."""
        return AsyncGeneration(functools.partial(self.chat, messages, template_variables, **options))

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]], **template_variables: Any) -> list[int]:
        """Token ids of chat messages, up to where the assistant's answer begins."""
        if self._chat_template is None:
            if self._chat_source is None:
                raise InputError("the file carries no chat template; use generate (`gqsa run --raw`) instead")
            ends = self.program.eos_token_ids
            self._chat_template = ChatTemplate(
                self._chat_source,
                self.tokenizer.token(self.program.bos_token_id),
                self.tokenizer.token(ends[0]) if ends else None,
            )
        # The template writes the special tokens itself.
        return self._prompt_ids(self._chat_template.render(messages, **template_variables), add_special_tokens=False)

    def score(self, text: str | Sequence[int], first: int = 1, wait: bool = True) -> ScoreResult:
        """Log-probability of the tokens of a text, or of token ids, from `first` on. See ScoreResult."""
        self._turns.check_open()
        ids = self._prompt_ids(text) if isinstance(text, str) else text
        with self._turns.turn(wait):
            return self.engine.score(ids, first)

    def save_session(self, path: str | os.PathLike[str], wait: bool = True) -> int:
        """Writes what the KV cache holds, the last prompt and its answer, to a file; returns the number of its tokens.

        A prompt that begins like it is read from there on, after `load_session` in any process. The file appears whole
        or not at all. Raises InputError where it cannot be written.
        """
        with self._turns.turn(wait):
            session = self.engine.save()
            write_session(path, self._digest, session)
            return len(session.tokens)

    def load_session(self, path: str | os.PathLike[str], wait: bool = True) -> int:
        """Makes the KV cache hold what `save_session` wrote; returns the number of its tokens.

        Raises InputError where the file cannot be read or is longer than the context, FormatError where it is damaged
        or of another model file; then the cache is as it was.
        """
        with self._turns.turn(wait):
            session = read_session(path, self._digest, self.program, self.context)
            self.engine.restore(session)
            return len(session.tokens)

    def _in_turn(
        self, pieces: Iterator[str], turn: Turn, wait: bool, stats: GenerationStats
    ) -> Generator[str, None, None]:
        """The pieces of a generation, each made while it is this one's turn."""
        try:
            self._turns.enter(turn, wait)
            for text in pieces:
                self._turns.pause(turn)
                yield text
                self._turns.resume(turn)
        except Cancelled:
            stats.finish_reason = "cancelled"
        finally:
            self._turns.release(turn)
            _log.debug("a generation ended: %s", stats)

    def _pieces(
        self,
        ids: list[int],
        max_new_tokens: int,
        options: SamplingOptions,
        seed: int | None,
        stop: StopFilter,
        n_keep: int | None,
        stats: GenerationStats,
        turn: Turn,
    ) -> Iterator[str]:
        """n_keep: tokens that stay when the context is full, None: it ends the text."""
        self.stats = stats
        began_s = time.perf_counter()
        sequence, seen, draw = TokenSequence(), list(ids), first_draw(options, seed)

        def cancelled() -> bool:
            return turn.cancelled

        def next_token(tokens: list[int]) -> int:
            nonlocal sequence, draw
            if turn.cancelled:
                raise Cancelled
            if n_keep is not None and len(sequence.tokens) + len(tokens) > self.context:
                tokens = _shifted([*sequence.tokens, *tokens], n_keep)
                sequence = TokenSequence()
                stats.context_shifts += 1
            now, draw = draw, next_draw(draw)
            if options.repetition_penalty == 1:
                return self.engine.extend_choosing(sequence, tokens, now, cancelled)
            # What was seen is known here alone.
            logits = self.engine.extend(sequence, tokens, cancelled)
            return choose(penalize(logits, seen, options.repetition_penalty), now)

        token = next_token(ids)
        stats.cached_tokens = sequence.n_reused
        stats.prefill_seconds = time.perf_counter() - began_s

        stream = TextStream(self.tokenizer, ids)
        # The last token is read out only, so it needs no place in the cache.
        room = self.context - len(ids) + 1 if n_keep is None else max_new_tokens
        limit = min(max_new_tokens, room)
        finish = "context" if room < max_new_tokens else "length"
        for count in range(1, limit + 1):
            began_s = time.perf_counter()
            stats.new_tokens = count
            if token in self.program.eos_token_ids:
                finish = "stop"
                break
            seen.append(token)
            text = stop.push(stream.push(token))
            stats.decode_seconds += time.perf_counter() - began_s
            if text:
                yield text
            if stop.stopped:
                finish = "stop"
                break
            if count < limit:
                began_s = time.perf_counter()
                token = next_token([token])
                stats.decode_seconds += time.perf_counter() - began_s
        tail = stop.push(stream.flush()) + stop.flush()
        stats.finish_reason = finish
        if tail:
            yield tail


def _shifted(tokens: list[int], n_keep: int) -> list[int]:
    """The first n_keep tokens and the newer half of the others."""
    return tokens[:n_keep] + tokens[n_keep + (len(tokens) - n_keep + 1) // 2 :]
