# SPDX-License-Identifier: Apache-2.0
"""Certificates: read once, whole and strictly; what follows from them is decided in `chains`.

By asn1crypto, since `cryptography` refuses six of the eight certificates of two Luna HSM packages.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from asn1crypto import x509

from d1_signer.attestation import der
from d1_signer.attestation.refusals import plain, refused

BASIC_CONSTRAINTS = "2.5.29.19"
KEY_USAGE = "2.5.29.15"
EXTENDED_KEY_USAGE = "2.5.29.37"
SUBJECT_ALT_NAME = "2.5.29.17"
V1, V3 = 0, 2

MOST_CERTIFICATES = 64
_LONGEST = 16_384
_BEGIN, _END = "-----BEGIN ", "-----END "


@dataclass(frozen=True, slots=True)
class Extension:
    """An extension: whether it is critical, and its value in DER."""

    critical: bool
    value: bytes


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is used of a certificate.

    Attributes:
        encoding: All of it, in DER.
        signed: The part that is signed.
        algorithm: OID of the signature algorithm.
        parameters: Its parameters in DER; empty where there are none.
        signature: The signature.
        version: `V1` or `V3` (or 1, version 2).
        subject: The subject's name in DER.
        issuer: The issuer's name in DER.
        common_name: The subject's common name; empty where there is not exactly one.
        not_before: Seconds since the epoch.
        not_after: Seconds since the epoch.
        spki: The key, SubjectPublicKeyInfo in DER.
        extensions: By OID.
    """

    encoding: bytes
    signed: bytes
    algorithm: str
    parameters: bytes
    signature: bytes
    version: int
    subject: bytes
    issuer: bytes
    common_name: str
    not_before: float
    not_after: float
    spki: bytes
    extensions: dict[str, Extension]

    @property
    def spki_sha256(self) -> str:
        """SHA-256 of the key, hexadecimal."""
        return hashlib.sha256(self.spki).hexdigest()

    @property
    def name(self) -> str:
        """For people."""
        return f"the certificate of {plain(self.common_name) or 'a nameless subject'}"

    def value(self, oid: str) -> bytes | None:
        """The value of an extension, or None."""
        extension = self.extensions.get(oid)
        return None if extension is None else extension.value

    def constraints(self) -> tuple[bool, int | None]:
        """Whether it is an authority's, and for how many authorities below it."""
        value = self.value(BASIC_CONSTRAINTS)
        if value is None:
            return False, None
        read = x509.BasicConstraints.load(value, strict=True)
        return read["ca"].native, read["path_len_constraint"].native

    def usages(self) -> frozenset[str] | None:
        """asn1crypto's names of its key usages; None where there is no such extension."""
        value = self.value(KEY_USAGE)
        return None if value is None else frozenset(x509.KeyUsage.load(value, strict=True).native)

    def purposes(self) -> frozenset[str]:
        """OIDs of its extended key usages."""
        value = self.value(EXTENDED_KEY_USAGE)
        if value is None:
            return frozenset()
        return frozenset(each.dotted for each in x509.ExtKeyUsageSyntax.load(value, strict=True))


def read_certificate(encoding: bytes) -> Certificate:
    """Read one certificate in DER.

    Raises:
        AttestationError: Not DER, not a certificate, or one that contradicts itself.
    """
    if len(encoding) > _LONGEST:
        raise refused(f"a certificate is longer than {_LONGEST} bytes")
    der.check(encoding)
    whole = x509.Certificate.load(encoding, strict=True)
    body, algorithm = whole["tbs_certificate"], whole["signature_algorithm"]
    if body["signature"].dump() != algorithm.dump():
        raise refused("a certificate names two signature algorithms")
    version = int(body["version"])
    extensions = _read_extensions(body["extensions"])
    if extensions and version != V3:
        raise refused("a certificate has extensions and is not of version 3")
    validity = body["validity"]
    common_name = body["subject"].native.get("common_name")
    return Certificate(
        encoding=encoding,
        signed=body.dump(),
        algorithm=algorithm["algorithm"].dotted,
        parameters=algorithm["parameters"].dump(),
        signature=whole["signature_value"].native,
        version=version,
        subject=body["subject"].dump(),
        issuer=body["issuer"].dump(),
        common_name=common_name if isinstance(common_name, str) else "",
        not_before=validity["not_before"].native.timestamp(),
        not_after=validity["not_after"].native.timestamp(),
        spki=body["subject_public_key_info"].dump(),
        extensions=extensions,
    )


def _read_extensions(listed: x509.Extensions) -> dict[str, Extension]:
    extensions: dict[str, Extension] = {}
    if listed.native is None:
        return extensions
    for each in listed:
        oid = each["extn_id"].dotted
        if oid in extensions:
            raise refused(f"a certificate has the extension {oid} twice")
        extensions[oid] = Extension(each["critical"].native, each["extn_value"].contents)
    return extensions


def read_certificates(entries: Iterable[bytes]) -> tuple[Certificate, ...]:
    """Read what stands in a statement's certificates, each once.

    Raises:
        AttestationError: An entry is neither DER nor PEM, or there are more than 64.
    """
    encodings: dict[bytes, None] = {}
    for entry in entries:
        found = [entry] if entry[:1] == bytes((der.SEQUENCE,)) else armoured(entry, "CERTIFICATE")
        encodings.update(dict.fromkeys(found))
        if len(encodings) > MOST_CERTIFICATES:
            raise refused(f"there are more than {MOST_CERTIFICATES} certificates")
    return tuple(map(read_certificate, encodings))


def armoured(text: bytes, label: str) -> list[bytes]:
    """What stands in PEM (RFC 7468): blocks of one label; text around them says nothing.

    Raises:
        AttestationError: No block, one of another label, or one that cannot be read.
    """
    found: list[bytes] = []
    rest = text.decode("utf-8", "replace")
    while True:
        _, begin, rest = rest.partition(_BEGIN)
        if not begin:
            break
        inside, end, rest = rest.partition(f"{_END}{label}-----")
        if not end or not inside.startswith(f"{label}-----") or len(found) == MOST_CERTIFICATES:
            raise refused(f"its PEM is cut, too long, or holds something beside {label}")
        lines = inside.removeprefix(f"{label}-----").split()
        found.append(base64.b64decode("".join(lines), validate=True))
    if not found:
        raise refused(f"neither DER nor PEM where {label} is due")
    return found
