# SPDX-License-Identifier: Apache-2.0
"""What TLS with one server is made of, and what the files of it held when they were read."""

from __future__ import annotations

import functools
import math
import os
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, final

from cryptography import x509

from d1_signer.errors import ConfigurationError, SecretSourceError
from d1_signer.frames import without_locals
from d1_signer.secret import (
    Secret,
    SecretSource,
    file_of,
    holds_key,
    read_private_file,
    read_public_file,
    read_secret,
    shown_path,
    unreadable,
)
from d1_signer.signing.key_uri import scheme_of
from d1_signer.signing.lazy_signer import LazySigner
from d1_signer.signing.signer import Signer
from d1_signer.transport import handshake
from d1_signer.transport.processes import fork_gate
from d1_signer.transport.tls import VerifyingContext, as_file, new_context

ClientKey = str | os.PathLike[str] | Signer | LazySigner | Sequence[Signer | LazySigner]


@final
@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The client certificate that D1's mutual TLS asks for.

    Attributes:
        certificate: Path of the certificate in PEM, its chain behind it.
        key: Path of its private key in PEM, for its owner or a group that reads it; or a `Signer`
            or `LazySigner` of it, or several of them: the one whose key is the certificate's signs,
            so that a certificate for a new key can take this one's place. They stay the caller's.
        passphrase: Source of a key file's passphrase; None for one that is not encrypted.
        timeout: Seconds for a signer's signature of one handshake.
        trusted_owner: A user (uid) who may own the files of key and passphrase, such as an agent's.

    Raises:
        ConfigurationError: A key itself is given where a path belongs, the timeout is not a number
            of seconds above 0, or the trusted owner no number.
    """

    certificate: str | os.PathLike[str]
    key: ClientKey
    passphrase: SecretSource | None = field(default=None, repr=False, kw_only=True)
    timeout: float = field(default=2.0, kw_only=True)
    trusted_owner: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what names no file or no user, and a timeout that no handshake could keep."""
        as_path(self.certificate)
        if not self.signers():  # which refuses what is neither
            as_path(self.key)
        number = isinstance(self.timeout, int | float) and not isinstance(self.timeout, bool)
        if not number or not 0 < self.timeout < math.inf:
            raise ConfigurationError(
                "The timeout of a ClientCertificate is not a number of seconds above 0.",
                hint="Write ClientCertificate(certificate, signer, timeout=5.0).",
            )
        owner = self.trusted_owner
        if owner is not None and (not isinstance(owner, int) or isinstance(owner, bool)):
            raise ConfigurationError("trusted_owner is not the number of a user (uid).")

    def signers(self) -> tuple[Signer | LazySigner, ...]:
        """The signers of the key; none where it is a file.

        Raises:
            ConfigurationError: What is given as the key is neither a path nor signers.
        """
        if isinstance(self.key, str | bytes | os.PathLike):
            return ()
        several = isinstance(self.key, Sequence)
        signers = tuple(self.key) if several else (self.key,)  # type: ignore[arg-type]
        if not signers or not all(isinstance(each, Signer | LazySigner) for each in signers):
            # A key may come in lines, or as a JWK that has been read.
            texts = [_text(each) for each in signers]
            if any(map(holds_key, [*texts, "\n".join(texts)])):
                raise _key_itself()
            raise ConfigurationError(
                "The client key is neither a path nor a Signer.",
                hint="Give ClientCertificate(certificate, key) a path, a Signer or several.",
            )
        return signers  # type: ignore[return-value]  # looked at above

    def files(self) -> list[str]:
        """The files that it is made of."""
        key = [as_path(self.key)] if not self.signers() else []
        passphrase = [self.passphrase and file_of(self.passphrase)]
        return [as_path(self.certificate), *key, *filter(None, passphrase)]


# What was given by mistake would stand in the frame of the error.
ClientCertificate.__init__ = without_locals(ClientCertificate.__init__)  # type: ignore[method-assign]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Authorities:
    """Who may sign the server's certificate: a file's, a text's, or else the system's.

    Attributes:
        file: A file in PEM, looked at again where it changes.
        pem: The same as text.
        name: What error texts call the text.
    """

    file: str | None = None
    pem: bytes | None = None
    name: str = "the system's"

    def shown(self) -> str:
        """How error texts name them."""
        return self.name if self.file is None else shown_path(self.file)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Hints:
    """What to do about files that cannot be used: those for D1, where nothing else is said.

    Attributes:
        certificate: The certificate cannot be read.
        pair: The key is another certificate's.
        passphrase: The key is encrypted.
        authorities: The authorities cannot be read.
        expiry: The certificate ends within weeks; None where none lives longer.
    """

    certificate: str = "Give the file in PEM that Thales sent for your CSR, its chain behind it."
    pair: str = (
        "Give the key from whose CSR Thales signed the certificate; that one stands first in its "
        "file, its chain behind it."
    )
    passphrase: str = "Name the source of its passphrase: file:PATH or env:NAME."  # noqa: S105 (advice)
    authorities: str = "Name a file of certificates in PEM that this process's user may read."
    expiry: str | None = "have Thales sign a new one"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What the files held when they were read, so that all contexts are made of the same.

    Attributes:
        state: What tells whether a file has changed since.
        certificate: The client's; None for none.
    """

    state: tuple[object, ...]
    certificate: x509.Certificate | None
    _authorities: Authorities = field(repr=False)
    _trusted: bytes | None = field(repr=False)
    _hints: Hints = field(repr=False)
    _show: Callable[[ssl.SSLContext], None] | None = field(repr=False)

    @classmethod
    def read(cls, authorities: Authorities, client: ClientCertificate | None, hints: Hints) -> Self:
        """Read the files, each once.

        Raises:
            SecretSourceError: A file of the client certificate cannot be read.
            ConfigurationError: The CA file cannot be read, or the certificate is none.
            InvalidKeyError: Signers are given for a certificate of another kind of key.
            KeyMismatchError: The key of none of the signers is the certificate's.
        """
        state = state_of(authorities, client)
        trusted = authorities.pem
        try:
            if authorities.file is not None:
                trusted = read_public_file(authorities.file)
        except (OSError, ValueError) as error:
            raise _no_authorities(authorities, unreadable(error), hints) from None
        certificate, show = (None, None) if client is None else _read_client(client, hints)
        return cls(
            state=state,
            certificate=certificate,
            _authorities=authorities,
            _trusted=trusted,
            _hints=hints,
            _show=show,
        )

    def context(self) -> VerifyingContext:
        """A new context.

        Raises:
            SecretSourceError: The key cannot be used, or its passphrase cannot be had.
            ConfigurationError: The CA file holds no certificates, the key does not belong to the
                certificate, or a signer cannot sign handshakes here.
        """
        context = new_context()
        self.load_into(context)
        return context

    def load_into(self, context: VerifyingContext) -> None:
        """Change a context that was given out; nothing else may use it meanwhile.

        Raises:
            D1SignerError: See `context`.
        """
        try:
            # Authorities that are no longer in the file stay in it.
            if self._trusted is None:
                context.load_default_certs()
            else:
                context.trust(self._trusted)
        except ssl.SSLError:
            raise _no_authorities(self._authorities, "it holds none", self._hints) from None
        except OSError as error:
            raise _no_authorities(self._authorities, unreadable(error), self._hints) from None
        self._shown_by(context)

    def _shown_by(self, context: VerifyingContext) -> None:
        if self._show is not None:
            self._show(context)
            # A server of TLS 1.3 may ask for the certificate after the handshake (RFC 8446,
            # section 4.6.2), as one of TLS 1.2 does with a second handshake.
            context.post_handshake_auth = True
        context.client_certificate = self.certificate


def state_of(authorities: Authorities, client: ClientCertificate | None) -> tuple[object, ...]:
    """What tells that a file was changed or replaced, also behind symbolic links."""
    found: list[object] = []
    trusted = [] if authorities.file is None else [authorities.file]
    for file in [*trusted, *(client.files() if client else [])]:
        try:
            status = os.stat(file)  # noqa: PTH116 (paths come as text)
        except (OSError, ValueError):
            found.append(None)
        else:
            changed = (status.st_mtime_ns, status.st_ctime_ns)  # the latter by permissions, too
            found.append((status.st_dev, status.st_ino, *changed, status.st_size))
    return tuple(found)


def as_path(value: object) -> str:
    """A path as text.

    Raises:
        ConfigurationError: It is none, such as what the file should hold.
    """
    try:
        path = os.fsdecode(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigurationError("A certificate, key or CA file is not given as a path.") from None
    if holds_key(path):
        raise _key_itself()
    if scheme_of(path):
        raise ConfigurationError(
            "A URI is given where the path of a certificate's, key's or CA's file belongs.",
            hint="Give a path; a key URI is opened with open_signer, and that signer is given.",
        )
    return path


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, Mapping):
        return str(dict(value))
    return value if isinstance(value, str) else ""


def _key_itself() -> ConfigurationError:
    return ConfigurationError(
        "A key or a certificate itself is given where the path of its file belongs.",
        hint="Put the key into a file of its own (chmod 600) and give its path, as in "
        "ClientCertificate('/etc/d1/client.pem', '/etc/d1/client.key'), or a signer; replace the "
        "key if others may have seen it.",
    )


def _no_authorities(authorities: Authorities, reason: str, hints: Hints) -> ConfigurationError:
    return ConfigurationError(
        f"The CA file cannot be read: {authorities.shown()}: {reason}.", hint=hints.authorities
    )


def _read_client(
    client: ClientCertificate, hints: Hints
) -> tuple[x509.Certificate, Callable[[ssl.SSLContext], None]]:
    """The certificate, and what has a context show it."""
    path = as_path(client.certificate)
    shown = shown_path(path)
    try:
        pem = read_public_file(path)
    except (OSError, ValueError) as error:
        raise SecretSourceError(
            f"The client certificate cannot be read: {shown}: {unreadable(error)}.",
            hint=hints.certificate,
        ) from None
    chain = handshake.chain_of(pem, shown, hints.certificate)
    signers = client.signers()
    if signers:
        public_key = handshake.public_key_of(chain[0], shown)
        handshake.require_one_that_fits(signers, public_key, shown)
        return chain[0], functools.partial(
            handshake.sign_with,
            chain=chain,
            public_key=public_key,
            signers=signers,
            timeout=client.timeout,
        )
    key_path = as_path(client.key)
    # One character for each byte: a Secret is text.
    owner = client.trusted_owner
    content = read_private_file(key_path, what="client key file", trusted_owner=owner)
    key = Secret(content.decode("latin-1"))
    del content
    return chain[0], functools.partial(
        _load_pair,
        certificate=pem,
        key=key,
        passphrase=_Passphrase(client.passphrase, owner),
        shown=f"{shown}, {shown_path(key_path)}",
        hints=hints,
    )


class _Passphrase:
    """That of a key file: asked for once, where OpenSSL asks, and kept as long as that key is."""

    def __init__(self, source: SecretSource | None, trusted_owner: int | None) -> None:
        self._source = source
        self._owner = trusted_owner
        self._kept: Secret | None = None
        self.asked = False

    def __call__(self) -> str:
        self.asked = True
        if self._source is None:
            return ""  # an empty answer keeps OpenSSL from asking on the terminal
        if self._kept is None:
            with fork_gate.left():
                self._kept = read_secret(
                    self._source, what="client key's passphrase", trusted_owner=self._owner
                )
        return self._kept.reveal()

    def hint(self, hints: Hints) -> str:
        """What to do where the key did not open."""
        if self._source is None:
            return hints.passphrase
        return "Look at the source of its passphrase: the key does not open with that one."


def _load_pair(
    context: ssl.SSLContext,
    *,
    certificate: bytes,
    key: Secret,
    passphrase: _Passphrase,
    shown: str,
    hints: Hints,
) -> None:
    try:
        with (
            as_file(certificate) as certificate_path,
            as_file(key.reveal().encode("latin-1")) as key_path,
        ):
            context.load_cert_chain(certificate_path, key_path, password=passphrase)
    except ssl.SSLError as error:
        # The second is said of a key of another kind.
        if error.reason in {"KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}:
            raise ConfigurationError(
                f"The client key does not belong to the client certificate: {shown}.",
                hint=hints.pair,
            ) from None
        raise SecretSourceError(
            f"The client certificate or its key cannot be read: {shown}.",
            hint=passphrase.hint(hints) if passphrase.asked else "Both must be PEM files.",
        ) from None
    except OSError as error:
        raise SecretSourceError(
            f"The client certificate or its key cannot be loaded: {shown}: {unreadable(error)}.",
            hint="Look at this process's limits of memory and descriptors, and that it has /proc.",
        ) from None
    except ValueError:
        raise SecretSourceError(
            "The client key's passphrase is longer than OpenSSL takes.", hint="Look at its source."
        ) from None
