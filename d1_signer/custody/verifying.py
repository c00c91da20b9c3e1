# SPDX-License-Identifier: Apache-2.0
"""Verifying a bundle: from its bytes alone, without a key, a setting, a network or a file."""

from __future__ import annotations

import calendar
import contextlib
import hashlib
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from d1_signer.attestation import AttestationError, Statement
from d1_signer.custody.bundle import USES, VERSION, encoded, is_challenge, signed_part
from d1_signer.custody.evidence import Attestation, Evidence, Fact
from d1_signer.custody.report import CustodyReport, Maker, utc
from d1_signer.custody.statements import Anchors, attested
from d1_signer.errors import CustodyError, D1SignerError
from d1_signer.es256 import PublicKey, raw_from_der

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_BUNDLE = ("d1_signer_custody_bundle", "challenge", "time", "made_by", "keys", "signatures")
_MAKER = ("host", "user", "d1_signer", "python")
_KEY = ("use", "public_key", "report", "statements")
_AWAY = ("use", "location", "error")
_ERROR = ("code", "message", "hint", "retryable", "details")
_STATEMENT = ("format", "content", "certificates", "nonce", "parts")
_MOST_STATEMENTS = 8  # each may cost three times 64 signatures
# Formats whose statements can carry what an auditor chose.
_WITH_NONCE = frozenset({"tpm2", "yubihsm"})


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedKey:
    """One key of a bundle.

    Attributes:
        use: What it is for.
        report: Its report, with what is attested worked out anew; None: it was away.
        location: Where it is.
        findings: What is wrong with what stands there of it.
        fresh: Of each statement, whether it carries the challenge itself.
    """

    use: str
    report: CustodyReport | None
    location: str
    findings: tuple[str, ...] = ()
    fresh: tuple[bool, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A bundle that was verified.

    Attributes:
        challenge: What it was made for.
        made_at: Seconds since the epoch, as it says itself.
        made_by: Who made it, as it says itself.
        keys: Its keys.
        findings: What is wrong with all of it.
    """

    challenge: str | None
    made_at: int
    made_by: Maker
    keys: tuple[CheckedKey, ...]
    findings: tuple[str, ...]

    @property
    def all_findings(self) -> tuple[str, ...]:
        """Everything that is wrong; empty: it holds."""
        return (*self.findings, *(finding for key in self.keys for finding in key.findings))


def check_bundle(
    content: bytes,
    *,
    anchors: Anchors,
    challenge: str | None = None,
    thumbprint: str | None = None,
) -> Checked:
    """Verify a bundle.

    Args:
        content: The file.
        anchors: Which keys statements may rest on.
        challenge: What it must have been made for; None: not judged.
        thumbprint: RFC 7638 thumbprint of a key that must be in it; None: not judged.

    Raises:
        CustodyError: It is no bundle, or not in its one form.
    """
    try:
        return _checked(content, anchors, challenge, thumbprint)
    except CustodyError:
        raise
    except (
        *(ValueError, TypeError, KeyError, AttributeError, RecursionError),
        *(OverflowError, OSError),  # a time that is too far away
        D1SignerError,  # what stands there as a public key is none
    ):
        raise _none("it is no such JSON object") from None


@dataclass(frozen=True, slots=True)
class _Held:
    """What a key and its statements are held against."""

    message: bytes
    anchors: Anchors
    challenge: str | None
    made_at: int


def _none(reason: str) -> CustodyError:
    return CustodyError(
        f"This is no custody bundle: {reason}.",
        hint="Give the file as d1-signer custody --bundle has written it, unchanged.",
    )


def _checked(
    content: bytes, anchors: Anchors, challenge: str | None, thumbprint: str | None
) -> Checked:
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("d1_signer_custody_bundle") != VERSION:
        raise _none(f"it does not say that it is one of version {VERSION}")
    if encoded(document) != content:
        raise _none("its bytes are not in the form that it has; something has changed them")
    _members(document, _BUNDLE)
    if len(document["keys"]) != len(document["signatures"]):
        raise _none("it has not one signature for each key")
    made_at = calendar.timegm(time.strptime(document["time"], _TIME))
    made_for = _text(document["challenge"], none=True)
    if utc(made_at) != document["time"] or not (made_for is None or is_challenge(made_for)):
        raise _none("its time or its challenge is not written as one")
    findings = []
    held = _Held(signed_part(content), anchors, made_for, made_at)
    keys = tuple(
        _key(told, signature, held)
        for told, signature in zip(document["keys"], document["signatures"], strict=True)
    )
    if challenge is not None and challenge != made_for:
        findings.append("It was made for another challenge, or for none.")
    thumbprints = [key.report.thumbprint for key in keys if key.report is not None]
    if not thumbprints:
        findings.append("No key has signed it.")
    if thumbprint is not None and thumbprint not in thumbprints:
        findings.append(f"No key in it has the thumbprint {thumbprint}.")
    return Checked(
        challenge=made_for,
        made_at=made_at,
        made_by=_maker(document["made_by"]),
        keys=keys,
        findings=tuple(findings),
    )


def _key(told: Mapping[str, Any], signature: object, held: _Held) -> CheckedKey:
    use = _text(told["use"])
    if use not in USES:
        raise _none("a key in it is for something that no key of ours is for")
    if "report" not in told:
        return _away(told, signature)
    _members(told, _KEY)
    findings = []
    der = _bytes(told["public_key"])
    public_key = PublicKey.from_der(der)
    report = _report(told["report"])
    if encoded(report.to_dict()) != encoded(told["report"]):
        raise _none("a report in it is not in the form that it has, or calls a fact attested")
    if public_key.der() != der or public_key.thumbprint() != report.thumbprint:
        findings.append(f"The report of {report.kid} is about another key than the one given.")
    try:
        raw = raw_from_der(_bytes(signature))
        public_key.verify(raw, held.message)
    except (D1SignerError, ValueError, TypeError):
        findings.append(f"The key {report.thumbprint} has not signed this.")
    found: list[Attestation] = []
    fresh: list[bool] = []
    if len(told["statements"]) > _MOST_STATEMENTS:
        raise _none(f"a key in it has more than {_MOST_STATEMENTS} statements")
    for one in told["statements"]:
        try:
            statement = _statement(one)
            one_found, carries = _attested(statement, public_key, held)
        except AttestationError as error:
            findings.append(f"{error.message} {error.hint}".strip())
        else:
            found.append(one_found)
            fresh.append(carries)
    evidence = report.evidence.with_attestations(tuple(found))
    return CheckedKey(
        use=use,
        report=replace(report, evidence=evidence),
        location=evidence.location,
        findings=tuple(findings),
        fresh=tuple(fresh),
    )


def _away(told: Mapping[str, Any], signature: object) -> CheckedKey:
    """A key that could not be asked."""
    _members(told, _AWAY)
    location, error = _text(told["location"]), told["error"]
    if signature is not None:
        raise _none("a key without a report has signed")
    if error is not None:
        _members(error, _ERROR)
    said = "" if error is None else _text(error["message"])
    finding = f"The key {location} could not be asked: {said}"
    return CheckedKey(use=told["use"], report=None, location=location, findings=(finding,))


def _attested(statement: Statement, public_key: PublicKey, held: _Held) -> tuple[Attestation, bool]:
    """What is attested, and whether the statement itself carries the challenge.

    The validity of certificates is judged at the moment at which the bundle was made.
    """
    at = held.made_at
    if held.challenge is not None and statement.format in _WITH_NONCE:
        text = held.challenge.encode()
        for nonce in (text, hashlib.sha256(text).digest()):
            with contextlib.suppress(AttestationError):
                found = attested(statement, public_key, held.anchors, nonce=nonce, at=at)
                return found, True
    return attested(statement, public_key, held.anchors, at=at), False


def _report(told: Mapping[str, Any]) -> CustodyReport:
    facts = tuple(
        Fact(name=_text(fact["name"]), value=_value(fact["value"]), source=_text(fact["source"]))
        for fact in told["facts"]
    )
    evidence = Evidence(
        location=_text(told["location"]),
        exportable=_answer(told["exportable"]),
        never_exportable=_answer(told["never_exportable"]),
        generated_in_place=_answer(told["generated_in_place"]),
        hardware=_answer(told["hardware"]),
        fips_mode=_answer(told["fips_mode"]),
        facts=facts,
    )
    made_by = told["made_by"]
    return CustodyReport(
        backend=_text(told["backend"]),
        kid=_text(told["kid"]),
        thumbprint=_text(told["thumbprint"]),
        collected_at=_number(told["collected_at"]),
        evidence=evidence,
        plug_in=None if told["plug_in"] is None else _text(told["plug_in"]),
        made_by=None if made_by is None else _maker(made_by),
    )


def _maker(told: Mapping[str, Any]) -> Maker:
    _members(told, _MAKER)
    return Maker(**{name: _text(value) for name, value in told.items()})


def _members(told: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Those of docs/custody/format.md, in its order: nothing stands there that nobody reads."""
    if not isinstance(told, dict) or tuple(told) != names:
        raise _none("its members are not those of one")


def _statement(told: Mapping[str, Any]) -> Statement:
    _members(told, _STATEMENT)
    parts, nonce = told["parts"], told["nonce"]
    return Statement(
        format=_text(told["format"]),
        content=_bytes(told["content"]),
        certificates=tuple(_bytes(one) for one in told["certificates"]),
        nonce=None if nonce is None else _bytes(nonce),
        parts=None
        if parts is None
        else {_text(name): _bytes(part) for name, part in parts.items()},
    )


def _text(value: object, *, none: bool = False) -> Any:
    if isinstance(value, str) or (none and value is None):
        return value
    raise TypeError


def _bytes(value: object) -> bytes:
    decoded = b64decode(_text(value), validate=True)
    if b64encode(decoded).decode() != value:  # two texts for the same bytes
        raise TypeError
    return decoded


def _value(value: object) -> bool | int | str | None:
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError


def _answer(value: object) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise TypeError


def _number(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise TypeError
