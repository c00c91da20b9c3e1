# SPDX-License-Identifier: Apache-2.0
"""The sandbox as tests and the command line use it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Literal

from d1_signer.errors import ConfigurationError, InvalidInputError
from d1_signer.frames import without_locals
from d1_signer.sandbox.assertions import AssertionVerifier, KeyRegister
from d1_signer.sandbox.certificates import CertificateFolder
from d1_signer.sandbox.faults import TOKEN_ONLY
from d1_signer.sandbox.plan import Plan
from d1_signer.sandbox.recorder import Recorder
from d1_signer.sandbox.running import HOST, Listener, Running
from d1_signer.sandbox.service import BANKING_PATH, BASE_PATH, TOKEN_PATH, Service, TokenOffice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from d1_signer.sandbox.records import Counters, Exchange, Fault, TokenRequest


class Sandbox:
    """A D1 authorization server on 127.0.0.1 with one protected resource.

    It is a context manager; `start` and `close` do the same by hand. It runs in a thread of its own
    and may be used from any thread. Nothing remains after `close`: no thread, socket or file.

    Args:
        issuer_id: The issuer that is known here; ``iss`` and ``sub`` of assertions.
        port: TCP port, 0 for any free one.
        tls: Mutual TLS with certificates made for the run; plain http where False.
        token_lifetime: Seconds that access tokens live.
        clock: Seconds since the epoch, for all that the sandbox judges, and its Date header.
        leeway: Seconds that ``iat`` and ``nbf`` may lie in the future.

    Raises:
        MissingExtraError: The extra ``sandbox`` is not installed.
        InvalidInputError: An argument is of a wrong type or out of range.
    """

    def __init__(
        self,
        issuer_id: str,
        *,
        port: int = 0,
        tls: bool = True,
        token_lifetime: float = 900.0,
        clock: Callable[[], float] = time.time,
        leeway: float = 5.0,
    ) -> None:
        self._issuer_id = issuer_id  # first of all: repr needs it
        if not isinstance(issuer_id, str) or not issuer_id:
            raise InvalidInputError("The issuer ID is a string that is not empty.")
        if type(port) is not int:
            raise InvalidInputError("The port is a whole number.")
        if not callable(clock):
            raise InvalidInputError("The clock is a function that returns seconds.")
        if not _is_finite(leeway) or leeway < 0:
            raise InvalidInputError("The leeway is a number of seconds, 0 or more.")
        self._port = port
        self._tls = tls
        self._clock = clock
        self._leeway = leeway
        self._keys = KeyRegister()
        self._recorder = Recorder()
        self._token_plan = Plan()
        self._banking_plan = Plan(unfit=TOKEN_ONLY)
        self._office = TokenOffice(clock=clock, lifetime=_checked_lifetime(token_lifetime))
        self._certificates: CertificateFolder | None = None
        self._running: Running | None = None

    def __repr__(self) -> str:
        return f"<Sandbox {self._issuer_id!r}>"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> Self:
        """Make the certificates, listen and serve; once in a sandbox's life.

        Raises:
            ConfigurationError: The port is taken, certificates cannot be written, the system gives
                no more descriptors, or the sandbox was started before.
        """
        if self._running is not None:
            raise ConfigurationError("A sandbox is started once; make a new one.")
        listener = Listener(self._port, self._recorder)
        try:
            self._port = listener.getsockname()[1]
            if self._tls:
                self._certificates = CertificateFolder()
            tls = self._certificates.server_context() if self._certificates else None
            self._running = Running(listener, tls, self._service())
        except BaseException as error:
            listener.close()
            self.close()
            if isinstance(error, OSError):
                raise ConfigurationError(f"The sandbox cannot start: {error}.") from None
            raise
        return self

    def close(self) -> None:
        """End all connections, the thread and the certificates; more than once does no harm."""
        if self._running is not None:
            self._running.stop()
        if self._certificates is not None:
            self._certificates.remove()

    @property
    def base_url(self) -> str:
        """What an ``Environment`` is; ends in ``/authz/v1``."""
        return self._origin() + BASE_PATH

    @property
    def token_endpoint(self) -> str:
        """The token endpoint's URL: the audience of assertions."""
        return self._origin() + TOKEN_PATH

    @property
    def banking_url(self) -> str:
        """The banking API's base; ``/ping`` below it is protected and takes GET and POST."""
        return self._origin() + BANKING_PATH

    @property
    def variables(self) -> dict[str, str]:
        """The settings of a client of it, under the names of `d1-signer`'s variables."""
        variables = {"D1_ENVIRONMENT": self.base_url, "D1_ISSUER_ID": self._issuer_id}
        if self._tls:
            variables |= {
                "D1_CLIENT_CERT": str(self.client_certificate),
                "D1_CLIENT_KEY": str(self.client_key),
                "D1_CA_FILE": str(self.ca_file),
            }
        return variables

    @property
    def ca_file(self) -> Path:
        """The certificate of the run's authority, PEM."""
        return self._folder().ca_file

    @property
    def client_certificate(self) -> Path:
        """A client certificate that is let in, PEM."""
        return self._folder().client_certificate

    @property
    def client_key(self) -> Path:
        """Its P-256 key, unencrypted PKCS#8 PEM, mode 0600."""
        return self._folder().client_key

    def issue_client_certificate(
        self, *, key: Literal["ec", "rsa"] = "ec", passphrase: bytes | None = None
    ) -> tuple[Path, Path]:
        """Issue one more client certificate, for a new key.

        Args:
            key: ``"ec"`` (P-256) or ``"rsa"`` (2048 bits).
            passphrase: Encrypts the key file where given.

        Returns:
            The PEM files of the certificate and of the key.

        Raises:
            InvalidInputError: Another kind of key, or a passphrase that cannot be one.
        """
        return self._folder().issue_client(key=key, passphrase=passphrase)

    def sign_client_request(self, request: bytes) -> Path:
        """Issue a client certificate from a CSR, as Thales does: for a key in an HSM.

        Args:
            request: The CSR in PEM, as ``d1-signer csr`` prints it. Its subject is not kept.

        Returns:
            The PEM file of the certificate.

        Raises:
            InvalidInputError: Not a CSR, or not signed by its key.
            InvalidKeyError: The key is neither RSA nor EC.
        """
        return self._folder().sign_request(request)

    @without_locals
    def register_key(self, kid: str, jwk: Mapping[str, str]) -> None:
        """Make a public key known, as D1 does at onboarding; the kid's former key is replaced.

        Args:
            kid: The kid that assertions will name.
            jwk: A public P-256 JWK (RFC 7518 section 6.2.1).

        Raises:
            InvalidInputError: The kid is empty or no string, the JWK is no mapping, or it has
                another kid.
            InvalidKeyError: Not a public P-256 signature key.
        """
        self._keys.add(kid, jwk)

    def forget_key(self, kid: str) -> None:
        """Forget a key, as at the end of a rotation.

        Raises:
            InvalidInputError: The kid is empty or no string.
        """
        self._keys.remove(kid)

    def misbehave(
        self, fault: Fault | str | None, *, times: int | None = None, **parameters: object
    ) -> None:
        """Misbehave at the token endpoint from the next request on.

        Args:
            fault: How, see `Fault`; None to behave again.
            times: For how many requests; None until told otherwise.
            **parameters: Those of the fault.

        Raises:
            InvalidInputError: No such fault or parameter, or a value of a wrong type.
        """
        self._token_plan.order(fault, times=times, parameters=parameters)

    def misbehave_banking(
        self, fault: Fault | str | None, *, times: int | None = None, **parameters: object
    ) -> None:
        """Misbehave at the protected resource; arguments as for `misbehave`.

        Faults that concern token answers only are refused.
        """
        self._banking_plan.order(fault, times=times, parameters=parameters)

    def revoke_tokens(self) -> None:
        """Answer 401 at the protected resource to all tokens issued so far."""
        self._office.revoke_all()

    def set_token_lifetime(self, seconds: float) -> None:
        """Let tokens issued from now on live so many seconds.

        Raises:
            InvalidInputError: Not a positive finite number.
        """
        self._office.lifetime = _checked_lifetime(seconds)

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self._recorder.counters

    @property
    def requests(self) -> tuple[TokenRequest, ...]:
        """The last 10,000 token requests in the order of arrival."""
        return self._recorder.requests

    @property
    def exchanges(self) -> tuple[Exchange, ...]:
        """The last 1,000 answered requests of any kind; they hold assertions and tokens."""
        return self._recorder.exchanges

    def _service(self) -> Service:
        verifier = AssertionVerifier(
            issuer_id=self._issuer_id,
            audience=self.token_endpoint,
            keys=self._keys,
            leeway=self._leeway,
        )
        return Service(
            issuer_id=self._issuer_id,
            clock=self._clock,
            office=self._office,
            verifier=verifier,
            recorder=self._recorder,
            token_plan=self._token_plan,
            banking_plan=self._banking_plan,
        )

    def _origin(self) -> str:
        if self._port == 0:
            raise ConfigurationError("The sandbox has no port before it is started.")
        return f"{'https' if self._tls else 'http'}://{HOST}:{self._port}"

    def _folder(self) -> CertificateFolder:
        if self._certificates is None:
            raise ConfigurationError("The sandbox has certificates only with TLS, once started.")
        return self._certificates


def _is_finite(value: object) -> bool:
    # Compared and not converted: an int beyond the floats would be an OverflowError.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _checked_lifetime(seconds: float) -> float:
    if not _is_finite(seconds) or seconds <= 0:
        raise InvalidInputError("A token lifetime is a positive number of seconds.")
    return seconds
