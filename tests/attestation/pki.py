# SPDX-License-Identifier: Apache-2.0
"""Certificates of any kind, also those that no builder makes: a chain of our own for statements."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

from asn1crypto import algos, core, keys as asn1_keys, x509
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.hashes import MD5, SHA1, SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
START = datetime(2020, 1, 1, tzinfo=UTC)
END = datetime(2040, 1, 1, tzinfo=UTC)
NOW = datetime(2026, 11, 27, tzinfo=UTC).timestamp()
_DIGESTS: dict[str, type[HashAlgorithm]] = {
    "sha256": SHA256,
    "sha384": SHA384,
    "sha1": SHA1,
    "md5": MD5,
}


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    """The same key for the same name."""
    number = int.from_bytes(hashlib.sha256(name.encode()).digest(), "big")
    return ec.derive_private_key(number >> 8, ec.SECP256R1())


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """One key for each name, made once for each run."""
    assert name
    return rsa.generate_private_key(65537, bits)


def spki(key: PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def spki_sha256(key: PrivateKey) -> str:
    return hashlib.sha256(spki(key)).hexdigest()


def pem(der: bytes, label: str = "CERTIFICATE") -> bytes:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()


def sign(key: PrivateKey, data: bytes, digest: HashAlgorithm | None = None) -> bytes:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(data, padding.PKCS1v15(), digest or SHA256())
    return key.sign(data, ec.ECDSA(digest or SHA256()))


def without_sign_octets(signature: bytes) -> bytes:
    """An ECDSA signature as a Luna HSM writes it: INTEGERs of its length, whatever their sign."""
    pair = algos.DSASignature.load(signature)
    size = 32
    numbers = [pair[each].native.to_bytes(size, "big") for each in ("r", "s")]
    content = b"".join(b"\x02" + bytes([size]) + number for number in numbers)
    return b"\x30" + bytes([len(content)]) + content


@dataclass(frozen=True)
class Holder:
    """Who is certified: a name and a key."""

    name: str
    key: PrivateKey


@dataclass
class Settings:
    """What a certificate is made of."""

    subject: Holder
    issuer: Holder
    ca: bool | None = None
    longest: int | None = None
    usages: set[str] | None = None
    purposes: list[str] | None = None
    extensions: list[tuple[str, bool, bytes]] = field(default_factory=list)
    version: str = "v3"
    digest: str = "sha256"
    start: datetime = START
    end: datetime = END
    null_parameters: bool = False
    explicit_false: bool = False
    mangle: Callable[[bytes], bytes] = bytes


def certificate(settings: Settings) -> bytes:
    """A certificate in DER."""
    subject, issuer = settings.subject, settings.issuer
    kind = "rsa" if isinstance(issuer.key, rsa.RSAPrivateKey) else "ecdsa"
    algorithm: dict[str, Any] = {"algorithm": f"{settings.digest}_{kind}"}
    if kind == "rsa" or settings.null_parameters:
        algorithm["parameters"] = core.Null()
    body = x509.TbsCertificate(
        {
            "version": settings.version,
            "serial_number": 1,
            "signature": algos.SignedDigestAlgorithm(algorithm),
            "issuer": x509.Name.build({"common_name": issuer.name}),
            "validity": {
                "not_before": x509.Time({"utc_time": settings.start}),
                "not_after": x509.Time({"utc_time": settings.end}),
            },
            "subject": x509.Name.build({"common_name": subject.name}),
            "subject_public_key_info": asn1_keys.PublicKeyInfo.load(spki(subject.key)),
        }
    )
    listed = _extensions(settings)
    if listed:
        body["extensions"] = listed
    encoded = body.dump()
    if settings.explicit_false:
        encoded = _with_explicit_false(body)
    signature = sign(issuer.key, encoded, _DIGESTS[settings.digest]())
    return value(
        0x30,
        encoded
        + algos.SignedDigestAlgorithm(algorithm).dump()
        + core.OctetBitString(settings.mangle(signature) if kind == "ecdsa" else signature).dump(),
    )


def value(tag: int, content: bytes) -> bytes:
    """A DER value."""
    length = len(content)
    if length < 0x80:
        return bytes([tag, length]) + content
    octets = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _with_explicit_false(body: x509.TbsCertificate) -> bytes:
    """The default of ``critical`` written out, which DER forbids and a Luna HSM does."""
    parts = [
        body[name].dump()
        for name in (
            "version",
            "serial_number",
            "signature",
            "issuer",
            "validity",
            "subject",
            "subject_public_key_info",
        )
    ]
    written = [
        value(
            0x30,
            each["extn_id"].dump()
            + core.Boolean(each["critical"].native).dump()
            + each["extn_value"].dump(),
        )
        for each in body["extensions"]
    ]
    return value(0x30, b"".join(parts) + value(0xA3, value(0x30, b"".join(written))))


def _extensions(settings: Settings) -> list[x509.Extension]:
    values: list[tuple[str, bool, bytes]] = []
    if settings.ca is not None:
        constraints: dict[str, Any] = {"ca": settings.ca}
        if settings.longest is not None:
            constraints["path_len_constraint"] = settings.longest
        values.append(("2.5.29.19", True, x509.BasicConstraints(constraints).dump()))
    if settings.usages is not None:
        values.append(("2.5.29.15", True, x509.KeyUsage(settings.usages).dump()))
    if settings.purposes is not None:
        values.append(("2.5.29.37", True, x509.ExtKeyUsageSyntax(settings.purposes).dump()))
    return [
        x509.Extension(
            {"extn_id": oid, "critical": critical, "extn_value": core.ParsableOctetString(value)}
        )
        for oid, critical, value in values + settings.extensions
    ]
