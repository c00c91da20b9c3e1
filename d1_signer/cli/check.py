# SPDX-License-Identifier: Apache-2.0
"""`d1-signer check`: from the key to an access token, step by step."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import click
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from d1_signer.cli._opening import Opening
from d1_signer.cli._output import (
    OptionsOnly,
    Output,
    explanation,
    moment,
    printable,
    said,
    to_stdout,
    with_output_options,
)
from d1_signer.cli._settings import (
    Connection,
    Issuer,
    Keys,
    with_connection,
    with_issuer,
    with_keys,
)
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidSignatureError,
    KeyUriError,
    TokenResponseError,
    TokenUnavailable,
)
from d1_signer.secret import Secret, shown_path
from d1_signer.signing.key_uri import scheme_of, without_secrets
from d1_signer.signing.registry import load_backend_module
from d1_signer.signing.signer import Signer
from d1_signer.token.d1 import Environment
from d1_signer.token.endpoint import TokenEndpoint
from d1_signer.token.renewal import Limits
from d1_signer.transport.client import ClientTls

_CERTIFICATE = "client-certificate"
_REFUSALS = frozenset({400, 401, 403})


class Status(StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step that is over; ``subject`` is the key or the environment it was about."""

    name: str
    subject: str
    status: Status
    detail: str = ""
    error: D1SignerError | None = None

    def to_dict(self) -> dict[str, object]:
        """The step as JSON-ready values."""
        return {
            "step": self.name,
            "subject": self.subject,
            "status": str(self.status),
            "detail": self.detail,
            "error": self.error and self.error.to_dict(),
        }


@dataclass(slots=True)
class Checklist:
    """The steps so far; each is told as it ends, since the next one may take long."""

    output: Output
    steps: list[Step] = field(default_factory=list)
    _subject: str = ""

    def begin(self, subject: str) -> None:
        """Turn to a key or to the environment."""
        self._subject = subject
        self._tell(printable(subject))

    def ok(self, name: str, detail: str = "") -> None:
        """A step has passed."""
        self._add(Step(name=name, subject=self._subject, status=Status.OK, detail=detail))

    def skipped(self, name: str, reason: str) -> None:
        """A step was not taken."""
        self._add(Step(name=name, subject=self._subject, status=Status.SKIPPED, detail=reason))

    def failed(self, name: str, error: D1SignerError) -> None:
        """A step has failed; tells what to do."""
        step = Step(
            name=name,
            subject=self._subject,
            status=Status.FAILED,
            detail=error.message,
            error=error,
        )
        self._add(step)
        for line in explanation(error):
            self._tell(f"           {line}")

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[str], None]]:
        """Run a step: it has passed unless one of our errors ends it.

        Gives a function that takes the step's detail; the error is kept and not raised.
        """
        details: list[str] = []
        try:
            yield details.append
        except D1SignerError as error:
            self.failed(name, error)
        else:
            self.ok(name, ", ".join(details))

    @property
    def first_failure(self) -> Step | None:
        """The step at which it stopped."""
        return next((step for step in self.steps if step.status is Status.FAILED), None)

    def passed(self) -> bool:
        """Whether the last step passed."""
        return self.steps[-1].status is Status.OK

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self._tell(f"  {step.status:<7}  {step.name:<18}  {printable(step.detail)}".rstrip())

    def _tell(self, line: str) -> None:
        if not self.output.json:
            to_stdout(line)


@click.command(cls=OptionsOnly)
@with_keys
@with_issuer
@with_connection
@with_output_options
@click.pass_context
def check(
    context: click.Context, keys: Keys, issuer: Issuer, connection: Connection, *, output: Output
) -> None:
    """Check keys, TLS and D1 step by step.

    It says at which step it stopped and what to do. With a key alone, the key is checked; with
    the other settings, the client certificate, the endpoint and a token for each key as well. The
    exit status is 0 only if no step failed.
    """
    keys.require()
    checklist = Checklist(output)
    with ExitStack() as stack:
        signers = [_check_key(checklist, keys, uri, stack) for uri in keys.uris]
        _check_d1(checklist, signers, issuer, connection)
    stopped = checklist.first_failure
    document = {
        "ok": stopped is None,
        "stopped_at": stopped and stopped.to_dict(),
        "steps": [step.to_dict() for step in checklist.steps],
    }
    output.result(document, f"\n{_conclusion(checklist, stopped)}")
    if stopped:
        context.exit(1)


def _conclusion(checklist: Checklist, stopped: Step | None) -> str:
    if stopped:
        return f"Stopped at {stopped.name} of {printable(stopped.subject)}; see above what to do."
    skipped = [step.name for step in checklist.steps if step.status is Status.SKIPPED]
    return f"Passed; not checked: {', '.join(skipped)}." if skipped else "All steps passed."


def _check_key(checklist: Checklist, keys: Keys, uri: str, stack: ExitStack) -> Signer | None:
    """Check one key; returns its signer if it can sign."""
    checklist.begin(_shown_key(uri))
    opening = Opening(uri=uri, options=keys.options.given)
    try:
        signer = stack.enter_context(keys.open(uri))
    except D1SignerError as error:
        if opening.is_wrong_option(error):
            raise
        _tell_where_it_stopped(checklist, opening, error)
        return None
    _tell_steps(checklist, opening.steps[:-1], opening.not_taken(None))
    checklist.ok("key", f"kid {signer.kid}")
    with checklist.step("signature") as detail:
        _verify_with_cryptography(signer)
        detail("verified by cryptography")
    able = checklist.passed()
    with checklist.step("custody") as detail:
        evidence = signer.custody().evidence
        detail(f"exportable: {said(evidence.exportable)}")
        detail(f"generated in place: {said(evidence.generated_in_place)}")
        detail(f"hardware: {said(evidence.hardware)}")
        for fact in evidence.facts:
            if fact.name == "locking":
                detail(f"locking: {fact.value}")
    return signer if able else None


def _shown_key(uri: str) -> str:
    try:
        load_backend_module(uri)
    except KeyUriError:
        return f"{scheme_of(uri)}:"  # what nothing serves may be anything, a password even
    except D1SignerError:
        pass  # opening it will tell
    return without_secrets(uri)


def _tell_where_it_stopped(checklist: Checklist, opening: Opening, error: D1SignerError) -> None:
    names = (*opening.steps, "signature", "custody")
    stopped_at = opening.stopped_at(error)
    at = names.index(stopped_at)
    _tell_steps(checklist, names[:at], opening.not_taken(error))
    checklist.failed(stopped_at, error)
    for name in names[at + 1 :]:
        checklist.skipped(name, f"{stopped_at} failed")


def _tell_steps(checklist: Checklist, names: Sequence[str], not_taken: Mapping[str, str]) -> None:
    for name in names:
        if name in not_taken:
            checklist.skipped(name, not_taken[name])
        else:
            checklist.ok(name)


def _verify_with_cryptography(signer: Signer) -> None:
    """Sign and verify by another implementation than ours, from the PEM that is registered."""
    message = b"d1-signer check " + secrets.token_bytes(32)
    signature = signer.sign(message)
    key = load_pem_public_key(signer.public_key.pem().encode())
    r, s = (int.from_bytes(half, "big") for half in (signature[:32], signature[32:]))
    try:
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 (tells the type checker)
        key.verify(utils.encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
    except InvalidSignature:
        raise InvalidSignatureError(
            "The signature does not verify under the key's PEM.",
            hint="Do not register this key; report this to the maintainers of d1_signer.",
        ) from None


def _check_d1(
    checklist: Checklist, signers: list[Signer | None], issuer: Issuer, connection: Connection
) -> None:
    environment = issuer.optional_environment()
    checklist.begin(f"D1 {environment.base_url}" if environment else "D1")
    tls = _check_certificate(checklist, environment, connection)
    if environment is None or tls is None:
        reason = "the TLS settings failed" if environment else "no environment is given"
        checklist.skipped("endpoint", reason)
        checklist.skipped("access-token", reason)
        return
    with checklist.step("endpoint") as detail:
        detail(_reach(environment, tls, connection.proxy))
    reached = checklist.passed()
    for signer in signers:
        if signer is None or not reached or issuer.issuer_id is None:
            missing = (
                "no issuer id is given" if issuer.issuer_id is None else "an earlier step failed"
            )
            checklist.skipped("access-token", missing)
            continue
        with (
            checklist.step("access-token") as detail,
            connection.fetcher(signer, issuer, tls=tls) as fetcher,
        ):
            token = fetcher.token()
            detail(f"kid {signer.kid}, scope {token.scope!r}, expires {moment(token.expires_at)}")


def _check_certificate(
    checklist: Checklist, environment: Environment | None, connection: Connection
) -> ClientTls | None:
    """Check the TLS settings; returns what makes contexts of them if they can be used."""
    try:
        certificate = connection.certificate(environment)
        tls = ClientTls(certificate, connection.ca_file)
        detail = None
        if tls.certificate is not None:
            detail = _validity(tls.certificate, connection.client_cert or "")
    except D1SignerError as error:
        checklist.failed(_CERTIFICATE, error)
        return None
    if detail is None:
        checklist.skipped(_CERTIFICATE, "none is given")
    else:
        checklist.ok(_CERTIFICATE, detail)
    return tls


def _validity(certificate: x509.Certificate, path: str) -> str:
    """Until when the certificate is valid.

    Raises:
        ConfigurationError: It is not valid now.
    """
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.now(UTC)
    if not begin <= now <= end:
        raise ConfigurationError(
            f"{shown_path(Path(path).absolute())} is valid from {begin:%Y-%m-%d} to "
            f"{end:%Y-%m-%d}, and not now.",
            hint="Use the one that is valid now; Thales signs a new one from a new CSR.",
        )
    return f"valid until {end:%Y-%m-%d} ({(end - now).days} days)"


def _reach(environment: Environment, tls: ClientTls, proxy: str | None) -> str:
    """Let the endpoint refuse something that is no assertion: it was reached, and knows us.

    Raises:
        TokenError: It was not reached, or what answers is not a token endpoint.
    """
    limits = Limits()
    endpoint = TokenEndpoint(
        environment,
        tls,
        proxy=proxy,
        connect_timeout=limits.connect,
        read_timeout=limits.read,
    )
    cut = threading.Timer(limits.total, endpoint.abort)
    cut.daemon = True
    with contextlib.closing(endpoint):
        cut.start()
        reply = endpoint.post(
            Secret("not-an-assertion"),
            correlation_id=f"check-{secrets.token_hex(8)}",
            deadline=time.monotonic() + limits.total,
        )
        cut.cancel()
    unreached = reply.status is None or isinstance(reply.outcome, TokenUnavailable)
    if isinstance(reply.outcome, D1SignerError) and unreached:
        raise reply.outcome
    if reply.status not in _REFUSALS:
        raise TokenResponseError(
            f"HTTP {reply.status} is not what a token endpoint answers to a bad assertion.",
            hint="Check the environment's URL; it is what stands before /oauth2/token.",
        )
    if reply.clock_offset is None:
        return f"HTTP {reply.status}"
    ahead = round(reply.clock_offset)
    # The Date header has whole seconds, and the answer took its time.
    clock = f"differs by {ahead:+d} s" if abs(ahead) > 1 else "agrees"
    return f"HTTP {reply.status}, D1's clock {clock}"
