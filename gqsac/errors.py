"""Errors of the compiler. The roots live in the runtime, which both distributions share."""

from gqsa_runtime.errors import DeviceError, FormatError, GqsaError, InputError, ModelError, UnsupportedError

__all__ = ["DeviceError", "FormatError", "GqsaError", "InputError", "ModelError", "UnsupportedError"]
