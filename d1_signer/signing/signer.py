# SPDX-License-Identifier: Apache-2.0
"""A key that signs: `Signer`.

A backend signs a 32-byte digest and says whether it answers DER or raw; hashing, conversion, range
check and verification happen here, so no backend can leave them out.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn, Self, final

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from d1_signer import es256
from d1_signer.attestation import Statement
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.custody.report import CustodyReport, Maker
from d1_signer.errors import (
    AuditError,
    ConfigurationError,
    D1SignerError,
    InvalidInputError,
    InvalidSignatureError,
    KeyMismatchError,
    SignerClosedError,
)
from d1_signer.es256 import PublicKey
from d1_signer.events import Observer, Recordable, SignEvent, Trail, Use, checked, notify
from d1_signer.frames import without_locals
from d1_signer.signing.backend import Backend, Pooled, SignatureEncoding, guarded
from d1_signer.signing.holding import Holding
from d1_signer.signing.recording import answers, checked_trail, described, recorded
from d1_signer.signing.registry import plug_in_of

_LONGEST_TIMEOUT = 86_400.0


@final
class Signer:
    """Signs with ES256 under one key. Safe in threads and after fork; not picklable.

    Attributes:
        algorithm: ``"ES256"``.
    """

    algorithm = es256.ALGORITHM

    @without_locals  # a URI with a PIN may be given for the backend
    def __init__(
        self,
        backend: Backend,
        *,
        kid: str | None = None,
        verify: bool = True,
        expected_thumbprint: str | None = None,
        custody_policy: CustodyPolicy | None = None,
        attestation: Statement | str | None = None,
        attestation_anchors: str | None = None,
        observers: Sequence[Observer] = (),
        trail: Trail | None = None,
    ) -> None:
        """Take over a backend; `close` closes it. Most callers want `open_signer`.

        Args:
            backend: An open backend.
            kid: Key identifier that D1 knows; None: the RFC 7638 thumbprint.
            verify: Verify each signature under the pinned public key before it is returned.
            expected_thumbprint: RFC 7638 thumbprint that the key must have.
            custody_policy: What the key's custody must be shown to be, now and whenever the backend
                opens the key anew; None: what ``D1_CUSTODY_POLICY`` says, if it is set.
            attestation: A device's statement about the key, or ``FORMAT:PATH[,PATH…]``.
            attestation_anchors: File of keys that statements may rest on, beside the published.
            observers: Told of each signature, see `SignEvent`.
            trail: Asked before each signature, see `AuditTrail`; stays the caller's.

        Raises:
            ConfigurationError: ``backend`` is none, ``trail`` is none, or it is sealed by this key.
            AuditUnavailable: The trail cannot record that the key is in use.
            KeyMismatchError: The key has another thumbprint than expected.
            CustodyError: The evidence does not meet the policy, or the statement proves nothing
                about this key.
            ConfigurationError: A policy, a statement or a file that is none.
            InvalidInputError: ``kid`` is empty, longer than 256 characters or not printable.
        """
        self._name = self._kid = ""  # for the repr in a crash report, should a step below fail
        self._backend = backend
        self._name, self._encoding = _described(backend)
        # Rebuilt, so that the verifier is ours and not an object of the backend's own making.
        self._public_key = guarded(
            self._name, lambda: PublicKey.from_der(backend.public_key().der())
        )
        self._verify = verify
        self._observers = checked(observers)
        self._closed = False
        self._thumbprint = self._public_key.thumbprint()
        checked_trail(trail)
        self._trail = trail
        self._kid = self._thumbprint if kid is None else checked_kid(kid)
        if expected_thumbprint is not None and expected_thumbprint != self._public_key.thumbprint():
            raise KeyMismatchError(
                f"The key's thumbprint is {self._public_key.thumbprint()}, which is not the "
                "expected one.",
                hint="Check which key the URI names, and the thumbprint that was registered.",
            )
        self._about: dict[str, Recordable] = {
            "backend": self._name,
            "kid": self._kid,
            "thumbprint": self._thumbprint,
        }
        if trail is not None:
            trail.watch(self._public_key)
            trail.note("key", self._about)
        self._custody = Holding(
            backend,
            self._public_key,
            policy=custody_policy,
            attestation=attestation,
            anchors=attestation_anchors,
            trail=trail,
            about=self._about,
        )
        self._custody.hold()

    @property
    def trail(self) -> Trail | None:
        """The audit trail that records its uses."""
        return self._trail

    @property
    def public_key(self) -> PublicKey:
        """The public key, pinned at opening."""
        return self._public_key

    @property
    def kid(self) -> str:
        """Key identifier: the caller's, else the RFC 7638 thumbprint."""
        return self._kid

    def sign(
        self, message: bytes, *, timeout: float | None = None, use: Use | None = None
    ) -> bytes:
        """Sign a message with ES256 (RFC 7518 section 3.4).

        Args:
            message: Bytes of any length; hashed here, never sent to the backend.
            timeout: Seconds to wait at most; None: the backend's own time limit.
            use: What the signature is for, passed on to the observers.

        Returns:
            64 bytes, r||s.

        Raises:
            SignerUnavailable: The device or service does not answer; retryable.
            SignerError: Anything else that keeps the key from signing.
            InvalidInputError: ``message`` is not bytes, or ``timeout`` not a number.
        """
        try:
            digest = hashlib.sha256(message).digest()
        except (TypeError, BufferError):
            raise InvalidInputError("The message to sign is not bytes.") from None
        return self.sign_digest(digest, timeout=timeout, use=use)

    def sign_digest(
        self, digest: bytes, *, timeout: float | None = None, use: Use | None = None
    ) -> bytes:
        """Sign a SHA-256 digest that the caller made.

        Args:
            digest: Exactly 32 bytes.
            timeout: Seconds to wait at most; None: the backend's own time limit.
            use: What the signature is for, passed on to the observers.

        Returns:
            64 bytes, r||s.

        Raises:
            InvalidInputError: ``digest`` is not 32 bytes, or ``timeout`` not a number.
            SignerUnavailable: The device or service does not answer; retryable.
            SignerError: Anything else that keeps the key from signing.
        """
        if not isinstance(digest, bytes) or len(digest) != es256.DIGEST_LENGTH:
            raise InvalidInputError("The digest to sign is not 32 bytes.")
        if timeout is not None and not (
            isinstance(timeout, int | float) and -_LONGEST_TIMEOUT < timeout < _LONGEST_TIMEOUT
        ):
            raise InvalidInputError("The timeout is not a number of seconds.")
        if self._closed:
            raise SignerClosedError(
                "The signer is closed.", hint="Open it anew with open_signer()."
            )
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self._observers:
            return self._recorded(digest, deadline, use)
        error: str | None = "interrupted"
        pool: tuple[int, int] | None = None
        began, started = time.time(), time.perf_counter()
        try:
            if isinstance(self._backend, Pooled):
                pool = guarded(self._name, self._backend.pool_use)
            signature = self._recorded(digest, deadline, use)
            error = None
        except D1SignerError as failure:
            error = failure.code
            raise
        finally:
            duration = time.perf_counter() - started
            event = SignEvent(
                backend=self._name,
                kid=self._kid,
                duration=duration,
                error=error,
                use=use,
                pool_use=pool,
                time=began,
                thumbprint=self._thumbprint,
                digest=digest.hex(),
            )
            notify(self._observers, event)
        return signature

    def _recorded(self, digest: bytes, deadline: float | None, use: Use | None) -> bytes:
        if self._trail is None:
            return self._sign(digest, deadline)
        about = {**self._about, **described(use), "digest": digest.hex()}
        with recorded(self._trail, "sign", about, deadline):
            return self._sign(digest, deadline)

    def _sign(self, digest: bytes, deadline: float | None) -> bytes:
        if self._custody.watched is not None:
            self._custody.hold_again(deadline)
        answer = guarded(self._name, self._backend.sign_digest, digest, deadline)
        if self._encoding is SignatureEncoding.DER:
            answer = es256.raw_from_der(answer)
        if self._verify:
            try:
                self._public_key.verify_digest(answer, digest)
            except InvalidSignatureError as failure:
                raise InvalidSignatureError(
                    f"The {self._name} backend answered a signature that the key "
                    f"{self._public_key.thumbprint()} did not make; it was not used.",
                    hint="Check whether the key was replaced; if not, the answer was corrupted.",
                ) from failure
        else:
            es256.check_raw(answer)
        if self._custody.watched is not None:
            self._custody.hold_again(deadline)  # this signature may have opened the key anew
        return answer

    def custody(self) -> CustodyReport:
        """Collect the evidence about where the private key lives.

        Raises:
            SignerUnavailable: The device or service does not answer; retryable.
            SignerError: Anything else that keeps the backend from asking.
        """
        with recorded(self._trail, "custody", self._about) as found:
            evidence = self._custody.evidence()
            found.update(answers(evidence))
        return CustodyReport(
            backend=self._name,
            kid=self._kid,
            thumbprint=self._public_key.thumbprint(),
            collected_at=int(time.time()),
            evidence=evidence,
            plug_in=plug_in_of(self._backend),
            made_by=Maker.here(),
        )

    def as_private_key(self) -> EllipticCurvePrivateKey:
        """This signer in the shape of a private key of the ``cryptography`` package.

        For signing requests and certificates, PyJWT, MSAL: whatever calls the key's ``sign`` and
        does not export it. It is good until `close`.
        """
        from d1_signer.signing.private_key import SignerPrivateKey

        return SignerPrivateKey(self)

    def close(self) -> None:
        """Release the backend; calling it again does nothing."""
        first, self._closed = not self._closed, True
        try:
            guarded(self._name, self._backend.close)
        finally:
            if first and self._trail is not None:
                with contextlib.suppress(AuditError):  # the key is closed, recorded or not
                    self._trail.note("key-closed", self._about)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Signer {self._name} kid={self._kid!r}>"

    def __reduce__(self) -> NoReturn:
        msg = "a Signer cannot be pickled: open it where it is used"
        raise TypeError(msg)


def _described(backend: Backend) -> tuple[str, SignatureEncoding]:
    """A backend's name and encoding, each asked once: its own code may answer them."""

    def told() -> tuple[str, SignatureEncoding]:
        if not callable(getattr(backend, "sign_digest", None)):
            raise ConfigurationError(
                "A Signer is made of an open backend, and this is none.",
                hint="Write open_signer(uri) where a key URI is given.",
            )
        if not isinstance(backend.name, str):
            raise TypeError
        return backend.name, SignatureEncoding(backend.encoding)

    return guarded(plug_in_of(backend) or "built-in", told)


def checked_kid(kid: str) -> str:
    """Return it unless it can be no kid.

    Raises:
        InvalidInputError: It is empty, longer than 256 characters or not printable.
    """
    if not isinstance(kid, str) or not 0 < len(kid) <= 256 or not kid.isprintable():  # noqa: PLR2004
        raise InvalidInputError(
            "The kid is empty, longer than 256 characters, or not printable text.",
            hint="Give the key identifier under which D1 registered the public key.",
        )
    return kid
