"""`gqsac sign`: a signature for a file that is built."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import click
from gqsa_runtime.signature import SUFFIX

_PATH = click.Path(path_type=Path, dir_okay=False)

# Of commands that make a .gqsa file. Its value is for `signer`.
sign_option = click.option(
    "--sign", "key", metavar="KEY", type=_PATH, help="Sign the file with this private key; see `gqsac sign`."
)


def signer(key: Path | None):
    """What signs with a key, or None without one. Raises GqsaError: better before a file is made than after."""
    if key is None:
        return None
    from gqsac.sign import Signer

    return Signer(key)


def sign_made(signing, file: Path) -> None:
    """Signs a file that was made, or says that the signature beside it is of what had its name before."""
    if signing is not None:
        click.echo(f"signed: {signing.sign(file)}", err=True)
    elif (beside := Path(f"{file}{SUFFIX}")).is_file() and not _names(beside, file):
        click.echo(
            f"note: {beside} is the signature of other bytes than {file} has now; sign it with `gqsac sign`, or remove "
            "that signature",
            err=True,
        )


def _names(signature: Path, file: Path) -> bool:
    """Whether a signature states the digest of a file, whoever made it."""
    sha256 = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(1 << 20):
            sha256.update(part)
    try:
        return sha256.hexdigest().encode() in base64.b64decode(
            json.loads(signature.read_bytes())["dsseEnvelope"]["payload"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


@click.command()
@click.argument("file", metavar="FILE", type=_PATH)
@click.option("--key", required=True, type=_PATH, help="Private key on P-256, P-384 or P-521, PEM, no password.")
@click.option("--certificate", type=_PATH, help="The key's certificate, for those who trust its issuer.")
@click.option("--chain", multiple=True, type=_PATH, help="Certificate of an issuer between it and them; repeatable.")
@click.option("-o", "--output", type=_PATH, help="Signature to make. Default: FILE.sig.")
def sign(file, key, certificate, chain, output):
    """Signs a .gqsa file, by OpenSSF model signing v1.

    Who has the public key, or trusts the certificate's issuer, can then refuse every other file: `gqsac run FILE
    --require-signature PEM`, or Model.open(FILE, require_signature=PEM). Needs `pip install "gqsac[sign]"`.

    \b
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out key.pem
    openssl pkey -in key.pem -pubout -out public.pem
    gqsac sign qwen.gqsa --key key.pem
    gqsac run qwen.gqsa --require-signature public.pem --prompt "Name three rivers."
    """
    if chain and certificate is None:
        raise click.UsageError("--chain leads from a --certificate; give it, too")
    from gqsac.sign import Signer

    written = Signer(key, certificate, chain).sign(file, output)
    click.echo(f"signed: {written}", err=True)
