# SPDX-License-Identifier: Apache-2.0
"""One fetcher for each process, one token for the fleet; settings come from the environment.

Beside those of the command line (``D1_SIGNER_KEY`` and so on):

- ``REDIS_URL``: ``redis://``, ``rediss://`` or ``unix://``; without it each process fetches its own
  token.
- ``D1_STORE_KEY_FILE``: a file of 32 random bytes in hexadecimal, the same for the whole fleet.
"""

from __future__ import annotations

import os

from d1_signer import (
    ClientCertificate,
    Limits,
    RedisTokenStore,
    SignerSet,
    TokenFetcher,
    open_signer,
    read_secret,
)


def new_fetcher() -> TokenFetcher:
    settings = os.environ
    store = key = None
    if "REDIS_URL" in settings:
        store = RedisTokenStore.from_url(settings["REDIS_URL"])
        secret = read_secret(f"file:{settings['D1_STORE_KEY_FILE']}", what="store key")
        key = bytes.fromhex(secret.reveal())
    return TokenFetcher(
        SignerSet([open_signer(uri) for uri in settings["D1_SIGNER_KEY"].split()]),
        issuer_id=settings["D1_ISSUER_ID"],
        environment=settings["D1_ENVIRONMENT"],
        client_certificate=ClientCertificate(settings["D1_CLIENT_CERT"], settings["D1_CLIENT_KEY"]),
        ca_file=settings.get("D1_CA_FILE"),
        # How long a caller waits at most where no valid token is left.
        limits=Limits(total=float(settings.get("D1_TOTAL_SECONDS", "30"))),
        store=store,
        store_key=key,
    )
