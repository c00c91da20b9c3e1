# SPDX-License-Identifier: Apache-2.0
"""``securosys``: key attestations of Securosys Primus HSMs.

JSON with a description of the key in XML, the signature over it by the HSM's attestation key, and
the certificates of that key and of the HSM.
"""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from xml.parsers import expat

from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.attestation import chains, keys
from d1_signer.attestation.certificates import (
    Certificate,
    read_certificates,
)
from d1_signer.attestation.chains import Rules, chain_of
from d1_signer.attestation.refusals import plain, refused
from d1_signer.attestation.statement import Asked, FactValue, Statement, Verified

_DEVICE = re.compile(r"PRIMUS HSM KEY \(SN: (\d+)\)")
_LONGEST = 65_536
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_FLAGS = (
    "extractable",
    "never_extractable",
    "sensitive",
    "always_sensitive",
    "copyable",
    "modifiable",
    "sign",
)
_TEXTS = ("label", "algorithm", "key_size", "create_time", "attest_time", "key_use_count")
_LIMITS = (
    "It carries nothing of its reader: how fresh it is rests on the HSM's clock.",
    "It does not say whether the HSM is in FIPS mode, nor who may use the key.",
)
_ATTRIBUTES = ("private_key", "attributes")


def verify_securosys(statement: Statement, asked: Asked) -> Verified:
    """Verify an attestation of a key in a Primus HSM.

    Raises:
        AttestationError: No chain of a Primus HSM, another signature, or what is signed does not
            describe a private key.
    """
    document = _document(statement.content)
    signed = _base64(document.get("attestationData"))
    chain = document.get("attestationCertChain")
    if not isinstance(chain, list) or not all(isinstance(each, str) for each in chain):
        raise refused("attestationCertChain is not a list of certificates in PEM")
    pool = read_certificates([each.encode() for each in chain] + list(statement.certificates))
    leaf, device = _signer(pool)
    chains.may_sign(leaf)
    proven = chain_of(
        leaf, pool, anchors=asked.anchors, at=asked.at, rules=Rules(may_issue=chains.authority)
    )
    if len(proven.certificates) < 2 or proven.certificates[1] is not device:  # noqa: PLR2004
        raise refused(f"{leaf.name} is not by the HSM")
    signature = _base64(document.get("attestationSignature"))
    if not keys.verify_plain(keys.load(leaf.spki), signature, signed, SHA256()):
        raise refused("its signature is not by the HSM's attestation key")
    return _verified(_Description(signed), device, proven)


def _verified(said: _Description, device: Certificate, proven: chains.Chain) -> Verified:
    flags = {name: said.flag(name) for name in _FLAGS}
    facts: dict[str, FactValue] = {
        **flags,
        **{name: plain(said.text(name)) for name in _TEXTS},
        "creation": plain(said.creation),
    }
    generated = said.creation == "generated"
    extractable = flags["extractable"] or not flags["sensitive"]
    never = flags["never_extractable"] and flags["always_sensitive"]
    return Verified(
        spki=keys.encoded(keys.load(_base64(said.text("public_key")))),
        device=f"Securosys Primus HSM {device.common_name.rpartition(' ')[2].rstrip(')')}",
        exportable=extractable,
        never_exportable=never and not extractable and generated,
        generated_in_place=generated,
        hardware=proven.anchor.hardware,
        fips_mode=None,
        stated_at=_seconds(said.text("attest_time")),
        anchor=proven.anchor.spki_sha256,
        facts=facts,
        limits=_LIMITS,
        certificates=proven.encodings,
    )


def _document(content: bytes) -> dict[str, object]:
    """The JSON, each member once."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise refused("its JSON has a member twice")
        return members

    document = json.loads(content.decode(), object_pairs_hook=once)
    if not isinstance(document, dict):
        raise refused("its JSON is not an object")
    return document


def _base64(text: object) -> bytes:
    if not isinstance(text, str):
        raise refused("a part is missing that is due in base64")
    return base64.b64decode("".join(text.split()), validate=True)


def _signer(pool: tuple[Certificate, ...]) -> tuple[Certificate, Certificate]:
    """The certificate of the attestation key and that of the HSM which issued it."""
    devices = [each for each in pool if _DEVICE.fullmatch(each.common_name)]
    leaves = [
        (each, device)
        for device in devices
        for each in pool
        if each.issuer == device.subject and each is not device
    ]
    if len(leaves) != 1:
        raise refused("its certificates are not those of one HSM and of its attestation key")
    return leaves[0]


def _seconds(text: str) -> int:
    return int(datetime.strptime(text, _TIME).replace(tzinfo=UTC).timestamp())


class _Description:
    """The XML that the HSM signed: a private key's, each element once, with no declarations."""

    def __init__(self, xml: bytes) -> None:
        if len(xml) > _LONGEST:
            raise refused(f"the description of the key is longer than {_LONGEST} bytes")
        self.creation = ""
        self._texts: dict[tuple[str, ...], str] = {}
        self._path: tuple[str, ...] = ()
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartElementHandler = self._begin
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add
        parser.StartDoctypeDeclHandler = self._refuse
        parser.Parse(xml, True)  # noqa: FBT003 (expat takes it by place)

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        self._path += (name,)
        if self._path in self._texts or len(self._path) > 3:  # noqa: PLR2004 (as its attributes)
            raise refused("the description of the key has an element twice, or too deep")
        self._texts[self._path] = ""
        if len(self._path) == 1:
            self.creation = attributes.get("creation", "")

    def _add(self, text: str) -> None:
        self._texts[self._path] += text

    def _end(self, _name: str) -> None:
        self._path = self._path[:-1]

    def _refuse(self, *_: object) -> None:
        raise refused("the description of the key declares a document type")

    def text(self, name: str) -> str:
        """What an element says."""
        text = self._texts.get(("private_key", name))
        if text is None:
            raise refused(f"the description of the key lacks {name}")
        return text.strip()

    def flag(self, name: str) -> bool:
        """What an attribute of the key says."""
        text = self._texts.get((*_ATTRIBUTES, name))
        if text not in {"true", "false"}:
            raise refused(f"the description of the key does not say whether it is {name}")
        return text == "true"
