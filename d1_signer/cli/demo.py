# SPDX-License-Identifier: Apache-2.0
"""`d1-signer demo`: from a key to a call of D1's banking API, on this machine alone."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d1_signer.cli._output import (
    OptionsOnly,
    Output,
    printable,
    said,
    with_output_options,
)
from d1_signer.errors import ConfigurationError, D1SignerError

if TYPE_CHECKING:
    from d1_signer.sandbox import Sandbox
    from d1_signer.sandbox.commands import HeldSignals
    from d1_signer.signing.signer import Signer
    from d1_signer.token.fetcher import TokenFetcher

_ISSUER = "demo-issuer"
_KID = "demo-2026"
_SHOWN_FACTS = ("CKA_LOCAL", "CKA_SENSITIVE", "CKA_EXTRACTABLE", "token model")
_OK = 200


@dataclass(slots=True)
class _Story:
    """What happens, told as it happens; one JSON object in the end where that is wanted."""

    output: Output
    signals: HeldSignals
    document: dict[str, dict[str, object]] = field(default_factory=dict)

    def begin(self, name: str, title: str) -> None:
        """A new part."""
        if self.document:
            self._tell("")
        self._tell(f"{len(self.document) + 1}. {title}", heading=True)
        self.document[name] = {}

    def show(self, name: str, value: object, *, told: str | None = None) -> None:
        """A fact of the part."""
        part = next(reversed(self.document.values()))
        part[name.lower().replace(" ", "_")] = value
        self._tell(f"   {name:<22} {printable(told or str(value))}")

    def require(self, held: object, what: str) -> None:
        """Say what held; end the demo where it did not."""
        if not held:
            raise D1SignerError(
                f"The demo found something that should not be: not true that {what}.",
                hint="Report it to the maintainers of d1_signer.",
            )
        self.held(what)

    def held(self, what: str) -> None:
        """Say what held."""
        self._tell(f"   ok: {what}")

    def _tell(self, line: str, *, heading: bool = False) -> None:
        if (status := self.signals.status()) is not None:
            raise click.exceptions.Exit(status)
        if not self.output.json:
            self.output.line(line, heading=heading)


@click.command(cls=OptionsOnly)
@with_output_options
def demo(*, output: Output) -> None:
    """Go the whole way on this machine: a key, a token, a call.

    The key is made in a throw-away token of SoftHSM where that is installed, else in a file; D1 is
    the sandbox. Nothing is read of your settings, and nothing remains.
    """
    from d1_signer.custody.policy import CustodyPolicy
    from d1_signer.sandbox import Sandbox
    from d1_signer.sandbox.commands import PASSED_ON, signals_held, unless_ignored
    from d1_signer.signing.opening import generate_key, open_signer
    from d1_signer.token.fetcher import TokenFetcher
    from d1_signer.transport.credentials import ClientCertificate

    # A signal ends it between two lines: a call of the module would write on in a removed folder.
    with signals_held(*unless_ignored(*PASSED_ON)) as signals, ExitStack() as stack:
        story = _Story(output, signals)
        uri = stack.enter_context(_place(story))
        key = generate_key(uri)
        story.show("key URI", key.uri.partition("?")[0])
        story.show("thumbprint", key.public_key.thumbprint())
        nothing_demanded = CustodyPolicy()  # else D1_CUSTODY_POLICY would be read
        signer = stack.enter_context(open_signer(uri, kid=_KID, custody_policy=nothing_demanded))
        _sign(story, signer)
        _tell_custody(story, signer)
        d1 = stack.enter_context(Sandbox(_ISSUER))
        fetcher = stack.enter_context(
            TokenFetcher(
                signer,
                issuer_id=_ISSUER,
                environment=d1.base_url,
                client_certificate=ClientCertificate(d1.client_certificate, d1.client_key),
                ca_file=d1.ca_file,
            )
        )
        d1.register_key(signer.kid, signer.public_key.jwk())
        _get_token(story, d1, fetcher)
        _call(story, d1, fetcher)
    output.result(story.document, "\nNothing remains: the key and the sandbox are gone.")


@contextmanager
def _place(story: _Story) -> Iterator[str]:
    """Where the key is made: its key URI."""
    import tempfile

    from d1_signer.sandbox.softhsm import throw_away_token

    missing = _missing_for_softhsm()
    if missing is not None:
        story.begin("key", "A P-256 key, made in a file")
        story.show("not in SoftHSM", str(missing))
        with tempfile.TemporaryDirectory(prefix="d1-signer-demo-") as folder:
            yield (Path(folder) / "key.pem").as_uri()
        return
    story.begin("key", "A P-256 key, made inside the HSM (SoftHSM, with a throw-away token)")
    former = os.environ.get("SOFTHSM2_CONF")
    with throw_away_token("d1-demo") as token:
        os.environ["SOFTHSM2_CONF"] = str(token.configuration)
        try:
            yield token.key_uri(_KID)
        finally:
            del os.environ["SOFTHSM2_CONF"]
            if former is not None:
                os.environ["SOFTHSM2_CONF"] = former


def _missing_for_softhsm() -> ConfigurationError | None:
    """Why the key cannot be in SoftHSM."""
    from d1_signer.sandbox.softhsm import find_softhsm
    from d1_signer.signing.registry import load_backend_module

    try:
        find_softhsm()
        load_backend_module("pkcs11:")
    except ConfigurationError as error:
        return error
    return None


def _sign(story: _Story, signer: Signer) -> None:
    story.begin("signature", "A signature, made where the key is and verified here")
    message = b"the first signature"
    signature = signer.sign(message)
    story.show("algorithm", signer.algorithm)
    story.show("bytes", len(signature), told=f"{len(signature)}: r and s, 32 bytes each")
    signer.public_key.verify(signature, message)
    story.held("it verifies under the public key")


def _tell_custody(story: _Story, signer: Signer) -> None:
    story.begin("custody", "What is known about where the key lives, and who says so")
    evidence = signer.custody().evidence
    facts = {fact.name: fact for fact in evidence.facts}  # all: d1-signer custody
    for name in _SHOWN_FACTS:
        if name in facts:
            fact = facts[name]
            told = f"{said(fact.value):<12} {fact.source}, {fact.assurance}"
            story.show(name, fact.value, told=told)
    story.show("exportable", evidence.exportable, told=said(evidence.exportable))
    story.show("hardware", evidence.hardware, told=said(evidence.hardware))
    if "CKA_SENSITIVE" in facts:
        story.require(evidence.generated_in_place is True, "the key was made on the token")
        story.require(facts["CKA_SENSITIVE"].value is True, "its value is never shown in clear")
        story.require(evidence.exportable is False, "it cannot leave the token")


def _get_token(story: _Story, d1: Sandbox, fetcher: TokenFetcher) -> None:
    story.begin("assertion", "D1 knows the public key, and takes an assertion signed by it")
    token = fetcher.token()
    (request,) = d1.requests  # as the sandbox received it
    story.show("endpoint", d1.token_endpoint)
    story.show("header", dict(request.header), told=json.dumps(request.header))
    for name, value in request.claims.items():
        story.show(f"claim {name}", value)
    story.begin("token", "The access token, for all threads of the process until it expires")
    story.show("value", "**** (masked)")
    story.show("scope", token.scope)
    seconds = round(token.expires_at - time.time())
    story.show("expires in", seconds, told=f"{seconds} s")
    story.require(fetcher.token() is token, "the second call gave the same token")
    story.require(d1.counters.token_requests == 1, "D1 was asked once")


def _call(story: _Story, d1: Sandbox, fetcher: TokenFetcher) -> None:
    story.begin("call", "A call of the banking API with it")
    with fetcher.session() as session:
        response = session.get(f"{d1.banking_url}/ping", timeout=10)
    story.show("GET", response.url)
    story.show("status", response.status_code)
    story.show("answer", response.json(), told=json.dumps(response.json()))
    story.require(response.status_code == _OK, "D1 took the token")
    story.require(d1.counters.token_requests == 1, "D1 was asked for no other token")
