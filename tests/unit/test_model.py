"""Text generation, chat, and opening of files, over a device of NumPy alone."""

import dataclasses
import math

import numpy as np
import pytest
from gqsa_runtime import load, memory
from gqsa_runtime.errors import ClosedError, DeviceError, FormatError, InputError
from gqsa_runtime.model import Model
from gqsa_runtime.reader import ArtifactFile

from tests.format import tiny
from tests.unit import fake_device


def test_generate_greedy_to_the_end_of_text():
    model = fake_device.model("Once ", "upon a tïme")
    pieces = list(model.generate("Once "))
    assert "".join(pieces) == "upon a tïme" and "ï" in pieces
    stats = model.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.finish_reason) == (5, 0, "stop")
    assert stats.new_tokens == len("upon a tïme".encode()) + 1
    assert stats.prefill_seconds > 0 and stats.decode_tokens_per_second > 0


def test_max_new_tokens_and_context():
    model = fake_device.model("ab", "c" * 100)
    assert "".join(model.generate("ab", max_new_tokens=3)) == "ccc"
    assert model.stats.finish_reason == "length"
    assert model.engine.position == 4  # the last token is not fed back
    assert "".join(model.generate("ab", max_new_tokens=1000)) == "c" * (tiny.CONTEXT - 2 + 1)
    assert model.stats.finish_reason == "context"


@pytest.mark.parametrize("prompt, n_keep, kept", [("ab", 0, 0), ("ab", 5, 5), ([tiny.BOS, 1, 2], 0, 1)])
def test_context_shift_reads_the_newer_half_again(prompt, n_keep, kept):
    """Each token is what the engine makes of a text without what was forgotten."""
    context, fresh = 8, fake_device.model(context=8)
    ids = fresh.tokenize(prompt) if isinstance(prompt, str) else prompt
    expected, text, shifts = [], list(ids), 0
    while len(expected) < 20:
        if len(text) > context:  # 9 tokens: of those behind the kept ones, the newer half
            text, shifts = text[:kept] + text[kept + math.ceil((9 - kept) / 2) :], shifts + 1
        fresh.engine.reset()
        expected.append(int(fresh.engine.prefill(text).argmax()))
        text.append(expected[-1])
    assert tiny.EOS not in expected and shifts > 2
    model = fake_device.model(context=context)
    pieces = list(model.generate(prompt, max_new_tokens=20, context_shift=True, n_keep=n_keep))
    assert "".join(pieces) == model.tokenizer.decode(expected)
    stats = model.stats
    assert (stats.new_tokens, stats.finish_reason, stats.context_shifts) == (20, "length", shifts)
    assert "".join(model.generate(prompt, max_new_tokens=20)) != "".join(pieces)
    assert model.stats.finish_reason == "context" and model.stats.context_shifts == 0


def test_what_context_shift_refuses():
    model = fake_device.model(context=8)
    for options, match in (
        ({"n_keep": 2}, "nothing is forgotten without context_shift"),
        ({"n_keep": -1, "context_shift": True}, "n_keep is -1, expected 0 or more"),
        ({"n_keep": 7, "context_shift": True}, "of a context of 8 tokens 0 to 6 can be kept"),
        ({"prompt": "x" * 9, "context_shift": True}, "the prompt has 9 tokens, but the context is 8"),
    ):
        with pytest.raises(InputError, match=match):
            model.generate(**{"prompt": "a", **options})


def test_half_a_character_at_the_limit():
    model = fake_device.model("a", "日本")
    assert "".join(model.generate("a", max_new_tokens=4)) == "日\ufffd"


def test_stop_strings():
    model = fake_device.model("a", "one END two")
    assert "".join(model.generate("a", stop="END")) == "one "
    assert model.stats.finish_reason == "stop"
    assert "".join(model.generate("a", stop=["zzz", " t"])) == "one END"
    assert "".join(model.generate("a", stop="END no")) == "one END two"


def test_seed_makes_sampling_repeatable():
    model = fake_device.model()
    first, again, other = ("".join(model.generate("x", 20, temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_repetition_penalty_sees_the_prompt_and_the_answer():
    model = fake_device.model()
    ids = []
    model.engine.extend = _recording(model.engine.extend, ids)
    list(model.generate("abc", 25, repetition_penalty=1e9))
    assert ids[: len("abc")] == model.tokenize("abc")
    assert len(ids) == len("abc") + 24 and len(set(ids)) == len(ids)


def _recording(function, calls):
    def recorded(sequence, tokens, *cancelled):
        calls.extend(tokens)
        return function(sequence, tokens, *cancelled)

    return recorded


def test_token_ids_as_prompt_and_empty_prompts():
    model = fake_device.model("ab", "cd")
    assert "".join(model.generate(np.array(model.tokenize("ab")))) == "cd"
    list(model.generate("", max_new_tokens=1))
    assert model.engine.tokens == (tiny.BOS,)
    model.program = dataclasses.replace(model.program, bos_token_id=None)
    with pytest.raises(InputError, match="prompt is empty"):
        model.generate("")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"prompt": "x" * 33}, "prompt has 33 tokens, but the context is 32"),
        ({"prompt": "x" * 9999}, "text has 9999 characters, which is more than 32 tokens can hold"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "x", "temperature": -1}, "temperature is -1"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "stop": [""]}, "stop string is empty"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_piece(arguments, match):
    with pytest.raises(InputError, match=match):
        fake_device.model().generate(**arguments)


def test_token_outside_the_vocabulary():
    with pytest.raises(InputError, match="token 300 at place 1"):
        list(fake_device.model().generate([1, 300]))


def test_an_overtaken_generation_goes_on():
    model = fake_device.model()
    alone = "".join(model.generate("ab", 20, temperature=1.0, seed=3))
    first = model.generate("ab", 20, temperature=1.0, seed=3)
    text = next(first)
    other = "".join(model.generate("abc", 9, temperature=1.0, seed=4))
    model.score("something else")
    assert text + "".join(first) == alone
    assert "".join(model.generate("abc", 9, temperature=1.0, seed=4)) == other


def test_chat_renders_and_keeps_the_shared_prefix():
    model = fake_device.model(answer=[], context=200)
    messages = [{"role": "user", "content": "Hi"}]
    ids = model.chat_tokens(messages)
    assert model.tokenizer.decode(ids) == "[user]Hi\n[assistant]" and ids[0] == tiny.BOS
    model.device.script = [*ids, *model.tokenize("Yes.")]
    assert "".join(model.chat(messages)) == "Yes."
    messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    list(model.chat(messages, max_new_tokens=1))
    assert model.stats.cached_tokens == len(ids) + len("Yes.")
    assert model.stats.prompt_tokens == len(model.chat_tokens(messages))


def test_chat_without_a_template():
    model = fake_device.model(chat_template=None)
    assert not model.has_chat_template
    with pytest.raises(InputError, match="no chat template"):
        model.chat([{"role": "user", "content": "Hi"}])


def test_score_takes_text_and_tokens():
    model = fake_device.model()
    by_text, by_tokens = model.score("hello"), model.score(model.tokenize("hello"))
    assert by_text.log_probs.shape == (4,) and (by_text.log_probs < 0).all()
    np.testing.assert_array_equal(by_text.log_probs, by_tokens.log_probs)


def test_close_closes_the_device():
    with fake_device.model() as model:
        assert not model.device.closed
        generation = model.generate("a")
        next(generation)
    assert model.device.closed
    model.close()
    calls = (
        lambda: next(generation),
        lambda: model.generate("a"),
        lambda: model.chat([{"role": "user", "content": "Hi"}]),
        lambda: model.score("ab"),
        lambda: model.tokenize("a"),
    )
    for call in calls:
        with pytest.raises(ClosedError, match="^the model is closed$"):
            call()


# Opening files.


@pytest.fixture
def opened(monkeypatch):
    """Replaces devices by the fake one; lists what was asked for."""
    calls = []

    def open_fake(kind, ordinal, program, tensors, binaries, context, threads, clock):
        calls.append((kind, ordinal, context, threads))
        arrays = {name: tensors[name] for name in tensors}
        assert binaries(program.binaries[0]) == tiny.CODE
        assert all(tensors[name] is array for name, array in arrays.items()), "an array in use was read twice"
        assert tensors.nbytes("embed") == arrays["embed"].nbytes and not arrays["embed"].flags.writeable
        return fake_device.FakeDevice(program, context)

    monkeypatch.setattr(load, "_open", open_fake)
    monkeypatch.setattr(load, "probe", lambda kind, program, ordinal: (kind == "cpu", f"about {kind}"))
    return calls


def test_open(path, opened):
    progress = []
    with Model.open(path, progress=lambda done, total: progress.append((done, total))) as model:
        assert "".join(model.generate("Hi", max_new_tokens=3)) is not None
        assert model.device_reason == "cpu: about cpu; no GPU: about cuda"
        assert model.context_reason is None and model.has_chat_template
    assert opened == [("cpu", 0, tiny.CONTEXT, None)]
    assert progress and progress[-1][0] >= progress[-1][1] > 0
    stages = model.open_seconds
    assert {"header", "tokenizer", "device", "read", "check", "wait"} < set(stages)
    assert 0 < stages["header"] + stages["device"] + stages["wait"] < stages["total"]


def test_open_with_choices(path, opened):
    assert Model.open(path, device="cpu", context=7, threads=2).context == 7
    assert opened == [("cpu", 0, 7, 2)]
    with pytest.raises(DeviceError, match="about cuda"):
        Model.open(path, device="cuda:1")
    for device in ("gpu", "cpu:1", "cuda:x", ""):
        with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N"):
            Model.open(path, device=device)
    with pytest.raises(InputError, match="context is 33.*1 to 32"):
        Model.open(path, context=33)
    with pytest.raises(InputError, match="context is 0.* choose --context 32$"):
        Model.open(path, context=0)
    for context in ("all", 8.0, True):
        with pytest.raises(InputError, match=f"context is {context!r}, expected a number of tokens or 'auto'"):
            Model.open(path, context=context)
    for threads in (0, 2**32 + 1):
        with pytest.raises(InputError, match=f"threads is {threads}, expected at least 1 and at most 1024"):
            Model.open(path, threads=threads)


def test_nothing_to_run_on(path, opened, monkeypatch):
    monkeypatch.setattr(load, "probe", lambda kind, program, ordinal: (False, f"no {kind}"))
    with pytest.raises(DeviceError, match="GPU: no cuda. CPU: no cpu"):
        Model.open(path)
    for device in ("cpu", "cuda"):
        with pytest.raises(DeviceError, match=f"^no {device}$"):
            Model.open(path, device=device)


def test_a_gpu_comes_first(path, monkeypatch):
    monkeypatch.setattr(load, "probe", lambda kind, program, ordinal: (True, "fine"))
    with ArtifactFile.open(path) as file:
        assert load.choose_device(file.program, "auto") == ("cuda", 0, "cuda: fine")
        assert load.choose_device(file.program, "cuda:2") == ("cuda", 2, "cuda:2, as asked: fine")


def test_context_shrinks_to_the_memory(path, opened, monkeypatch):
    with ArtifactFile.open(path) as file:
        needs = memory.needed_bytes(file.program, file.tensors, "cpu", 10)
        per_token = memory.context_bytes(file.program, 1)
    assert per_token == 2 * 16 * 4 + 4 * 4
    monkeypatch.setattr(memory, "CPU_HEADROOM_BYTES", 0)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: needs + per_token - 1)
    model = Model.open(path)
    assert model.context == 10 and model.context_reason.startswith("context 10: context 32 needs")
    with pytest.raises(DeviceError, match="context 11 needs.*a context of 10 fits"):
        Model.open(path, context=11)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 100)
    with pytest.raises(DeviceError, match="not even one position fits"):
        Model.open(path)
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: None)
    assert Model.open(path).context == tiny.CONTEXT


def test_context_auto_takes_what_the_memory_allows(path, opened, monkeypatch):
    with ArtifactFile.open(path) as file:
        fixed = memory.needed_bytes(file.program, file.tensors, "cpu", 0)
        per_token = memory.context_bytes(file.program, 1)
        monkeypatch.setattr(memory, "CPU_HEADROOM_BYTES", 0)
        monkeypatch.setattr(memory, "free_cpu_bytes", lambda: fixed + 21 * per_token)
        model = Model.open(path, context="auto")  # half of what is left: RAM is everybody's
        assert model.context == 10 and model.context_reason.startswith("context 10: what fits 50% of the 0.00 GB")
        with monkeypatch.context() as patch:  # a GPU's memory is the model's
            patch.setitem(memory.AUTO_SHARE, "cpu", memory.AUTO_SHARE["cuda"])
            assert Model.open(path, context="auto").context == 21
        monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 1 << 40)
        model = Model.open(path, context="auto")
        assert model.context == tiny.CONTEXT and model.context_reason.endswith("all that the model is made for")
        monkeypatch.setattr(memory, "free_cpu_bytes", lambda: fixed + per_token)
        assert Model.open(path, context="auto").context == 1
        monkeypatch.setattr(memory, "free_cpu_bytes", lambda: fixed)
        with pytest.raises(DeviceError, match="not even one position fits"):
            Model.open(path, context="auto")
        monkeypatch.setattr(memory, "free_cpu_bytes", lambda: None)
        model = Model.open(path, context="auto")
        assert model.context == tiny.CONTEXT and "does not say how much memory is free" in model.context_reason


def test_memory_is_asked_for_before_anything_is_read(path, opened, monkeypatch):
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: memory.CPU_HEADROOM_BYTES + 100)
    monkeypatch.setattr(load, "CheckedTensors", lambda *args: pytest.fail("read"))
    with pytest.raises(DeviceError, match=r"context 32 needs \d.* can be used"):
        Model.open(path)


def test_damaged_contents_are_refused_with_the_path(tmp_path, opened, monkeypatch):
    def refuse(match, **options):
        file = tmp_path / "bad.gqsa"
        file.write_bytes(tiny.file_bytes(**options))
        with pytest.raises(FormatError, match=f"bad.gqsa: .*{match}"):
            Model.open(file)

    arrays = tiny.tensors()
    arrays["q.groups"] = np.full(4, -1, np.int32)
    refuse("'q.groups' holds column", arrays=arrays)
    refuse("launch plan", made=tiny.program(plans={"cpu": tiny.plan(prefill_chunk=1000)}))
    closed = []
    monkeypatch.setattr(fake_device.FakeDevice, "close", lambda device: closed.append(device))
    refuse("tokenizer cannot be read", **{"tokenizer.huggingface.json": "{}"})
    assert len(closed) == 1  # the device was open by then
    refuse("tokenizer.huggingface.json", **{"tokenizer.huggingface.json": None})


def test_a_broken_chat_template_matters_only_to_chat(tmp_path, opened):
    file = tmp_path / "model.gqsa"
    file.write_bytes(tiny.file_bytes(**{"tokenizer.chat_template": "{% for %}"}))
    with Model.open(file) as model:
        list(model.generate("a", max_new_tokens=1))
        with pytest.raises(FormatError, match="chat template cannot be compiled"):
            model.chat([{"role": "user", "content": "Hi"}])


def test_free_memory_is_a_number_or_unknown():
    free = memory.free_cpu_bytes()
    assert free is None or 0 < free < 1 << 50
