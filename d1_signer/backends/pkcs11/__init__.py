# SPDX-License-Identifier: Apache-2.0
"""Keys in an HSM, a smart card or a TPM through PKCS#11: ``pkcs11:token=bank;object=d1``.

URIs by RFC 7512. Needs the extra ``pkcs11`` and the vendor's module, a shared library that
``module-path`` names::

    open_signer(
        "pkcs11:token=bank;object=d1"
        "?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/d1/pin"
    )

Every error of `open_backend` names the step that failed in ``details["step"]``: ``module`` (the
library loads and is initialised), ``token`` (found), ``login`` (accepted), ``key`` (found) or
``signature`` (a first one, verified under the public key).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from d1_signer.backends.pkcs11.uri import Pkcs11Uri
from d1_signer.errors import ConfigurationError, KeyUriError, MissingExtraError
from d1_signer.es256 import PublicKey
from d1_signer.secret import SecretSource
from d1_signer.signing.backend import Backend, GeneratedKey

try:
    from d1_signer.backends.pkcs11.backend import Pkcs11Backend
    from d1_signer.backends.pkcs11.generate import generate
    from d1_signer.backends.pkcs11.isolation.backend import HostSettings, IsolatedBackend
    from d1_signer.backends.pkcs11.isolation.opening import Opener
    from d1_signer.backends.pkcs11.session.login import CKU_USER
    from d1_signer.backends.pkcs11.session.pin import Pin
    from d1_signer.backends.pkcs11.settings import Settings
except ModuleNotFoundError as error:
    if error.name != "pkcs11":
        raise
    raise MissingExtraError.of("python-pkcs11", "pkcs11") from None

_log = logging.getLogger(__name__)

# Where packages and vendors put modules. Only named in an error, never loaded by themselves: which
# library gets the PIN is for the operator to say.
_USUAL_PLACES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so",
    "/usr/lib/x86_64-linux-gnu/pkcs11/libtpm2_pkcs11.so",
    "/usr/lib/x86_64-linux-gnu/pkcs11/yubihsm_pkcs11.so",
    "/usr/safenet/lunaclient/lib/libCryptoki2_64.so",
    "/opt/nfast/toolkits/pkcs11/libcknfast.so",
    "/opt/cloudhsm/lib/libcloudhsm_pkcs11.so",
    "/opt/utimaco/lib/libcs_pkcs11_R3.so",
)
_MODULE_FOLDERS = (
    "/usr/lib/pkcs11",
    "/usr/lib64/pkcs11",
    "/usr/lib/x86_64-linux-gnu/pkcs11",
    "/usr/lib/aarch64-linux-gnu/pkcs11",
    "/usr/lib/softhsm",
    "/usr/local/lib",
)


def open_backend(
    uri: str,
    *,
    pin_source: SecretSource | None = None,
    module_path: str | None = None,
    public_key: PublicKey | str | None = None,
    max_sessions: int = 4,
    session_timeout: float = 10.0,
    timeout: float | None = None,
    locking: str = "auto",
    user_type: int | None = None,
    protected_authentication_path: bool = False,
    init_reserved: str | None = None,
    isolation: str = "none",
    processes: int = 1,
    keep_environment: str = "",
    core_dumps: bool = False,
) -> Backend:
    """Open a key in a PKCS#11 token.

    Args:
        uri: RFC 7512, such as ``pkcs11:token=bank;object=d1?module-path=/path/lib.so``. Exactly one
            token and one private key must fit.
        pin_source: Where the user PIN comes from; wins over the URI's ``pin-source``.
        module_path: The module's file; wins over the URI's ``module-path``.
        public_key: The public key (or its PEM), for a token that holds neither it nor a
            certificate, or tells them in a form that cannot be read; checked against the token's
            where it can.
        max_sessions: Sessions that sign, beside the one that holds the login.
        session_timeout: Seconds to wait at most for a free session.
        timeout: Seconds for a call that is given no time limit of its own, and for opening, beside
            reading the PIN. None: such a call is made directly and returns when the module returns.
            With a limit, a call is handed to another thread, which costs about 0.1 ms.
        locking: ``"os"``: the module locks by itself (``CKF_OS_LOCKING_OK``); ``"lock"``: one lock
            around every call; ``"auto"``: the first where the module offers it.
        user_type: Number of the user type, for vendors that have their own (a Luna partition's
            crypto user is 0x80000001); None: ``CKU_USER``.
        protected_authentication_path: The PIN is entered at the device (PIN pad).
        init_reserved: Text handed to ``C_Initialize`` as ``pReserved``, for modules that are
            configured so (NSS softokn).
        isolation: ``"process"`` hosts the module in child processes: a library that hangs is killed
            at the deadline, one that crashes costs an error, and each is replaced. ``"none"``: in
            this process.
        processes: With ``isolation="process"``, how many children; each has ``max_sessions``.
        keep_environment: With ``isolation="process"``, names of variables that the module needs
            although they look like somebody else's credentials, as ``AWS_*,GOOGLE_*``; `*` is any
            text. The others of `d1_signer.backends.pkcs11.isolation.confinement` are kept from it.
        core_dumps: With ``isolation="process"``, whether a crash of the module may leave a core
            file. The PIN is in it.

    Raises:
        KeyUriError: The URI cannot be read, or names no module.
        ConfigurationError: The module cannot be loaded or initialised, or an option is wrong.
        SecretSourceError: The PIN cannot be read.
        KeyNotFoundError: No token, or no key, fits.
        AmbiguousKeyError: More than one fits.
        LoginError: The PIN was refused, or may not be tried.
        InvalidKeyError: The key is no P-256 key that may sign.
        KeyMismatchError: The private key does not fit its public key.
        SignerUnavailable: The token does not work now; retryable.
    """
    parsed = Pkcs11Uri.parse(uri)
    settings = Settings(
        uri=parsed,
        module_path=_module_path(parsed, module_path),
        max_sessions=_in_range("max_sessions", max_sessions, 1, 1024),
        session_timeout=_seconds("session_timeout", session_timeout),
        timeout=None if timeout is None else _seconds("timeout", timeout),
        user_type=CKU_USER
        if user_type is None
        else _in_range("user_type", user_type, 0, 2**32 - 1),
        locking=_choice("locking", locking, ("auto", "os", "lock")),
        pin_pad=protected_authentication_path,
        public_key=PublicKey.from_pem(public_key) if isinstance(public_key, str) else public_key,
        init_reserved=init_reserved,
    )
    _in_range("processes", processes, 1, 64)
    if _choice("isolation", isolation, ("none", "process")) == "none":
        return Pkcs11Backend(settings, _pin(parsed, pin_source))
    given = settings.public_key
    options: dict[str, object] = {
        "public_key": None if given is None else given.pem(),
        "max_sessions": settings.max_sessions,
    }
    host = _host_settings(uri, settings, pin_source, options, keep_environment)
    return IsolatedBackend(replace(host, processes=processes, core_dumps=core_dumps))


def _host_settings(
    uri: str,
    settings: Settings,
    pin_source: SecretSource | None,
    more: dict[str, object],
    keep_environment: str,
) -> HostSettings:
    """What the children are told; a source that a child can read itself goes there as it is."""
    options: dict[str, object] = {
        "module_path": settings.module_path,
        "locking": settings.locking,
        "user_type": settings.user_type,
        "protected_authentication_path": settings.pin_pad,
        "init_reserved": settings.init_reserved,
        **more,
    }
    source = pin_source if pin_source is not None else settings.uri.pin_source
    kept = tuple(filter(None, map(str.strip, keep_environment.split(","))))
    if isinstance(source, str) and source != "prompt":
        if source.startswith("env:"):
            kept += (source.removeprefix("env:"),)
        options["pin_source"], source = source, None
    return HostSettings(
        uri=uri,
        location=settings.uri.token_location(),
        options=options,
        pin_source=source,
        processes=1,
        connections=settings.max_sessions,
        patience=settings.session_timeout,
        timeout=settings.timeout,
        kept_variables=kept,
        core_dumps=False,
    )


def generate_key(
    uri: str,
    *,
    pin_source: SecretSource | None = None,
    module_path: str | None = None,
    locking: str = "auto",
    user_type: int | None = None,
    protected_authentication_path: bool = False,
    init_reserved: str | None = None,
    isolation: str = "none",
    keep_environment: str = "",
    timeout: float = 60.0,
) -> GeneratedKey:
    """Make a P-256 key on the token: sensitive, not extractable, for signing only.

    Args:
        uri: As for `open_backend`, with ``object``, the new key's label. Without ``id`` it gets 8
            random bytes; a token that wants another form (YubiHSM: 2 bytes) is told by ``id``.
        pin_source: As for `open_backend`.
        module_path: As for `open_backend`.
        locking: As for `open_backend`.
        user_type: As for `open_backend`.
        protected_authentication_path: As for `open_backend`.
        init_reserved: As for `open_backend`.
        isolation: As for `open_backend`; the child ends when the key is made.
        keep_environment: As for `open_backend`.
        timeout: Seconds for all of it, beside reading the PIN.

    Returns:
        The key's URI, with its id, and its public key.

    Raises:
        KeyExistsError: A key with that label or that id exists; nothing was changed.
        SignerError: The token did not make the key as it was asked to; the hint tells whether what
            it made instead was removed.
        SignerTimeout: The token did not answer in time; the key may be made nevertheless.
    """
    parsed = Pkcs11Uri.parse(uri)
    if not parsed.object:
        raise KeyUriError(
            "The key URI has no object, which names the new key.", hint="Add ;object=NAME."
        )
    settings = Settings(
        uri=parsed,
        module_path=_module_path(parsed, module_path),
        user_type=CKU_USER
        if user_type is None
        else _in_range("user_type", user_type, 0, 2**32 - 1),
        locking=_choice("locking", locking, ("auto", "os", "lock")),
        pin_pad=protected_authentication_path,
        init_reserved=init_reserved,
    )
    timeout = _seconds("timeout", timeout)
    if _choice("isolation", isolation, ("none", "process")) == "none":
        return generate(settings, _pin(parsed, pin_source), timeout)
    host = _host_settings(uri, settings, pin_source, {"timeout": timeout}, keep_environment)
    return Opener(host).generate(timeout)


def _pin(uri: Pkcs11Uri, source: SecretSource | None) -> Pin:
    if uri.pin_value is not None:
        _log.warning("pkcs11.pin_in_uri: name the PIN's source instead (pin-source=file:PATH)")
    if source is not None:
        return Pin(source, None, of=uri.location())
    return Pin(uri.pin_source, uri.pin_value, of=uri.location())


def _module_path(uri: Pkcs11Uri, given: str | None) -> str:
    path = given or uri.module_path
    if path and "\0" in path:
        kind = ConfigurationError if given else KeyUriError
        raise kind(
            "The path of the PKCS#11 module has a NUL character in it.",
            hint="Give the module's file as it is named on disk.",
            details={"step": "module"},
        )
    if path:
        return path
    if uri.module_name:
        return _by_name(uri.module_name)
    here = [place for place in _USUAL_PLACES if Path(place).exists()]
    raise KeyUriError(
        "The key URI names no PKCS#11 module.",
        hint="Add ?module-path=FILE. Found on this system: " + (", ".join(here) or "none") + ".",
        details={"step": "module"},
    )


def _by_name(name: str) -> str:
    """RFC 7512 section 2.3: the name without a prefix ``lib`` and the suffix."""
    if "/" not in name:
        for folder in _MODULE_FOLDERS:
            for file in (f"{name}.so", f"lib{name}.so", f"{name}.dylib", f"lib{name}.dylib"):
                if (path := Path(folder, file)).is_file():
                    return str(path)
    raise KeyUriError(
        "There is no PKCS#11 module of the name that module-name gives.",
        hint=f"Looked in {', '.join(_MODULE_FOLDERS)}; give module-path=FILE instead.",
        details={"step": "module"},
    )


def _in_range(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigurationError(f"{name} is not a number from {low} to {high}.")
    return value


def _seconds(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:  # noqa: PLR2004
        raise ConfigurationError(f"{name} is not a number of seconds above 0, at most a day.")
    return float(value)


def _choice(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ConfigurationError(f"{name} is none of {', '.join(known)}.")
    return value
