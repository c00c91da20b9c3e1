# SPDX-License-Identifier: Apache-2.0
"""A new signing key without an outage, and a second place to sign, on this machine alone.

D1 is the sandbox; the keys are files here and would be HSMs or a KMS. The steps are the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from d1_signer import (
    ClientCertificate,
    LazySigner,
    SignerSet,
    TokenFetcher,
    generate_key,
    open_signer,
)
from d1_signer.sandbox import Sandbox

ISSUER = "example-issuer"


def expect(kid: str, signers: SignerSet, d1: Sandbox) -> None:
    """Obtain a token, and see under which kid D1 gave it."""
    with TokenFetcher(
        signers,
        issuer_id=ISSUER,
        environment=d1.base_url,
        client_certificate=ClientCertificate(d1.client_certificate, d1.client_key),
        ca_file=d1.ca_file,
    ) as fetcher:
        fetcher.token()
    signed = d1.requests[-1].header["kid"]
    if signed != kid:
        raise SystemExit(f"{signed} signed instead of {kid}")


def rotate(folder: Path, d1: Sandbox) -> None:
    old = open_signer(generate_key((folder / "2026.pem").as_uri()).uri, kid="bank-2026")
    new = open_signer(generate_key((folder / "2027.pem").as_uri()).uri, kid="bank-2027")
    d1.register_key(old.kid, old.public_key.jwk())
    with SignerSet([old]) as signers:
        # 1. The new key joins behind the old one.
        signers.add(new)

        # 2. Both are published.
        for key in signers.jwks()["keys"]:
            print("send to Thales:", key["kid"], key["x"][:8])
        expect("bank-2026", signers, d1)

        # What comes of a promotion too early: D1 does not know the new kid, the old one signs.
        signers.promote("bank-2027")
        expect("bank-2026", signers, d1)
        signers.promote("bank-2026")

        # 3. Thales has confirmed that both are registered.
        d1.register_key(new.kid, new.public_key.jwk())
        expect("bank-2026", signers, d1)

        # 4. From now on the new one signs, and the old one stands by.
        signers.promote("bank-2027")
        expect("bank-2027", signers, d1)

        # 5. No process signs with the old key any more; this is the only one here.
        # 6. The old key goes, here first and then at D1.
        signers.remove("bank-2026")
        d1.forget_key("bank-2026")
        expect("bank-2027", signers, d1)


def fail_over(folder: Path, d1: Sandbox) -> None:
    # A cloned HSM has the same key and kid; a KMS has a key of its own, which D1 knows, too.
    key = generate_key((folder / "hsm.pem").as_uri())
    clone = open_signer(key.uri, kid="hsm")
    kms = open_signer(generate_key((folder / "kms.pem").as_uri()).uri, kid="kms")
    for signer in (clone, kms):
        d1.register_key(signer.kid, signer.public_key.jwk())

    # The first HSM is away while this process starts; it is opened when it is back.
    away = (folder / "not-yet.pem").as_uri()
    first = LazySigner(lambda: open_signer(away, kid="hsm"), kid="hsm", public_key=key.public_key)
    with SignerSet([first, clone, kms]) as signers:
        expect("hsm", signers, d1)  # by the clone
        for member in signers.health():
            print("health:", member.kid, member.health, member.last_error or "-")
        clone.close()  # the clone fails as well
        expect("kms", signers, d1)


def main() -> None:
    with tempfile.TemporaryDirectory() as name, Sandbox(ISSUER) as d1:
        rotate(Path(name), d1)
        fail_over(Path(name), d1)
    print("rotated and failed over without an error")


if __name__ == "__main__":
    main()
