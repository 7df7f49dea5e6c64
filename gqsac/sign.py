"""Signs a .gqsa file: OpenSSF model signing v1, a detached bundle beside the file."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from gqsa_runtime.signature import SUFFIX

from gqsac.errors import DeviceError, InputError


class Signer:
    """Signs files with a private key on P-256, P-384 or P-521.

    key: a PEM file without a password. certificate: of the key, a PEM file, where those who check trust its issuers
    rather than the key; chain: certificates from its issuer on, the trusted one not needed.
    Raises InputError where they cannot be used together, DeviceError where the library that signs is missing.
    """

    def __init__(self, key: Path, certificate: Path | None = None, chain: Sequence[Path] = ()):
        try:
            from model_signing import signing
        except ImportError as error:
            raise DeviceError(
                f'the library that signs cannot be imported ({error}); install it with `pip install "gqsac[sign]"`'
            ) from error
        for path in (key, certificate, *chain):
            if path is not None and not path.is_file():
                raise InputError(f"{path}: there is no such file to sign with; check the path")
        self._config = signing.Config()
        try:
            if certificate is None:
                self._config.use_elliptic_key_signer(private_key=key)
            else:
                # An empty chain is none to the library; the certificate itself in it says nothing new.
                self._config.use_certificate_signer(
                    private_key=key, signing_certificate=certificate, certificate_chain=chain or [certificate]
                )
        except Exception as error:  # of the library and of those below it, which have many
            raise InputError(
                f"{key}: nothing can be signed with this ({error}); expected a private key on P-256, P-384 or P-521 as "
                "PEM without a password, such as `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256` "
                "makes, and, if any, its own certificate"
            ) from None

    def sign(self, file: Path, signature: Path | None = None) -> Path:
        """Writes the signature of a file, whole or not at all; returns where: by default FILE.sig.

        Raises InputError where the file cannot be read or the signature not be written.
        """
        if not file.is_file():
            raise InputError(f"{file}: there is no such file to sign; make one with `gqsac build`")
        target = Path(f"{file}{SUFFIX}") if signature is None else signature
        partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
        try:
            # The file itself and not a link to it, which the library refuses to follow.
            self._config.sign(file.resolve(), partial)
            with open(partial, "rb") as written:
                os.fsync(written.fileno())
            os.replace(partial, target)
        except OSError as error:
            raise InputError(
                f"{target}: the signature cannot be written: {error.strerror or error}; choose another path or free "
                "space"
            ) from None
        finally:
            partial.unlink(missing_ok=True)
        return target
