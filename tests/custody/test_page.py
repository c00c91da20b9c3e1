# SPDX-License-Identifier: Apache-2.0
"""The page: what it says, and that no foreign text becomes part of it."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser
from typing import Any

from d1_signer.attestation import PUBLISHED, Statement, Verified
from d1_signer.custody.bundle import KeyReport
from d1_signer.custody.evidence import Attestation, Evidence, Fact
from d1_signer.custody.page import page
from d1_signer.custody.policy import CustodyPolicy
from d1_signer.custody.report import CustodyReport, Maker
from d1_signer.errors import D1SignerError
from tests.attestation.makers import luna

# What breaks out of text, of an attribute, of a style sheet, of a script, and out of a line.
ATTACKS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</style><style>@import url(//evil.example)</style>",
    "</section></main><iframe srcdoc='x'>",
    "<!--",
    "]]>",
    "&lt;b&gt;&#60;b&#62;",
    "\u202eNOT claimed\u2066",
    "\x00\x1b[2J\r\n",
    "\ud800",
    "javascript:alert(1)",
)
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2"),
    *("h3", "p", "code", "dl", "dt", "dd", "ul", "ol", "li", "b", "span", "table", "thead"),
    *("tbody", "tr", "th", "td"),
}
MAKER = Maker(host="host", user="user", d1_signer="0.1", python="3.11")


class Reader(HTMLParser):
    """Elements, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: set[str] = set()
        self.depth = 0
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.depth += tag != "meta"

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 (HTMLParser's)
        self.depth -= 1

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)


def read(content: bytes) -> Reader:
    reader = Reader()
    reader.feed(content.decode())
    reader.close()
    assert set(reader.elements) <= ALLOWED
    assert reader.attributes <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "data-of")
    }
    assert reader.depth == 0
    assert reader.elements.count("style") == 1
    return reader


def report(text: str = "x", **answers: Any) -> CustodyReport:
    told = {"exportable": False, "generated_in_place": None, "hardware": True, **answers}
    facts = (Fact(name=text, value=text, source=text), Fact(name="n", value=None, source="s"))
    evidence = Evidence(location=text, facts=facts, **told)
    return CustodyReport(
        backend=text, kid=text, thumbprint=text, collected_at=0, evidence=evidence, plug_in=text
    )


def attested(
    told: CustodyReport, text: str, statement: Statement, certificates: tuple[bytes, ...] = ()
) -> CustodyReport:
    verified = Verified(
        spki=b"",
        device=text,
        exportable=False,
        never_exportable=None,
        generated_in_place=None,
        hardware=None,
        fips_mode=None,
        stated_at=1,
        anchor="ab" * 32,
        facts={text: text},
        limits=(text,),
        certificates=certificates,
    )
    found = (Attestation(statement=statement, verified=verified),)
    return dataclasses.replace(told, evidence=told.evidence.with_attestations(found))


def test_no_foreign_text_becomes_part_of_the_page() -> None:
    plain = read(_page("x"))
    for attack in ATTACKS:
        reader = read(_page(attack))
        assert reader.elements == plain.elements, attack
        shown = "".join(reader.text)
        assert all(letter.isprintable() or letter == "\n" for letter in shown), attack


def _page(text: str) -> bytes:
    statement = Statement(format=text)
    told = attested(report(text), text, statement)
    error = D1SignerError(text, hint=text)
    keys: list[Any] = [
        (KeyReport(use=text, location=text, report=told), (text,)),
        (KeyReport(use=text, location=text, error=error), ()),
    ]
    maker = Maker(host=text, user=text, d1_signer=text, python=text)
    return page(keys, policy=CustodyPolicy(hardware=True), made_by=maker, made_at=0)


def test_nothing_is_loaded_and_nothing_runs() -> None:
    content = _page("x").decode()
    assert "default-src 'none'" in content
    for word in ("url(", "@import", "http://", "https://", "<script", "src=", "href="):
        assert word not in content


def said(*keys: tuple[KeyReport, tuple[str, ...]], **demands: Any) -> str:
    policy = CustodyPolicy(**demands)
    text = read(page(keys, policy=policy, made_by=MAKER, made_at=0)).text
    return " ".join(" ".join(text).split())


def test_the_verdict_stands_on_top_and_what_is_not_proven_below() -> None:
    key = KeyReport(use="assertion", location="l", report=report("pkcs11"))
    text = said((key, ()), hardware=True)
    assert "All keys (1) are shown to be what is required." in text
    assert (
        "Of 5 answers about 1 keys 0 are attested by a device, 2 are only claimed, 3 are unknown."
        in text
    )
    assert "Held by hardware: pkcs11 claims it; no device has signed it." in text
    assert "Device in FIPS mode: nobody says so." in text
    assert "Cannot leave its place claimed by pkcs11" in text
    assert "Held by hardware required; claimed by pkcs11" in text
    assert "Shown to be what is required. Thumbprint" in text
    assert "Cannot leave its place required; claimed" in said((key, ()), non_exportable=True)
    text = said((key, ("held by hardware",)), hardware=True)
    assert "1 of 1 keys not shown to be what is required; 0 shown to be what is required." in text
    assert "Not shown to be: held by hardware." in text
    away = KeyReport(use="client", location="l", error=D1SignerError("It is away."))
    text = said((key, ()), (away, ()))
    assert "1 of 2 keys could not be asked; 1 told below." in text
    assert "It is away." in text
    assert "nothing was required" in said((key, ()))
    worse = KeyReport(use="assertion", location="l", report=report(exportable=True))
    assert "Can leave its place" in said((worse, ()))


def test_the_chain_is_drawn_from_the_key_to_the_anchor() -> None:
    made = luna()
    told = attested(report("pkcs11"), "Luna K7", made.statement, made.verify().certificates)
    text = said((KeyReport(use="assertion", location="l", report=told), ()))
    order = (
        "This key",
        "luna-pkc statement",
        "41key",
        "Luna K7-521174",
        "Trusted: a key that the operator has named",
        "abab",
    )
    places = [text.index(word, text.index("Statement of Luna K7")) for word in order]
    assert places == sorted(places)
    assert "Cannot leave its place attested by Luna K7 (luna-pkc)" in text
    assert "luna-pkc: Luna K7" in text  # a limit
    assert "attested by Luna K7 (luna-pkc), within the limits below" in text
    assert "Trusted: a key that the operator has named" in text
    (one,) = told.evidence.attestations or ()
    published = min(PUBLISHED, key=lambda anchor: anchor.spki_sha256)
    known = dataclasses.replace(one.verified, anchor=published.spki_sha256)
    evidence = told.evidence.with_attestations((dataclasses.replace(one, verified=known),))
    told = dataclasses.replace(told, evidence=evidence)
    text = said((KeyReport(use="assertion", location="l", report=told), ()))
    assert f"Trusted: {published.name} SHA-256 of its SubjectPublicKeyInfo" in text
