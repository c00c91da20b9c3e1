# SPDX-License-Identifier: Apache-2.0
"""``marvell``: key attestations of Marvell LiquidSecurity HSMs, as Google Cloud HSM gives them.

The layout is that of Marvell's page "Software Key Attestation" (firmware 3.x): a response header,
attributes of the public and of the private object, and a signature of the partition's key over all
before it. Two chains certify that key: the manufacturer's (root, card, partition) and that of the
partition's owner. Whoever holds a card could make a partition, whoever owns one could certify any
key: only both together show a partition of the owner's on a card of Marvell's.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import struct

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256

from d1_signer.attestation import chains, keys
from d1_signer.attestation.certificates import V1, Certificate, read_certificates
from d1_signer.attestation.chains import Chain, Rules, chain_of
from d1_signer.attestation.refusals import plain, refused
from d1_signer.attestation.statement import Asked, FactValue, Statement, Verified
from d1_signer.errors import AttestationError

_LONGEST = 65_536
_MOST_PARTITIONS = 8  # two are due: the manufacturer's and the owner's
_GZIP = b"\x1f\x8b"
_CARD = re.compile(r"HSM:([\w.-]+)(, for FIPS mode)?")
_PARTITION = re.compile(r"HSM:([\w.-]+):PARTN:(\d+)(, for FIPS mode)?")

_CLASS, _KEY_TYPE, _SENSITIVE, _LOCAL = 0x0000, 0x0100, 0x0103, 0x0163
_EXTRACTABLE, _NEVER_EXTRACTABLE, _ALWAYS_SENSITIVE = 0x0162, 0x0164, 0x0165
_SIGN, _WRAP_WITH_TRUSTED = 0x0108, 0x0210
# For EC keys the point and OpenSSL's number of the curve, for RSA modulus and length in bits.
_VALUE, _SIZE, _PUBLIC_EXPONENT = 0x0120, 0x0121, 0x0122
_SPKI_SHA256 = 0x1003
_PUBLIC, _PRIVATE = 2, 3
_RSA, _EC = 0, 3
_CURVES = {415: "secp256r1", 715: "secp384r1", 716: "secp521r1"}
_FLAGS = {
    "CKA_EXTRACTABLE": _EXTRACTABLE,
    "CKA_NEVER_EXTRACTABLE": _NEVER_EXTRACTABLE,
    "CKA_SENSITIVE": _SENSITIVE,
    "CKA_ALWAYS_SENSITIVE": _ALWAYS_SENSITIVE,
    "CKA_LOCAL": _LOCAL,
    "CKA_SIGN": _SIGN,
    "CKA_WRAP_WITH_TRUSTED": _WRAP_WITH_TRUSTED,
}
_LIMITS = (
    "It does not say when it was made, and carries no nonce: an old one looks the same.",
    "FIPS mode is what the certificates of card and partition say, not a look at the device now.",
    "It does not say who may use the key.",
)

Attributes = dict[int, bytes]


def verify_marvell(statement: Statement, asked: Asked) -> Verified:
    """Verify an attestation of a key pair by the key of its partition.

    Raises:
        AttestationError: Not both chains certify one partition key, its signature does not fit, or
            what is signed is not about a private key.
    """
    signed, partition, made, owned = _signed_by_both(statement, asked)
    public, private = _key_pair(signed)
    spki = _key(public, private)
    facts: dict[str, FactValue] = {
        name: _flag(private, number) for name, number in _FLAGS.items() if number in private
    }
    facts["partition"] = int(partition[2])
    facts["owner anchor"] = owned.anchor.spki_sha256
    extractable = _flag(private, _EXTRACTABLE) or not _flag(private, _SENSITIVE)
    never = _flag(private, _NEVER_EXTRACTABLE) and _flag(private, _ALWAYS_SENSITIVE)
    local = _flag(private, _LOCAL)
    fips = all(each.common_name.endswith(", for FIPS mode") for each in made.certificates)
    return Verified(
        spki=spki,
        device=f"Marvell LiquidSecurity HSM {plain(partition[1])}, partition {partition[2]}",
        exportable=extractable,
        never_exportable=never and local and not extractable,
        generated_in_place=local,
        hardware=made.anchor.hardware,
        fips_mode=True if fips else None,
        stated_at=None,
        anchor=made.anchor.spki_sha256,
        facts=facts,
        limits=_LIMITS,
        certificates=made.encodings + owned.encodings,
    )


def _signed_by_both(
    statement: Statement, asked: Asked
) -> tuple[bytes, re.Match[str], Chain, Chain]:
    """What is signed, the partition's name, and the two chains."""
    pool = read_certificates(statement.certificates)
    made, owned = _chains(pool, asked)
    if made.anchor == owned.anchor:
        raise refused("one anchor stands for both, the manufacturer and the owner of the partition")
    partition = _PARTITION.fullmatch(made.certificates[0].common_name)
    if partition is None:
        raise refused("the signing certificate is not a partition's")
    for chain in (made, owned):
        chains.may_sign(chain.certificates[0])
    key = keys.load(made.certificates[0].spki)
    content = _unpacked(statement.content)
    length = key.key_size // 8
    signed, signature = content[:-length], content[-length:]
    if not keys.verify_plain(key, signature, signed, SHA256()):
        raise refused("its signature is not by the partition's key")
    return signed, partition, made, owned


def _unpacked(content: bytes) -> bytes:
    """The attestation, out of the gzip that Google wraps it in, which must end with the file."""
    if content.startswith(_GZIP):
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise refused(f"the attestation is longer than {_LONGEST} bytes")
    return content


def _chains(pool: tuple[Certificate, ...], asked: Asked) -> tuple[Chain, Chain]:
    """The manufacturer's and the owner's chain of one partition key."""
    partitions = [each for each in pool if _PARTITION.fullmatch(each.common_name)]
    if not 0 < len(partitions) <= _MOST_PARTITIONS:
        raise refused(f"{len(partitions)} certificates of partitions come with it")
    made = _found(partitions, pool, asked, owner=False)
    owned = _found(partitions, pool, asked, owner=True)
    for one in made:
        for other in owned:
            if one.certificates[0].spki == other.certificates[0].spki:
                return one, other
    raise refused("manufacturer and owner certify different partition keys")


def _found(
    partitions: list[Certificate],
    pool: tuple[Certificate, ...],
    asked: Asked,
    *,
    owner: bool,
) -> list[Chain]:
    """Chains of the manufacturer, of partition and card, or of the owner, who signs itself."""
    anchors = tuple(each for each in asked.anchors if each.owner in {owner, None})
    length = 1 if owner else 2
    rules = Rules(may_issue=_card, longest=length)
    found: list[Chain] = []
    reasons: list[AttestationError] = []
    for partition in partitions:
        try:
            chain = chain_of(partition, pool, anchors=anchors, at=asked.at, rules=rules)
        except AttestationError as reason:
            reasons.append(reason)
        else:
            if len(chain.certificates) == length:
                found.append(chain)
            else:
                reasons.append(refused("no card stands above its partition"))
    if not found:
        raise chains.most_telling(reasons)
    return found


def _card(path: tuple[Certificate, ...]) -> None:
    """A card's certificate has no extensions, being of version 1; its name says what it is."""
    partition, card = _PARTITION.fullmatch(path[0].common_name), path[-1]
    named = _CARD.fullmatch(card.common_name)
    if partition is None or named is None or named[1] != partition[1]:
        raise refused(f"{card.name} is not that of the card of {path[0].name}")
    if card.version != V1 or card.extensions:
        chains.authority(path)


def _key_pair(signed: bytes) -> tuple[Attributes, Attributes]:
    """Attributes of the public and of the private object, each once, with nothing between them."""
    _, _, total, size = struct.unpack_from(">IIII", signed)
    first = len(signed) - size
    if not 16 < first <= 32 or total <= len(signed):  # noqa: PLR2004 (header; two handles behind it)
        raise refused("its lengths contradict each other")
    info = signed[first:]
    _, _, public_at, private_at = struct.unpack_from(">HHHH", info)
    if not private_at:
        raise refused("it is about a symmetric key")
    public, end = _object(info, public_at)
    private, last = _object(info, private_at)
    if (public_at, end, last) != (8, private_at, len(info)):
        raise refused("its objects are not one behind the other")
    if (_number(public, _CLASS), _number(private, _CLASS)) != (_PUBLIC, _PRIVATE):
        raise refused("it does not describe a public and a private key")
    return public, private


def _object(info: bytes, at: int) -> tuple[Attributes, int]:
    """Attributes of an object, and where it ends."""
    _, count, size = struct.unpack_from(">III", info, at)
    at += 12
    end = at + size
    attributes: Attributes = {}
    for _ in range(count):
        number, length = struct.unpack_from(">II", info, at)
        at += 8 + length
        if at > end or number in attributes:
            raise refused("an object's attributes are cut or repeated")
        attributes[number] = info[at - length : at]
    if at != end or end > len(info):
        raise refused("an object's attributes are cut")
    return attributes, end


def _number(attributes: Attributes, number: int) -> int:
    value = attributes.get(number)
    if not value:
        raise refused(f"the attribute {number:#06x} is missing")
    return int.from_bytes(value, "big")


def _flag(attributes: Attributes, number: int) -> bool:
    value = attributes.get(number)
    if value not in {b"\x00", b"\x01"}:
        raise refused(f"the attribute {number:#06x} is not yes or no")
    return value == b"\x01"


def _key(public: Attributes, private: Attributes) -> bytes:
    """The public key that the private object names, held against all that is said of it."""
    if any(public.get(each) != private.get(each) for each in (_KEY_TYPE, _VALUE, _SIZE)):
        raise refused("its public and its private object are of different keys")
    kind, size = _number(private, _KEY_TYPE), _number(private, _SIZE)
    key: keys.AnyKey
    if kind == _EC and size in _CURVES:
        curve = keys.CURVES[_CURVES[size]]
        key = ec.EllipticCurvePublicKey.from_encoded_point(curve, private[_VALUE])
    elif kind == _RSA:
        key = keys.rsa_key(_number(private, _VALUE), _number(private, _PUBLIC_EXPONENT))
    else:
        raise refused("its key is neither RSA nor on P-256, P-384 or P-521")
    spki = keys.encoded(key)
    if private.get(_SPKI_SHA256) != hashlib.sha256(spki).digest():
        raise refused("its key is not the one that its digest names")
    return spki
