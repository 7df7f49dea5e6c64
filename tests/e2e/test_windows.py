"""Layers with a sliding window far beyond the rows that they keep: the numbers are those of transformers."""

import numpy as np
import pytest
from gqsa_runtime import Model
from gqsa_runtime.device_cpu import supported_targets
from gqsa_runtime.kv_cache import held_rows
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.sequence import Sequence

from gqsac.rounding import Rounding
from tests.e2e.checkpoints import CONFIGS, save_checkpoint
from tests.e2e.command import TARGET, succeed
from tests.e2e.reference import expected_log_probs, expected_logits, load_rounded_reference

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")

WINDOW, CONTEXT = 24, 1024
HELD = held_rows(WINDOW)  # 544
TOLERANCE = 1e-4
IDS = np.random.default_rng(0).integers(0, 255, 900).tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(reference, .gqsa file) of a Gemma 3, one layer with a window and one without."""
    folder = tmp_path_factory.mktemp("windows")
    fields = {
        **CONFIGS["llama"], "model_type": "gemma3_text", "rope_scaling": None, "max_position_embeddings": CONTEXT,
        "head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    }  # fmt: skip
    source, file = save_checkpoint(folder / "source", "llama", **fields), folder / "m.gqsa"
    succeed("build", source, "-o", file, "--bits", 16, "--target", TARGET, "--kv-dtype", "f32", "--exact")
    return load_rounded_reference(source, Rounding(16, 64)), file


def test_a_window_layer_takes_memory_for_its_window(made):
    with ArtifactFile.open(made[1]) as file:
        program = file.program
    assert [layer.window for layer in program.kv_layers] == [WINDOW, 0]
    assert program.kv_bytes(CONTEXT) == 2 * 2 * 16 * 4 * (HELD + CONTEXT)


@pytest.fixture
def opened(made):
    """(check(logits, after so many tokens of IDS), the model, how many tokens each launch ran)."""
    reference, file = made
    expected = expected_logits(reference, IDS)

    def check(logits, n_tokens):
        error = np.abs(logits - expected[n_tokens - 1]).max()
        assert error < TOLERANCE, f"logits after {n_tokens} tokens differ by {error:.1e}"

    with Model.open(file, device="cpu", threads=2) as model:
        launched, upload = [], model.device.upload

        def counting(buffer, values):
            if buffer == "tokens":
                launched.append(len(values))
            upload(buffer, values)

        model.device.upload = counting
        yield check, model, launched


def test_scores_prompts_and_single_tokens(made, opened):
    check, model, _ = opened
    assert np.abs(model.score(IDS).log_probs - expected_log_probs(made[0], IDS)).max() < TOLERANCE
    model.engine.reset()
    for n_tokens in (500, HELD - 1, HELD + 3, 890):  # prompts in chunks, and tokens by themselves between them
        check(model.engine.prefill(IDS[model.engine.position : n_tokens]), n_tokens)
        check(model.engine.decode(IDS[n_tokens]), n_tokens + 1)


def test_what_was_lost_is_read_again(opened):
    check, model, launched = opened
    engine = model.engine
    engine.prefill(IDS)
    for kept, runs in ((890, 3), (380, 3), (379, 382), (300, 3)):  # rows from 901 - HELD = 357 on are there
        launched.clear()
        engine.rewind(kept)
        assert engine.position == kept
        check(engine.prefill(IDS[kept : kept + 3]), kept + 3)
        assert sum(launched) == runs, f"after a return to {kept}"
    first, second = Sequence(), Sequence()
    check(engine.extend(first, IDS), 900)
    check(engine.extend(second, IDS[:880]), 880)
    assert second.n_reused == 879
    check(engine.extend(Sequence(), IDS[:60]), 60)
    launched.clear()
    check(engine.extend(Sequence(), IDS[:890]), 890)
    assert sum(launched) == 830  # nothing is lost by going back from 60


def test_sessions_hold_what_can_be_seen(made, opened, tmp_path):
    check, model, launched = opened
    model.engine.prefill(IDS[:880])
    model.engine.rewind(100)
    model.save_session(tmp_path / "short")  # the lost rows are made again
    model.engine.prefill(IDS[100:880])
    model.save_session(tmp_path / "long")
    row = 2 * 2 * 16 * 4
    assert (tmp_path / "long").stat().st_size == 80 + 4 * 880 + row * (880 + WINDOW)
    with Model.open(made[1], device="cpu", threads=1) as other:
        other.load_session(tmp_path / "long")
        check(other.engine.decode(IDS[880]), 881)
        check(other.engine.prefill(IDS[881:]), 900)
        other.load_session(tmp_path / "short")
        assert other.engine.position == 100
        check(other.engine.prefill(IDS[100:]), 900)
        other.load_session(tmp_path / "long")
        other.engine.rewind(879)  # a row more than the session has
        check(other.engine.decode(IDS[879]), 880)
