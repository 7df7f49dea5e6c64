"""Errors that a user of gqsac or gqsa-runtime can cause or meet.

Each message is one sentence or two: what went wrong and where, what was found and what was
expected, and what to do next. The command line prints the message alone and exits with 1.
"""


class GqsaError(Exception):
    """Root of all errors that are reported to the user without a traceback."""


class FormatError(GqsaError):
    """A file is not what it should be: truncated, foreign, damaged, or of another version."""


class SignatureError(GqsaError):
    """A signature that was asked for is missing, cannot be checked, or is not of these bytes by a trusted key."""


class ModelError(GqsaError):
    """A model, its config or its weights cannot be used."""


class UnsupportedError(ModelError):
    """A model needs something that is not built: an operator, an attention form, a bit width."""


class DeviceError(GqsaError):
    """A GPU, a driver, a compiler or memory is missing or too small."""


class InputError(GqsaError):
    """A prompt, an option or a text is out of range."""


class BusyError(GqsaError):
    """A model is in use by another call, and the caller asked not to wait."""


class ClosedError(GqsaError):
    """A model was closed; nothing more can be asked of it."""


class Cancelled(Exception):
    """Ends a generation from within. It reaches no caller: the text just ends."""
