# SPDX-License-Identifier: Apache-2.0
"""Access tokens of the Thales D1 API, with a signing key that never leaves its HSM or KMS.

Use::

    from d1_signer import ClientCertificate, Environment, TokenFetcher, open_signer

    hsm = "module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/d1/pin"
    with open_signer(f"pkcs11:token=bank;object=d1?{hsm}", kid="bank-2026") as signer:
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

import contextlib
import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d1_signer import es256 as es256
    from d1_signer.audit.trail import (
        AuditTrail as AuditTrail,
    )
    from d1_signer.custody.evidence import (
        Assurance as Assurance,
        Evidence as Evidence,
        Fact as Fact,
    )
    from d1_signer.custody.policy import (
        CustodyPolicy as CustodyPolicy,
    )
    from d1_signer.custody.report import (
        CustodyReport as CustodyReport,
    )
    from d1_signer.errors import (
        AccessDeniedError as AccessDeniedError,
        AmbiguousKeyError as AmbiguousKeyError,
        AttestationError as AttestationError,
        AuditError as AuditError,
        AuditUnavailable as AuditUnavailable,
        ConfigurationError as ConfigurationError,
        CustodyError as CustodyError,
        D1SignerError as D1SignerError,
        FetcherClosedError as FetcherClosedError,
        IntegrityError as IntegrityError,
        InvalidInputError as InvalidInputError,
        InvalidKeyError as InvalidKeyError,
        InvalidSignatureError as InvalidSignatureError,
        KeyDisabledError as KeyDisabledError,
        KeyExistsError as KeyExistsError,
        KeyMismatchError as KeyMismatchError,
        KeyNotFoundError as KeyNotFoundError,
        KeyUriError as KeyUriError,
        LoginError as LoginError,
        MissingExtraError as MissingExtraError,
        SecretSourceError as SecretSourceError,
        SignerClosedError as SignerClosedError,
        SignerError as SignerError,
        SignerThrottled as SignerThrottled,
        SignerTimeout as SignerTimeout,
        SignerUnavailable as SignerUnavailable,
        StoreUnavailable as StoreUnavailable,
        TlsError as TlsError,
        TokenError as TokenError,
        TokenRefusedError as TokenRefusedError,
        TokenResponseError as TokenResponseError,
        TokenTimeout as TokenTimeout,
        TokenUnavailable as TokenUnavailable,
    )
    from d1_signer.es256 import (
        PublicKey as PublicKey,
    )
    from d1_signer.events import (
        CertificateEvent as CertificateEvent,
        FailoverEvent as FailoverEvent,
        Observer as Observer,
        RenewalEvent as RenewalEvent,
        RequestEvent as RequestEvent,
        SignEvent as SignEvent,
        Use as Use,
    )
    from d1_signer.secret import (
        Secret as Secret,
        SecretSource as SecretSource,
        read_secret as read_secret,
    )
    from d1_signer.signing.backend import (
        Backend as Backend,
        BackendModule as BackendModule,
        GeneratedKey as GeneratedKey,
        Pooled as Pooled,
        SignatureEncoding as SignatureEncoding,
    )
    from d1_signer.signing.key_uri import (
        KeyUri as KeyUri,
    )
    from d1_signer.signing.lazy_signer import (
        LazySigner as LazySigner,
    )
    from d1_signer.signing.member import (
        Health as Health,
        MemberHealth as MemberHealth,
    )
    from d1_signer.signing.opening import (
        generate_key as generate_key,
        open_signer as open_signer,
    )
    from d1_signer.signing.signer import (
        Signer as Signer,
    )
    from d1_signer.signing.signer_set import (
        SignerSet as SignerSet,
    )
    from d1_signer.token.access_token import (
        AccessToken as AccessToken,
    )
    from d1_signer.token.auth import (
        D1Auth as D1Auth,
    )
    from d1_signer.token.d1 import (
        Audience as Audience,
        Environment as Environment,
    )
    from d1_signer.token.fetcher import (
        TokenFetcher as TokenFetcher,
    )
    from d1_signer.token.httpx_auth import (
        HttpxD1Auth as HttpxD1Auth,
    )
    from d1_signer.token.redis_store import (
        RedisTokenStore as RedisTokenStore,
    )
    from d1_signer.token.renewal import (
        Limits as Limits,
    )
    from d1_signer.token.status import (
        FetcherStatus as FetcherStatus,
    )
    from d1_signer.token.stores import (
        Lease as Lease,
        TokenStore as TokenStore,
    )
    from d1_signer.transport.credentials import (
        ClientCertificate as ClientCertificate,
    )
    from d1_signer.transport.processes import (
        PerProcess as PerProcess,
    )

# Every public name and the module that defines it; the one list of what this package offers.
_HOMES = {
    "audit.trail": ["AuditTrail"],
    "token.access_token": ["AccessToken"],
    "token.auth": ["D1Auth"],
    "signing.backend": ["Backend", "BackendModule", "GeneratedKey", "Pooled", "SignatureEncoding"],
    "custody.evidence": ["Assurance", "Evidence", "Fact"],
    "custody.policy": ["CustodyPolicy"],
    "custody.report": ["CustodyReport"],
    "token.d1": ["Audience", "Environment"],
    "errors": [
        "AccessDeniedError",
        "AmbiguousKeyError",
        "AttestationError",
        "AuditError",
        "AuditUnavailable",
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
    "events": [
        "CertificateEvent",
        "FailoverEvent",
        "Observer",
        "RenewalEvent",
        "RequestEvent",
        "SignEvent",
        "Use",
    ],
    "token.httpx_auth": ["HttpxD1Auth"],
    "token.renewal": ["Limits"],
    "signing.opening": ["generate_key", "open_signer"],
    "signing.signer": ["Signer"],
    "signing.lazy_signer": ["LazySigner"],
    "signing.member": ["Health", "MemberHealth"],
    "signing.signer_set": ["SignerSet"],
    "secret": ["Secret", "SecretSource", "read_secret"],
    "signing.key_uri": ["KeyUri"],
    "token.redis_store": ["RedisTokenStore"],
    "token.status": ["FetcherStatus"],
    "token.stores": ["Lease", "TokenStore"],
    "transport.processes": ["PerProcess"],
    "transport.credentials": ["ClientCertificate"],
    "token.fetcher": ["TokenFetcher"],
}
__version__: str
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Those that need an extra are left out, or `import *` would need the extras too.
_NEED_AN_EXTRA = {"HttpxD1Auth", "RedisTokenStore"}
__all__ = [  # noqa: PLE0604 (the names above, which a test holds against the type checker's view)
    *(name for name in _HOME_OF if name not in _NEED_AN_EXTRA),
    "es256",
]


# Without this, Python prints a library's warnings to stderr where nobody configured logging.
logging.getLogger("d1_signer").addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    if name == "es256":
        return importlib.import_module("d1_signer.es256")
    if name not in _HOME_OF:
        msg = f"module 'd1_signer' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"d1_signer.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    # Names the folder of an installed distribution's metadata. To import importlib.metadata, which
    # reads the same there, takes more time than anything else of `d1-signer --version`.
    for place in sys.path:
        with contextlib.suppress(OSError):
            for found in os.listdir(place or os.curdir):  # noqa: PTH208 (pathlib takes time)
                if found.startswith("d1_signer-") and found.endswith(".dist-info"):
                    return found.removeprefix("d1_signer-").removesuffix(".dist-info")
    from importlib.metadata import version

    return version("d1-signer")


def __dir__() -> list[str]:
    return sorted({*_HOME_OF, "es256"})
