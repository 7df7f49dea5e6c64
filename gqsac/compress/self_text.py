"""Text that a model writes itself, to calibrate and train on: sampled at temperature 1 from many starts.

What a compressed model has to keep is its distribution of next tokens where it will be used, which is not the kind of
any file at hand. Sampled text has the model's own kind (LLM-QAT, arXiv 2305.17888), and a chat model's with its
template: asked to begin the user's turn, it writes questions as well as answers (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gqsa_runtime.chat import ChatTemplate
from gqsa_runtime.errors import InputError, ModelError
from tokenizers import Tokenizer
from transformers.cache_utils import DynamicCache, DynamicLayer

from gqsac.compress.partial import PartialFolder
from gqsac.compress.progress import Meter, count_bar
from gqsac.source import Source

PREFIX = "self:"
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
# Of keys and values of the samples of a batch; on a GPU a share of its memory. A step there takes as long as its
# launches, whatever the samples, up to some thousands.
_CACHE_BYTES_ON_CPU, _CACHE_SHARE = 1 << 30, 0.45
_MOST_AT_ONCE = {"cuda": 2048, "cpu": 32}
_KEPT = "self"
_MARK = "\u2063what the user says\u2063"


def tokens_asked_for(texts: list[str]) -> tuple[list[str], int]:
    """(the text files among calibration texts, tokens to sample from the model itself: 0 for none).

    "self:200k" and "self:4M" ask for so many tokens. Raises InputError for what is no such number, or a second one.
    """
    files, counts = [], []
    for text in texts:
        if not str(text).startswith(PREFIX):
            files.append(text)
            continue
        number = str(text).removeprefix(PREFIX).lower()
        unit = number[-1:] if number[-1:] in ("k", "m") else ""
        try:
            count = float(number.removesuffix(unit)) * _UNITS[unit]
        except ValueError:
            count = math.nan
        if not 1 <= count < 1e12:
            raise InputError(
                f"the calibration text {text!r} names no number of tokens; expected one such as self:200k or self:4M"
            )
        counts.append(round(count))
    if len(counts) > 1:
        raise InputError("the calibration texts ask twice for text of the model's own; give self:N once")
    return files, sum(counts)


def own_samples(wanted: dict[str, int], own_tokens: int, seq_len: int, with_files: bool) -> dict[str, int]:
    """Purpose -> how many of its samples the model writes: all without text files, at most half beside them.

    wanted: purpose -> samples. own_tokens: at most so many in all, see tokens_asked_for. Raises InputError where they
    do not suffice.
    """
    if not own_tokens:
        return dict.fromkeys(wanted, 0)
    most = -(-own_tokens // seq_len)
    if with_files:
        return {purpose: min(most, count // 2) for purpose, count in wanted.items()}
    needed = max(wanted.values())
    if needed > most:
        raise InputError(
            f"{PREFIX}{own_tokens} are {most} samples of {seq_len} tokens, but {needed} are needed; ask for "
            f"{PREFIX}{needed * seq_len}, for fewer or shorter samples, or give text files too"
        )
    return wanted


def mixed(written: np.ndarray, read: np.ndarray | None, seed: int) -> np.ndarray:
    """Samples of both kinds in seeded order, int64 [samples, seq_len]. read: None for none."""
    windows = written if read is None else np.concatenate([written, read])
    return windows[np.random.default_rng(seed).permutation(len(windows))]


@dataclass(frozen=True)
class Starts:
    """What sampled texts begin with. document: tokens before a text, maybe none. chat: those before a user's first
    words, or None without a chat template. words: int64, ordinary tokens. ends: tokens that end a text."""

    document: tuple[int, ...]
    chat: tuple[int, ...] | None
    words: np.ndarray
    ends: tuple[int, ...]

    @classmethod
    def of(cls, source: Source) -> Starts:
        """Raises FormatError and InputError where the chat template cannot open a user's turn."""
        tokenizer = Tokenizer.from_str(source.tokenizer_json)
        generation = json.loads(source.files.get("generation_config.json", b"{}"))
        first, ends = (_ids(generation.get(k, source.config.get(k))) for k in ("bos_token_id", "eos_token_id"))
        special = set(tokenizer.get_added_tokens_decoder())
        size = len(source.model.get_input_embeddings().weight)
        words = np.array([i for i in sorted(tokenizer.get_vocab().values()) if i not in special and i < size], np.int64)
        # What stands between the documents that models are trained on, where no token begins them.
        document = tuple(tokenizer.encode("").ids) or first[:1] or ends[:1]
        return cls(document, _chat_start(source, tokenizer), words, ends)

    def draw(self, rng: np.random.Generator) -> list[int]:
        """The tokens of a start: of a document, of one with a first word at random, or of a chat, each as often."""
        kind = rng.integers(2 if self.chat is None else 3)
        if kind == 2:
            return list(self.chat)
        if kind == 1 or not self.document:
            return [*self.document, int(rng.choice(self.words))]
        return list(self.document)


def _ids(value) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)


def _chat_start(source: Source, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """Tokens of the chat template before a user's first words; None without a template."""
    config = json.loads(source.files.get("tokenizer_config.json", b"{}"))
    template = source.files.get("chat_template.jinja", b"").decode() or config.get("chat_template")
    if not isinstance(template, str):
        return None

    def spelled(name: str) -> str | None:
        token = config.get(name)
        return token.get("content") if isinstance(token, dict) else token

    chat = ChatTemplate(template, spelled("bos_token"), spelled("eos_token"))
    rendered = chat.render([{"role": "user", "content": _MARK}], add_generation_prompt=False)
    before, found, _ = rendered.partition(_MARK)
    if not found:
        raise InputError(f"{source.name}: its chat template drops the user's words, so no chats can be sampled")
    return tuple(tokenizer.encode(before, add_special_tokens=False).ids)


def sampled_windows(
    source: Source,
    make_model,
    count: int,
    seq_len: int,
    seed: int,
    device: torch.device,
    partial: PartialFolder,
    folder: Path | None,
    shown: bool,
) -> np.ndarray:
    """int64 [count, seq_len]: texts that the model writes, one behind another where one ends early.

    make_model: the uncompressed model, anew; called only if something is left to sample. What is finished is kept in
    `partial`, a batch at a time. folder: where whole samples are kept for other runs, and taken from; or None. shown:
    progress on stderr. Raises ModelError where the model's logits are not finite.
    """
    file = folder and folder / f"{source.fingerprint()}-{count}x{seq_len}-seed-{seed}.npy"
    if file and file.is_file():
        return _read(file, count, seq_len)
    starts = Starts.of(source)
    at_once = samples_at_once(source.model.config, seq_len, device)
    batches = [min(at_once, count - first) for first in range(0, count, at_once)]
    kept = [partial.load_block(_KEPT, number) for number in range(len(batches))]
    left = sum(size for size, windows in zip(batches, kept, strict=True) if windows is None)
    model = None
    with count_bar("sampling text", left * seq_len, "token", shown, Meter(device)) as on_count:
        for number, size in enumerate(batches):
            if kept[number] is None:
                if model is None:
                    model = make_model().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
                windows = sample(model, starts, size, seq_len, (seed, number), on_count, _cache(model, seq_len))
                kept[number] = {"tokens": windows}
                partial.save_block(_KEPT, number, kept[number])
    if model is not None:
        model.to("meta")  # its memory is not needed any more
    tokens = np.concatenate([windows["tokens"] for windows in kept])
    if file:
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as written:
            np.save(written, tokens.astype(np.min_scalar_type(int(tokens.max()))))
        part.replace(file)
    return tokens


def _read(file: Path, count: int, seq_len: int) -> np.ndarray:
    """Samples as `sampled_windows` keeps them."""
    try:
        tokens = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file} is damaged ({error}); delete it, and the text is sampled anew") from error
    if tokens.shape != (count, seq_len) or tokens.dtype.kind != "u":
        raise InputError(
            f"{file} holds {tokens.dtype} {list(tokens.shape)}, expected tokens {[count, seq_len]}; delete it, and the "
            "text is sampled anew"
        )
    return tokens.astype(np.int64)


class _ReservedLayer(DynamicLayer):
    """Keys and values of a layer in room for all positions, where appending to them would copy them each time."""

    def __init__(self, positions: int):
        super().__init__()
        self._positions, self._length, self._room = positions, 0, None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """See DynamicLayer."""
        both = (key_states, value_states)
        if self._room is None:
            self._room = [states.new_empty(*states.shape[:2], self._positions, states.shape[3]) for states in both]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        first, self._length = self._length, self._length + key_states.shape[2]
        for room, states in zip(self._room, both, strict=True):
            room[:, :, first : self._length] = states
        self.keys, self.values = (room[:, :, : self._length] for room in self._room)
        return self.keys, self.values


def _cache(model, seq_len: int) -> DynamicCache:
    """The model's cache, for so many positions."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_ReservedLayer(seq_len) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def samples_at_once(config, seq_len: int, device: torch.device) -> int:
    """Samples of a batch, by what their keys and values take."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kept_heads = getattr(config, "num_key_value_heads", None) or heads
    each = 2 * config.num_hidden_layers * kept_heads * head_size * seq_len * (2 if device.type == "cuda" else 4)
    room = _CACHE_BYTES_ON_CPU
    if device.type == "cuda":  # of all, not of what is free: a run that goes on must make the same batches
        room = int(_CACHE_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return max(1, min(_MOST_AT_ONCE[device.type], room // each))


@torch.no_grad()
def sample(model, starts: Starts, count: int, seq_len: int, seed: tuple[int, int], on_count=lambda n: None, cache=None):
    """int64 [count, seq_len], each row by itself. seed: of this batch. on_count: called with tokens made. cache: of the
    model, empty, in place of its own."""
    device = model.device
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
    forced = np.full((count, seq_len), -1, np.int64)  # tokens of starts, -1 where the model chooses
    for row in range(count):
        _force(forced[row], starts.draw(rng))
    tokens = torch.empty(count, seq_len, dtype=torch.int64, device=device)
    ends = torch.tensor(starts.ends, dtype=torch.int64, device=device)
    finite, chosen = torch.tensor(True, device=device), None
    for place in range(seq_len):
        given = torch.from_numpy(forced[:, place]).to(device)
        now = given if chosen is None else torch.where(given >= 0, given, chosen)
        tokens[:, place] = now
        if len(ends):
            ended = torch.isin(now, ends) & (given < 0)
            for row in torch.nonzero(ended)[:, 0].tolist():
                _force(forced[row, place + 1 :], starts.draw(rng))
        output = model(now[:, None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()
        finite &= torch.isfinite(logits).all()
        chosen = torch.multinomial(torch.softmax(logits.nan_to_num(), 1), 1, generator=generator)[:, 0]
        on_count(count)
    if not finite:
        raise ModelError("the model's logits hold a NaN or an infinity, so no text can be sampled from it")
    return tokens.cpu().numpy()


def _force(places: np.ndarray, start: list[int]) -> None:
    """Puts a start at the beginning of a row's places, as far as they reach."""
    fits = start[: len(places)]
    places[: len(fits)] = fits
