"""Checks a file's detached signature: which SHA-256 do the holders of a trusted key vouch for.

The form is that of OpenSSF model signing v1 (https://github.com/ossf/model-signing-spec), as `gqsac sign` and the
`model_signing` tool write it: a Sigstore bundle with a DSSE envelope around an in-toto statement of the file's digest.
Nothing of the statement is looked at before its signature has been checked, with the package `cryptography`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from gqsa_runtime.errors import InputError, SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

SUFFIX = ".sig"  # of a file's signature, beside it
_MAX_BYTES = 1 << 20  # of a signature or a key
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"


@dataclass(frozen=True)
class Signature:
    """What a signature file vouches for. sha256: of the whole signed file. path: of the signature."""

    sha256: bytes
    path: str


def check_signature(
    path: str | os.PathLike[str], trusted: str | os.PathLike[str] | bytes, signature: str | os.PathLike[str] | None
) -> Signature:
    """The signature of the file at `path`, made with a trusted key. The file itself is not read.

    trusted: a PEM file, or its bytes: a public key on P-256, P-384 or P-521, or the certificates that the signer's must
    descend from. signature: its file; default: the file's name and ".sig".
    Raises SignatureError for everything that is not such a signature, and where it cannot be checked; InputError where
    `trusted` cannot be read.
    """
    where = os.fspath(path) + SUFFIX if signature is None else os.fspath(signature)
    key = _trusted_key(trusted)
    try:
        data = _read(where)
    except OSError as error:
        raise SignatureError(
            f"{where}: a signature of {os.fspath(path)} is asked for, but cannot be read: {error.strerror or error}; "
            "get it from whoever made the file"
        ) from None
    try:
        return Signature(_signed_digest(json.loads(data), key), where)
    except SignatureError as error:
        raise SignatureError(f"{where}: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise SignatureError(
            f"{where}: this is no signature of OpenSSF model signing v1 ({error!r}); make one with `gqsac sign`"
        ) from None


# Given the verification material of a bundle, the key that must have signed it.
_Trust = Callable[[dict[str, Any]], "EllipticCurvePublicKey"]


def _trusted_key(trusted: str | os.PathLike[str] | bytes) -> _Trust:
    try:
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise SignatureError(
            f"a signature is asked for, but the package that checks it cannot be imported ({error}); install it with "
            '`pip install "gqsa-runtime[signature]"`'
        ) from error
    where = "the trusted key" if isinstance(trusted, bytes) else os.fspath(trusted)
    try:
        pem = trusted if isinstance(trusted, bytes) else _read(where)
    except OSError as error:
        raise InputError(f"{where}: the key cannot be read: {error.strerror or error}; check the path") from None
    try:
        if b"-----BEGIN CERTIFICATE-----" in pem:
            roots = x509.load_pem_x509_certificates(pem)
            return lambda material: _key_of_certificate(material, roots)
        key = load_pem_public_key(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InputError(
            f"{where}: this is neither a public key nor a certificate in PEM form; make one of a private key with "
            "`openssl pkey -in KEY -pubout`"
        ) from None
    curve_key = _on_a_known_curve(key, where)
    return lambda material: _same_key(material, curve_key)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise SignatureError(f"{path}: the file has more than {_MAX_BYTES >> 20} MiB, no key or signature has")
    return data


def _on_a_known_curve(key: object, where: str) -> EllipticCurvePublicKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in ("secp256r1", "secp384r1", "secp521r1"):
        raise InputError(
            f"{where}: model signing v1 knows keys on the curves P-256, P-384 and P-521 alone; make one with "
            "`openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256`"
        )
    return key


def _same_key(material: dict[str, Any], key: EllipticCurvePublicKey) -> EllipticCurvePublicKey:
    """The trusted key. The bundle's hint, the SHA-256 of its PEM form, only makes for a better message."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if "publicKey" not in material:
        raise SignatureError("the signature was made with a certificate, expected one of the given key")
    hint = material["publicKey"].get("hint")
    if hint and hint != hashlib.sha256(pem).hexdigest():
        raise SignatureError("the signature was made with another key than the one that is trusted")
    return key


def _key_of_certificate(material: dict[str, Any], roots: list[Any]) -> EllipticCurvePublicKey:
    """The signer's key, whose certificate must descend from a trusted one and be made for signing.

    As the standard has it, dates are looked at as of the day from which the certificate holds: a bundle has no
    trusted time, and what was signed stays signed.
    """
    from cryptography import x509
    from cryptography.x509 import oid, verification

    if "x509CertificateChain" not in material:
        raise SignatureError("the signature was made with a bare key, expected one with a certificate")
    chain = [
        x509.load_der_x509_certificate(base64.b64decode(certificate["rawBytes"], validate=True))
        for certificate in material["x509CertificateChain"]["certificates"]
    ]
    leaf = chain[0]
    builder = verification.PolicyBuilder().store(verification.Store(roots)).time(leaf.not_valid_before_utc)
    builder = builder.extension_policies(
        ca_policy=verification.ExtensionPolicy.webpki_defaults_ca(),
        ee_policy=verification.ExtensionPolicy.permit_all(),  # a signer is no web site; its usage is looked at below
    )
    try:
        builder.build_client_verifier().verify(leaf, chain[1:])
    except verification.VerificationError as error:
        raise SignatureError(f"the signer's certificate does not descend from a trusted one: {error}") from None
    usages = {type(extension.value): extension.value for extension in leaf.extensions}
    usage, extended = usages.get(x509.KeyUsage), usages.get(x509.ExtendedKeyUsage)
    for_signing = usage is not None and usage.digital_signature
    if not for_signing and (extended is None or oid.ExtendedKeyUsageOID.CODE_SIGNING not in extended):
        raise SignatureError("the signer's certificate is not made for signing")
    return _on_a_known_curve(leaf.public_key(), "the signer's certificate")


def _signed_digest(bundle: dict[str, Any], trust: _Trust) -> bytes:
    """SHA-256 of the file that a bundle is of, after its signature was checked."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    _expect(bundle["mediaType"], _BUNDLE, "the bundle")
    key = trust(bundle["verificationMaterial"])
    envelope = bundle["dsseEnvelope"]
    _expect(envelope["payloadType"], _PAYLOAD, "the signed content")
    _expect(len(envelope["signatures"]), 1, "the number of signatures")
    payload, signature = _decoded(envelope["payload"]), _decoded(envelope["signatures"][0]["sig"])
    message = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD.encode(), len(payload), payload)
    algorithm = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}[key.curve.key_size]
    try:
        key.verify(signature, message, ec.ECDSA(algorithm))
    except InvalidSignature:
        raise SignatureError("the signature is not of the trusted key, or of other content") from None
    return _file_digest(json.loads(payload))


def _file_digest(statement: dict[str, Any]) -> bytes:
    """The digest in a statement whose signature is sound."""
    _expect(statement["_type"], _STATEMENT, "the statement")
    _expect(statement["predicateType"], _PREDICATE, "what is stated")
    predicate, subjects = statement["predicate"], statement["subject"]
    _expect(predicate["serialization"]["method"], "files", "what was hashed")
    _expect(len(subjects), 1, "the number of subjects")
    resources = predicate["resources"]
    if len(resources) != 1 or resources[0]["name"] != ".":
        raise SignatureError("the signature is of a folder, expected one of the file itself; make it with `gqsac sign`")
    _expect(resources[0]["algorithm"], "sha256", "the digest")
    digest = bytes.fromhex(resources[0]["digest"])
    _expect(len(digest), 32, "the number of bytes of the digest")
    _expect(subjects[0]["digest"]["sha256"], hashlib.sha256(digest).hexdigest(), "the digest of all digests")
    return digest


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        _wrong("a part of the envelope is no base64")


def _expect(found: object, expected: object, what: str) -> None:
    if found != expected:
        _wrong(f"{what} is {str(found)[:80]!r}, expected {expected!r}")


def _wrong(what: str) -> NoReturn:
    raise SignatureError(f"{what}; make the signature with `gqsac sign`")
