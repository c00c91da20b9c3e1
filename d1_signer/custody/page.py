# SPDX-License-Identifier: Apache-2.0
"""The report as one page that an auditor can read, print and file: no script, nothing from outside.

Everything that a device, a service or a file has told is foreign text.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence

from d1_signer.attestation import PUBLISHED
from d1_signer.custody.bundle import KeyReport
from d1_signer.custody.chain import links
from d1_signer.custody.evidence import ANSWERS, Attestation, Evidence
from d1_signer.custody.policy import WORDS, CustodyPolicy
from d1_signer.custody.report import CustodyReport, Maker, utc
from d1_signer.custody.style import STYLE

_NAMES = {
    "exportable": ("Cannot leave its place", "Can leave its place"),
    "never_exportable": ("Never could leave its place", "Could leave its place at some time"),
    "generated_in_place": ("Made where it lives", "Made elsewhere"),
    "hardware": ("Held by hardware", "Not held by hardware"),
    "fips_mode": ("Device in FIPS mode", "Device not in FIPS mode"),
}
_USES = {
    "assertion": "signs assertions for D1",
    "client": "client key of mutual TLS",
    "audit": "signs the audit trail's checkpoints",
}
_PUBLISHED = {anchor.spki_sha256: anchor.name for anchor in PUBLISHED}
_WORDS = (
    ("attested", "a device has signed it, and its signature leads to a key that is trusted"),
    ("claimed", "the module or the service says so of itself, and nobody has signed it"),
    ("unknown", "nobody says so"),
    ("required", "the policy that is named at the top demands it"),
)


def page(
    keys: Sequence[tuple[KeyReport, Sequence[str]]],
    *,
    policy: CustodyPolicy,
    made_by: Maker,
    made_at: int,
    bundle: bytes | None = None,
) -> bytes:
    """Make the page.

    Args:
        keys: What is told of each key, and what of the policy it does not meet.
        policy: What is demanded.
        made_by: Who makes the page.
        made_at: Seconds since the epoch.
        bundle: The bundle that was made with it.
    """
    body = [
        '<header><p class="kind">Custody report</p>',
        _verdict(keys, policy),
        _made(made_by, made_at, bundle),
        "</header>",
        *(_key(told, unmet, policy) for told, unmet in keys),
        _glossary(),
    ]
    # The policy of the page: nothing is loaded or run, even if foreign text were not escaped.
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>Custody report</title><style>{STYLE}</style></head>\n"
    )
    return f"{head}<body><main>\n{''.join(body)}\n</main></body></html>\n".encode()


def _made(made_by: Maker, made_at: int, bundle: bytes | None) -> str:
    digest = "" if bundle is None else hashlib.sha256(bundle).hexdigest()
    beside = (
        f" The one made with this page has the SHA-256 <code>{digest}</code>." if bundle else ""
    )
    return (
        f"<p>Made {_e(utc(made_at))} on {_e(made_by.host)} as the user {_e(made_by.user)}, with "
        f"d1_signer {_e(made_by.d1_signer)} on Python {_e(made_by.python)}.</p>"
        "<p>This page is not signed. The bundle (<code>d1-signer custody --bundle</code>) is, and "
        f"can be verified without d1_signer.{beside}</p>"
    )


def _e(value: object) -> str:
    """Foreign text: no markup, and no characters that hide or turn others around."""
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in str(value)
    )
    return html.escape(shown, quote=True)


def _verdict(keys: Sequence[tuple[KeyReport, Sequence[str]]], policy: CustodyPolicy) -> str:
    away = sum(told.report is None for told, _ in keys)
    short = sum(bool(unmet) for _, unmet in keys)
    met = len(keys) - away - short
    told = [f"{short} of {len(keys)} keys not shown to be what is required"] * bool(short)
    told += [f"{away} of {len(keys)} keys could not be asked"] * bool(away)
    if told:
        shown = f"{met} shown to be what is required" if policy.words else f"{met} told below"
        mark, text = "bad", "; ".join([*told, shown]) + "."
    elif policy.words:
        mark, text = "good", f"All keys ({met}) are shown to be what is required."
    else:
        mark, text = "open", f"{met} keys; nothing was required, so judge for yourself."
    words = ", ".join(policy.words) or "nothing"
    return (
        f'<h1 class="{mark}">{_e(text[0].upper() + text[1:])}</h1>'
        f"<p>Required: {_e(words)}.</p><p>{_founded(keys)}</p>"
    )


def _founded(keys: Sequence[tuple[KeyReport, Sequence[str]]]) -> str:
    """How well the answers are founded, all in all."""
    known = [told.report.evidence for told, _ in keys if told.report is not None]
    pairs = [(evidence, name) for evidence in known for name in ANSWERS]
    unknown = sum(getattr(evidence, name) is None for evidence, name in pairs)
    attested = sum(evidence.attested_by(name) is not None for evidence, name in pairs)
    return (
        f"Of {len(pairs)} answers about {len(known)} keys {attested} are attested by a device, "
        f"{len(pairs) - attested - unknown} are only claimed, {unknown} are unknown."
    )


def _key(told: KeyReport, unmet: Sequence[str], policy: CustodyPolicy) -> str:
    use = _e(_USES.get(told.use, told.use))
    report = told.report
    if report is None:
        error = told.error
        said = "" if error is None else f"<p>{_e(error.message)} {_e(error.hint)}</p>"
        return (
            f'<section><h2>{_e(told.location)}</h2><p class="use">{use}</p>'
            f'<p class="bad">This key could not be asked.</p>{said}</section>'
        )
    evidence = report.evidence
    parts = [
        f'<h2>{_e(report.kid)}</h2><p class="use">{use}</p>',
        _result(unmet, policy),
        "<dl>",
        *_pair("Thumbprint (RFC 7638)", report.thumbprint),
        *_pair("Location", evidence.location),
        *_pair("Backend", report.plug_in or report.backend),
        *_pair("Algorithm", "ES256 (P-256, SHA-256)"),
        *_pair("Asked at", utc(report.collected_at)),
        "</dl>",
        _answers(report, policy),
        _not_proven(report),
        *map(_statement, evidence.attestations or ()),
        _facts(evidence),
    ]
    return f"<section>{''.join(parts)}</section>"


def _result(unmet: Sequence[str], policy: CustodyPolicy) -> str:
    if unmet:
        return f'<p class="bad result">Not shown to be: {_e(", ".join(unmet))}.</p>'
    return '<p class="good result">Shown to be what is required.</p>' if policy.words else ""


def _pair(name: str, value: str) -> tuple[str, str]:
    return f"<dt>{_e(name)}</dt>", f"<dd>{_e(value)}</dd>"


def _answers(report: CustodyReport, policy: CustodyPolicy) -> str:
    rows = []
    demanded = {name for name in WORDS.values() if getattr(policy, name)}
    # The policy's word is about what can be now, as the answer is about what cannot.
    demanded |= {"exportable"} if "non_exportable" in demanded else set()
    for name, (good, bad) in _NAMES.items():
        answer: bool | None = getattr(report.evidence, name)
        by = report.evidence.attested_by(name)
        holds = answer is ANSWERS[name][0]
        if answer is None:
            mark, who = "open", "unknown"
        elif by is None:
            mark, who = "claim" if holds else "bad", f"claimed by {report.backend}"
        else:
            mark = "good" if holds else "bad"
            who = f"attested by {by.verified.device} ({by.statement.format})"
            who += ", within the limits below" if by.verified.limits else ""
        who = f"required; {who}" if name in demanded else who
        text = bad if answer is not None and not holds else good
        rows.append(f'<li class="{mark}"><b>{_e(text)}</b><span>{_e(who)}</span></li>')
    return f'<ul class="answers">{"".join(rows)}</ul>'


def _not_proven(report: CustodyReport) -> str:
    evidence, told = report.evidence, []
    for name, (good, _) in _NAMES.items():
        answer: bool | None = getattr(evidence, name)
        if answer is None:
            told.append(f"{good}: nobody says so.")
        elif answer is ANSWERS[name][0] and evidence.attested_by(name) is None:
            told.append(f"{good}: {report.backend} claims it; no device has signed it.")
    told += [
        f"{one.statement.format}: {limit}"
        for one in evidence.attestations or ()
        for limit in one.verified.limits
    ]
    if not told:
        return ""
    items = "".join(f"<li>{_e(line)}</li>" for line in told)
    return f'<h3>What is not proven</h3><ul class="limits">{items}</ul>'


def _statement(one: Attestation) -> str:
    verified = one.verified
    steps = [
        ("This key", f"{verified.device} has signed a statement about it"),
        (f"{one.statement.format} statement", _stated(one)),
        *(
            (link.subject, f"certified by {link.issuer}, until {link.until}")
            for link in links(verified)
        ),
        (
            f"Trusted: {_PUBLISHED.get(verified.anchor, 'a key that the operator has named')}",
            f"SHA-256 of its SubjectPublicKeyInfo: {verified.anchor}",
        ),
    ]
    items = "".join(f"<li><b>{_e(name)}</b><span>{_e(text)}</span></li>" for name, text in steps)
    return f'<h3>Statement of {_e(verified.device)}</h3><ol class="chain">{items}</ol>'


def _stated(one: Attestation) -> str:
    stated = one.verified.stated_at
    when = "it does not say when" if stated is None else f"on {utc(stated)} by the device's clock"
    return f"verified; made {when}" if stated is not None else f"verified; {when}"


def _facts(evidence: Evidence) -> str:
    rows = "".join(
        f'<tr><td data-of="Fact">{_e(fact.name)}</td><td data-of="Value">'
        f"{_e('not known' if fact.value is None else fact.value)}</td>"
        f'<td data-of="Source">{_e(fact.source)}</td>'
        f'<td data-of="Assurance">{_e(fact.assurance)}</td></tr>'
        for fact in evidence.facts
    )
    return (
        "<h3>Evidence</h3><table><thead><tr><th>Fact</th><th>Value</th><th>Source</th>"
        f"<th>Assurance</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def _glossary() -> str:
    rows = "".join("".join(_pair(word, meaning)) for word, meaning in _WORDS)
    return f"<section><h3>The words</h3><dl>{rows}</dl></section>"
