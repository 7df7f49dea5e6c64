"""Signatures: who made a file, by OpenSSF model signing v1, as its own library writes and reads them."""

import base64
import builtins
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from gqsa_runtime import reader as reader_module
from gqsa_runtime.cli import gqsa
from gqsa_runtime.errors import FormatError, InputError, SignatureError
from gqsa_runtime.model import Model
from gqsa_runtime.reader import ArtifactFile
from gqsa_runtime.signature import check_signature
from model_signing import signing as library
from model_signing import verifying

from gqsac.cli import cli as gqsac
from gqsac.sign import Signer
from tests.format import tiny
from tests.format.signing import PEM, Authority, save_key


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return save_key(tmp_path_factory.mktemp("keys") / "maker.pem")


@pytest.fixture
def signed(tmp_path, keys):
    path = tmp_path / "model.gqsa"
    path.write_bytes(tiny.file_bytes())
    Signer(keys[0]).sign(path)
    return path


def opened(path, key, signature=None):
    with ArtifactFile.open(path, key, signature) as file:
        return {name: file.read(name) for name in file.tensors}


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_both_ways_between_the_library_and_the_runtime(tmp_path, curve):
    path = tmp_path / "model.gqsa"
    path.write_bytes(tiny.file_bytes())
    private, public = save_key(tmp_path / "maker.pem", curve)
    library.Config().use_elliptic_key_signer(private_key=private).sign(path, tmp_path / "by-library.sig")
    assert opened(path, public, tmp_path / "by-library.sig").keys()
    written = Signer(private).sign(path)
    assert written == Path(f"{path}.sig") and sorted(p.suffix for p in tmp_path.iterdir()).count(".partial") == 0
    verifying.Config().use_elliptic_key_verifier(public_key=public).verify(path, written)
    assert check_signature(path, public, None).sha256 == hashlib.sha256(path.read_bytes()).digest()
    assert opened(path, public.read_bytes()).keys()  # the key as bytes, as an application carries it


def test_certificates_both_ways(tmp_path):
    path = tmp_path / "model.gqsa"
    path.write_bytes(tiny.file_bytes())
    root, other = Authority("root"), Authority("other")
    between = Authority("between", root)
    maker = Authority("maker", between, ca=False)
    trusted, chain, certificate = (each.save(tmp_path) for each in (root, between, maker))
    Signer(tmp_path / "maker.key", certificate, [chain]).sign(path)
    assert opened(path, trusted).keys()
    verifying.Config().use_certificate_verifier(certificate_chain=[trusted]).verify(path, Path(f"{path}.sig"))
    with pytest.raises(SignatureError, match="does not descend from a trusted one"):
        opened(path, other.save(tmp_path))
    with pytest.raises(SignatureError, match="made with a certificate, expected one of the given key"):
        opened(path, tmp_path / "maker.pub")
    Signer(tmp_path / "maker.key", certificate).sign(path)  # without the one between
    with pytest.raises(SignatureError, match="does not descend from a trusted one"):
        opened(path, trusted)
    direct = Authority("direct", root, ca=False).save(tmp_path)
    Signer(tmp_path / "direct.key", direct).sign(path)
    assert opened(path, trusted).keys()
    verifying.Config().use_certificate_verifier(certificate_chain=[trusted]).verify(path, Path(f"{path}.sig"))
    for name, issuer, signs, match in (
        ("web", root, False, "is not made for signing"),
        ("guest", maker, True, "does not descend from a trusted one"),  # by one that may not issue
    ):
        made = Authority(name, issuer, ca=False, signs=signs).save(tmp_path)
        Signer(tmp_path / f"{name}.key", made, [certificate, chain]).sign(path)
        with pytest.raises(SignatureError, match=match):
            opened(path, trusted)


def test_every_byte_of_the_file_is_signed(signed, keys):
    data = signed.read_bytes()
    for place in [*range(0, len(data), 997), len(data) - 1]:
        signed.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises((SignatureError, FormatError)):
            opened(signed, keys[1])
    signed.write_bytes(tiny.file_bytes(tiny.program(name="another")))  # a sound file, of other content
    with pytest.raises(SignatureError, match=rf"{signed}: its SHA-256 is [0-9a-f]{{64}}, but {signed}.sig is of"):
        opened(signed, keys[1])


def test_a_file_that_changes_after_the_check_gives_signed_bytes_or_none(signed, keys, tmp_path):
    expected = opened(signed, keys[1])
    evil = tmp_path / "evil.gqsa"
    arrays = {name: array if array.dtype.kind != "f" else array + 1 for name, array in tiny.tensors().items()}
    evil.write_bytes(tiny.file_bytes(arrays=arrays))
    original = shutil.copy(signed, tmp_path / "original.gqsa")
    with ArtifactFile.open(signed, keys[1]) as file:
        os.replace(shutil.copy(evil, tmp_path / "moved"), signed)  # another file under the name
        assert all((file.read(name) == expected[name]).all() for name in file.tensors)
    shutil.copy(original, signed)
    with ArtifactFile.open(signed, keys[1]) as file:
        shutil.copyfile(evil, signed)  # the same file, written over: header, tensors and digests of another
        read = 0
        for name in file.tensors:
            try:
                assert (file.read(name) == expected[name]).all()
                read += 1
            except FormatError as error:
                assert "is damaged" in str(error)
        assert read < len(expected)


def test_header_and_digests_that_are_used_are_those_that_are_hashed(signed, keys, tmp_path, monkeypatch):
    """Another file lies there while its header is read, and the signed one while it is hashed."""
    good, evil = signed.read_bytes(), tiny.file_bytes(tiny.program(name="evil"))
    check = ArtifactFile._check_signature

    def swap_and_check(*args):
        signed.write_bytes(good)
        check(*args)

    monkeypatch.setattr(ArtifactFile, "_check_signature", swap_and_check)
    signed.write_bytes(evil)
    with pytest.raises(SignatureError, match="its SHA-256 is"):
        opened(signed, keys[1])


def test_nothing_is_used_before_the_check(signed, keys, monkeypatch):
    def parse(text):
        raise AssertionError("the launch plan was looked at")

    monkeypatch.setattr(reader_module.Program, "from_json", parse)
    data = bytearray(signed.read_bytes())
    data[-65] ^= 1  # of the digest table
    signed.write_bytes(data)
    with pytest.raises(SignatureError):
        opened(signed, keys[1])


def envelope(statement, private: Path, **changes) -> dict:
    """A bundle around any statement, soundly signed."""
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    kind = "application/vnd.in-toto+json"
    message = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    sig = base64.b64encode(key.sign(message, ec.ECDSA(hashes.SHA256()))).decode()
    return {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {"publicKey": {"hint": ""}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": kind,
            "signatures": [{"sig": sig, "keyid": ""}],
        },
        **changes,
    }


def statement(path: Path, **changes) -> dict:
    digest = hashlib.sha256(path.read_bytes())
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "m", "digest": {"sha256": hashlib.sha256(digest.digest()).hexdigest()}}],
        "predicateType": "https://model_signing/signature/v1.0",
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": ".", "algorithm": "sha256", "digest": digest.hexdigest()}],
        },
        **changes,
    }


def test_a_bundle_by_hand_is_taken(signed, keys):
    Path(f"{signed}.sig").write_text(json.dumps(envelope(statement(signed), keys[0])))
    assert opened(signed, keys[1])


def _resource(**changes):
    return lambda made: made["predicate"]["resources"][0].update(changes)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda made: made.update(_type="https://in-toto.io/Statement/v0.1"), "the statement is"),
        (lambda made: made.update(predicateType="https://model_signing/Digests/v0.1"), "what is stated is"),
        (lambda made: made["predicate"]["serialization"].update(method="shards"), "what was hashed is 'shards'"),
        (_resource(name="model.gqsa"), "is of a folder"),
        (_resource(algorithm="blake3"), "the digest is 'blake3'"),
        (_resource(digest="ab"), "number of bytes of the digest is '1'"),
        (_resource(digest="no hex"), "no signature of OpenSSF"),
        (lambda made: made["predicate"]["resources"].append({}), "is of a folder"),
        (lambda made: made["predicate"]["resources"].clear(), "is of a folder"),
        (lambda made: made["subject"].append({}), "number of subjects is '2'"),
        (lambda made: made["subject"][0]["digest"].update(sha256="0" * 64), "digest of all digests"),
        (lambda made: made.pop("predicate"), "no signature of OpenSSF"),
    ],
)
def test_statements_that_are_refused(signed, keys, change, match):
    made = statement(signed)
    change(made)
    Path(f"{signed}.sig").write_text(json.dumps(envelope(made, keys[0])))
    with pytest.raises(SignatureError, match=match):
        opened(signed, keys[1])


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda made: made.update(mediaType="text/plain"), "the bundle is 'text/plain'"),
        (lambda made: made["dsseEnvelope"].update(payloadType="text/plain"), "the signed content is"),
        (lambda made: made["dsseEnvelope"].update(payload="e30="), "not of the trusted key, or of other content"),
        (lambda made: made["dsseEnvelope"].update(payload="?"), "no base64"),
        (lambda made: made["dsseEnvelope"].update(payload=7), "no signature of OpenSSF"),
        (lambda made: made["dsseEnvelope"]["signatures"].clear(), "number of signatures is '0'"),
        (lambda made: made["dsseEnvelope"]["signatures"].append({"sig": ""}), "number of signatures is '2'"),
        (lambda made: made["dsseEnvelope"]["signatures"][0].update(sig=""), "not of the trusted key"),
        (lambda made: made["verificationMaterial"].update(publicKey={"hint": "00"}), "made with another key"),
        (lambda made: made["verificationMaterial"].pop("publicKey"), "made with a certificate"),
        (lambda made: made.pop("verificationMaterial"), "no signature of OpenSSF"),
    ],
)
def test_bundles_that_are_refused(signed, keys, change, match):
    made = envelope(statement(signed), keys[0])
    change(made)
    Path(f"{signed}.sig").write_text(json.dumps(made))
    with pytest.raises(SignatureError, match=match):
        opened(signed, keys[1])


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000, "{}", "\x00", "9" * 5000])
def test_what_is_no_bundle_at_all(signed, keys, text):
    Path(f"{signed}.sig").write_text(text)
    with pytest.raises(SignatureError, match=f"{signed}.sig: this is no signature of OpenSSF"):
        opened(signed, keys[1])


def test_signatures_that_cannot_be_read(signed, keys, tmp_path):
    with pytest.raises(SignatureError, match=r"elsewhere.sig: a signature of .* cannot be read: No such file"):
        opened(signed, keys[1], tmp_path / "elsewhere.sig")
    Path(f"{signed}.sig").write_bytes(b" " * (1 << 20) + b"{}")
    with pytest.raises(SignatureError, match="more than 1 MiB"):
        opened(signed, keys[1])
    Path(f"{signed}.sig").unlink()
    with pytest.raises(SignatureError, match="cannot be read"):
        opened(signed, keys[1])


def test_another_key_and_keys_that_are_none(signed, tmp_path):
    _, other = save_key(tmp_path / "other.pem")
    with pytest.raises(SignatureError, match="made with another key than the one that is trusted"):
        opened(signed, other)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        opened(signed, tmp_path / "missing.pem")
    with pytest.raises(InputError, match="neither a public key nor a certificate"):
        opened(signed, signed)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    wrong = (
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256K1()),
    )
    for key in wrong:
        with pytest.raises(InputError, match="knows keys on the curves P-256, P-384 and P-521 alone"):
            opened(signed, key.public_key().public_bytes(PEM, form))
        private, _ = save_key(tmp_path / "wrong.pem", key=key)
        with pytest.raises(InputError, match="nothing can be signed with this"):
            Signer(private)


def test_a_check_that_cannot_run_is_an_error(signed, keys, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.startswith("cryptography"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SignatureError, match=r'pip install "gqsa-runtime\[signature\]"'):
        Model.open(signed, require_signature=keys[1])


def test_command_line(runner, signed, keys):
    public = str(keys[1])
    assert runner.invoke(gqsa, ["verify", str(signed), "--require-signature", public]).exit_code == 0
    Path(f"{signed}.sig").rename(f"{signed}.moved")
    with pytest.raises(SignatureError, match="cannot be read"):
        runner.invoke(gqsa, ["verify", str(signed), "--require-signature", public], catch_exceptions=False)
    ppl = ["eval", "ppl", "--text", public]
    verbs = [["run", "-p", "Hi"], ["chat"], ["bench"], ppl]
    verbs += [[*verb, "--rebuild-kernels"] for verb in verbs] + [["verify", "--rebuild"], ["check"]]
    for group, verb in [*((gqsa, verb) for verb in verbs), (gqsac, ppl), (gqsac, [*ppl, "--rebuild-kernels"])]:
        with pytest.raises(SignatureError, match="cannot be read"):
            runner.invoke(group, [*verb, str(signed), "--require-signature", public], catch_exceptions=False)
    for verb, codes in (("verify", {0}), ("check", {0, 3})):  # 3: nothing here runs it
        moved = [verb, str(signed), "--signature", f"{signed}.moved"]
        assert runner.invoke(gqsa, [*moved, "--require-signature", public]).exit_code in codes
        assert runner.invoke(gqsa, moved).exit_code == 2
    assert runner.invoke(gqsac, [*ppl, str(signed.parent), "--require-signature", public]).exit_code == 2


def test_check_is_of_signed_files(signed, keys, tmp_path):
    assert Model.check(signed, require_signature=keys[1]).name == Model.check(signed).name
    moved = Path(f"{signed}.sig").rename(tmp_path / "moved.sig")
    assert Model.check(signed, require_signature=keys[1].read_bytes(), signature=moved).name
    with pytest.raises(SignatureError, match="cannot be read"):
        Model.check(signed, require_signature=keys[1])
    data = bytearray(signed.read_bytes())
    with ArtifactFile.open(signed) as file:
        data[list(file.tensors.values())[-1].offset] ^= 1  # a weight, which is hashed alone
    signed.write_bytes(data)
    Model.check(signed)
    with pytest.raises(SignatureError, match="its SHA-256 is"):
        Model.check(signed, require_signature=keys[1], signature=moved)


@pytest.fixture
def runner():
    from click.testing import CliRunner

    return CliRunner()
