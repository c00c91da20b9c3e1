# SPDX-License-Identifier: Apache-2.0
"""From a key that is made inside an HSM to a call of D1's banking API, on this machine alone.

`make demo` runs it. The HSM is SoftHSM with a throw-away token, D1 is the sandbox of this package:

    softhsm/with-token python docs/examples/demo.py
"""

from __future__ import annotations

import os
import sys
import time

from d1_signer import ClientCertificate, TokenFetcher, generate_key, open_signer
from d1_signer.sandbox import Sandbox

ISSUER = "demo-issuer"


def main() -> None:
    uri = os.environ.get("D1_SIGNER_KEY") or sys.exit("Run it by softhsm/with-token, see above.")

    title("1. A P-256 key, made inside the HSM")
    key = generate_key(uri)
    show("key URI", key.uri.partition("?")[0])
    show("thumbprint", key.public_key.thumbprint())

    with (
        open_signer(uri, kid="demo-2026") as signer,
        Sandbox(ISSUER) as d1,
        TokenFetcher(
            signer,
            issuer_id=ISSUER,
            environment=d1.base_url,
            client_certificate=ClientCertificate(d1.client_certificate, d1.client_key),
            ca_file=d1.ca_file,
        ) as fetcher,
    ):
        title("2. What is known about where the key lives, and who says so")
        evidence = signer.custody().evidence
        facts = {fact.name: fact for fact in evidence.facts}  # all: d1-signer custody
        for name in ("CKA_LOCAL", "CKA_SENSITIVE", "CKA_EXTRACTABLE", "token model"):
            show(name, f"{facts[name].value!s:<12} {facts[name].source}, {facts[name].assurance}")
        require(evidence.generated_in_place is True, "the key was made on the token")
        require(facts["CKA_SENSITIVE"].value is True, "its value is never shown in clear")
        require(evidence.exportable is False, "it cannot leave the token")

        title("3. D1 knows the public key, takes an assertion signed by it, and gives a token")
        d1.register_key(signer.kid, signer.public_key.jwk())
        token = fetcher.token()
        (request,) = d1.requests  # as the sandbox received it
        show("endpoint", d1.token_endpoint)
        show("header", dict(request.header))
        for name, value in request.claims.items():
            show(f"claim {name}", value)

        title("4. The access token, for all threads of the process until it expires")
        show("value", "**** (masked)")
        show("scope", token.scope)
        show("expires in", f"{token.expires_at - time.time():.0f} s")
        require(fetcher.token() is token, "the second call gave the same token")
        require(d1.counters.token_requests == 1, "D1 was asked once")

        title("5. A call of the banking API with it")
        with fetcher.session() as session:
            response = session.get(f"{d1.banking_url}/ping", timeout=10)
        show("GET", response.url)
        show("answer", f"{response.status_code} {response.json()}")
        require(response.status_code == 200, "D1 took the token")  # noqa: PLR2004
        require(d1.counters.token_requests == 1, "D1 was asked for no other token")


def title(text: str) -> None:
    print(f"\n{text}")


def show(name: str, value: object) -> None:
    print(f"   {name:<22} {value}")


def require(held: object, what: str) -> None:
    """Say what held; end the demo where it did not."""
    if not held:
        sys.exit(f"NOT TRUE: {what}")
    print(f"   ok: {what}")


if __name__ == "__main__":
    main()
