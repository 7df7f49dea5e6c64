"""Errors that a user of gqsac or gqsa-runtime can cause or meet.

Each message is one sentence or two: what went wrong and where, what was found and what was
expected, and what to do next. The command line prints the message alone and exits with 1.
"""

from gqsa_runtime.typecheck import printable

_MOST_CHARACTERS = 1000  # of a message that quotes a file


class GqsaError(Exception):
    """Root of all errors that are reported to the user without a traceback."""


class _OneLine(GqsaError):
    """Quotes what others wrote: a file's names and texts, a library's words on them.

    None of it moves a terminal, and of a long one stay the beginning and the end.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_shortened(printable(_shortened(message))))


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 250]} … {text[-240:]}"


class FormatError(_OneLine):
    """A file is not what it should be: truncated, foreign, damaged, or of another version."""


class SignatureError(GqsaError):
    """A signature that was asked for is missing, cannot be checked, or is not of these bytes by a trusted key."""


class ModelError(GqsaError):
    """A model, its config or its weights cannot be used."""


class UnsupportedError(ModelError):
    """A model needs something that is not built: an operator, an attention form, a bit width."""


class DeviceError(GqsaError):
    """A GPU, a driver, a compiler or memory is missing or too small."""


class InputError(_OneLine):
    """A prompt, an option or a text is out of range."""


class BusyError(GqsaError):
    """A model is in use by another call, and the caller asked not to wait."""


class ClosedError(GqsaError):
    """A model was closed; nothing more can be asked of it."""


class Cancelled(Exception):
    """Ends a generation from within. It reaches no caller: the text just ends."""
