"""`gqsac sign`: a signature for a file that is built."""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path, dir_okay=False)


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
