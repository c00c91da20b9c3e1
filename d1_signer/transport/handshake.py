# SPDX-License-Identifier: Apache-2.0
"""TLS handshakes whose client key is a `Signer`'s: the key stays in its HSM or KMS.

Python's ssl module takes a client key from a file only. OpenSSL lets an EC key have a method of its
own (``EC_KEY_METHOD``, man page EC_KEY_METHOD_new), so the context is given one, through ctypes, on
exactly the libraries that the ssl module works with. Deprecated since OpenSSL 3.0 and present in
4.0; see docs/adr/0022.
"""

from __future__ import annotations

import ctypes
import functools
import ssl
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_long, c_uint64, c_void_p
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from d1_signer import es256
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidKeyError,
    KeyMismatchError,
    SecretSourceError,
    SignerClosedError,
    SignerError,
)
from d1_signer.es256 import PublicKey
from d1_signer.events import Use
from d1_signer.signing.lazy_signer import LazySigner
from d1_signer.signing.signer import Signer
from d1_signer.transport.processes import fork_gate

T = TypeVar("T")

PURPOSE = "tls-client-handshake"
# The releases that `make matrix` runs; the place of a pointer behind an object is looked for there
# only.
_RELEASES = frozenset({(3, 11), (3, 12), (3, 13)})
_P256 = 415  # NID_X9_62_prime256v1
_SSL_CTRL_CHAIN = 88
_SSL_CTRL_CHAIN_CERT = 89
_SSL_CTRL_SET_CLIENT_SIGALGS_LIST = 102
_ALL_OPTIONS = (1 << 64) - 1  # which Python tells with a sign
# SSL_VERIFY_PEER, and SSL_VERIFY_FAIL_IF_NO_PEER_CERT with it
_VERIFY_MODES = {ssl.CERT_NONE: 0, ssl.CERT_OPTIONAL: 1, ssl.CERT_REQUIRED: 3}
_DIGEST = 32
_POINT = 65  # bytes, uncompressed

# type, digest, its length, out, its length, two of earlier steps, key
_SIGN = "int(*)(int, void *, int, void *, unsigned int *, void *, void *, void *)"
_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "SSL_CTX_get_options": (c_uint64, [c_void_p]),
    "SSL_CTX_get_verify_mode": (c_int, [c_void_p]),
    "SSL_CTX_use_certificate": (c_int, [c_void_p, c_void_p]),
    "SSL_CTX_use_PrivateKey": (c_int, [c_void_p, c_void_p]),
    "SSL_CTX_ctrl": (c_long, [c_void_p, c_int, c_long, c_void_p]),
    "d2i_X509": (c_void_p, [c_void_p, POINTER(c_char_p), c_long]),
    "X509_free": (None, [c_void_p]),
    "EC_KEY_OpenSSL": (c_void_p, []),
    "EC_KEY_METHOD_new": (c_void_p, [c_void_p]),
    "EC_KEY_METHOD_set_sign": (None, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "EC_KEY_new_by_curve_name": (c_void_p, [c_int]),
    "EC_KEY_oct2key": (c_int, [c_void_p, c_char_p, ctypes.c_size_t, c_void_p]),
    "EC_KEY_set_method": (c_int, [c_void_p, c_void_p]),
    "EC_KEY_free": (None, [c_void_p]),
    "EVP_PKEY_new": (c_void_p, []),
    "EVP_PKEY_set1_EC_KEY": (c_int, [c_void_p, c_void_p]),
    "EVP_PKEY_free": (None, [c_void_p]),
    "ERR_clear_error": (None, []),
}


def chain_of(pem: bytes, shown: str, hint: str) -> list[x509.Certificate]:
    """The certificates of a PEM file, the client's own first; ``hint`` for where it is none.

    Raises:
        SecretSourceError: It holds none that can be read.
    """
    try:
        chain = x509.load_pem_x509_certificates(pem)
        own = chain[0]
        # Parsed when they are asked for, which is no time for errors.
        _ = (own.subject.rfc4514_string(), own.issuer.rfc4514_string())
        _ = (own.not_valid_before_utc, own.not_valid_after_utc)
    except (ValueError, OverflowError, x509.InvalidVersion):
        raise SecretSourceError(
            f"The client certificate cannot be read: {shown}.", hint=hint
        ) from None
    return chain


def public_key_of(certificate: x509.Certificate, shown: str) -> PublicKey:
    """The public key of a certificate whose private key is a signer's.

    Raises:
        InvalidKeyError: It is not on P-256, which is all that a `Signer` signs with.
    """
    try:
        key: Any = certificate.public_key()
        return PublicKey(key)
    except (D1SignerError, ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidKeyError(
            f"The client certificate is not for a P-256 key: {shown}.",
            hint="A Signer signs ES256 only: have Thales sign a CSR of such a key, or give the "
            "key of this certificate as a file.",
        ) from None


def require_one_that_fits(
    signers: Sequence[Signer | LazySigner], public_key: PublicKey, shown: str
) -> None:
    """Refuse signers of which none has the certificate's key.

    Raises:
        KeyMismatchError: None of them.
    """
    if all(signer.public_key != public_key for signer in signers):
        found = ", ".join(f"{s.kid} ({s.public_key.thumbprint()})" for s in signers)
        raise KeyMismatchError(
            f"The client key does not belong to the client certificate: {shown}.",
            hint=f"The certificate's key has the thumbprint {public_key.thumbprint()}; given: "
            f"{found}. Give the key from whose CSR Thales signed the certificate; that one stands "
            "first in its file, its chain behind it.",
        )


def sign_with(
    context: ssl.SSLContext,
    chain: Sequence[x509.Certificate],
    public_key: PublicKey,
    signers: Sequence[Signer | LazySigner],
    *,
    timeout: float,
) -> None:
    """Have a context show a certificate and let a signer sign its handshakes.

    Args:
        context: One whose sockets do their handshakes in `with_server`.
        chain: The certificate and its chain.
        public_key: The certificate's.
        signers: The first that is not closed, and whose key is the certificate's, signs; a lazy
            one is opened by then.
        timeout: Seconds for one signature.

    Raises:
        ConfigurationError: This build of Python or OpenSSL does not let a signer sign.
    """
    openssl = _openssl()
    pointer = _pointer(openssl, context)
    # Of a certificate that was there before.
    _require(openssl, openssl.SSL_CTX_ctrl(pointer, _SSL_CTRL_CHAIN, 0, None))
    for number, certificate in enumerate(chain):
        der = certificate.public_bytes(Encoding.DER)
        with _certificate(openssl, der) as held:
            added = (
                openssl.SSL_CTX_use_certificate(pointer, held)
                if number == 0
                else openssl.SSL_CTX_ctrl(pointer, _SSL_CTRL_CHAIN_CERT, 1, held)
            )
            _require(openssl, added)
    # Without it a server may ask for a signature over another hash.
    algorithms = ctypes.create_string_buffer(b"ecdsa_secp256r1_sha256")
    _require(
        openssl,
        openssl.SSL_CTX_ctrl(
            pointer, _SSL_CTRL_SET_CLIENT_SIGALGS_LIST, 0, ctypes.cast(algorithms, c_void_p)
        ),
    )
    key = _key(openssl, pointer, public_key)
    _handshakes[key] = functools.partial(_sign, public_key, tuple(signers), timeout)
    # Its sockets hold the context: the last of them is gone by then. Until then the key is held
    # here too, or another's could get the address of one that was renewed.
    weakref.finalize(context, _forget, openssl, key).atexit = False


def _forget(openssl: ctypes.CDLL, key: int) -> None:
    del _handshakes[key]
    openssl.EC_KEY_free(key)


def _sign(
    public_key: PublicKey, signers: tuple[Signer | LazySigner, ...], timeout: float, digest: bytes
) -> bytes:
    if len(digest) != _DIGEST:
        raise SignerError(
            f"The server asks for a signature over {8 * len(digest)} bits.",
            hint="A client key in a Signer signs ecdsa_secp256r1_sha256 only.",
        )
    server = _now.server
    use = Use(purpose=PURPOSE, references=(("server", server),) if server else ())
    closed: SignerClosedError | None = None
    for source in signers:
        if source.public_key != public_key:
            continue
        try:
            signer = source.signer(timeout=timeout) if isinstance(source, LazySigner) else source
            return signer.sign_digest(digest, timeout=timeout, use=use)
        except SignerClosedError as error:
            closed = error.fresh()
    assert closed is not None  # noqa: S101 (one of them has the key: `require_one_that_fits`)
    raise closed


class _Now(threading.local):
    """What the handshake of this thread is about, and what its signature failed with."""

    server: str | None = None
    failure: BaseException | None = None


_now = _Now()
# By the address of the EC_KEY that OpenSSL hands to the method.
_handshakes: dict[int, Callable[[bytes], bytes]] = {}


@contextmanager
def with_server(server: str | None) -> Iterator[None]:
    """Around a handshake or a step of it: what the signature failed with is what is raised.

    Args:
        server: Whom the handshake is with, for the `Use` of the signature.

    Raises:
        D1SignerError: What the signer raised.
    """
    before = (_now.server, _now.failure)
    _now.server, _now.failure = server, None
    failure = None
    try:
        yield
    except ssl.SSLError:
        failure = _now.failure
        if failure is None:
            raise
    finally:
        _now.server, _now.failure = before
    if failure is not None:
        raise failure


# -- what OpenSSL calls -------------------------------------------------------------------------


def _on_sign(
    _type: int, digest: Any, length: int, out: Any, out_length: Any, _kinv: Any, _r: Any, key: Any
) -> int:
    sign = _handshakes[_address(key)]
    with fork_gate.left():
        signature = sign(ctypes.string_at(_address(digest), length))
    der = es256.der_from_raw(signature)
    ctypes.memmove(_address(out), der, len(der))
    out_length[0] = len(der)
    return 1


def _on_failure(_kind: object, failure: BaseException, _traceback: object) -> None:
    _now.failure = failure  # raised after the handshake


def _address(pointer: Any) -> int:
    return int(_ffi().cast("uintptr_t", pointer))


@functools.cache
def _ffi() -> Any:
    try:
        import cffi  # type: ignore[import-untyped]  # has none; comes with cryptography
    except ImportError:
        raise _unsupported("this installation, which has no cffi") from None
    return cffi.FFI()


# -- OpenSSL ------------------------------------------------------------------------------------


@functools.cache
def _openssl() -> ctypes.CDLL:
    """The OpenSSL of the ssl module, with what is needed of it.

    Raises:
        ConfigurationError: Another interpreter, or a build that does not show its OpenSSL.
    """
    release = sys.version_info[:2]
    usual = (
        sys.implementation.name == "cpython"
        and release in _RELEASES
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and not hasattr(sys, "getobjects")  # an object head with more in it
    )
    if not usual:
        raise _unsupported(f"this interpreter ({sys.implementation.name} {sys.version.split()[0]})")
    try:
        # Symbols are looked for in the library and in what it is linked with, before all others.
        library = ctypes.CDLL(getattr(sys.modules["_ssl"], "__file__", None))
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        raise _unsupported("this build of Python, which does not show its OpenSSL") from None
    return library


@functools.cache
def _method() -> int:
    # For the process: keys hold it until they are freed, whenever that is.
    openssl = _openssl()
    method: int | None = openssl.EC_KEY_METHOD_new(openssl.EC_KEY_OpenSSL())
    if not method:
        raise _unsupported("this OpenSSL, which has no EC_KEY_METHOD")
    # Not a callback of ctypes: a signal's handler can raise before the first line of a function,
    # and OpenSSL would then take what happens to be on the stack for the result.
    sign = _ffi().callback(_SIGN, _on_sign, error=0, onerror=_on_failure)
    _callbacks.append(sign)
    openssl.EC_KEY_METHOD_set_sign(method, _address(sign), None, None)
    return method


# Kept as long as the methods that have their addresses.
_callbacks: list[object] = []


def _pointer(openssl: ctypes.CDLL, context: ssl.SSLContext) -> int:
    """The ``SSL_CTX`` of a context: the first field behind the object's head."""
    pointer = c_void_p.from_address(id(context) + object.__basicsize__).value
    # Looked at through two values that Python tells too, before it is used for anything.
    told = (context.options & _ALL_OPTIONS, _VERIFY_MODES[context.verify_mode])
    if not pointer or told != (
        openssl.SSL_CTX_get_options(pointer),
        openssl.SSL_CTX_get_verify_mode(pointer),
    ):
        raise _unsupported("the ssl module of this build, whose contexts are laid out otherwise")
    return pointer


@contextmanager
def _certificate(openssl: ctypes.CDLL, der: bytes) -> Iterator[int]:
    data = c_char_p(der)
    held: int | None = openssl.d2i_X509(None, ctypes.byref(data), len(der))
    _require(openssl, held)
    assert held is not None  # noqa: S101 (required a line above)
    try:
        yield held
    finally:
        openssl.X509_free(held)


def _key(openssl: ctypes.CDLL, pointer: int, public_key: PublicKey) -> int:
    """Give a context an EC key that has no private part; returns its address, held once more."""
    key: int | None = openssl.EC_KEY_new_by_curve_name(_P256)
    wrapped: int | None = openssl.EVP_PKEY_new()
    try:
        _require(openssl, key and wrapped)
        point = public_key.der()[-_POINT:]  # SPKI ends with it (RFC 5480, section 2.2)
        _require(openssl, openssl.EC_KEY_oct2key(key, point, len(point), None))
        _require(openssl, openssl.EC_KEY_set_method(key, _method()))
        _require(openssl, openssl.EVP_PKEY_set1_EC_KEY(wrapped, key))
        _require(openssl, openssl.SSL_CTX_use_PrivateKey(pointer, wrapped))
    except BaseException:
        openssl.EC_KEY_free(key)
        raise
    finally:
        openssl.EVP_PKEY_free(wrapped)  # the context holds it now
    assert key is not None  # noqa: S101 (required above)
    return key


def _require(openssl: ctypes.CDLL, result: int | None) -> None:
    if not result or result < 0:
        openssl.ERR_clear_error()  # or the next call of the ssl module would tell of it
        raise _unsupported("this OpenSSL, which refuses a key with a method of its own")


def _unsupported(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"A Signer cannot sign TLS handshakes with {what}.",
        hint="Use an interpreter that docs/tls.md lists; or a PEM file with a PKCS#11 URI for "
        "OpenSSL's pkcs11-provider; or a key in a file.",
    )
