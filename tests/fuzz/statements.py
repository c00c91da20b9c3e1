# SPDX-License-Identifier: Apache-2.0
"""Statements taken apart and put together again, so that each part can be changed."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable
from dataclasses import replace

from asn1crypto import cms, pem
from hypothesis import strategies as st

from d1_signer.attestation import Statement
from tests.attestation import samples
from tests.attestation.makers import MAKERS, package, yubikey_piv
from tests.attestation.pki import value
from tests.fuzz.mutations import mutated

Parts = dict[str, bytes]
_REAL = (
    "marvell ec",
    "marvell rsa",
    "luna-pkc ecc",
    "luna-pkc rsa",
    "yubihsm",
    "yubikey-piv ValidChain",
    "yubikey-piv ValidChain2018",
    "securosys",
    "tpm2 certcreation",
    "tpm2 certify",
    "tpm2 soft",
)


def taken_apart(statement: Statement) -> Parts:
    """What it holds: certificates in DER, base64 and gzip undone."""
    parts = dict(statement.parts or {})
    certificates = [der for entry in statement.certificates for der in _unarmoured(entry)]
    content = statement.content
    if statement.format == "marvell":
        parts["content"] = gzip.decompress(content) if content[:1] == b"\x1f" else content
    elif statement.format == "luna-pkc":
        listed = cms.ContentInfo.load(content)["content"]["certificates"]
        certificates += [each.dump() for each in listed]
    elif statement.format == "securosys":
        document = json.loads(content)
        for name in ("attestationData", "attestationSignature"):
            parts[name] = base64.b64decode(document[name])
        chain = document["attestationCertChain"]
        certificates += [der for each in chain for der in _unarmoured(each.encode())]
    elif statement.format != "tpm2":
        (parts["content"],) = _unarmoured(content)
    return parts | {f"certificate {n}": each for n, each in enumerate(certificates)}


def put_together(name: str, parts: Parts) -> Statement:
    """The statement of these parts."""
    rest = {key: part for key, part in parts.items() if not key.startswith("certificate")}
    certificates = tuple(part for key, part in parts.items() if key not in rest)
    if name == "tpm2":
        return Statement(format=name, content=b"", certificates=certificates, parts=rest)
    if name == "luna-pkc":
        return Statement(format=name, content=package(list(certificates)))
    if name == "securosys":
        document: dict[str, object] = {
            key: base64.b64encode(part).decode() for key, part in rest.items()
        }
        document["attestationCertChain"] = [
            pem.armor("CERTIFICATE", each).decode() for each in certificates
        ]
        return Statement(format=name, content=json.dumps(document).encode())
    return Statement(format=name, content=rest.get("content", b""), certificates=certificates)


def _unarmoured(entry: bytes) -> list[bytes]:
    if not pem.detect(entry):
        return [entry]
    return [der for _, _, der in pem.unarmor(entry, multiple=True)]


def _longer_length(tag: int, content: bytes) -> bytes:
    octets = len(content).to_bytes(3, "big")
    return bytes([tag, 0x83]) + octets + content


def _indefinite(tag: int, content: bytes) -> bytes:
    return bytes([tag, 0x80]) + content + b"\0\0"


def _longer_content(tag: int, content: bytes) -> bytes:
    return value(tag, b"\0" + content)


def _other_true(tag: int, content: bytes) -> bytes:
    return value(tag, b"\x01" if content == b"\xff" else content)


_FORMS: list[Callable[[int, bytes], bytes]] = [
    _longer_length,
    _indefinite,
    _longer_content,
    _other_true,
]


def reencoded(der: bytes, which: int, form: Callable[[int, bytes], bytes]) -> bytes:
    """The same DER with one value in another form, counted from the front as they begin."""
    left = [which]

    def walk(data: bytes) -> bytes:
        done, at = b"", 0
        while at + 1 < len(data):
            tag, start, length = data[at], at + 2, data[at + 1]
            if length & 0x80:
                start += length & 0x7F
                length = int.from_bytes(data[at + 2 : start], "big")
            content = data[start : start + length]
            mine = left[0] == 0
            left[0] -= 1
            content = walk(content) if tag & 0x20 else content
            done += form(tag, content) if mine else value(tag, content)
            at = start + length
        return done + data[at:]

    return walk(der)


MADE = [maker() for maker in MAKERS.values()] + [yubikey_piv(old=True)]
MADE += [samples.sample(name) for name in _REAL if samples.FOLDER]
PARTS = [taken_apart(made.statement) for made in MADE]


@st.composite
def changed(draw: st.DrawFn, which: int) -> Statement:
    """One of `MADE` of which one or two parts were changed."""
    statement, parts = MADE[which].statement, dict(PARTS[which])
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return replace(statement, content=draw(mutated(statement.content or b"x")))
    # Two parts of another statement can be all of it, which then proves what it proves.
    for _ in range(1 if kind == 3 else draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(parts)))
        if kind == 1:
            del parts[name]
            parts = parts or {"content": b""}
        elif kind == 2:  # two parts change places
            other = draw(st.sampled_from(sorted(parts)))
            parts[name], parts[other] = parts[other], parts[name]
        elif kind == 3:  # a part of another statement
            foreign = PARTS[draw(st.integers(0, len(PARTS) - 1))]
            parts[name] = foreign[draw(st.sampled_from(sorted(foreign)))]
        elif kind <= 5 and parts[name][:1] == b"\x30" and statement.format != "tpm2":
            form = draw(st.sampled_from(_FORMS))
            parts[name] = reencoded(parts[name], draw(st.integers(0, 80)), form)
        else:
            parts[name] = draw(mutated(parts[name]))
    return put_together(statement.format, parts)
