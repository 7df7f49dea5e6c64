"""Scaled rotary embeddings at 8k, 32k and 64k positions against transformers: one layer over drawn rows of KV cache.

To run so many tokens would take a minute. Their rows are drawn instead and given to both sides as they stand; what
follows them is rotated to its far position and meets them all.
"""

import numpy as np
import pytest
import torch
from gqsa_runtime import Model
from gqsa_runtime.device_cpu import supported_targets
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.rope import RopeTables, long_ropes
from gqsa_runtime.sequence import Sequence
from gqsa_runtime.session import Session, cache_shapes
from transformers import DynamicCache

from gqsac.rounding import Rounding
from tests.e2e.checkpoints import save_checkpoint
from tests.e2e.command import succeed
from tests.e2e.reference import load_rounded_reference
from tests.e2e.test_pipeline import EXACT

pytestmark = pytest.mark.skipif(not supported_targets(), reason="this CPU runs none of gqsac's kernels")

CONTEXT = 65536
POSITIONS = (8192, 32768, CONTEXT)  # as many tokens with the last one
NEW = 9  # that follow the drawn rows: one of them alone, the rest together
ORIGINAL = 4096
FACTORS = {"short_factor": list(np.linspace(1, 1.5, 8)), "long_factor": list(np.linspace(1, 16, 8))}
_SCALED = {"factor": 16.0, "original_max_position_embeddings": ORIGINAL}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 16.0},
    "dynamic": {"rope_type": "dynamic", "factor": 16.0},
    "llama3": {"rope_type": "llama3", **_SCALED, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", **_SCALED},
    "longrope": {"rope_type": "longrope", **_SCALED, **FACTORS},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Type of rope -> (reference, .gqsa file), made when first asked for. All run the same kernels."""
    folder = tmp_path_factory.mktemp("far")

    def make(rope_type: str):
        # transformers wants the base beside the rest: at 10 000 half of the features turn slowly even so far out.
        fields = {"max_position_embeddings": CONTEXT, "num_hidden_layers": 1, "rope_scaling": None}
        fields["rope_parameters"] = {"rope_theta": 10000.0, **ROPES[rope_type]}
        source, file = save_checkpoint(folder / rope_type, "llama", **fields), folder / f"{rope_type}.gqsa"
        succeed("build", source, "-o", file, "--bits", 16, *EXACT)
        return load_rounded_reference(source, Rounding(16, 64)), file

    return make


def drawn_session(program, n_tokens: int) -> Session:
    """Rows of n_tokens, some of which a query is drawn to: keys of about 1 as models have them."""
    random = np.random.default_rng(n_tokens)
    rows = [random.standard_normal((n_tokens, width), np.float32) for *_, width in cache_shapes(program)]
    return Session(random.integers(0, 255, n_tokens, np.int32), rows)


@torch.no_grad()
def logits_after(reference, session: Session, tokens) -> np.ndarray:
    """f32 [n_tokens, vocab] of tokens behind a session."""
    cache, (keys, values) = DynamicCache(), (torch.from_numpy(rows) for rows in session.rows)
    heads = reference.config.num_key_value_heads
    cache.update(*(rows.reshape(1, len(rows), heads, -1).transpose(1, 2) for rows in (keys, values)), 0)
    first = len(session.tokens)
    positions = torch.arange(first, first + len(tokens))[None]
    return reference(torch.tensor([tokens]), position_ids=positions, past_key_values=cache).logits[0].numpy()


@pytest.mark.parametrize("rope_type", ROPES)
def test_far_positions(made, rope_type):
    reference, file = made(rope_type)
    with Model.open(file, device="cpu", context="auto", threads=2) as model:
        assert model.context == CONTEXT
        for end in POSITIONS:
            session = drawn_session(model.program, end - NEW)
            tokens = np.random.default_rng(end).integers(0, 255, NEW).tolist()
            expected = logits_after(reference, session, tokens)
            model.engine.restore(session)
            got = [model.engine.decode(tokens[0]), model.engine.prefill(tokens[1:])]
            assert model.engine.position == end
            error = np.abs(np.stack(got) - expected[[0, -1]]).max()
            assert error < 1e-4, f"logits at {end} positions differ by {error:.1e}"
            # The comparison would notice another rotation: at a position nearer by one, logits are others.
            near = Session(session.tokens[1:], [rows[1:] for rows in session.rows])
            model.engine.restore(near)
            assert np.abs(model.engine.decode(tokens[0]) - expected[0]).max() > 1e-2
    with ArtifactFile.open(file) as artifact:
        ropes = artifact.program.ropes
        frequencies = {name: artifact.read(name) for name in artifact.tensors if "inv_freq" in name}
    tables = RopeTables(ropes, frequencies, CONTEXT)
    for n_tokens in (ORIGINAL, *POSITIONS):
        ((_, table),) = tables.make(long_ropes(ropes, n_tokens))
        cos, sin = reference.model.rotary_emb(torch.zeros(1), torch.arange(n_tokens)[None])
        expected = torch.cat([cos[0, :, :8], sin[0, :, :8]], 1).numpy()
        assert np.abs(table[:n_tokens] - expected).max() < 1e-6


def test_a_text_that_grows_beyond_the_short_frequencies(made, monkeypatch):
    """Greedy tokens over the border are those that transformers makes of the whole text each time."""
    monkeypatch.setitem(ROPES, "longrope", {**ROPES["longrope"], "original_max_position_embeddings": 40})
    reference, file = made("longrope")
    prompt = np.random.default_rng(5).integers(0, 255, 36).tolist()
    sequence, new, seen = Sequence(), prompt, list(prompt)
    with Model.open(file, device="cpu", context=64, threads=1) as model, torch.no_grad():
        for _ in range(10):
            expected = reference(torch.tensor([seen])).logits[0, -1].numpy()
            assert np.abs(model.engine.extend(sequence, new) - expected).max() < 1e-4
            new = [int(expected.argmax())]
            seen += new
