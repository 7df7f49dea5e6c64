"""Keys, certificates and signatures for tests, made with `cryptography` and `model_signing`."""

import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PEM = serialization.Encoding.PEM


def save_key(path: Path, curve=ec.SECP256R1, key=None) -> tuple[Path, Path]:
    """(private, public) key as PEM files."""
    key = key or ec.generate_private_key(curve())
    public = path.with_suffix(".pub")
    none = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, none))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return path, public


class Authority:
    """A certificate and its key, which issues others."""

    def __init__(self, name: str, issuer: "Authority | None" = None, ca: bool = True, signs: bool = True):
        self.name, self.key = name, ec.generate_private_key(ec.SECP256R1())
        parent = issuer or self
        begin = datetime.datetime(2020, 1, 1)  # long expired by now, which does not matter
        builder = x509.CertificateBuilder().subject_name(_name(name)).issuer_name(_name(parent.name))
        builder = builder.public_key(self.key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(begin).not_valid_after(begin + datetime.timedelta(days=365))
        identifier = x509.SubjectKeyIdentifier.from_public_key(self.key.public_key())
        of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(parent.key.public_key())
        usages = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only", "crl_sign"), False,
        )  # fmt: skip
        usage = x509.KeyUsage(digital_signature=signs and not ca, key_cert_sign=ca, **usages)
        for extension, critical in (
            (x509.BasicConstraints(ca, None), True),
            (identifier, False),
            (of_issuer, False),
            (usage, True),
        ):
            builder = builder.add_extension(extension, critical)
        if not ca:
            kind = ExtendedKeyUsageOID.CODE_SIGNING if signs else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([kind]), False)
        self.certificate = builder.sign(parent.key, hashes.SHA256())

    def save(self, folder: Path) -> Path:
        """The certificate as a PEM file, and its key beside it as NAME.key."""
        path = folder / f"{self.name}.crt"
        path.write_bytes(self.certificate.public_bytes(PEM))
        save_key(folder / f"{self.name}.key", key=self.key)
        return path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
