# SPDX-License-Identifier: Apache-2.0
"""Access tokens of the Thales D1 API, with a signing key that never leaves its HSM or KMS.

Use::

    from d1_signer import ClientCertificate, Environment, TokenFetcher, open_signer

    with open_signer("pkcs11:token=bank;object=d1?pin-source=file:/etc/d1/pin") as signer:
        fetcher = TokenFetcher(
            signer,
            issuer_id="my-issuer",
            environment=Environment.STAGING,
            client_certificate=ClientCertificate("/etc/d1/client.pem", "/etc/d1/client.key"),
        )
        print(fetcher.token().expires_at)

Names are loaded when they are first used, so importing the package loads no SDK.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d1_signer import es256 as es256
    from d1_signer.access_token import (
        AccessToken as AccessToken,
    )
    from d1_signer.auth import (
        D1Auth as D1Auth,
    )
    from d1_signer.backend import (
        Backend as Backend,
    )
    from d1_signer.backend import (
        GeneratedKey as GeneratedKey,
    )
    from d1_signer.backend import (
        SignatureEncoding as SignatureEncoding,
    )
    from d1_signer.custody import (
        Assurance as Assurance,
    )
    from d1_signer.custody import (
        CustodyPolicy as CustodyPolicy,
    )
    from d1_signer.custody import (
        CustodyReport as CustodyReport,
    )
    from d1_signer.custody import (
        Evidence as Evidence,
    )
    from d1_signer.custody import (
        Fact as Fact,
    )
    from d1_signer.d1 import (
        Environment as Environment,
    )
    from d1_signer.errors import (
        AccessDeniedError as AccessDeniedError,
    )
    from d1_signer.errors import (
        AmbiguousKeyError as AmbiguousKeyError,
    )
    from d1_signer.errors import (
        ConfigurationError as ConfigurationError,
    )
    from d1_signer.errors import (
        CustodyError as CustodyError,
    )
    from d1_signer.errors import (
        D1SignerError as D1SignerError,
    )
    from d1_signer.errors import (
        FetcherClosedError as FetcherClosedError,
    )
    from d1_signer.errors import (
        IntegrityError as IntegrityError,
    )
    from d1_signer.errors import (
        InvalidInputError as InvalidInputError,
    )
    from d1_signer.errors import (
        InvalidKeyError as InvalidKeyError,
    )
    from d1_signer.errors import (
        InvalidSignatureError as InvalidSignatureError,
    )
    from d1_signer.errors import (
        KeyDisabledError as KeyDisabledError,
    )
    from d1_signer.errors import (
        KeyExistsError as KeyExistsError,
    )
    from d1_signer.errors import (
        KeyMismatchError as KeyMismatchError,
    )
    from d1_signer.errors import (
        KeyNotFoundError as KeyNotFoundError,
    )
    from d1_signer.errors import (
        KeyUriError as KeyUriError,
    )
    from d1_signer.errors import (
        LoginError as LoginError,
    )
    from d1_signer.errors import (
        MissingExtraError as MissingExtraError,
    )
    from d1_signer.errors import (
        SecretSourceError as SecretSourceError,
    )
    from d1_signer.errors import (
        SignerClosedError as SignerClosedError,
    )
    from d1_signer.errors import (
        SignerError as SignerError,
    )
    from d1_signer.errors import (
        SignerThrottled as SignerThrottled,
    )
    from d1_signer.errors import (
        SignerTimeout as SignerTimeout,
    )
    from d1_signer.errors import (
        SignerUnavailable as SignerUnavailable,
    )
    from d1_signer.errors import (
        StoreUnavailable as StoreUnavailable,
    )
    from d1_signer.errors import (
        TlsError as TlsError,
    )
    from d1_signer.errors import (
        TokenError as TokenError,
    )
    from d1_signer.errors import (
        TokenRefusedError as TokenRefusedError,
    )
    from d1_signer.errors import (
        TokenResponseError as TokenResponseError,
    )
    from d1_signer.errors import (
        TokenTimeout as TokenTimeout,
    )
    from d1_signer.errors import (
        TokenUnavailable as TokenUnavailable,
    )
    from d1_signer.es256 import (
        PublicKey as PublicKey,
    )
    from d1_signer.events import (
        FailoverEvent as FailoverEvent,
    )
    from d1_signer.events import (
        Observer as Observer,
    )
    from d1_signer.events import (
        RenewalEvent as RenewalEvent,
    )
    from d1_signer.events import (
        RequestEvent as RequestEvent,
    )
    from d1_signer.events import (
        SignEvent as SignEvent,
    )
    from d1_signer.events import (
        Use as Use,
    )
    from d1_signer.httpx_auth import (
        HttpxD1Auth as HttpxD1Auth,
    )
    from d1_signer.renewal import (
        Limits as Limits,
    )
    from d1_signer.signer import (
        Signer as Signer,
    )
    from d1_signer.signer import (
        generate_key as generate_key,
    )
    from d1_signer.signer import (
        open_signer as open_signer,
    )
    from d1_signer.signer_set import (
        Health as Health,
    )
    from d1_signer.signer_set import (
        LazySigner as LazySigner,
    )
    from d1_signer.signer_set import (
        MemberHealth as MemberHealth,
    )
    from d1_signer.signer_set import (
        SignerSet as SignerSet,
    )
    from d1_signer.stores import (
        Lease as Lease,
    )
    from d1_signer.stores import (
        TokenStore as TokenStore,
    )
    from d1_signer.tls import (
        ClientCertificate as ClientCertificate,
    )
    from d1_signer.token import (
        Audience as Audience,
    )
    from d1_signer.token import (
        TokenFetcher as TokenFetcher,
    )

# Every public name and the module that defines it; the one list of what this package offers.
_HOMES = {
    "access_token": ["AccessToken"],
    "auth": ["D1Auth"],
    "backend": ["Backend", "GeneratedKey", "SignatureEncoding"],
    "custody": ["Assurance", "CustodyPolicy", "CustodyReport", "Evidence", "Fact"],
    "d1": ["Environment"],
    "errors": [
        "AccessDeniedError",
        "AmbiguousKeyError",
        "ConfigurationError",
        "CustodyError",
        "D1SignerError",
        "FetcherClosedError",
        "IntegrityError",
        "InvalidInputError",
        "InvalidKeyError",
        "InvalidSignatureError",
        "KeyDisabledError",
        "KeyExistsError",
        "KeyMismatchError",
        "KeyNotFoundError",
        "KeyUriError",
        "LoginError",
        "MissingExtraError",
        "SecretSourceError",
        "SignerClosedError",
        "SignerError",
        "SignerThrottled",
        "SignerTimeout",
        "SignerUnavailable",
        "StoreUnavailable",
        "TlsError",
        "TokenError",
        "TokenRefusedError",
        "TokenResponseError",
        "TokenTimeout",
        "TokenUnavailable",
    ],
    "es256": ["PublicKey"],
    "events": ["FailoverEvent", "Observer", "RenewalEvent", "RequestEvent", "SignEvent", "Use"],
    "httpx_auth": ["HttpxD1Auth"],
    "renewal": ["Limits"],
    "signer": [
        "Signer",
        "generate_key",
        "open_signer",
    ],
    "signer_set": ["Health", "LazySigner", "MemberHealth", "SignerSet"],
    "stores": ["Lease", "TokenStore"],
    "tls": ["ClientCertificate"],
    "token": ["Audience", "TokenFetcher"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604 (the names above, which a test holds against the type checker's view)
    *_HOME_OF,
    "es256",
]


# Without this, Python prints a library's warnings to stderr where nobody configured logging.
logging.getLogger("d1_signer").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name == "es256":
        return importlib.import_module("d1_signer.es256")
    if name not in _HOME_OF:
        msg = f"module 'd1_signer' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"d1_signer.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
