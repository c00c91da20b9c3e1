# SPDX-License-Identifier: Apache-2.0
"""What `d1-signer custody` does: each key is looked at, told about, and signs the bundle."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from d1_signer.cli._custody_text import key_text, shortfall
from d1_signer.cli._options import BackendOptions
from d1_signer.cli._output import Output
from d1_signer.cli._output_file import OutputFile
from d1_signer.cli._settings import Keys, open_key
from d1_signer.cli._trail import current_trail, trail_settings
from d1_signer.custody.bundle import KeyReport, make_bundle
from d1_signer.custody.page import page
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.custody.report import Maker, utc
from d1_signer.errors import D1SignerError
from d1_signer.signing.key_uri import scheme_of, without_secrets
from d1_signer.signing.signer import Signer

if TYPE_CHECKING:
    from d1_signer.audit.trail import AuditTrail

_NO_DEMANDS = CustodyPolicy()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Subject:
    """A key to look at, and how it is opened."""

    use: str
    uri: str
    options: BackendOptions
    kid: str | None
    trail: AuditTrail | None

    def open(self) -> Signer:
        # Held against the policy later, so that a key that falls short is reported as well.
        return open_key(self.uri, self.options, kid=self.kid, policy=_NO_DEMANDS, trail=self.trail)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Looked:
    """What was found of one key, and its signer where it could be opened."""

    told: KeyReport
    signer: Signer | None
    unmet: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        told = self.told
        if told.report is None:
            error = told.error and told.error.to_dict()
            return {"use": told.use, "location": told.location, "error": error}
        return {"use": told.use, **told.report.to_dict(), "unmet": list(self.unmet)}


def look(
    keys: Keys,
    client_key: str | None,
    require: str | None,
    *,
    bundle: OutputFile | None,
    challenge: str | None,
    page_file: OutputFile | None,
    output: Output,
) -> int:
    """Look at all keys, and tell; returns the exit status.

    Raises:
        D1SignerError: No key can be asked, or a file cannot be written.
    """
    policy = _NO_DEMANDS if require is None else CustodyPolicy.parse(require, where="--require")
    made_by, made_at = Maker.here(), int(time.time())
    with ExitStack() as stack:
        looked = [_looked_at(stack, one, policy) for one in _subjects(keys, client_key)]
        _require_one(looked)
        falls_short = any(one.unmet for one in looked)
        made: bytes | None = None
        if bundle is not None and not falls_short:
            told = [(one.told, one.signer) for one in looked]
            made = make_bundle(told, challenge=challenge, made_by=made_by, made_at=made_at)
            bundle.write(made, "the bundle", output)
        if page_file is not None:
            shown = [(one.told, one.unmet) for one in looked]
            content = page(shown, policy=policy, made_by=made_by, made_at=made_at, bundle=made)
            page_file.write(content, "the page", output)
    document = {
        "time": utc(made_at),
        "made_by": asdict(made_by),
        "policy": list(policy.words),
        "keys": [one.to_dict() for one in looked],
    }
    output.result(document, "\n\n".join(key_text(one.told, one.unmet) for one in looked))
    if not output.json:
        for one in looked:
            if one.unmet:
                output.failure(shortfall(one.told, one.unmet, policy))
    if bundle is not None and falls_short:
        output.note("No bundle is written: a key is not shown to be what is required.")
    return int(falls_short or any(one.told.report is None for one in looked))


def _subjects(keys: Keys, client_key: str | None) -> list[_Subject]:
    """The keys and what each is for; options are for the signing keys alone."""
    sealing = trail_settings()
    # Whoever only looks at the key that seals needs no trail.
    trail = None if sealing.folder is None else current_trail()
    plain = BackendOptions()
    found = [
        _Subject(use="assertion", uri=uri, options=keys.options, kid=keys.kid, trail=trail)
        for uri in keys.uris
    ]
    if client_key is not None and scheme_of(client_key):
        found.append(_Subject(use="client", uri=client_key, options=plain, kid=None, trail=trail))
    if sealing.key is not None:
        # A trail does not record the uses of the key that seals it.
        found.append(_Subject(use="audit", uri=sealing.key, options=plain, kid=None, trail=None))
    return found


def _looked_at(stack: ExitStack, one: _Subject, policy: CustodyPolicy) -> _Looked:
    location = without_secrets(one.uri)
    try:
        signer = stack.enter_context(one.open())
        report = signer.custody()
    except D1SignerError as error:
        return _Looked(told=KeyReport(use=one.use, location=location, error=error), signer=None)
    told = KeyReport(use=one.use, location=report.evidence.location, report=report)
    return _Looked(told=told, signer=signer, unmet=policy.unmet(report.evidence))


def _require_one(looked: Sequence[_Looked]) -> None:
    """Where no key can be reported on, the first one's error is that of the command."""
    first = looked[0].told.error
    if first is not None and all(one.told.report is None for one in looked):
        raise first.fresh()
