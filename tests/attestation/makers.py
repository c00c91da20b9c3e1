# SPDX-License-Identifier: Apache-2.0
"""Statements of every format with a root of our own, each part of which a test can change."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from d1_signer.attestation import Anchor, Statement, Verified, verify
from tests.attestation.pki import (
    NOW,
    Holder,
    PrivateKey,
    Settings,
    certificate,
    ec_key,
    pem,
    rsa_key,
    sign,
    spki,
    spki_sha256,
    value,
    without_sign_octets,
)

Changes = dict[str, Callable[[Settings], None]]
KEY = ec_key("the key that statements are about")
ROOT = Holder("root of the tests", ec_key("root"))
OWNER_ROOT = Holder("owner's root of the tests", ec_key("owner's root"))


@dataclass(frozen=True)
class Made:
    """A statement and what it is verified with."""

    statement: Statement
    anchors: tuple[Anchor, ...]
    asked: dict[str, Any] = field(default_factory=dict)
    certificates: dict[str, bytes] = field(default_factory=dict)

    def verify(self, **asked: Any) -> Verified:
        with_defaults = {"anchors": self.anchors, "at": NOW, **self.asked, **asked}
        return verify(self.statement, **with_defaults)


class Issuing:
    """Certificates by their roles, with the changes that a test makes to them."""

    def __init__(self, changes: Changes | None) -> None:
        self._changes = dict(changes or {})
        self.made: dict[str, bytes] = {}

    def __call__(self, role: str, settings: Settings) -> Holder:
        if role in self._changes:
            self._changes.pop(role)(settings)
        self.made[role] = certificate(settings)
        return settings.subject

    def all(self) -> tuple[bytes, ...]:
        assert not self._changes, "a role that this format has not"
        return tuple(map(pem, self.made.values()))


def trusted(root: Holder, **more: Any) -> Anchor:
    return Anchor(spki_sha256(root.key), name=root.name, hardware=True, spki=spki(root.key), **more)


# ── marvell ──────────────────────────────────────────────────────────────────────────────────────

_CARD, _PARTITION = "HSM:1.0-TEST, for FIPS mode", "HSM:1.0-TEST:PARTN:7, for FIPS mode"
_COMMON = {0x0001: b"\x02", 0x0002: b"\x01", 0x0003: b"app_key".ljust(128, b"\0")}
_OF_PUBLIC = {0x0000: b"\x02", 0x0103: b"\x00", 0x0162: b"\x01", 0x0163: b"\x01", 0x0164: b"\x00"}
_OF_PRIVATE = {
    0x0000: b"\x03",
    0x0103: b"\x01",
    0x0108: b"\x01",
    0x0162: b"\x00",
    0x0163: b"\x01",
    0x0164: b"\x01",
    0x0165: b"\x01",
    0x0210: b"\x00",
}


def marvell(
    changes: Changes | None = None,
    *,
    key: PrivateKey = KEY,
    private: dict[int, bytes | None] | None = None,
    public: dict[int, bytes | None] | None = None,
    again: dict[int, bytes] | None = None,
    change: Callable[[bytes], bytes] = bytes,
    packed: bool = True,
) -> Made:
    issue = Issuing(changes)
    partition_key = rsa_key("partition")
    card = issue("card", Settings(Holder(_CARD, ec_key("card")), ROOT, version="v1"))
    partition = Holder(_PARTITION, partition_key)
    issue("partition", Settings(partition, card))
    issue(
        "owned",
        Settings(partition, OWNER_ROOT, ca=False, usages={"digital_signature", "key_encipherment"}),
    )
    numbers = _marvell_key(key)
    objects = [
        _marvell_object(1, {**_COMMON, **_OF_PUBLIC, **numbers}, public),
        _marvell_object(2, {**_COMMON, **_OF_PRIVATE, **numbers}, private, again),
    ]
    info = struct.pack(">HHHH", 1, 3, 8, 8 + len(objects[0])) + b"".join(objects)
    total = 32 + len(info) + 256
    signed = change(struct.pack(">IIII4I", 0, 3, total, len(info), 0, 1, 0, 2) + info)
    content = signed + sign(partition_key, signed)
    return Made(
        Statement(
            format="marvell",
            content=gzip.compress(content) if packed else content,
            certificates=(b"".join(issue.all()),),
        ),
        (trusted(ROOT, owner=False), trusted(OWNER_ROOT, owner=True)),
        certificates=issue.made,
    )


def _marvell_key(key: PrivateKey) -> dict[int, bytes]:
    digest = {0x1003: hashlib.sha256(spki(key)).digest()}
    if isinstance(key, rsa.RSAPrivateKey):
        numbers = key.public_key().public_numbers()
        size = key.key_size
        return {
            0x0100: b"\x00",
            0x0120: numbers.n.to_bytes(size // 8, "big"),
            0x0121: size.to_bytes(4, "big"),
            0x0122: b"\x01\x00\x01",
            **digest,
        }
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return {0x0100: b"\x03", 0x0120: point, 0x0121: (415).to_bytes(4, "big"), **digest}


def _marvell_object(
    handle: int,
    attributes: dict[int, bytes],
    changed: dict[int, bytes | None] | None,
    again: dict[int, bytes] | None = None,
) -> bytes:
    merged = {**attributes, **(changed or {})}
    listed = [(number, value) for number, value in merged.items() if value is not None]
    listed += (again or {}).items()
    content = b"".join(struct.pack(">II", number, len(each)) + each for number, each in listed)
    return struct.pack(">III", handle, len(listed), len(content)) + content


# ── luna-pkc ─────────────────────────────────────────────────────────────────────────────────────

LUNA = "1.3.6.1.4.1.12383"


def luna(
    changes: Changes | None = None, *, key: PrivateKey = KEY, serial: int = 521174, more: int = 0
) -> Made:
    issue = Issuing(changes)
    number = [(f"{LUNA}.2.1", False, serial.to_bytes(4, "little"))]
    above: dict[str, Any] = {
        "null_parameters": True,
        "explicit_false": True,
        "mangle": without_sign_octets,
    }
    authority: dict[str, Any] = {"ca": True, "usages": {"key_cert_sign", "crl_sign"}, **above}
    integrity = Settings(
        Holder("integrity", ec_key("integrity")), ROOT, purposes=[f"{LUNA}.1.7"], **authority
    )
    origin = Settings(
        Holder("origin", ec_key("origin")),
        issue("integrity", integrity),
        purposes=[f"{LUNA}.1.8"],
        **authority,
    )
    device = Settings(
        Holder(f"Luna K7-{serial}", ec_key("luna device")),
        issue("origin", origin),
        purposes=[f"{LUNA}.1.12"],
        extensions=number,
        **authority,
    )
    by = issue("device", device)
    for role in ["key", *(f"key{each}" for each in range(more))]:
        issue(
            role,
            Settings(
                Holder(f"41{role}", key),
                by,
                purposes=[f"{LUNA}.1.13"],
                usages={"digital_signature"},
                extensions=number,
                **above,
            ),
        )
    issue.all()
    return Made(
        Statement(format="luna-pkc", content=package(list(issue.made.values()))),
        (trusted(ROOT),),
        certificates=issue.made,
    )


def package(certificates: list[bytes]) -> bytes:
    """A PKCS #7 package of certificates, whatever they are."""
    signed_data, data = (value(0x06, bytes.fromhex(f"2a864886f70d0107{n}")) for n in ("02", "01"))
    listed = value(0xA0, b"".join(certificates))
    body = b"\x02\x01\x01\x31\x00" + value(0x30, data) + listed + b"\x31\x00"
    return value(0x30, signed_data + value(0xA0, value(0x30, body)))


# ── yubihsm and yubikey-piv ──────────────────────────────────────────────────────────────────────

HSM, PIV = "1.3.6.1.4.1.41482.4", "1.3.6.1.4.1.41482.3"


def yubihsm(
    changes: Changes | None = None,
    *,
    origin: int = 0x01,
    capabilities: int = 0x80,
    label: bytes = b"d1",
    serial: int = 1234,
    without: str = "",
) -> Made:
    issue = Issuing(changes)
    firmware = (f"{HSM}.1", False, b"\x04\x03\x02\x04\x01")
    stated = [
        firmware,
        (f"{HSM}.2", False, b"\x02\x02" + serial.to_bytes(2, "big")),
        (f"{HSM}.3", False, b"\x03\x02\x00" + bytes([origin])),
        (f"{HSM}.4", False, b"\x03\x03\x00\x00\x01"),
        (f"{HSM}.5", False, b"\x03\x09\x00" + capabilities.to_bytes(8, "big")),
        (f"{HSM}.6", False, b"\x02\x01\x05"),
        (f"{HSM}.9", False, bytes([0x0C, len(label)]) + label),
    ]
    authority: dict[str, Any] = {"ca": True, "usages": {"key_cert_sign", "crl_sign"}}
    below = issue(
        "sub-ca", Settings(Holder("sub-ca", ec_key("sub-ca")), ROOT, longest=1, **authority)
    )
    number = (f"{HSM}.2", False, b"\x02\x02\x04\xd2")
    device = Settings(
        Holder("YubiHSM Attestation (1234)", ec_key("yubihsm")),
        below,
        ca=True,
        longest=0,
        extensions=[firmware, number],
    )
    by = issue("device", device)
    kept = [each for each in stated if each[0] != without]
    issue("key", Settings(Holder("YubiHSM Attestation id:0x0005", KEY), by, extensions=kept))
    return _by_certificates("yubihsm", issue)


def yubikey_piv(
    changes: Changes | None = None, *, old: bool = False, policies: bytes = b"\x02\x01"
) -> Made:
    issue = Issuing(changes)
    firmware = (f"{PIV}.3", False, b"\x04\x03\x07" if old else b"\x05\x04\x03")
    device = Settings(
        Holder("Yubico PIV Attestation", ec_key("yubikey")), ROOT, extensions=[firmware]
    )
    if not old:
        device.ca, device.longest = True, 0
    by = issue("device", device)
    stated = [
        firmware,
        (f"{PIV}.7", False, b"\x02\x02\x04\xd2"),
        (f"{PIV}.8", False, policies),
    ]
    issue("key", Settings(Holder("YubiKey PIV Attestation 9a", KEY), by, extensions=stated))
    return _by_certificates("yubikey-piv", issue)


def _by_certificates(name: str, issue: Issuing) -> Made:
    *above, content = issue.all()
    return Made(
        Statement(format=name, content=content, certificates=tuple(above)),
        (trusted(ROOT),),
        certificates=issue.made,
    )


# ── securosys ────────────────────────────────────────────────────────────────────────────────────

_XML = """<?xml version="1.0" encoding="UTF-8"?>
<private_key creation="{creation}"><label>d1</label>
<create_time>2026-01-01T00:00:00Z</create_time><attest_time>2026-01-02T00:00:00Z</attest_time>
<key_use_count>3</key_use_count><algorithm>EC</algorithm><key_size>256</key_size>
<public_key>{public_key}</public_key><attributes>{attributes}</attributes></private_key>"""
_ATTRIBUTES = {
    "sign": True,
    "sensitive": True,
    "always_sensitive": True,
    "extractable": False,
    "never_extractable": True,
    "modifiable": False,
    "copyable": False,
}


def securosys(
    changes: Changes | None = None,
    *,
    creation: str = "generated",
    attributes: dict[str, bool] | None = None,
    change: Callable[[str], str] = str,
    members: dict[str, object] | None = None,
) -> Made:
    issue = Issuing(changes)
    device = Settings(
        Holder("PRIMUS HSM KEY (SN: 18)", ec_key("primus")),
        ROOT,
        ca=True,
        longest=0,
        usages={"key_cert_sign", "crl_sign"},
    )
    by = issue("device", device)
    signer = Settings(
        Holder("attestation-key", ec_key("attestation-key")),
        by,
        ca=False,
        usages={"digital_signature"},
    )
    key = issue("signer", signer).key
    listed = {**_ATTRIBUTES, **(attributes or {})}
    xml = change(
        _XML.format(
            creation=creation,
            public_key=base64.b64encode(spki(KEY)).decode(),
            attributes="".join(f"<{k}>{str(v).lower()}</{k}>" for k, v in listed.items()),
        )
    ).encode()
    document = {
        "hsmVendor": "SECUROSYS",
        "attestationData": base64.b64encode(xml).decode(),
        "attestationSignature": base64.b64encode(sign(key, xml)).decode(),
        "attestationCertChain": [each.decode() for each in issue.all()],
        **(members or {}),
    }
    return Made(
        Statement(format="securosys", content=json.dumps(document).encode()),
        (trusted(ROOT),),
        certificates=issue.made,
    )


# ── tpm2 ─────────────────────────────────────────────────────────────────────────────────────────

NONCE = b"the auditor's nonce"
_AK = 0x00050072  # fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, restricted, sign
_KEY = 0x00040072
CREATION = bytes.fromhex("00000000002000") + b"\x00" * 31 + b"creation data"


def tpm2(
    changes: Changes | None = None,
    *,
    creation: bool = True,
    attributes: int = _KEY,
    ak_attributes: int = _AK,
    magic: int = 0xFF544347,
    safe: int = 1,
    key: PrivateKey = KEY,
    ak: PrivateKey | None = None,
    hashed: bytes = CREATION,
    parts: dict[str, bytes] | None = None,
    plain: bool = False,
    certified: bool = True,
) -> Made:
    issue = Issuing(changes)
    ak = ak or ec_key("ak")
    if certified:
        authority = Settings(Holder("ca", ec_key("ca")), ROOT, ca=True, usages={"key_cert_sign"})
        issue(
            "ak",
            Settings(
                Holder("ak", ak),
                issue("ca", authority),
                usages={"digital_signature"},
                purposes=["2.23.133.8.3"],
            ),
        )
    public, ak_public = tpm_public(key, attributes), tpm_public(ak, ak_attributes, scheme=True)
    attest = struct.pack(">IH", magic, 0x801A if creation else 0x8017)
    attest += tpm2b(b"\x00\x0b" + b"q" * 32) + tpm2b(NONCE)
    attest += struct.pack(">QIIBQ", 5000, 2, 1, safe, 0x1122)
    attest += tpm2b(b"\x00\x0b" + hashlib.sha256(public).digest())
    attest += tpm2b(hashlib.sha256(hashed).digest() if creation else b"\x00\x0b" + b"n" * 32)
    made = {
        "attest": attest,
        "signature": sign(ak, attest) if plain else _tpm_signature(ak, attest),
        "public": tpm2b(public),
        "ak_public": tpm2b(ak_public),
        **({"creation_data": tpm2b(CREATION)} if creation else {}),
        **(parts or {}),
    }
    return Made(
        Statement(format="tpm2", content=b"", certificates=issue.all(), parts=made),
        (trusted(ROOT),) if certified else (trusted(Holder("ak", ak)),),
        {"nonce": NONCE},
        certificates=issue.made,
    )


def tpm2b(data: bytes) -> bytes:
    return len(data).to_bytes(2, "big") + data


def tpm_public(key: PrivateKey, attributes: int, *, scheme: bool = False) -> bytes:
    """TPMT_PUBLIC, with or without a scheme of its own."""
    if isinstance(key, rsa.RSAPrivateKey):
        n = key.public_key().public_numbers().n.to_bytes(key.key_size // 8, "big")
        own = struct.pack(">HH", 0x14, 0x0B) if scheme else struct.pack(">H", 0x10)
        rest = struct.pack(">HI", key.key_size, 0) + tpm2b(n)
        return struct.pack(">HHIHH", 1, 0x0B, attributes, 0, 0x10) + own + rest
    numbers = key.public_key().public_numbers()
    own = struct.pack(">HH", 0x18, 0x0B) if scheme else struct.pack(">H", 0x10)
    rest = struct.pack(">HH", 3, 0x10)
    rest += b"".join(tpm2b(each.to_bytes(32, "big")) for each in (numbers.x, numbers.y))
    return struct.pack(">HHIHH", 0x23, 0x0B, attributes, 0, 0x10) + own + rest


def _tpm_signature(key: PrivateKey, data: bytes) -> bytes:
    signature = sign(key, data)
    if isinstance(key, rsa.RSAPrivateKey):
        return struct.pack(">HH", 0x14, 0x0B) + tpm2b(signature)
    raw = without_sign_octets(signature)[2:]
    r, s = raw[2:34], raw[36:68]
    return struct.pack(">HH", 0x18, 0x0B) + tpm2b(r) + tpm2b(s)


MAKERS: dict[str, Callable[..., Made]] = {
    "marvell": marvell,
    "luna-pkc": luna,
    "yubihsm": yubihsm,
    "yubikey-piv": yubikey_piv,
    "securosys": securosys,
    "tpm2": tpm2,
}
