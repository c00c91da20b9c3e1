# SPDX-License-Identifier: Apache-2.0
"""The steps of `d1-signer check`: what is tried, from the key to an access token."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

import click
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from d1_signer.cli._checking_store import check_store
from d1_signer.cli._checking_trail import check_trail
from d1_signer.cli._checklist import ACCESS_TOKEN, CERTIFICATE, ENDPOINT, Checklist
from d1_signer.cli._config import policy_in, settings_in
from d1_signer.cli._connection import Connection
from d1_signer.cli._custody_text import answered
from d1_signer.cli._opening import Opening
from d1_signer.cli._output import moment
from d1_signer.cli._settings import Issuer, Keys
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.errors import (
    ConfigurationError,
    D1SignerError,
    InvalidSignatureError,
    KeyUriError,
    TokenError,
    TokenRefusedError,
    TokenResponseError,
)
from d1_signer.secret import Secret
from d1_signer.signing.key_uri import scheme_of, split_fragment, without_secrets
from d1_signer.signing.registry import load_backend_module
from d1_signer.signing.signer import Signer
from d1_signer.signing.steps import Step
from d1_signer.token.d1 import Environment, origin
from d1_signer.token.endpoint import Reply, RequestFormat, TokenEndpoint
from d1_signer.token.renewal import MOST_SKEW, Limits
from d1_signer.transport.certificates import dates_at_fault
from d1_signer.transport.client import DAYS_OF_WARNING, ClientTls
from d1_signer.transport.hosts import shown_address


def take_steps(
    checklist: Checklist, keys: Keys, issuer: Issuer, connection: Connection, warn_days: int | None
) -> None:
    """Take all steps that the settings allow."""
    issuer.optional_environment()  # one that cannot be read, before anybody is asked for a PIN
    if not check_trail(checklist):
        _skip_all(checklist, keys, issuer)
        checklist.end()
        return
    with ExitStack() as stack:
        signers = [
            (_about(keys, uri), _check_key(checklist, keys, uri, stack)) for uri in keys.uris
        ]
        _check_d1(checklist, signers, issuer, connection, warn_days)
    check_store(checklist, issuer)
    checklist.end()


def _skip_all(checklist: Checklist, keys: Keys, issuer: Issuer) -> None:
    reason = "the audit trail takes no record"
    for uri in keys.uris:
        checklist.begin(_shown_key(uri), _about(keys, uri))
        checklist.skipped("key", reason, depends=True)
    checklist.begin(*_shown_environment(issuer.optional_environment()))
    for name in (CERTIFICATE, ENDPOINT, ACCESS_TOKEN):
        checklist.skipped(name, reason, depends=True)
    check_store(checklist, issuer, not_taken=reason)


def _check_key(checklist: Checklist, keys: Keys, uri: str, stack: ExitStack) -> Signer | None:
    """Check one key; returns its signer if it can sign."""
    checklist.begin(_shown_key(uri), _about(keys, uri))
    opening = Opening(uri=uri, options=keys.options.of(uri))
    try:
        signer = stack.enter_context(keys.open(uri))
    except D1SignerError as error:
        if opening.is_wrong_option(error):
            raise
        _tell_where_it_stopped(checklist, opening, error)
        return None
    _tell_steps(checklist, opening.steps[:-1], opening.not_taken(None))
    checklist.go_on(f"kid {signer.kid}", kid=signer.kid)
    checklist.ok("key")
    with checklist.step("signature") as detail:
        _verify_with_cryptography(signer)
        detail("verified by cryptography")
    able = checklist.passed()
    with checklist.step("custody") as detail:
        evidence = signer.custody().evidence
        for name in ("exportable", "generated_in_place", "hardware"):
            detail(f"{name.replace('_', ' ')}: {answered(evidence, name)}")
        for fact in evidence.facts:
            if fact.name == "locking":
                detail(f"locking: {fact.value}")
        if not _is_judged():
            detail("not judged: no D1_CUSTODY_POLICY is set")
    return signer if able else None


def _is_judged() -> bool:
    """Whether a key that falls short would not have been opened."""
    of_the_file = policy_in(click.get_current_context())
    return of_the_file is not None or CustodyPolicy.from_environment() is not None


def _about(keys: Keys, uri: str) -> str:
    """The key in short, before it is open."""
    try:
        kid = keys.kid or (split_fragment(uri)[1] if _is_served(uri) else None)
    except KeyUriError:  # opening it will tell
        kid = None
    return f"kid {kid}" if kid else _shown_key(uri)


def _shown_key(uri: str) -> str:
    # What nothing serves may be anything, a password even.
    return without_secrets(uri) if _is_served(uri) else f"{scheme_of(uri)}:"


def _is_served(uri: str) -> bool:
    try:
        load_backend_module(uri)
    except KeyUriError:
        return False
    except D1SignerError:
        pass  # opening it will tell
    return True


def _tell_where_it_stopped(checklist: Checklist, opening: Opening, error: D1SignerError) -> None:
    names = (*opening.steps, "signature", "custody")
    stopped_at = opening.stopped_at(error)
    at = names.index(stopped_at)
    _tell_steps(checklist, names[:at], opening.not_taken(error))
    checklist.failed(stopped_at, error)
    for name in names[at + 1 :]:
        checklist.skipped(name, f"{stopped_at} failed", depends=True)


def _tell_steps(checklist: Checklist, names: Sequence[str], not_taken: Mapping[str, str]) -> None:
    for name in names:
        if name in not_taken:
            checklist.skipped(name, not_taken[name])
        else:
            checklist.ok(name)


def _verify_with_cryptography(signer: Signer) -> None:
    """Sign and verify by another implementation than ours, from the PEM that is registered."""
    message = b"d1-signer check " + secrets.token_bytes(32)
    with Step(f"a signature of kid {signer.kid}"):
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
    checklist: Checklist,
    signers: Sequence[tuple[str, Signer | None]],
    issuer: Issuer,
    connection: Connection,
    warn_days: int | None,
) -> None:
    environment = issuer.optional_environment()
    checklist.begin(*_shown_environment(environment))
    if not (issuer.given or connection.given or warn_days is not None):
        checklist.skipped(CERTIFICATE, "give --environment and --issuer-id to check D1 as well")
        for name in (ENDPOINT, ACCESS_TOKEN):
            checklist.skipped(name, "no setting of D1 is given")
        return
    tls = _check_certificate(checklist, environment, connection, warn_days)
    if environment is None:
        with checklist.step(ENDPOINT):
            issuer.required_environment()
    elif tls is None:
        checklist.skipped(ENDPOINT, "the TLS settings failed", depends=True)
    elif not _check_endpoint(checklist, environment, tls, connection):
        tls = None
    host = _shown_environment(environment)[1]
    for about, signer in signers:
        if signer is None:
            checklist.go_on(f"{about} at {host}")
        else:
            checklist.go_on(f"kid {signer.kid} at {host}", kid=signer.kid)
        _check_token(checklist, signer, issuer, connection, tls if environment else None)


def _shown_environment(environment: Environment | None) -> tuple[str, str]:
    if environment is None:
        return "D1", "D1"
    _, host, port = origin(environment.base_url)
    return f"D1 {environment.base_url}", shown_address(host, port)


def _check_token(
    checklist: Checklist,
    signer: Signer | None,
    issuer: Issuer,
    connection: Connection,
    tls: ClientTls | None,
) -> None:
    """Get a token for a key; ``tls`` is None where the endpoint was not reached."""
    if issuer.issuer_id is not None and (signer is None or tls is None):
        checklist.skipped(ACCESS_TOKEN, "an earlier step failed", depends=True)
        return
    with checklist.step(ACCESS_TOKEN) as detail:
        issuer.required_id()
        assert signer is not None  # noqa: S101 (tells the type checker)
        with connection.fetcher(signer, issuer, tls=tls) as fetcher:
            token = fetcher.token()
        detail(f"scope {token.scope!r}, expires {moment(token.expires_at)}")


def _check_certificate(
    checklist: Checklist,
    environment: Environment | None,
    connection: Connection,
    warn_days: int | None,
) -> ClientTls | None:
    """Check the TLS settings; returns what makes contexts of them if they can be used."""
    try:
        tls = ClientTls(connection.certificate(environment), connection.ca_file)
    except D1SignerError as error:
        checklist.failed(CERTIFICATE, error)
        return None
    if tls.certificate is not None:
        _tell_dates(checklist, tls.certificate, warn_days)
    elif warn_days is None:
        checklist.skipped(CERTIFICATE, "none is given")
    else:
        missing = ConfigurationError(
            f"There is no client certificate whose end --warn-days {warn_days} could look at.",
            hint="Give --client-cert and --client-key, or leave --warn-days out.",
        )
        checklist.failed(CERTIFICATE, missing)
    return tls


def _tell_dates(checklist: Checklist, certificate: x509.Certificate, warn_days: int | None) -> None:
    """Tell until when it is valid; the connection is tried in any case: our clock may be wrong."""
    end = certificate.not_valid_after_utc
    days = (end - datetime.now(UTC)).days
    at_fault = dates_at_fault(certificate)
    detail = f"valid until {end:%Y-%m-%d} ({days} days)"
    if at_fault:
        detail = f"it {at_fault} by this machine's clock"
    elif days < DAYS_OF_WARNING:
        detail += ": have Thales sign a new one"
    not_after = end.isoformat()
    if warn_days is not None and days < warn_days:
        error = ConfigurationError(
            f"The client certificate is {detail}; --warn-days {warn_days} asks for more."
            if not at_fault
            else f"The client certificate {at_fault} by this machine's clock.",
            hint="Have Thales sign a new one from a new CSR.",
        )
        checklist.failed(CERTIFICATE, error, not_after=not_after)
    elif at_fault:
        checklist.unclear(CERTIFICATE, detail, not_after=not_after)
    else:
        checklist.ok(CERTIFICATE, detail, not_after=not_after)


def _check_endpoint(
    checklist: Checklist, environment: Environment, tls: ClientTls, connection: Connection
) -> bool:
    """Let the endpoint refuse something that is no assertion; returns whether anything answers.

    How D1 words a refusal was never seen: other answers than an OAuth error are unclear.
    """
    try:
        reply = _answer_to_no_assertion(environment, tls, connection)
    except ConfigurationError as error:  # of the proxy
        checklist.failed(ENDPOINT, error)
        return False
    outcome = reply.outcome
    answered = reply.status is not None or isinstance(outcome, TokenResponseError)
    if isinstance(outcome, D1SignerError) and not answered:
        checklist.failed(ENDPOINT, outcome)
        return False
    if abs(reply.clock_offset or 0.0) > MOST_SKEW:
        checklist.failed(ENDPOINT, _wrong_clock(reply.clock_offset or 0.0))
        return False
    if isinstance(outcome, TokenRefusedError) and outcome.error:
        checklist.ok(
            ENDPOINT,
            f"refuses what is no assertion, as it should (HTTP {reply.status}){_clock(reply)}",
        )
    elif isinstance(outcome, D1SignerError):
        checklist.unclear(ENDPOINT, f"{outcome.message}{_clock(reply)}")
    else:
        checklist.unclear(ENDPOINT, f"HTTP {reply.status}: it gives a token for no assertion")
    return True


def _answer_to_no_assertion(
    environment: Environment, tls: ClientTls, connection: Connection
) -> Reply:
    settings = settings_in(click.get_current_context())
    limits = Limits() if settings is None else settings.limits
    endpoint = TokenEndpoint(
        environment,
        tls,
        proxy=connection.optional_proxy(),
        connect_timeout=limits.connect,
        read_timeout=limits.read,
        request_format=RequestFormat.of(connection.request_format),
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
    return reply


def _wrong_clock(offset: float) -> TokenError:
    side = "behind" if offset > 0 else "ahead of"
    return TokenError(
        f"This machine's clock is {abs(offset):.0f} seconds {side} D1's, as the Date of its answer "
        "says: D1 refuses every assertion that is made here.",
        hint="Set the clock of this machine right.",
        details={"clock_offset": round(offset)},
    )


def _clock(reply: Reply) -> str:
    if reply.clock_offset is None:
        return ""
    ahead = round(reply.clock_offset)
    # The Date header has whole seconds, and the answer took its time.
    return f", D1's clock {f'differs by {ahead:+d} s' if abs(ahead) > 1 else 'agrees'}"
