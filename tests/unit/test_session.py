"""Sessions come back as they were, in another process too, and nothing else comes in their place."""

import dataclasses

import numpy as np
import pytest
from gqsa_runtime.errors import FormatError, InputError
from gqsa_runtime.session import Session, cache_shapes, read_session, write_session

from tests.format import tiny
from tests.unit import fake_device

DIGEST = bytes(range(32))


def made(n_tokens=5, seed=0):
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n_tokens, width)).astype(np.float32) for *_, width in cache_shapes(tiny.program())]
    return Session(rng.integers(0, tiny.VOCAB, n_tokens).astype(np.int32), rows)


def read(path, digest=DIGEST, context=tiny.CONTEXT, **changes):
    return read_session(path, digest, tiny.program(**changes), context)


@pytest.mark.parametrize("n_tokens", [0, 1, 5, tiny.CONTEXT])
def test_a_session_comes_back(tmp_path, n_tokens):
    session = made(n_tokens)
    write_session(tmp_path / "s", DIGEST, session)
    write_session(tmp_path / "s", DIGEST, session)  # over the old one
    back = read(tmp_path / "s")
    np.testing.assert_array_equal(back.tokens, session.tokens)
    assert len(back.rows) == len(session.rows) == 2 * len(tiny.program().kv_layers)
    for one, other in zip(back.rows, session.rows, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_rows_of_int8_come_back_with_their_scales(tmp_path):
    program = tiny.program(kv_dtype="int8")
    assert cache_shapes(program) == [("k_cache", 0, 16 + 16), ("v_cache", 0, 16 + 16)]
    rows = list(np.random.default_rng(0).integers(-128, 128, (2, 5, 32), dtype=np.int8))
    write_session(tmp_path / "s", DIGEST, Session(np.zeros(5, np.int32), rows))
    back = read(tmp_path / "s", kv_dtype="int8").rows
    assert [row.dtype for row in back] == [np.int8] * 2
    np.testing.assert_array_equal(back, rows)


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "s"
    with pytest.raises(InputError, match="s: the session cannot be read: No such file"):
        read(path)
    path.write_bytes(b"GGUF" + bytes(200))
    with pytest.raises(FormatError, match="not a session file"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(FormatError, match="not a session file"):
        read(path)
    write_session(path, DIGEST, made(5))
    with pytest.raises(FormatError, match="of another model file"):
        read(path, digest=bytes(32))
    with pytest.raises(InputError, match="holds 5 tokens, the context is 4; open the model with --context 5"):
        read(path, context=4)
    with pytest.raises(FormatError, match="damaged: .* expected"):
        read(path, kv_dtype="f16")
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(FormatError, match="version 2, this runtime reads 1"):
        read(path)
    with pytest.raises(InputError, match="cannot be written"):
        write_session(tmp_path / "none" / "s", DIGEST, made(1))


def test_every_damaged_byte_is_noticed(tmp_path):
    write_session(tmp_path / "whole", DIGEST, made(2))
    data = (tmp_path / "whole").read_bytes()
    path = tmp_path / "s"
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :])
        with pytest.raises((FormatError, InputError)):
            read(path)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read(path)
    path.write_bytes(data + b"x")
    with pytest.raises(FormatError, match="damaged"):
        read(path)


def test_tokens_outside_the_vocabulary(tmp_path):
    session = dataclasses.replace(made(3), tokens=np.array([1, tiny.VOCAB, 2], np.int32))
    write_session(tmp_path / "s", DIGEST, session)
    with pytest.raises(FormatError, match="outside the vocabulary"):
        read(tmp_path / "s")


def test_a_model_goes_on_from_a_session(tmp_path):
    path = tmp_path / "s"
    with fake_device.model() as model:
        whole = "".join(model.generate("one two three", max_new_tokens=4))
        assert model.save_session(path) == len(model.engine.tokens)
        held = model.engine.tokens
    with fake_device.model() as model:
        assert model.load_session(path) == len(held) and model.engine.tokens == held
        assert "".join(model.generate("one two three", max_new_tokens=4)) == whole
        assert model.stats.cached_tokens == model.stats.prompt_tokens - 1  # the last runs for its logits
        other = tmp_path / "other"
        write_session(other, DIGEST, made(3))
        before = model.engine.tokens
        with pytest.raises(FormatError, match="another model file"):
            model.load_session(other)
        assert model.engine.tokens == before
