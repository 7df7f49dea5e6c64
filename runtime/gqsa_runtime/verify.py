"""Checks a whole file: digests, launch plan, index tensors, machine code, tokenizer, chat template and facts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from gqsa_runtime import format as gqsa
from gqsa_runtime.chat import ChatTemplate
from gqsa_runtime.checked_tensors import CheckedTensors
from gqsa_runtime.facts import read_facts
from gqsa_runtime.perplexity import Progress
from gqsa_runtime.reader import ArtifactFile, naming
from gqsa_runtime.tokenizer import Tokenizer
from gqsa_runtime.validate import validate


@dataclass(frozen=True)
class Verified:
    """What was read and found sound. n_bytes: of tensor data."""

    n_tensors: int
    n_bytes: int


def verify_file(
    path: str | os.PathLike[str],
    progress: Progress | None = None,
    require_signature: str | os.PathLike[str] | bytes | None = None,
    signature: str | os.PathLike[str] | None = None,
) -> Verified:
    """Reads everything in a .gqsa file once. Raises FormatError at the first thing that is wrong.

    progress: wraps the list of tensor names, as `tqdm.tqdm` does. require_signature, signature: as in `Model.open`.
    """
    with ArtifactFile.open(path, require_signature, signature) as artifact:
        return verify_open(artifact, progress)


def verify_open(artifact: ArtifactFile, progress: Progress | None = None) -> Verified:
    """As `verify_file`, of a file that is open and whose signature, if one is asked for, was checked by that."""
    with naming(artifact.path):
        validate(artifact.program, artifact.tensors)
        names = list(artifact.tensors)
        with CheckedTensors(artifact, names) as tensors:
            n_bytes = sum(tensors[name].nbytes for name in (progress(names) if progress else names))
        for binary in artifact.program.binaries:
            artifact.code(binary)
        Tokenizer(artifact.text(gqsa.KEY_TOKENIZER), artifact.program.vocab_size)
        if gqsa.KEY_FACTS in artifact.metadata:
            read_facts(artifact.text(gqsa.KEY_FACTS), artifact.path)
        if gqsa.KEY_CHAT_TEMPLATE in artifact.metadata:
            ChatTemplate(artifact.text(gqsa.KEY_CHAT_TEMPLATE)).check()
    return Verified(len(names), n_bytes)
